"""Kills, signals, full disks, rivals, broken numbers and hostile files: nothing is lost and nothing is let in."""

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import command, tree
from test_scripts import NAMES, same, table, weights

from codebase import checkpoint, data, train
from codebase.models.vae import VAE

KILLS = int(os.environ.get("KILLS", "8"))  # KILLS=200 is the long form of the test


def start(model: str, folder: Path, digits_dir: Path, *flags, **kwargs) -> subprocess.Popen:
    words = [*command(model), "--data", "digits", "--data_dir", str(digits_dir), *map(str, flags)]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


LENGTHS = {"vae": 600, "gmvae": 500, "ssvae": 160, "fsvae": 200}


@pytest.mark.parametrize("model", ["vae"] if KILLS < 50 else list(LENGTHS))
def test_killed_at_random_moments_a_run_ends_as_if_it_had_never_been(model, tmp_path, digits_dir):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    steps = LENGTHS[model]
    flags = ("--iter_max", steps, "--iter_save", max(10, steps // 25))
    assert start(model, whole, digits_dir, *flags).wait() == 0
    chance = random.Random(model)
    for _ in range(KILLS if KILLS < 50 else KILLS // len(LENGTHS)):
        process = start(model, killed, digits_dir, *flags)
        wait_for(killed / "logs" / NAMES[model] / ".owner", process)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
        for path in (killed / "checkpoints" / NAMES[model]).glob("*.pt"):
            torch.load(path, weights_only=True)  # whatever is there is whole
    last = start(model, killed, digits_dir, *flags)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    for step in checkpoint_steps(whole, model):
        assert same(weights(whole, NAMES[model], step), weights(killed, NAMES[model], step))
    one, two = (torch.load(folder / "checkpoints" / NAMES[model] / "state.pt") for folder in (whole, killed))
    assert all(same(moments, two["optimizer"][key]) for key, moments in one["optimizer"].items())
    assert table(whole, NAMES[model]) == table(killed, NAMES[model])
    assert not list(killed.rglob(".*.tmp"))


def checkpoint_steps(folder: Path, model: str) -> list[int]:
    return [int(path.stem[6:]) for path in (folder / "checkpoints" / NAMES[model]).glob("model-*.pt")]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(number, code, tmp_path, digits_dir):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000, "--iter_save", 50)
    wait_for(tmp_path / "checkpoints" / NAMES["vae"] / "state.pt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "goes on from there" in errors.splitlines()[-1]
    stopped = int(errors.split("stopped at step ")[1].split(",")[0])
    assert torch.load(tmp_path / "checkpoints" / NAMES["vae"] / "state.pt")["step"] == stopped


def test_a_second_process_on_the_same_run_is_refused_with_the_firsts_process_id(tmp_path, digits_dir, script):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000)
    wait_for(tmp_path / "logs" / NAMES["vae"] / ".owner", process)
    time.sleep(0.2)
    result = script("vae", "--iter_max", 100_000)
    assert result.returncode == 2 and f"process {process.pid}" in result.stderr
    process.kill()
    process.communicate()
    assert script("vae", "--iter_max", 5, "--overwrite", 1).returncode == 0  # the dead hold nothing


def test_a_full_disk_is_a_clear_error_and_leaves_checkpoints_loadable(tmp_path, digits_dir, script):
    assert script("vae", "--iter_max", 20).returncode == 0
    before = tree(tmp_path / "checkpoints")

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start("vae", tmp_path, digits_dir, "--iter_max", 40, preexec_fn=small_files_only)
    _, errors = process.communicate()
    assert process.returncode == 1 and len(errors.strip().splitlines()) == 1 and "File too large" in errors
    assert tree(tmp_path / "checkpoints") == before and not list(tmp_path.rglob("*.tmp"))
    assert script("vae", "--iter_max", 40).returncode == 0


def test_a_folder_that_vanishes_during_a_run_is_made_again_or_is_a_clear_error(tmp_path, digits_dir):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000, "--iter_save", 50)
    wait_for(tmp_path / "checkpoints" / NAMES["vae"] / "state.pt", process)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors and "checkpoints" in errors.splitlines()[-1]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_left_over(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    checkpoint.write(path, "old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, "new")
    assert tree(tmp_path) == {"figures.json": b"old"}


def test_left_overs_of_a_kill_are_cleaned_up_at_the_next_start(tmp_path, script):
    left_over = tmp_path / "checkpoints" / NAMES["vae"] / ".state.pt.123.tmp"
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(b"half a file")
    assert script("vae", "--iter_max", 5).returncode == 0
    assert not left_over.exists()


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(tmp_path, script, monkeypatch):
    assert script("vae", "--iter_max", 100).returncode == 0
    before = tree(tmp_path / "checkpoints")
    binarize = data.binarize
    calls = iter(range(10**9))
    monkeypatch.setattr(data, "binarize", lambda pixels: binarize(pixels) * (float("nan") if next(calls) == 50 else 1))
    result = script("vae", "--iter_max", 300)
    assert result.returncode == 1 and "rec not finite at step 200" in result.stderr.splitlines()[-1]
    assert tree(tmp_path / "checkpoints") == before


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def spoil(change):
    """A harm to a checkpoint: change(its dictionary) is stored in its place."""

    def harm(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(change(content), path)

    return harm


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


HARMS = {
    "code in a pickle": (lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)), "code in it is not run"),
    "code in a zip": (spoil(lambda content: content | {"enc.net.0.bias": Malicious()}), "code in it is not run"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
    "cut to a third": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "text": (lambda path: path.write_text("hello"), "no checkpoint"),
    "a flipped byte": (flip, "damaged"),
    "a list": (spoil(lambda content: list(content.values())), "no dictionary"),
    "another model": (spoil(lambda content: {"w": torch.ones(2)}), "of another model"),
    "a missing key": (spoil(lambda content: without(content, "dec.net.2.bias")), "no dec.net.2.bias"),
    "a surplus key": (spoil(lambda content: content | {"extra": torch.ones(1)}), "extra"),
    "another shape": (spoil(lambda content: content | {"enc.net.0.bias": torch.ones(299)}), "(300,), found (299,)"),
    "no tensor": (spoil(lambda content: content | {"enc.net.0.bias": 3}), "enc.net.0.bias"),
    "a NaN": (spoil(lambda content: content | {"enc.net.0.bias": torch.full((300,), float("nan"))}), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_or_hostile_checkpoint_is_refused_and_the_model_unchanged(harm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apply, words = HARMS[harm]
    apply(checkpoint.save_model_by_name(VAE(name="run"), 10))
    before, model = tree(tmp_path), VAE(name="run")
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(checkpoint.Refused) as caught:
        checkpoint.load_model_by_name(model, 10)
    assert words in str(caught.value) and "model-00010.pt" in str(caught.value)
    assert same(model.state_dict(), untouched) and tree(tmp_path) == before
    assert not Path("code-was-run").exists()


def test_a_hostile_state_is_refused_by_the_scripts_in_one_line(tmp_path, script):
    assert script("vae", "--iter_max", 10).returncode == 0
    state = tmp_path / "checkpoints" / NAMES["vae"] / "state.pt"
    torch.save({"step": 10, "settings": Malicious()}, state)
    result = script("vae", "--iter_max", 20)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and "state.pt" in result.stderr
    assert not (tmp_path / "code-was-run").exists()


def test_ssvae_with_a_batch_of_ten_thousand_fits_in_two_gigabytes(tmp_path, digits_dir):
    words = ["--iter_max", 3, "--batch_size", 10_000]
    process = start("ssvae", tmp_path, digits_dir, *words)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < 2_000_000  # kilobytes


def vae_step(pixels: torch.Tensor) -> train.Step:
    """A step of a VAE that the seed 0 fixes."""
    torch.manual_seed(0)
    model = VAE()
    return train.Step(model, lambda i: ((data.binarize(pixels[i]),), ()), train.adam(model, "cpu"), torch.zeros(4))


def test_recording_a_step_leaves_weights_moments_terms_and_random_state_untouched():
    """The logic around a CUDA graph, with a stand-in that calls the step: the replayed steps equal the plain ones."""

    pixels = torch.randint(0, 256, (1000, 784), dtype=torch.uint8)
    plain, recorded = vae_step(pixels), vae_step(pixels)
    replayed = train.Replayed(recorded, torch.zeros(100, dtype=torch.int64), lambda step, index: lambda: step(index))
    batches = [torch.randperm(1000)[:100] for _ in range(5)]
    torch.manual_seed(1)
    for index in batches:
        plain(index)
    torch.manual_seed(1)
    for index in batches:
        replayed(index)
    assert same(plain.model.state_dict(), recorded.model.state_dict()) and torch.equal(plain.terms, recorded.terms)


def test_the_pieces_of_a_large_batch_make_the_gradient_and_the_terms_of_the_whole(monkeypatch):
    pixels, found = torch.randint(0, 256, (240, 784), dtype=torch.uint8), []
    for piece in (1000, 80):
        monkeypatch.setattr(train, "PIECE", piece)
        step = vae_step(pixels)
        terms = step.gradients(torch.arange(240))
        found.append([terms, *(parameter.grad for parameter in step.model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_step_straight_to_the_kernel_is_the_step_of_torch():
    torch.manual_seed(0)
    ours, theirs, x = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3), torch.randn(7, 5)
    theirs.load_state_dict(ours.state_dict())
    first, second = train.adam(ours, "cpu"), train.adam(theirs, "cpu")
    for _ in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        train.adam_step(first)
        second.step()
    assert same(ours.state_dict(), theirs.state_dict())
    assert same(first.state[ours.weight], second.state[theirs.weight])


@pytest.mark.parametrize("change", [{"model": {"w": torch.ones(2)}}, {"settings": None}])
def test_a_state_of_something_else_is_refused(change, tmp_path, script):
    assert script("vae", "--iter_max", 10).returncode == 0
    path = tmp_path / "checkpoints" / NAMES["vae"] / "state.pt"
    changed = torch.load(path) | change
    torch.save({key: value for key, value in changed.items() if value is not None}, path)
    result = script("vae", "--iter_max", 20)
    assert result.returncode == 2 and "state.pt" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_four_replicates_at_once_give_the_figures_of_one_after_another(tmp_path, digits_dir, script):
    """Separate folders, one thread each: neighbours on the machine change nothing but the time."""
    environment, flags = {**os.environ, "OMP_NUM_THREADS": "1"}, ("--iter_max", 50)
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir(), apart.mkdir()
    started = [start("vae", together, digits_dir, *flags, "--run", run, env=environment) for run in range(4)]
    at_once = [process.communicate()[0].splitlines()[-1] for process in started]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_by_one = [script("vae", *flags, "--run", run, cwd=apart).stdout.splitlines()[-1] for run in range(4)]
    torch.set_num_threads(threads)
    assert at_once == one_by_one and len(set(at_once)) == 4

"""Kills, signals, full disks, rivals, broken numbers and hostile files: nothing is lost and nothing is let in."""

import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import NAMES, ROOT, Largest, checkpoint_steps, command, needs_compiler, same, start, table, tree, wait_for
from matplotlib import image
from matplotlib.figure import Figure

from codebase import checkpoint, data, evaluate, train
from codebase.models import nns
from codebase.models.vae import VAE
from codebase.runtime import files, report
from codebase.runtime.processes import Processes

LENGTHS = {"vae": 600, "gmvae": 500, "ssvae": 160, "fsvae": 200}


def state_file(folder: Path, model: str = "vae") -> Path:
    return folder / "checkpoints" / NAMES[model] / "state.pt"


def content(folder: Path) -> dict:
    """Every file of the runs in a folder, read; without the seconds, which no two runs share."""
    found = {}
    for name, raw in tree(folder).items():
        path = folder / name
        if path.name == "metrics.csv":
            raw = table(folder, path.parent.name)
        elif path.suffix == ".pt":
            raw = torch.load(path, weights_only=True)
            if path.name == "state.pt":
                raw["table"] |= {"seconds": 0, "rows": [row[:-1] for row in raw["table"]["rows"]]}
        found[name] = raw
    return found


def differences(a, b, name: str = "") -> list[str]:
    """The names of what differs in two nested dictionaries of tensors and plain values; bits count."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(a.get(key), b.get(key), f"{name}/{key}") for key in sorted({*a, *b}, key=str)]
        return [found for pair in pairs for found in differences(*pair)]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if equal else [name]


class Killed(BaseException):
    """What stands for SIGKILL inside the tests' own process."""


@pytest.fixture
def renames(monkeypatch):
    """Every file is put in place by os.replace. renames(k, fault) has the k-th fail from now on; it returns a list that
    the names of all files put in place are added to. Killed is a death: the dead rename and delete nothing more."""
    replace, unlink = os.replace, os.unlink

    def fail(k: int | None = None, fault: BaseException | None = None) -> list[str]:
        names, dead = [], []

        def failing(source, target, **kwargs):
            names.append(Path(target).name)
            if dead or len(names) == k:
                dead.extend([fault] if isinstance(fault, Killed) else [])
                raise fault
            replace(source, target, **kwargs)

        monkeypatch.setattr(os, "replace", failing)
        monkeypatch.setattr(os, "unlink", lambda *args, **kwargs: None if dead else unlink(*args, **kwargs))
        return names

    return fail


@pytest.fixture
def small(monkeypatch, script, tmp_path):
    """small(folder, *flags): a quick training that saves, closes rows and writes its table at different steps."""
    pixels = torch.randint(0, 256, (120, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "load", lambda run, split: data.Images(pixels, torch.arange(120) % 10))
    for name in ("Encoder", "Decoder"):  # narrow ones
        kind = getattr(nns, name)
        monkeypatch.setattr(nns, name, lambda *args, kind=kind, **sizes: kind(*args, **sizes | {"hidden": 8}))
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "WRITE_EVERY", 0)
    # a picture's bits are kept, and compared, without the time that its compression takes
    monkeypatch.setattr(image, "imsave", lambda file, pixels, **_: file.write(sha256(pixels.tobytes()).digest()))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"curves"))

    def run(folder: str, *flags):
        (tmp_path / folder).mkdir(exist_ok=True)
        flags = ("--iter_max", 6, "--iter_save", 3, "--batch_size", 10, *flags)
        return script("fsvae", *flags, cwd=tmp_path / folder)

    return run


DISK_FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("faults", [(DISK_FULL, Killed()), (Killed(), DISK_FULL)], ids=["disk full", "killed"])
def test_whatever_file_a_run_fails_at_the_same_command_ends_as_if_nothing_had_been(faults, small, renames, tmp_path):
    names = renames()
    assert small("whole").returncode == 0
    wanted = content(tmp_path / "whole")
    assert {"metrics.csv", "test.csv", "samples-0000003.png", "model-00003.pt", "results.json"} <= set(names)
    assert "state.pt" in names
    for k, name in enumerate(names, start=1):
        folder = f"{k}, {name}"
        for attempt, fault in enumerate(faults):  # the second fails later, or at nothing
            renames(k, fault)
            failed = small(folder)
            between_saves = names[k - 1 : k + 1] == ["metrics.csv", "metrics.csv"]
            if between_saves and not attempt and fault is DISK_FULL:
                assert failed.returncode == 0 and "warning: metrics.csv" in failed.stdout, folder
                break  # the table of the next save has all of it
            assert failed.returncode == 1 or attempt, folder
            if fault is DISK_FULL and failed.returncode:
                assert failed.stderr.count("\n") == 1 and "No space left" in failed.stderr
                assert not list((tmp_path / folder).rglob("*.tmp")), folder
            for path in (tmp_path / folder).rglob("*.pt"):
                torch.load(path, weights_only=True)  # whatever is there is whole
        renames()
        last = small(folder)
        assert last.returncode == 0, f"{folder}: {last.stderr}"
        assert not differences(content(tmp_path / folder), wanted), folder


def test_a_summary_that_cannot_be_stored_is_a_clear_error_and_can_be_had_again(small, renames, tmp_path):
    names = renames()
    assert small("whole", "--runs", 2).returncode == 0
    renames(len(names), DISK_FULL)
    failed = small("failed", "--runs", 2)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "No space left" in failed.stderr
    renames()
    assert small("failed", "--runs", 2).returncode == 0
    assert not differences(content(tmp_path / "failed"), content(tmp_path / "whole"))


def test_the_state_is_written_last_of_every_save(small, renames):
    names = renames()
    assert small("run").returncode == 0
    names = [name for name in names if name not in (".owner", "config.json")]
    first, *saves = "\n".join(names).split("state.pt")
    assert first.split() == ["metrics.csv"]  # a start has its state too
    for step, save in zip((3, 6), saves, strict=False):
        assert {"metrics.csv", "test.csv", f"samples-{step:07d}.png", f"model-{step:05d}.pt"} <= set(save.split())
    assert not {"metrics.csv", "test.csv", "model-00006.pt"} & set(saves[2].split())


@pytest.mark.parametrize("stop", [3, 6])
def test_killed_between_a_checkpoint_and_its_state_a_run_can_be_finished_and_extended(stop, small, renames, tmp_path):
    names = renames()
    assert small("whole", "--iter_max", 9).returncode == 0
    at = names.index("state.pt", names.index(f"model-{stop:05d}.pt"))
    renames(at + 1, Killed())
    assert small("killed", "--iter_max", stop).returncode == 1
    assert (tmp_path / "killed/checkpoints" / NAMES["fsvae"] / f"model-{stop:05d}.pt").exists()
    renames()
    extended = small("killed", "--iter_max", 9)
    assert extended.returncode == 0, extended.stderr
    assert not differences(content(tmp_path / "killed"), content(tmp_path / "whole"))


def test_a_table_that_is_gone_or_behind_is_completed_from_the_state(small, tmp_path):
    assert small("whole", "--iter_max", 9).returncode == 0
    assert small("parts").returncode == 0
    metrics = tmp_path / "parts/logs" / NAMES["fsvae"] / "metrics.csv"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert small("parts", "--iter_max", 8).returncode == 0
    metrics.unlink()
    assert small("parts", "--iter_max", 9).returncode == 0
    assert [row["step"] for row in table(tmp_path / "parts", NAMES["fsvae"])] == ["4", "8", "9"]
    assert table(tmp_path / "parts", NAMES["fsvae"]) == table(tmp_path / "whole", NAMES["fsvae"])


def kill_and_finish(model: str, folder: Path, digits_dir: Path, kills: int, seconds: float, *flags) -> None:
    """Kill a run so often, each time within so many seconds of its start; finished, it is as one never killed."""
    whole, killed = folder / f"{model}-whole", folder / f"{model}-killed"
    whole.mkdir(), killed.mkdir()
    assert start(model, whole, digits_dir, *flags).wait() == 0
    chance = random.Random(model)
    for _ in range(kills):
        process = start(model, killed, digits_dir, *flags)
        wait_for(killed / "logs" / NAMES[model] / ".owner", process)
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.communicate()
        for path in (killed / "checkpoints" / NAMES[model]).glob("*.pt"):
            torch.load(path, weights_only=True)  # whatever is there is whole
        (killed / "logs" / NAMES[model] / ".owner").unlink(missing_ok=True)  # so that the next one is waited for
    last = start(model, killed, digits_dir, *flags)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert checkpoint_steps(whole, model) == checkpoint_steps(killed, model)
    assert not differences(content(killed), content(whole)) and not list(killed.rglob(".*.tmp"))


def test_killed_at_random_moments_a_run_ends_as_if_it_had_never_been(tmp_path, digits_dir, long):
    for model in LENGTHS if long else ["vae"]:
        steps = LENGTHS[model] if long else 200
        flags = ("--iter_max", steps, "--iter_save", max(10, steps // 25))
        kill_and_finish(model, tmp_path, digits_dir, 50 if long else 3, 2, *flags)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("model", NAMES)
def test_killed_at_random_moments_a_compiled_run_ends_as_if_it_had_never_been(model, tmp_path, digits_dir):
    kill_and_finish(model, tmp_path, digits_dir, 5, 10, "--iter_max", 200, "--iter_save", 20, "--compile", 1)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(number, code, tmp_path, digits_dir):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000, "--iter_save", 50)
    wait_for(state_file(tmp_path), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "resumes from there" in errors.splitlines()[-1]
    stopped = int(errors.split("stopped at step ")[1].split(",")[0])
    assert torch.load(state_file(tmp_path))["step"] == stopped


@pytest.mark.parametrize("flag", [["--overwrite", "1"], ["--overwrite=1"]])
def test_a_stopped_overwrite_names_what_resumes(flag, script, monkeypatch, tmp_path):
    """The same command would start over."""
    assert script("vae", "--iter_max", 4).returncode == 0
    step, steps = torch.optim.Adam.step, iter(range(1, 100))

    def stopping(*args, **kwargs):
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stopping)
        stopped = script("vae", "--iter_max", 6, *flag, "--iter_save", 5)
    assert stopped.returncode == 130
    line = stopped.stderr.splitlines()[-1]
    assert "stopped at step 3, state saved; to resume: python run_vae.py " in line
    interpreter, _, *words = shlex.split(line.split("to resume: ")[1])
    assert interpreter == "python" and "--overwrite" not in line
    assert words[-4:] == ["--iter_max", "6", "--iter_save", "5"]
    resumed = script("vae", *words)
    assert resumed.returncode == 0 and "going on from step 3" in resumed.stdout
    assert checkpoint_steps(tmp_path, "vae") == [5, 6]


def test_the_first_of_two_signals_names_the_exit_code(script, monkeypatch):
    step, save = torch.optim.Adam.step, checkpoint.save_state

    def interrupted(number, call):
        return lambda *args, **kwargs: (signal.raise_signal(number), call(*args, **kwargs))[1]

    def stopping(*args, **kwargs):
        monkeypatch.setattr(checkpoint, "save_state", interrupted(signal.SIGTERM, save))
        return interrupted(signal.SIGINT, step)(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", stopping)
    assert script("vae", "--iter_max", 9).returncode == 130


LATE = {  # what is called after the last step's signals were looked at
    "the last step": (train.Training, "add"),
    "the last save": (checkpoint, "save_state"),
    "the end of training": (report.tqdm, "close"),
    "evaluation": (evaluate, "bounds"),
}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", LATE)
def test_a_late_signal_is_not_swallowed_and_ends_a_series(moment, number, code, script, tmp_path, monkeypatch):
    owner, name = LATE[moment]
    called, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == {"add": 3, "save_state": 2}.get(name, 1):  # a start is saved too
            signal.raise_signal(number)
        return called(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    result = script("vae", "--iter_max", 3, "--runs", 2)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [NAMES["vae"]]
    assert torch.load(state_file(tmp_path))["step"] == 3 and checkpoint_steps(tmp_path, "vae") == [3]
    assert moment == "evaluation" or result.stderr.splitlines()[-1].count("stopped at step 3") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_loaded_shows_no_traceback(number, code, tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import signal, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        f"        if name == 'torch': signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_vae\n"
        "sys.exit(run_vae.main(['--data', 'digits', '--iter_max', '1']))\n"
    )
    words = [sys.executable, "interrupted.py"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr


def test_a_second_process_on_the_same_run_is_refused_with_the_firsts_process_id(tmp_path, digits_dir, script):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000)
    wait_for(tmp_path / "logs" / NAMES["vae"] / ".owner", process)
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
    wait_for(state_file(tmp_path), process)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors and "checkpoints" in errors.splitlines()[-1]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_left_over(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    files.write(path, "old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write(path, "new")
    assert tree(tmp_path) == {"figures.json": b"old"}


def test_left_overs_of_a_kill_are_cleaned_up_at_the_next_start(tmp_path, script):
    left_overs = [folder / NAMES["vae"] / ".half.123.tmp" for folder in (tmp_path / "checkpoints", tmp_path / "logs")]
    for left_over in left_overs:
        left_over.parent.mkdir(parents=True)
        left_over.write_bytes(b"half a file")
    assert script("vae", "--iter_max", 5).returncode == 0
    assert not any(left_over.exists() for left_over in left_overs)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(tmp_path, script, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 20)
    assert script("vae", "--iter_max", 20).returncode == 0
    before = content(tmp_path / "checkpoints")
    binarize = data.binarize
    calls = iter(range(10**9))
    monkeypatch.setattr(data, "binarize", lambda pixels: binarize(pixels) * (float("nan") if next(calls) == 10 else 1))
    result = script("vae", "--iter_max", 60)
    assert result.returncode == 1 and "rec not finite at step 40" in result.stderr.splitlines()[-1]
    assert not differences(content(tmp_path / "checkpoints"), before)


def test_a_test_figure_that_is_not_finite_stops_training_too(tmp_path, script, monkeypatch):
    assert script("vae", "--iter_max", 20).returncode == 0
    before = content(tmp_path / "checkpoints")
    monkeypatch.setattr(evaluate, "bounds", lambda *_, **__: {"nelbo": float("inf"), "kl": 1.0, "rec": float("nan")})
    result = script("vae", "--iter_max", 40)
    line = "nelbo and rec of test images not finite at step 40: training stopped, the last checkpoint is kept"
    assert result.returncode == 1 and result.stderr.splitlines()[-1].endswith(line)
    assert not differences(content(tmp_path / "checkpoints"), before)


def test_figures_that_are_not_finite_are_an_error(script, tmp_path, monkeypatch):
    """Of weights that are finite, but wild: they are neither printed nor stored."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = VAE(name=NAMES["vae"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    checkpoint.save_model_by_name(model, 20)
    before = tree(tmp_path)
    result = script("vae", "--iter_max", 20, "--train", 0)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "nelbo" in line and "not finite" in line
    assert "NELBO" not in result.stdout and tree(tmp_path) == before


def test_an_fsvae_of_training_images_alone_is_checked_too(small, tmp_path, monkeypatch):
    """A training is not watched on them."""
    found = {"nelbo": float("nan"), "kl": 1.0, "rec": float("inf")}
    assert small("run").returncode == 0
    (tmp_path / "run/logs" / NAMES["fsvae"] / "results.json").unlink()
    monkeypatch.setattr(evaluate, "conditional_bound", lambda *_: found)
    result = small("run")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "nelbo and rec not finite" in line
    assert not (tmp_path / "run/logs" / NAMES["fsvae"] / "results.json").exists()


def test_figures_stored_as_nan_are_replaced(script, tmp_path):
    """Earlier revisions stored them, in files that are no JSON."""
    assert script("vae", "--iter_max", 5).returncode == 0
    path = tmp_path / "logs" / NAMES["vae"] / "results.json"
    stored = json.loads(path.read_text())
    stored["figures"] |= {"niwae_7": float("nan")}
    path.write_text(json.dumps(stored))
    result = script("vae", "--iter_max", 5, "--train", 0, "--iw", 1)
    assert result.returncode == 0, result.stderr
    assert "NaN" not in path.read_text() and "niwae_1" in path.read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_json_lacks_is_written(value, tmp_path):
    files.write(tmp_path / "a.json", {"a": 1.0})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        files.write(tmp_path / "a.json", {"a": value})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_a_model_that_knows_nothing_is_warned_of(model, script, monkeypatch):
    figures = {"nelbo": 543.5, "kl": 0.5, "rec": 543.0}
    monkeypatch.setattr(evaluate, "bounds", lambda *_, **__: dict(figures))
    said = script(model, "--iter_max", 2).stdout
    (warning,) = (line for line in said.splitlines() if line.startswith("warning:"))
    assert "543.5" in warning and "784 log 2" in warning
    assert said.splitlines()[-1].startswith("NELBO: 543.5")
    figures["nelbo"] = 543.3
    assert "warning:" not in script(model, "--iter_max", 2).stdout


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
    with pytest.raises(files.UsageError) as caught:
        checkpoint.load_model_by_name(model, 10)
    assert words in str(caught.value) and "model-00010.pt" in str(caught.value)
    assert same(model.state_dict(), untouched) and tree(tmp_path) == before
    assert not Path("code-was-run").exists()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"settings": Malicious()}, "code in it is not run"),
        ({"model": {"w": torch.ones(2)}}, "of another model"),
        ({"settings": None}, "settings"),
        ({"optimizer": None}, "optimizer"),
        ({"format": None}, "revision"),  # what revisions before the first format stored
        ({"format": checkpoint.FORMAT - 1}, "revision"),
        ({"format": checkpoint.FORMAT + 1}, "revision"),
    ],
    ids=["code", "another model", "no settings", "no optimizer", "no format", "an older format", "a newer format"],
)
def test_a_state_of_something_else_is_refused_in_one_line(change, word, tmp_path, script):
    assert script("vae", "--iter_max", 10).returncode == 0
    path = state_file(tmp_path)
    changed = torch.load(path) | change
    torch.save({key: value for key, value in changed.items() if value is not None}, path)
    before = tree(tmp_path / "checkpoints")
    result = script("vae", "--iter_max", 20)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "state.pt" in result.stderr and word in result.stderr
    assert tree(tmp_path / "checkpoints") == before and not (tmp_path / "code-was-run").exists()


def test_beside_a_state_of_another_revision_weights_load_and_training_can_start_over(tmp_path, script):
    assert script("vae", "--iter_max", 10).returncode == 0
    path = state_file(tmp_path)
    torch.save(without(torch.load(path), "format"), path)
    assert script("vae", "--iter_max", 10, "--train", 0, "--iw", 1).returncode == 0
    assert script("vae", "--iter_max", 20, "--overwrite", 1).returncode == 0
    assert checkpoint_steps(tmp_path, "vae") == [20]


@pytest.mark.long
def test_ssvae_with_a_batch_of_ten_thousand_fits_in_two_gigabytes(tmp_path, digits_dir, long):
    flags = ("--data", "digits", "--data_dir", digits_dir, "--iter_max", 3 if long else 1, "--batch_size", 10_000)
    # started from a small process: a child's peak counts the one that started it
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    words = [sys.executable, "-c", code, *command("ssvae", *flags)]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2_000_000  # kilobytes


@pytest.mark.parametrize("count, train_iw", [(240, 1), (250, 1), (100, 5), (30, 40)])
def test_the_pieces_of_a_large_batch_make_the_gradient_and_the_terms_of_the_whole(count, train_iw, monkeypatch):
    """A batch of many images, or of many samples of each: of eighty at most, or of one image."""
    found, sizes = [], []
    pixels = torch.randint(0, 256, (count, 784), dtype=torch.uint8)
    noise = torch.randn(train_iw, count, 10, dtype=torch.float64)

    def batch(index):
        return (data.binarize(pixels[index]).double(),), ()

    for piece in (10_000, 80):
        monkeypatch.setattr(train, "PIECE", piece)
        left = noise.clone()

        def draw(like):
            nonlocal left
            rows = like.shape[-2]
            drawn, left = left[:, :rows], left[:, rows:]
            sizes.append(like.numel() // 10)
            return drawn.reshape(like.shape)

        monkeypatch.setattr(torch, "randn_like", draw)
        torch.manual_seed(0)
        model = VAE(train_iw=train_iw).double()
        _, terms = train.backward(model, batch, torch.arange(count), Processes())
        found.append([terms, *(parameter.grad for parameter in model.parameters())])
        assert not left.numel()
    assert sizes[0] == count * train_iw == sum(sizes[1:]) and max(sizes[1:]) <= 80
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_large_number_of_samples_needs_no_more_memory_than_a_small_one():
    sizes = []
    for train_iw in (10, 100):
        model, pixels = VAE(train_iw=train_iw), torch.zeros(100, 784, dtype=torch.uint8)
        with Largest() as largest:
            train.backward(
                model, lambda i, pixels=pixels: ((data.binarize(pixels[i]),), ()), torch.arange(100), Processes()
            )
        sizes.append(largest.bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.long
def test_four_replicates_at_once_give_the_figures_of_one_after_another(tmp_path, digits_dir, script):
    """Separate folders, one thread each: neighbours on the machine change nothing but the time."""
    environment, flags = {**os.environ, "OMP_NUM_THREADS": "1"}, ("--iter_max", 20)
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir(), apart.mkdir()
    started = [start("vae", together, digits_dir, *flags, "--run", run, env=environment) for run in range(4)]
    at_once = [process.communicate()[0].splitlines()[-1] for process in started]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_by_one = [script("vae", *flags, "--run", run, cwd=apart).stdout.splitlines()[-1] for run in range(4)]
    torch.set_num_threads(threads)
    assert at_once == one_by_one and len(set(at_once)) == 4

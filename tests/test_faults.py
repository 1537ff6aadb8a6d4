"""Kills, signals, full disks, rivals, numbers that are not finite, hostile files.

Nothing is lost and nothing is let in.
"""

import csv
import errno
import json
import os
import pickle
import random
import re
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
from conftest import (
    NAMES,
    ROOT,
    checkpoint_steps,
    needs_compiler,
    same,
    start,
    table,
    tree,
    wait_for,
)
from matplotlib.figure import Figure
from PIL import Image

from codebase import checkpoint, data, evaluate, train
from codebase.models import nns
from codebase.models.vae import VAE
from codebase.runtime import files, log

LENGTHS = {"vae": 600, "gmvae": 500, "ssvae": 160, "fsvae": 200}
DISK_FULL = OSError(28, "No space left on device")


def state_file(folder: Path, model: str = "vae") -> Path:
    return folder / "checkpoints" / NAMES[model] / "state.pt"


def lock_file(folder: Path, model: str = "vae") -> Path:
    return folder / "logs" / NAMES[model] / ".lock"


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
            raw["metrics"]["seconds"] = 0
            raw["metrics"]["rows"] = [row[:-1] for row in raw["metrics"]["rows"]]
        found[name] = raw
    return found


def differences(a, b, name: str = "") -> list[str]:
    """The names of what differs in two nested dictionaries of tensors and plain values, by bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted({*a, *b}, key=str):
            found += differences(a.get(key), b.get(key), f"{name}/{key}")
        return found
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        equal = torch.equal(a, b)
    else:
        equal = a == b
    return [] if equal else [name]


def last_line(result) -> str:
    return result.stderr.splitlines()[-1]


class Killed(BaseException):
    """What stands for SIGKILL inside the tests' own process."""


@pytest.fixture
def renames(monkeypatch):
    """Every file is put in place by os.replace: renames(k, fault) has the k-th fail from now on.

    It returns a list that the names of all files put in place are added to. Killed is a death:
    the dead rename and delete nothing more.
    """
    replace = os.replace
    unlink = os.unlink

    def fail(k: int | None = None, fault: BaseException | None = None) -> list[str]:
        names = []
        dead = []

        def failing_replace(source, target, **kwargs):
            names.append(Path(target).name)
            if dead or len(names) == k:
                if isinstance(fault, Killed):
                    dead.append(fault)
                raise fault
            replace(source, target, **kwargs)

        def failing_unlink(*args, **kwargs):
            if not dead:
                unlink(*args, **kwargs)

        monkeypatch.setattr(os, "replace", failing_replace)
        monkeypatch.setattr(os, "unlink", failing_unlink)
        return names

    return fail


@pytest.fixture
def small(monkeypatch, script, tmp_path):
    """small(folder, *flags): a quick training that saves, closes rows and writes at other steps."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (120, 3072), dtype=torch.uint8, generator=generator)
    images = data.Images(pixels, torch.arange(120) % 10)
    monkeypatch.setattr(data, "load", lambda run, split: images)
    for name in ["Encoder", "Decoder"]:
        wide = getattr(nns, name)

        def narrow(*args, wide=wide, **sizes):
            return wide(*args, **{**sizes, "hidden": 8})

        monkeypatch.setattr(nns, name, narrow)
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "WRITE_EVERY", 0)

    # A picture's bits are kept, and compared, without the time that its compression takes.
    def save_image(image, file, **_):
        file.write(sha256(image.tobytes()).digest())

    monkeypatch.setattr(Image.Image, "save", save_image)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"curves"))

    def run(folder: str, *flags):
        (tmp_path / folder).mkdir(exist_ok=True)
        flags = ["--iter_max", 6, "--iter_save", 3, "--batch_size", 10, *flags]
        return script("fsvae", *flags, cwd=tmp_path / folder)

    return run


# ---------------------------------------------------------------------------------------------
# A write that fails, a process that is killed


ORDERS = {"disk full": [DISK_FULL, Killed()], "killed": [Killed(), DISK_FULL]}


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_that_fails_at_any_file(order, small, renames, tmp_path):
    """The same command ends as if nothing had been."""
    names = renames()
    assert small("whole").returncode == 0
    wanted = content(tmp_path / "whole")
    assert {"metrics.csv", "test.csv", "samples-0000003.png", "model-00003.pt"} <= set(names)
    assert {"results.json", "config.json", "state.pt"} <= set(names)
    for k, name in enumerate(names, start=1):
        folder = f"{k}, {name}"
        at_a_save = names[k].startswith(("test.csv", "model-", "state.pt")) if names[k:] else False
        between_saves = name == "metrics.csv" and not at_a_save
        for attempt, fault in enumerate(ORDERS[order]):  # the second fails later, or at nothing
            renames(k, fault)
            failed = small(folder)
            if between_saves and attempt == 0 and fault is DISK_FULL:
                assert failed.returncode == 0, folder
                assert "warning: metrics.csv" in failed.stdout, folder
                break  # the table of the next save has all of it
            assert failed.returncode == 1 or attempt, folder
            if fault is DISK_FULL and failed.returncode:
                assert failed.stderr.count("\n") == 1
                assert "No space left" in failed.stderr
                assert not list((tmp_path / folder).rglob("*.tmp")), folder
            for path in (tmp_path / folder).rglob("*.pt"):
                torch.load(path, weights_only=True)  # whatever is there is whole
        renames()
        last = small(folder)
        assert last.returncode == 0, f"{folder}: {last.stderr}"
        assert not differences(content(tmp_path / folder), wanted), folder


def test_a_summary_that_cannot_be_stored(small, renames, tmp_path):
    """And the same command makes it then."""
    names = renames()
    assert small("whole", "--runs", 2).returncode == 0
    renames(len(names), DISK_FULL)
    failed = small("failed", "--runs", 2)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "No space left" in failed.stderr
    renames()
    assert small("failed", "--runs", 2).returncode == 0
    assert not differences(content(tmp_path / "failed"), content(tmp_path / "whole"))


def test_the_state_is_written_last_of_every_save(small, renames):
    names = renames()
    assert small("run").returncode == 0
    names = [name for name in names if name != "config.json"]
    first, *saves = "\n".join(names).split("state.pt")
    assert first.split() == ["metrics.csv"]  # a start has its state too
    for step, save in zip([3, 6], saves, strict=False):
        wanted = {"metrics.csv", "test.csv", f"samples-{step:07d}.png", f"model-{step:05d}.pt"}
        assert wanted <= set(save.split())
    assert not {"metrics.csv", "test.csv", "model-00006.pt"} & set(saves[2].split())


@pytest.mark.parametrize("stop", [3, 6])
def test_killed_between_checkpoint_and_state_a_run_resumes(stop, small, renames, tmp_path):
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


def test_a_table_that_is_gone_is_completed(small, tmp_path):
    """From the state; one that is behind too."""
    name = NAMES["fsvae"]
    assert small("whole", "--iter_max", 9).returncode == 0
    assert small("parts").returncode == 0
    metrics = tmp_path / "parts/logs" / name / "metrics.csv"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert small("parts", "--iter_max", 8).returncode == 0
    metrics.unlink()
    assert small("parts", "--iter_max", 9).returncode == 0
    assert [row["step"] for row in table(tmp_path / "parts", name)] == ["4", "8", "9"]
    assert table(tmp_path / "parts", name) == table(tmp_path / "whole", name)


def kill_and_finish(model: str, folder: Path, digits_dir: Path, kills: int, seconds: float, *flags):
    """Kill a run so often, each time within so many seconds of its start, and finish it.

    It is then as one that was never killed.
    """
    whole = folder / f"{model}-whole"
    killed = folder / f"{model}-killed"
    whole.mkdir()
    killed.mkdir()
    first = start(model, whole, digits_dir, *flags)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    chance = random.Random(model)
    for _ in range(kills):
        process = start(model, killed, digits_dir, *flags)
        wait_for(lock_file(killed, model), process)
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.communicate()
        for path in (killed / "checkpoints" / NAMES[model]).glob("*.pt"):
            torch.load(path, weights_only=True)  # whatever is there is whole
        lock_file(killed, model).unlink(missing_ok=True)  # so that the next one is waited for
    last = start(model, killed, digits_dir, *flags)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert checkpoint_steps(whole, model) == checkpoint_steps(killed, model)
    assert not differences(content(killed), content(whole))
    assert not list(killed.rglob(".*.tmp"))


def test_killed_at_random_moments_a_run_resumes(tmp_path, digits_dir, long):
    for model in LENGTHS if long else ["vae"]:
        steps = LENGTHS[model] if long else 200
        kills = 50 if long else 3
        flags = ["--iter_max", steps, "--iter_save", max(10, steps // 25)]
        kill_and_finish(model, tmp_path, digits_dir, kills, 2, *flags)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("model", NAMES)
def test_killed_at_random_moments_a_compiled_run_resumes(model, tmp_path, digits_dir):
    flags = ["--iter_max", 200, "--iter_save", 20, "--compile", 1]
    kill_and_finish(model, tmp_path, digits_dir, 5, 10, *flags)


def test_a_full_disk_leaves_checkpoints_as_they_were(tmp_path, digits_dir, script):
    assert script("vae", "--iter_max", 20).returncode == 0
    before = tree(tmp_path / "checkpoints")

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start("vae", tmp_path, digits_dir, "--iter_max", 40, preexec_fn=small_files_only)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert "File too large" in errors
    assert tree(tmp_path / "checkpoints") == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert script("vae", "--iter_max", 40).returncode == 0


def test_a_folder_that_vanishes_during_a_run(tmp_path, digits_dir):
    """It is made again, or the error is clear."""
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000, "--iter_save", 50)
    wait_for(state_file(tmp_path), process)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "checkpoints" in errors.splitlines()[-1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """And nothing half-written beside it."""

    def fail(file):
        raise DISK_FULL

    path = tmp_path / "figures.json"
    files.write(path, b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write(path, b"new")
    assert tree(tmp_path) == {"figures.json": b"old"}


def test_left_overs_of_a_kill_are_removed(tmp_path, script):
    left_overs = []
    for folder in ["checkpoints", "logs"]:
        left_over = tmp_path / folder / NAMES["vae"] / ".half.123.tmp"
        left_over.parent.mkdir(parents=True)
        left_over.write_bytes(b"half a file")
        left_overs.append(left_over)
    assert script("vae", "--iter_max", 5).returncode == 0
    assert not any(left_over.exists() for left_over in left_overs)


# ---------------------------------------------------------------------------------------------
# Signals


ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize("number, code", ENDINGS)
def test_a_signal_saves_the_state(number, code, tmp_path, digits_dir):
    """And the run says how to resume it."""
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000, "--iter_save", 50)
    wait_for(state_file(tmp_path), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "resumes from there" in errors.splitlines()[-1]
    stopped = int(errors.split("stopped at step ")[1].split(",")[0])
    assert torch.load(state_file(tmp_path))["step"] == stopped


@pytest.mark.parametrize("flag", [["--overwrite", "1"], ["--overwrite=1"]])
def test_a_stopped_overwrite_names_what_resumes(flag, script, monkeypatch, tmp_path):
    """The same command would start over."""
    assert script("vae", "--iter_max", 4).returncode == 0
    step = torch.optim.Adam.step
    calls = []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stopping)
        stopped = script("vae", "--iter_max", 6, *flag, "--iter_save", 5)
    assert stopped.returncode == 130
    line = last_line(stopped)
    assert "stopped at step 3, state saved; to resume: python run_vae.py " in line
    interpreter, _, *words = shlex.split(line.split("to resume: ")[1])
    assert interpreter == "python"
    assert "--overwrite" not in line
    assert words[-4:] == ["--iter_max", "6", "--iter_save", "5"]
    resumed = script("vae", *words)
    assert resumed.returncode == 0
    assert "resuming from step 3" in resumed.stdout
    assert checkpoint_steps(tmp_path, "vae") == [5, 6]


def test_the_first_of_two_signals_names_the_code(script, monkeypatch):
    step = torch.optim.Adam.step
    save = checkpoint.save_state

    def interrupted(number, call):
        def interrupted_call(*args, **kwargs):
            signal.raise_signal(number)
            return call(*args, **kwargs)

        return interrupted_call

    def stopping(*args, **kwargs):
        monkeypatch.setattr(checkpoint, "save_state", interrupted(signal.SIGTERM, save))
        return interrupted(signal.SIGINT, step)(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", stopping)
    assert script("vae", "--iter_max", 9).returncode == 130


LATE = {  # what is called late in a training of three steps, and which call of it is the late one
    "the last step": (train.Metrics, "add", 3),
    "the last save": (checkpoint, "save_state", 2),  # a start is saved too
    "the end of training": (log.tqdm, "close", 2),  # the test images of a checkpoint have a bar
    "evaluation": (evaluate, "bounds", 2),
}


@pytest.mark.parametrize("number, code", ENDINGS)
@pytest.mark.parametrize("moment", LATE)
def test_a_late_signal_ends_a_series(moment, number, code, script, tmp_path, monkeypatch):
    """It is not swallowed."""
    owner, name, count = LATE[moment]
    called = getattr(owner, name)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            signal.raise_signal(number)
        return called(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    result = script("vae", "--iter_max", 3, "--runs", 2)
    assert result.returncode == code
    assert "Traceback" not in result.stderr, result.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [NAMES["vae"]]
    assert torch.load(state_file(tmp_path))["step"] == 3
    assert checkpoint_steps(tmp_path, "vae") == [3]
    assert last_line(result).count("stopped at step 3") == (moment != "evaluation")


@pytest.mark.parametrize("number, code", ENDINGS)
def test_a_signal_while_torch_loads_shows_no_traceback(number, code, tmp_path):
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
    assert result.returncode == code
    assert "Traceback" not in result.stderr, result.stderr


# ---------------------------------------------------------------------------------------------
# Rivals


def test_a_second_process_on_a_run_is_refused(tmp_path, digits_dir, script):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000)
    wait_for(state_file(tmp_path), process)
    before = tree(tmp_path / "checkpoints").keys()
    result = script("vae", "--iter_max", 100_000)
    assert result.returncode == 2
    assert "is in use by another process" in result.stderr
    assert tree(tmp_path / "checkpoints").keys() == before
    process.kill()
    process.communicate()
    # The dead hold nothing.
    assert script("vae", "--iter_max", 5, "--overwrite", 1).returncode == 0


@pytest.mark.long
def test_four_runs_at_once_give_their_own_metrics(tmp_path, digits_dir, script):
    """In one folder, a thread each: neighbours on the machine change nothing but the time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--iter_max", 20]
    together = tmp_path / "together"
    apart = tmp_path / "apart"
    together.mkdir()
    apart.mkdir()
    started = []
    for run in range(4):
        started.append(start("vae", together, digits_dir, *flags, "--run", run, env=environment))
    at_once = [process.communicate()[0].splitlines()[-1] for process in started]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_by_one = []
    for run in range(4):
        one_by_one.append(script("vae", *flags, "--run", run, cwd=apart).stdout.splitlines()[-1])
    torch.set_num_threads(threads)
    assert at_once == one_by_one
    assert len(set(at_once)) == 4


# ---------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_training(tmp_path, script, monkeypatch):
    """The last good checkpoint is kept."""
    monkeypatch.setattr(train, "LOG_EVERY", 20)
    assert script("vae", "--iter_max", 20).returncode == 0
    before = content(tmp_path / "checkpoints")
    binarize = data.binarize
    calls = []

    def broken(pixels):
        calls.append(pixels)
        return binarize(pixels) * (float("nan") if len(calls) == 11 else 1)

    monkeypatch.setattr(data, "binarize", broken)
    result = script("vae", "--iter_max", 60)
    assert result.returncode == 1
    assert "rec not finite at step 40" in last_line(result)
    assert not differences(content(tmp_path / "checkpoints"), before)


def test_a_broken_test_metric_stops_training(tmp_path, script, monkeypatch):
    assert script("vae", "--iter_max", 20).returncode == 0
    before = content(tmp_path / "checkpoints")
    found = {"nelbo": float("inf"), "kl": 1.0, "rec": float("nan")}
    monkeypatch.setattr(evaluate, "bounds", lambda *_, **__: found)
    result = script("vae", "--iter_max", 40)
    line = "nelbo and rec of test images not finite at step 40: "
    line += "training stopped, the last checkpoint is kept"
    assert result.returncode == 1
    assert last_line(result).endswith(line)
    assert not differences(content(tmp_path / "checkpoints"), before)


def test_metrics_that_are_not_finite_are_an_error(script, tmp_path, monkeypatch):
    """Of weights that are finite, but wild: they are neither printed nor stored."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = VAE(name=NAMES["vae"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    checkpoint.save_model_by_name(model, 20)
    before = tree(tmp_path)
    result = script("vae", "--iter_max", 20, "--train", 0, "--iw", 1)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert "nelbo" in line and "not finite" in line
    assert "NELBO" not in result.stdout
    assert tree(tmp_path) == before


def test_an_fsvae_of_training_images_is_checked_too(small, tmp_path, monkeypatch):
    """A training is not watched on them."""
    results = tmp_path / "run/logs" / NAMES["fsvae"] / "results.json"
    found = {"nelbo": float("nan"), "kl": 1.0, "rec": float("inf")}
    assert small("run").returncode == 0
    results.unlink()
    monkeypatch.setattr(evaluate, "conditional_bound", lambda *_, **__: found)
    result = small("run")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert "nelbo and rec not finite" in line
    assert not results.exists()


def test_metrics_stored_as_nan_are_replaced(script, tmp_path):
    """Earlier revisions stored them, in files that are no JSON."""
    assert script("vae", "--iter_max", 5).returncode == 0
    path = tmp_path / "logs" / NAMES["vae"] / "results.json"
    stored = json.loads(path.read_text())
    stored["figures"]["niwae_7"] = float("nan")
    path.write_text(json.dumps(stored))
    result = script("vae", "--iter_max", 5, "--train", 0, "--iw", 1)
    assert result.returncode == 0, result.stderr
    assert "NaN" not in path.read_text()
    assert "niwae_1" in path.read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_json_lacks_is_written(value, tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1.0})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": value})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_a_model_that_knows_nothing_is_warned_of(model, script, monkeypatch):
    """Its NELBO is above 784 log 2 = 543.4."""
    metrics = {"nelbo": 543.5, "kl": 0.5, "rec": 543.0}
    monkeypatch.setattr(evaluate, "bounds", lambda *_, **__: dict(metrics))
    said = script(model, "--iter_max", 2).stdout.splitlines()
    (warning,) = (line for line in said if line.startswith("warning:"))
    assert "543" in warning and "worse than guessing" in warning
    assert said[-1].startswith("NELBO: 543.5")
    metrics["nelbo"] = 543.3
    assert "warning:" not in script(model, "--iter_max", 2).stdout


# ---------------------------------------------------------------------------------------------
# Damaged and hostile files


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def spoil(change):
    """A harm to a checkpoint: change(its dictionary) is stored in its place."""

    def harm(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(change(content), path)

    return harm


def with_bias(value):
    """The harm that this stands in the place of the first bias."""
    return spoil(lambda content: {**content, "enc.net.0.bias": value})


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


def cut(part: float):
    """The harm that only this part of the file is there."""

    def harm(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])

    return harm


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def pickle_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(), 2))


HARMS = {
    "code in a pickle": (pickle_code, "code in it is not run"),
    "code in a zip": (with_bias(Malicious()), "code in it is not run"),
    "truncated": (cut(0.999), "truncated"),
    "cut to a third": (cut(0.333), "truncated"),
    "empty": (cut(0), "truncated"),
    "text": (lambda path: path.write_text("hello"), "no checkpoint"),
    "a flipped byte": (flip, "damaged"),
    "a list": (spoil(lambda content: list(content.values())), "no dictionary"),
    "another model": (spoil(lambda content: {"w": torch.ones(2)}), "of another model"),
    "a missing key": (spoil(lambda content: without(content, "dec.net.2.bias")), "dec.net.2.bias"),
    "a surplus key": (spoil(lambda content: {**content, "extra": torch.ones(1)}), "has extra"),
    "another shape": (with_bias(torch.ones(299)), "shape (300,), and is of (299,)"),
    "no tensor": (with_bias(3), "enc.net.0.bias"),
    "a NaN": (with_bias(torch.full((300,), float("nan"))), "not finite"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_or_hostile_checkpoint_is_refused(harm, tmp_path, monkeypatch):
    """The model is unchanged then."""
    monkeypatch.chdir(tmp_path)
    apply, words = HARMS[harm]
    apply(checkpoint.save_model_by_name(VAE(name="run"), 10))
    before = tree(tmp_path)
    model = VAE(name="run")
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(files.UsageError) as caught:
        checkpoint.load_model_by_name(model, 10)
    assert words in str(caught.value)
    assert "model-00010.pt" in str(caught.value)
    assert same(model.state_dict(), untouched)
    assert tree(tmp_path) == before
    assert not Path("code-was-run").exists()


STATES = {
    "code": ({"settings": Malicious()}, "code in it is not run"),
    "another model": ({"model": {"w": torch.ones(2)}}, "of another model"),
    "no settings": ({"settings": None}, "settings"),
    "no optimizer": ({"optimizer": None}, "optimizer"),
    "no metrics": ({"metrics": None}, "metrics"),
    "no format": ({"format": None}, "revision"),  # as before the first format
    "an older format": ({"format": checkpoint.FORMAT - 1}, "revision"),
    "a newer format": ({"format": checkpoint.FORMAT + 1}, "revision"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_something_else_is_refused(state, tmp_path, script):
    """In one line, and nothing is changed."""
    change, word = STATES[state]
    assert script("vae", "--iter_max", 10).returncode == 0
    path = state_file(tmp_path)
    changed = {**torch.load(path), **change}
    torch.save({key: value for key, value in changed.items() if value is not None}, path)
    before = tree(tmp_path / "checkpoints")
    result = script("vae", "--iter_max", 20)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "state.pt" in result.stderr
    assert word in result.stderr
    assert tree(tmp_path / "checkpoints") == before
    assert not (tmp_path / "code-was-run").exists()


def test_beside_a_state_of_another_revision_weights_load(tmp_path, script):
    """And training can start over."""
    assert script("vae", "--iter_max", 10).returncode == 0
    path = state_file(tmp_path)
    torch.save(without(torch.load(path), "format"), path)
    assert script("vae", "--iter_max", 10, "--train", 0, "--iw", 1).returncode == 0
    assert script("vae", "--iter_max", 20, "--overwrite", 1).returncode == 0
    assert checkpoint_steps(tmp_path, "vae") == [20]


def test_a_stopped_series_names_what_resumes_all(script, monkeypatch, tmp_path):
    """The runs to come still have what an earlier series stored, of other settings."""
    assert script("vae", "--iter_max", 2, "--runs", 3, "--batch_size", 50).returncode == 0
    step = torch.optim.Adam.step
    calls = []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:  # the second step of the second run
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stopping)
        stopped = script("vae", "--iter_max", 4, "--runs", 3, "--overwrite", 1)
    assert stopped.returncode == 130
    advice = last_line(stopped).split("to resume: ")[1]
    resume, rest, _ = re.split("; then the rest of the series: |; the summary", advice)
    resumed = script("vae", *shlex.split(resume)[2:])
    assert resumed.returncode == 0 and "resuming from step 2" in resumed.stdout
    assert script("vae", *shlex.split(rest)[2:]).returncode == 0
    evaluated = script("vae", "--iter_max", 4, "--runs", 3)
    assert evaluated.returncode == 0
    assert evaluated.stdout.count("trained before") == 3


def test_a_plot_that_cannot_be_written_loses_no_step(script, monkeypatch, tmp_path):
    def held(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "a plot")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "bounds", held)
        stopped = script("vae", "--iter_max", 4, "--iter_save", 2)
    assert stopped.returncode == 1
    assert "Permission denied: a plot" in last_line(stopped)
    resumed = script("vae", "--iter_max", 4, "--iter_save", 2)
    assert resumed.returncode == 0
    assert "resuming from step 2" in resumed.stdout
    with (tmp_path / "logs" / NAMES["vae"] / "test.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]


def test_a_table_held_at_the_last_step_loses_none(script, monkeypatch, tmp_path):
    write = train.Metrics.write

    def held(metrics, step):
        if step == 3:
            raise PermissionError(errno.EACCES, "Permission denied", "metrics.csv")
        write(metrics, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Metrics, "write", held)
        failed = script("vae", "--iter_max", 3)
    assert failed.returncode == 1
    assert "Permission denied: metrics.csv" in last_line(failed)
    finished = script("vae", "--iter_max", 3)
    assert finished.returncode == 0
    assert "resuming from step 3" in finished.stdout
    assert checkpoint_steps(tmp_path, "vae") == [3]
    table = tmp_path / "logs" / NAMES["vae"] / "metrics.csv"
    assert table.read_text().splitlines()[-1].startswith("3,")

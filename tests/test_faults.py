"""Kills, signals, full disks, rivals, other machines, numbers that are not finite, hostile files.

Nothing is lost and nothing is let in.
"""

import errno
import io
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    NAMES,
    checkpoint_steps,
    command,
    lines,
    needs_compiler,
    only_error,
    raising,
    same,
    signal_at,
    state,
    stored,
    table,
    tree,
    wait_for,
)
from untrained import noise

import run_vae
from codebase import checkpoint, data, evaluate, train
from codebase.models import nns
from codebase.models.vae import VAE
from codebase.runtime import download, files, launch, log

fcntl = pytest.importorskip("fcntl", reason="no POSIX locks on this machine")

NAME = NAMES["vae"]
FAULTY_START = Path(__file__).with_name("faulty_start.py")


def state_file(folder: Path) -> Path:
    return folder / "checkpoints" / NAME / "state.pt"


def start(model: str, folder: Path, digits_dir: Path, *flags) -> subprocess.Popen:
    """A script in a process of its own that is left running, on drawn digits."""
    words = command(model, "--data", "digits", "--data_dir", digits_dir, *flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=pipe, text=True)


DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
def small(few, monkeypatch, script, tmp_path):
    """small(folder, *flags): a quick training that saves, closes rows and writes at other steps."""
    monkeypatch.setattr(data, "load", lambda run, split: noise(120, 3072))
    for name in ["Encoder", "Decoder"]:
        wide = getattr(nns, name)

        def narrow(*args, wide=wide, **sizes):
            return wide(*args, **{**sizes, "hidden": 8})

        monkeypatch.setattr(nns, name, narrow)
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "WRITE_EVERY", 0)

    def run(folder: str, *flags):
        (tmp_path / folder).mkdir(exist_ok=True)
        flags = ["--iter_max", 6, "--iter_save", 3, "--batch_size", 10, *flags]
        return script("fsvae", *flags, cwd=tmp_path / folder)

    return run


# ---------------------------------------------------------------------------------------------
# A write that fails, a process that is killed


def test_a_run_that_fails_at_any_file(small, renames, tmp_path):
    """The same command ends as if nothing had been."""
    names = renames()
    lines(small("whole"))
    wanted = stored(tmp_path / "whole")
    assert {"metrics.csv", "test.csv", "samples-0000003.png", "model-00003.pt"} <= set(names)
    assert {"results.json", "config.json", "state.pt"} <= set(names)
    for k, name in enumerate(names, start=1):
        folder = f"{k}, {name}"
        renames(k, Killed())
        assert small(folder).returncode == 1
        for path in (tmp_path / folder).rglob("*.pt"):
            torch.load(path, weights_only=True)  # whatever is there is whole
        renames()
        lines(small(folder))
        assert stored(tmp_path / folder) == wanted, folder


KILLS = [  # the model, how often it is killed, within how many seconds of its start, and its flags
    ("vae", 2, 1, "--iter_max 100 --iter_save 20"),
    pytest.param("vae", 50, 2, "--iter_max 600 --iter_save 24", marks=pytest.mark.long),
    pytest.param("gmvae", 50, 2, "--iter_max 500 --iter_save 20", marks=pytest.mark.long),
    pytest.param("ssvae", 50, 2, "--iter_max 160 --iter_save 10", marks=pytest.mark.long),
    pytest.param("fsvae", 50, 2, "--iter_max 200 --iter_save 10", marks=pytest.mark.long),
    pytest.param(
        "vae",
        5,
        10,
        "--iter_max 200 --iter_save 20 --compile 1",
        marks=[pytest.mark.long, needs_compiler],
    ),
]


@pytest.mark.parametrize("model, kills, seconds, flags", KILLS)
def test_killed_at_random_moments_a_run_resumes(
    model, kills, seconds, flags, script, digits_dir, tmp_path
):
    """It is then as one that was never killed."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    lines(script(model, *flags.split(), cwd=whole, plots=True))
    chance = random.Random(model)
    lock = killed / "logs" / NAMES[model] / ".lock"
    for _ in range(kills):
        process = start(model, killed, digits_dir, *flags.split())
        wait_for(lock, process)
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.communicate()
        for path in (killed / "checkpoints" / NAMES[model]).glob("*.pt"):
            torch.load(path, weights_only=True)  # whatever is there is whole
        lock.unlink(missing_ok=True)  # so that the next one is waited for
    lines(script(model, *flags.split(), cwd=killed, plots=True))
    assert stored(killed) == stored(whole)
    assert not list(killed.rglob(".*.tmp"))


def test_a_full_disk_leaves_checkpoints_as_they_were(few, script, tmp_path):
    lines(script("vae", "--iter_max", 2))
    before = tree(tmp_path / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # Python ignores its signal
    try:
        failed = script("vae", "--iter_max", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in only_error(failed, 1)
    assert tree(tmp_path / "checkpoints") == before
    assert not list(tmp_path.rglob("*.tmp"))
    lines(script("vae", "--iter_max", 4))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """And nothing half-written beside it; nor does what cannot be removed hide the error."""
    path = tmp_path / "figures.json"
    files.write(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(DISK_FULL))
        with pytest.raises(OSError, match="No space left"):
            files.write(path, b"new")
    assert tree(tmp_path) == {"figures.json": b"old"}
    monkeypatch.setattr(os, "replace", raising(DISK_FULL))
    monkeypatch.setattr(os, "unlink", raising(PermissionError("no, not that either")))
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")


def test_left_overs_of_a_kill_are_removed(few, script, tmp_path):
    for folder in ["checkpoints", "logs"]:
        left_over = tmp_path / folder / NAME / ".half.123.tmp"
        left_over.parent.mkdir(parents=True)
        left_over.write_bytes(b"half a file")
    lines(script("vae", "--iter_max", 1))
    assert not list(tmp_path.rglob(".half*"))


# ---------------------------------------------------------------------------------------------
# Files that another program holds, as Windows has it


def test_a_held_table_loses_no_step(few, script, renames, monkeypatch, tmp_path):
    """Between saves it is warned of, and at a save it is an error."""
    monkeypatch.setattr(train, "WRITE_EVERY", 0)
    held = PermissionError(errno.EACCES, "Permission denied", "metrics.csv")
    flags = ["--iter_max", 4, "--iter_save", 3]
    renames(4, held)  # after config.json, and the table and state of the start
    printed = lines(script("vae", *flags))
    (warning,) = [line for line in printed if line.startswith("warning: metrics.csv")]
    assert "Permission denied" in warning
    names = renames()
    lines(script("vae", *flags, "--overwrite", 1))
    at_the_save = names.index("test.csv")
    assert names[at_the_save - 1] == "metrics.csv"
    renames(at_the_save, held)
    assert "metrics.csv" in only_error(script("vae", *flags, "--overwrite", 1), 1)
    renames()
    assert "resuming from step 3" in lines(script("vae", *flags))
    assert table(tmp_path, NAME)[-1]["step"] == "4"


# ---------------------------------------------------------------------------------------------
# Signals

ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number, code", ENDINGS)
def test_a_signal_saves_the_state(number, code, few, script, monkeypatch, tmp_path):
    """And the run says how to resume it."""
    signal_at(monkeypatch, 3, number)
    line = only_error(script("vae", "--iter_max", 6), code)
    assert line.endswith("stopped at step 3, state saved; the same command resumes from there")
    assert state(tmp_path)["step"] == 3


def test_a_new_training_has_no_tests_of_the_old_one(few, script, monkeypatch, tmp_path):
    """Whose checkpoints were removed by hand."""
    lines(script("vae", "--iter_max", 4))
    shutil.rmtree(tmp_path / "checkpoints")
    signal_at(monkeypatch, 3, signal.SIGINT)
    only_error(script("vae", "--iter_max", 6), 130)
    assert not (tmp_path / "logs" / NAME / "test.csv").exists()


def test_under_nohup_a_hang_up_stays_ignored(few, script, monkeypatch, tmp_path):
    signal_at(monkeypatch, 2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        lines(script("vae", "--iter_max", 3))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint_steps(tmp_path, "vae") == [3]


def test_main_may_be_called_from_anywhere(few, tmp_path, monkeypatch, digits_dir):
    """It leaves no signal handler behind, and works in a thread."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", "digits", "--iter_max", "2", "--iw", "5"]
    before = [signal.getsignal(number) for number, _ in ENDINGS]
    codes = [run_vae.main(words)]
    assert [signal.getsignal(number) for number, _ in ENDINGS] == before
    words[-3] = "3"
    thread = threading.Thread(target=lambda: codes.append(run_vae.main(words)))
    thread.start()
    thread.join()
    assert codes == [0, 0]
    assert checkpoint_steps(tmp_path, "vae") == [2, 3]


def test_a_stopped_overwrite_names_what_resumes(few, script, monkeypatch, tmp_path):
    """The same command would start over."""
    lines(script("vae", "--iter_max", 4))
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGINT)
        flags = ["--iter_max", 6, "--overwrite=1", "--iter_save", 5]
        line = only_error(script("vae", *flags), 130)
    assert "stopped at step 3, state saved; to resume: python run_vae.py " in line
    assert "--overwrite" not in line
    interpreter, _, *words = shlex.split(line.split("to resume: ")[1])
    assert interpreter == "python"
    assert words[-4:] == ["--iter_max", "6", "--iter_save", "5"]
    assert "resuming from step 3" in lines(script("vae", *words))
    assert checkpoint_steps(tmp_path, "vae") == [5, 6]


def test_a_stopped_series_names_what_resumes(few, script, monkeypatch):
    """The runs to come still have what an earlier series stored, of other settings."""
    series = ["--iter_max", 4, "--runs", 3]
    lines(script("vae", "--iter_max", 2, "--runs", 3, "--batch_size", 50))
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT)  # the second step of the second run
        stopped = script("vae", *series, "--overwrite", 1)
    rest, same_series = only_error(stopped, 130).split("to resume: ")[1].split(" && ")
    lines(script("vae", *shlex.split(rest)[2:]))
    resumed = lines(script("vae", *shlex.split(same_series)[2:]))
    assert [line for line in resumed if line.startswith("resuming")] == ["resuming from step 2"]
    assert sum("trained before" in line for line in resumed) == 2
    evaluated = lines(script("vae", *series))
    assert sum("trained before" in line for line in evaluated) == 3


def test_an_evaluation_that_is_interrupted_costs_no_training(few, script, monkeypatch):
    """With --overwrite 1 the same command would train again."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "latent_use", raising(KeyboardInterrupt()))  # after the training
        line = only_error(script("vae", "--iter_max", 2, "--overwrite", 1), 130)
    assert "interrupted; to resume: python run_vae.py" in line
    assert "--overwrite" not in line
    resumed = lines(script("vae", *shlex.split(line.split("to resume: ")[1])[2:]))
    assert any("trained before" in line for line in resumed)


def test_what_is_interrupted_before_it_begins_is_still_to_be_overwritten(
    few, script, monkeypatch, tmp_path
):
    """The same command is right then, and no other one is named."""
    lines(script("vae", "--iter_max", 2))
    before = stored(tmp_path)
    monkeypatch.setattr(download, "choose_data", raising(KeyboardInterrupt()))
    line = only_error(script("vae", "--iter_max", 2, "--overwrite", 1), 130)
    assert line.endswith(": interrupted")
    assert stored(tmp_path) == before


def test_processes_of_torchrun_resume_by_torchrun(monkeypatch):
    """Its own options are not known to the script."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = run_vae.parse(["--runs", "3", "--overwrite", "1"])
    rest, same_series = launch.how_to_resume(first, [2]).removeprefix("to resume: ").split(" && ")
    assert rest.startswith("torchrun ... -- ")
    assert rest.endswith("--run 2 --runs 1 --seed 2 --overwrite 1")
    assert same_series.endswith(" --runs 3")


LATE = {  # what is called late in a training of three steps, and which call of it is the late one
    "the last step": (train.Metrics, "add", 3),
    "the last save": (checkpoint, "save_state", 2),  # a start is saved too
    "the end of training": (log.tqdm, "close", 2),  # the test images of a checkpoint have a bar
    "evaluation": (evaluate, "bounds", 2),
}


@pytest.mark.parametrize("moment", LATE)
def test_a_late_signal_ends_a_series(moment, few, script, tmp_path, monkeypatch):
    """It is not swallowed."""
    owner, name, count = LATE[moment]
    called = getattr(owner, name)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return called(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    line = only_error(script("vae", "--iter_max", 3, "--runs", 2), 130)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [NAME]
    assert state(tmp_path)["step"] == 3
    assert checkpoint_steps(tmp_path, "vae") == [3]
    assert line.count("stopped at step 3") == (moment != "evaluation")


STARTS = [
    (["-S"], "argparse", signal.SIGINT),
    (["-S"], "codebase.runtime.launch", signal.SIGINT),
    ([], "torch", signal.SIGTERM),
]


@pytest.mark.parametrize("python_flags, module, number", STARTS)
def test_a_signal_while_a_script_loads(python_flags, module, number, tmp_path):
    words = [sys.executable, *python_flags, FAULTY_START, module, int(number), "--data", "digits"]
    words = [str(word) for word in words]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    what = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert only_error(result, 128 + number) == f"run_vae.py: {what}"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Streams that are closed or broken


@pytest.mark.parametrize("flags, code", [(["--iter_max", 2], 0), (["--z", 0], 2)])
def test_closed_streams_end_no_run(flags, code, few, script, monkeypatch, tmp_path):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert script("vae", *flags).returncode == code
        assert (sys.stdout, sys.stderr) == (stream, stream)
    assert checkpoint_steps(tmp_path, "vae") == ([2] if code == 0 else [])


class BrokenTerminal(io.StringIO):
    """A terminal that was closed: nothing can be written to it."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_broken_terminal_ends_no_training(few, script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", BrokenTerminal())
    assert script("vae", "--iter_max", 2).returncode == 0
    assert checkpoint_steps(tmp_path, "vae") == [2]


# ---------------------------------------------------------------------------------------------
# The settings of the process


@pytest.mark.parametrize(
    "variable, own, count",
    [
        ("GOMP_SPINCOUNT", None, launch.SPIN_COUNT),
        ("GOMP_SPINCOUNT", "77", "77"),
        ("OMP_WAIT_POLICY", "passive", None),
    ],
)
def test_threads_spin_shortly_unless_told_otherwise(variable, own, count, few, script, monkeypatch):
    for name in ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"]:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(variable, own)
    lines(script("vae", "--iter_max", 1))
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_denormal_numbers_are_zero_only_inside_runs():
    tiny = torch.tensor(1e-30)
    with launch.own_torch_settings("cpu"):
        assert tiny * 1e-10 == 0
    assert tiny * 1e-10 > 0


# ---------------------------------------------------------------------------------------------
# Rivals, and file systems without locks


def test_a_second_process_on_a_run_is_refused(tmp_path, digits_dir, script):
    """And the dead hold nothing."""
    long = ["--iter_max", 100_000, "--iter_save", 100_000, "--compile", 0]
    process = start("vae", tmp_path, digits_dir, *long)
    try:
        wait_for(state_file(tmp_path), process)
        before = tree(tmp_path / "checkpoints").keys()
        line = only_error(script("vae", *long))
        assert "is in use by another process" in line
        assert tree(tmp_path / "checkpoints").keys() == before
    finally:
        process.kill()
        process.communicate()
    lines(script("vae", "--iter_max", 2, "--overwrite", 1))


def test_without_locks_a_run_warns_and_continues(few, script, monkeypatch, tmp_path):
    """A left-over blocks nobody."""
    left_over = tmp_path / "logs" / NAME / ".lock"
    left_over.parent.mkdir(parents=True)
    left_over.touch()

    no_locks = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", raising(no_locks))
    printed = lines(script("vae", "--iter_max", 2))
    (warning,) = [line for line in printed if "cannot be locked here" in line]
    assert warning.startswith(f"warning: {Path('logs', NAME, '.lock')}")
    assert checkpoint_steps(tmp_path, "vae") == [2]


# ---------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.filterwarnings("ignore:pixels outside")
def test_a_loss_that_is_not_finite_stops_training(few, script, tmp_path, monkeypatch):
    """The last good checkpoint is kept."""
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    lines(script("vae", "--iter_max", 2))
    before = stored(tmp_path / "checkpoints")
    binarize = data.binarize
    monkeypatch.setattr(data, "binarize", lambda pixels: binarize(pixels) * float("nan"))
    line = only_error(script("vae", "--iter_max", 6), 1)
    assert "rec not finite at step 4" in line
    assert stored(tmp_path / "checkpoints") == before
    assert "nan" not in (tmp_path / "logs" / NAME / "metrics.csv").read_text()


def test_weights_that_are_not_finite_are_not_stored(few, script, tmp_path, monkeypatch):
    lines(script("vae", "--iter_max", 2))
    before = stored(tmp_path / "checkpoints")

    def diverging_step(model, *args):
        plain = plain_step(model, *args)

        def step(index):
            terms = plain(index)
            model.dec.net[4].bias.data.fill_(float("inf"))
            return terms

        return step

    plain_step = train.plain_step
    monkeypatch.setattr(train, "plain_step", diverging_step)
    line = only_error(script("vae", "--iter_max", 3), 1)
    assert "weights not finite at step 3" in line
    assert stored(tmp_path / "checkpoints") == before


def test_a_broken_test_metric_stops_training(few, script, tmp_path, monkeypatch):
    lines(script("vae", "--iter_max", 2))
    before = stored(tmp_path / "checkpoints")
    found = {"nelbo": float("inf"), "kl": 1.0, "rec": float("nan")}
    monkeypatch.setattr(evaluate, "bounds", lambda *_, **__: found)
    line = only_error(script("vae", "--iter_max", 4), 1)
    wanted = "nelbo and rec of test images not finite at step 4: "
    assert line.endswith(f"{wanted}training stopped, the last checkpoint is kept")
    assert stored(tmp_path / "checkpoints") == before


def test_metrics_that_are_not_finite_are_an_error(few, script, tmp_path, monkeypatch):
    """Of weights that are finite, but wild: they are neither printed nor stored."""
    monkeypatch.chdir(tmp_path)
    model = VAE(name=NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    checkpoint.save_model_by_name(model, 20)
    before = tree(tmp_path)
    result = script("vae", "--iter_max", 20, "--train", 0, "--iw", 1)
    line = only_error(result, 1)
    assert "nelbo" in line
    assert "not finite" in line
    assert "NELBO" not in result.stdout
    assert tree(tmp_path) == before


def test_a_model_that_knows_nothing_is_warned_of(few, script, monkeypatch):
    """Its NELBO is above 784 log 2 = 543.4."""
    for nelbo in (543.5, 543.3):
        metrics = {"nelbo": nelbo, "kl": 0.5, "rec": 543.0}
        monkeypatch.setattr(evaluate, "bounds", lambda *_, found=metrics, **__: dict(found))
        printed = "\n".join(lines(script("vae", "--iter_max", 2)))
        assert ("warning: a NELBO above 543 is worse than guessing" in printed) == (nelbo == 543.5)


# ---------------------------------------------------------------------------------------------
# Damaged and hostile files


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def spoil(change):
    """A harm to a checkpoint: change(its dictionary) is stored in its place."""

    def harm(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        torch.save(change(found), path)

    return harm


def with_bias(value):
    """The harm that this stands in the place of the first bias."""
    return spoil(lambda found: {**found, "enc.net.0.bias": value})


def without(found: dict, key: str) -> dict:
    return {name: value for name, value in found.items() if name != key}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0x10
    path.write_bytes(whole)


HARMS = {
    "code in a zip": (with_bias(Malicious()), "code in it is not run"),
    "truncated": (cut, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "a flipped byte": (flip, "damaged"),
    "another model": (spoil(lambda found: {"w": torch.ones(2)}), "of another model"),
    "a missing key": (spoil(lambda found: without(found, "dec.net.2.bias")), "dec.net.2.bias"),
    "a surplus key": (spoil(lambda found: {**found, "extra": torch.ones(1)}), "has extra"),
    "another shape": (with_bias(torch.ones(299)), "shape (300,), and is of (299,)"),
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
    "no metrics": ({"metrics": None}, "metrics"),
    "no such flag": ({"settings": {"model": "vae", "batch_size": 100}}, "revision"),
    "an older format": ({"format": checkpoint.FORMAT - 1}, "revision"),
}


@pytest.mark.parametrize("which", STATES)
def test_a_state_of_something_else_is_refused(which, few, tmp_path, script):
    """In one line, and nothing is changed."""
    change, word = STATES[which]
    lines(script("vae", "--iter_max", 2))
    changed = {**state(tmp_path), **change}
    kept = {key: value for key, value in changed.items() if value is not None}
    torch.save(kept, state_file(tmp_path))
    before = tree(tmp_path / "checkpoints")
    line = only_error(script("vae", "--iter_max", 4))
    assert "state.pt" in line
    assert word in line
    assert tree(tmp_path / "checkpoints") == before
    assert not (tmp_path / "code-was-run").exists()


def test_beside_a_state_of_another_revision_weights_load(few, tmp_path, script):
    """One from before the first format is refused in one line; training can start over."""
    trained = lines(script("vae", "--iter_max", 2))
    torch.save(without(state(tmp_path), "format"), state_file(tmp_path))
    before = tree(tmp_path)
    for step in (2, 4):
        line = only_error(script("vae", "--iter_max", step))
        for word in ("state.pt", "revision", "--train 0", "--overwrite 1"):
            assert word in line
        assert tree(tmp_path) == before
    kept = tree(tmp_path / "checkpoints")
    assert trained[-1] in lines(script("vae", "--iter_max", 2, "--train", 0, "--iw", 1))
    assert tree(tmp_path / "checkpoints") == kept
    lines(script("vae", "--iter_max", 4, "--overwrite", 1))
    assert checkpoint_steps(tmp_path, "vae") == [4]

"""Other machines: terminals that close, file systems without locks, Windows, clusters, GPUs."""

import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, checkpoint_steps, command, needs_cuda, start, tree, wait_for

from codebase import evaluate, train
from codebase.models.vae import VAE
from codebase.runtime import files, log

fcntl = pytest.importorskip("fcntl", reason="no POSIX locks on this machine")

NAME = NAMES["vae"]


def state_file(folder: Path) -> Path:
    return folder / "checkpoints" / NAME / "state.pt"


def one_line(result, code: int) -> str:
    """The one line on stderr of a command that ended with that code."""
    assert result.returncode == code, result
    (line,) = result.stderr.splitlines()
    return line


# ---------------------------------------------------------------------------------------------
# Signals, terminals and streams


def test_a_hang_up_saves_the_state(tmp_path, digits_dir):
    process = start("vae", tmp_path, digits_dir, "--iter_max", 100_000)
    wait_for(state_file(tmp_path), process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 129
    assert "state saved; the same command resumes from there" in errors.splitlines()[-1]
    stopped = int(errors.split("stopped at step ")[1].split(",")[0])
    assert torch.load(state_file(tmp_path))["step"] == stopped


@pytest.mark.long
def test_a_terminal_that_closes_saves_the_state(tmp_path, digits_dir):
    """What is written to it then fails, and hides nothing."""
    words = command("vae", "--data", "digits", "--data_dir", digits_dir, "--iter_max", 1_000_000)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(words[0], words)
    try:
        while not state_file(tmp_path).exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.05)
        time.sleep(0.5)  # some steps
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 129
    assert torch.load(state_file(tmp_path))["step"] > 0


def test_a_hang_up_that_is_ignored_stays_ignored(script, monkeypatch, tmp_path):
    """As nohup has it."""
    step = torch.optim.Adam.step

    def hung_up(*args, **kwargs):
        signal.raise_signal(signal.SIGHUP)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert script("vae", "--iter_max", 3).returncode == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint_steps(tmp_path, "vae") == [3]


@pytest.mark.parametrize("flags", [["--iter_max", 2], ["--iter_max", 2, "--lr", 9, "--iw", 5]])
def test_main_leaves_no_signal_handler_behind(flags, tmp_path, monkeypatch, digits_dir):
    import run_vae

    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    words = ["--data", "digits", "--data_dir", str(digits_dir), *map(str, flags)]
    assert run_vae.main(words) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_main_works_in_a_thread(tmp_path, monkeypatch, digits_dir):
    import run_vae

    monkeypatch.chdir(tmp_path)
    codes = []
    words = ["--data", "digits", "--data_dir", str(digits_dir), "--iter_max", "3"]
    thread = threading.Thread(target=lambda: codes.append(run_vae.main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert checkpoint_steps(tmp_path, "vae") == [3]


CLOSED = {
    "none": "sys.stdout = sys.stderr = None",
    "closed": "sys.stderr.close(); sys.stdout.close()",
}


@pytest.mark.parametrize("streams", [pytest.param("none", marks=pytest.mark.long), "closed"])
@pytest.mark.parametrize("flags, code", [(["--iter_max", "2"], 0), (["--z", "0"], 2)])
def test_a_run_needs_no_streams(streams, flags, code, tmp_path, digits_dir):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_vae\n"
        f"{CLOSED[streams]}\n"
        "sys.exit(run_vae.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "program.py", "--data", "digits", "--data_dir", str(digits_dir)]
    words += flags
    result = subprocess.run(words, cwd=tmp_path, stderr=subprocess.DEVNULL, timeout=120)
    assert result.returncode == code
    assert checkpoint_steps(tmp_path, "vae") == ([2] if code == 0 else [])


@pytest.mark.long
def test_no_file_is_opened_in_a_streams_place(tmp_path, digits_dir):
    words = command("vae", "--data", "digits", "--data_dir", digits_dir, "--iter_max", 2)
    line = f"{shlex.join(words)} 1>&- 2>&-"
    result = subprocess.run(["sh", "-c", line], cwd=tmp_path, timeout=120)
    assert result.returncode == 0
    assert checkpoint_steps(tmp_path, "vae") == [2]


MODULES = ["argparse", "dataclasses", "codebase.runtime.options", "codebase.runtime.launch"]


@pytest.mark.parametrize("module", MODULES)
def test_an_interrupt_while_a_script_loads(module, tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import runpy, signal, sys\n"
        f"sys.modules.pop({module!r}, None)\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = [{str(ROOT / 'run_vae.py')!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [sys.executable, "-S", "interrupted.py"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert one_line(result, 130) == "run_vae.py: interrupted"


@pytest.mark.parametrize("seconds", [0.04, 0.07, 0.1, 0.2, 0.5])
@pytest.mark.long
def test_an_interrupt_of_the_first_second(seconds, tmp_path):
    process = subprocess.Popen(command("vae"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "run_vae.py: interrupted\n")


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.long)])
def test_an_unprintable_file_name_is_escaped(encoding, tmp_path, digits_dir):
    pixels = np.random.RandomState(0).randint(0, 256, (200, 784)).astype(np.uint8)
    np.savez(tmp_path / "числа.npz", x=pixels[:100], x_test=pixels[100:])
    words = command("vae", "--iter_max", 2, "--data", "числа.npz")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(words, **settings, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    name = "model=vae_z=10_data=числа_run=0000"
    assert (tmp_path / "checkpoints" / name / "model-00002.pt").exists()
    assert "\\u0447" in result.stdout
    words[-1] = "нет.npz"
    missing = subprocess.run(words, **settings, timeout=60)
    assert "there is no file" in one_line(missing, 2)


# ---------------------------------------------------------------------------------------------
# Locks


@pytest.fixture
def no_locks(monkeypatch):
    """no_locks(errno): the file system answers so to whoever wants to lock a file."""

    def refuse(number: int) -> None:
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_warns_and_continues(number, no_locks, script, tmp_path):
    no_locks(number)
    result = script("vae", "--iter_max", 2)
    assert result.returncode == 0, result.stderr
    (warning,) = (line for line in result.stdout.splitlines() if line.startswith("warning:"))
    assert str(Path("logs", NAME, ".lock")) in warning
    assert script("vae", "--iter_max", 4).returncode == 0
    assert checkpoint_steps(tmp_path, "vae") == [2, 4]


ANSWERS = [NotImplementedError("no flock here"), filelock.Timeout("a lock")]


@pytest.mark.parametrize("error", ANSWERS)
def test_whatever_filelock_makes_of_it(error, no_locks, script, monkeypatch, tmp_path):
    """The run continues."""

    def acquire(*_, **__):
        raise error

    no_locks(errno.ENOLCK)
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    result = script("vae", "--iter_max", 2)
    assert result.returncode == 0 and "warning:" in result.stdout
    assert checkpoint_steps(tmp_path, "vae") == [2]


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.ENOSYS])
def test_an_empty_left_over_lock_file_blocks_nobody(number, no_locks, script, tmp_path):
    left_over = tmp_path / "logs" / NAME / ".lock"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    if number:
        no_locks(number)
    result = script("vae", "--iter_max", 2)
    assert result.returncode == 0, result.stderr
    assert checkpoint_steps(tmp_path, "vae") == [2]


def test_a_lock_file_that_is_denied_is_named(script, monkeypatch, tmp_path):
    (tmp_path / "logs" / NAME).mkdir(parents=True)
    (tmp_path / "logs" / NAME / ".lock").touch()
    real = os.open

    def denied(path, *args, **kwargs):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    line = one_line(script("vae", "--iter_max", 2), 2)
    assert str(Path("logs", NAME, ".lock")) in line
    assert "Permission denied" in line and "delete that file" in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_failing_clean_up_hides_no_error(script, monkeypatch, tmp_path):
    """Windows deletes no file that is open."""
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if Path(path).name == ".lock":
            raise PermissionError(errno.EACCES, "the process cannot access the file", str(path))
        real(path, *args, **kwargs)

    broken = state_file(tmp_path)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing that can be read")
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "remove", unlink)
    line = one_line(script("vae", "--iter_max", 2), 2)
    assert "state.pt" in line and "cannot access" not in line


def test_a_left_over_hides_no_error(monkeypatch, tmp_path):
    def fails(number, words):
        def fail(*_, **__):
            raise OSError(number, words)

        return fail

    monkeypatch.setattr(os, "replace", fails(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "unlink", fails(errno.EACCES, "Permission denied"))
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "a.json", b"{}")


# ---------------------------------------------------------------------------------------------
# Several processes and devices


def test_world_size_alone_is_told_in_one_line(script, monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = one_line(script("vae", "--iter_max", 2), 2)
    assert "WORLD_SIZE" in line and "MASTER_ADDR" in line and "torchrun" in line
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE" in one_line(script("vae", "--iter_max", 2), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--z", "x"], ["--data", "nothing"]])
def test_a_rank_alone_mutes_no_error(flags, script, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert flags[0] in one_line(script("vae", *flags), 2)


@pytest.fixture
def first_of_two(monkeypatch):
    """What torchrun tells the first of two processes."""
    settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (settings | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("flags", [["--device", "cuda"], []])
def test_more_processes_than_gpus_are_refused(flags, first_of_two, script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = one_line(script("vae", "--iter_max", 2, *flags), 2)
    assert "--device" in line and "2 processes" in line and "1 are here" in line
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_no_number_is_told(first_of_two, script, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0x")
    assert "RANK is '0x'" in one_line(script("vae", "--iter_max", 2), 2)
    assert list(tmp_path.iterdir()) == []


def test_processes_on_apple_silicon_are_refused(first_of_two, script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    line = one_line(script("vae", "--iter_max", 2), 2)
    assert "mps" in line and "--device cpu" in line
    assert list(tmp_path.iterdir()) == []


def test_evaluation_on_a_cpu_touches_no_gpu(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a GPU's random numbers were touched")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ["get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"]:
        monkeypatch.setattr(torch.cuda, name, touched)
    model = VAE()
    before = torch.get_rng_state()
    evaluate.bounds(model, torch.zeros(3, 784), ms=[1])
    assert torch.equal(torch.get_rng_state(), before)


@needs_cuda
def test_evaluation_keeps_the_random_numbers_of_every_gpu():
    """The model is on the last one, which need not be the current one."""
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", number) for number in range(count)]
    before = [torch.cuda.get_rng_state(device) for device in devices]
    model = VAE().to(devices[-1])
    x = torch.zeros(3, 784, device=devices[-1])
    first = evaluate.bounds(model, x, ms=[1])
    for device, state in zip(devices, before, strict=True):
        assert torch.equal(torch.cuda.get_rng_state(device), state)
    torch.rand(5, device=devices[-1])
    assert evaluate.bounds(model, x, ms=[1]) == first


# ---------------------------------------------------------------------------------------------
# The threads that wait

OWN_SETTINGS = {
    "nothing": ({}, True),
    "another count": ({"GOMP_SPINCOUNT": "77"}, False),
    "a policy": ({"OMP_WAIT_POLICY": "active"}, False),
}


@pytest.mark.parametrize("settings", OWN_SETTINGS)
def test_waiting_threads_spin_briefly_unless_told_otherwise(settings, tmp_path):
    """What is in the environment when torch is loaded."""
    own, ours = OWN_SETTINGS[settings]
    (tmp_path / "program.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch':\n"
        "            print('count', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_vae\n"
        "run_vae.main(['--data', 'digits', '--iter_max', '1'])\n"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "program.py"]
    environment.update(own)
    settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(words, **settings, timeout=60)
    word, count = result.stdout.split()
    assert word == "count"
    assert count.isdecimal() if ours else count == own.get("GOMP_SPINCOUNT", "None")
    assert tree(tmp_path).keys() == {"program.py"}


def test_a_table_that_is_held_ends_no_training(script, monkeypatch, tmp_path):
    """A spreadsheet on Windows does that."""
    monkeypatch.setattr(train, "WRITE_EVERY", 0)
    real = os.replace
    tables = []

    def replace(source, target, **kwargs):
        if Path(target).name == "metrics.csv":
            tables.append(target)
            if 2 <= len(tables) <= 5:  # the first is that of the start
                raise PermissionError(errno.EACCES, "Permission denied", str(target))
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    result = script("vae", "--iter_max", 8)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    (warning,) = (line for line in said if line.startswith("warning: metrics.csv"))
    assert "Permission denied" in warning
    assert json.loads((tmp_path / "logs" / NAME / "results.json").read_text())["step"] == 8
    assert (tmp_path / "logs" / NAME / "metrics.csv").read_text().splitlines()[-1].startswith("8,")


class Tee:
    """What notebooks and scripts put in the place of a stream, to keep what is printed."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_plain_object_may_stand_for_a_stream(name, script, monkeypatch):
    stream = Tee()
    monkeypatch.setattr(sys, name, stream)
    assert script("vae", "--iter_max", 2).returncode == 0
    assert ("NELBO: " in stream.text) == (name == "stdout")


def test_progress_is_written_to_a_broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken:
        stream = log.UnbreakableStream(broken)
        for _ in range(3):
            stream.write("step 1 of 2\n")
            stream.flush()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_a_closed_stream_of_progress_opens_no_files(tmp_path):
    closed = (tmp_path / "closed").open("w")
    closed.close()
    stream = log.UnbreakableStream(closed)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        stream.write("step 1 of 2\n")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.long
def test_a_broken_pipe_of_progress_ends_no_training(tmp_path, digits_dir):
    """Its exit code is 0 all the same, so that a shell goes on with the next command."""
    reader, writer = os.pipe()
    os.close(reader)
    words = command("vae", "--data", "digits", "--data_dir", digits_dir, "--iter_max", 6000)
    words += ["--batch_size", "1"]
    process = subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert process.returncode == 0
    assert b"NELBO: " in process.stdout
    assert torch.load(state_file(tmp_path))["step"] == 6000


@pytest.mark.long
def test_first_lines_stand_first_in_a_log(tmp_path, digits_dir):
    """Where both streams go to one file, as under nohup."""
    words = command("vae", "--data", "digits", "--data_dir", digits_dir)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("w") as file:
        flags = ["--iter_max", "2500", "--batch_size", "20"]
        subprocess.run([*words, *flags], cwd=tmp_path, env=environment, stdout=file, stderr=file)
    assert (tmp_path / "log").read_text().startswith("model=vae")

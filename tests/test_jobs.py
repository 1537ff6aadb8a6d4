"""A series side by side: what it stores, prints and sums up is that of one run after another.

A failure takes no other run down, a signal stops all, and nothing is lost.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import filelock
import odd_runs
import pytest
import torch
from conftest import NAMES, only_error, stored

import run_vae
from codebase.runtime import jobs, launch
from codebase.runtime.parallel import Processes

STEPS = 120
SUMMARY = "logs/model=vae_z=10_data=digits_summary.json"


def name(run: int) -> str:
    return NAMES["vae"].replace("run=0000", f"run={run:04d}")


def state(folder: Path, run: int) -> Path:
    return folder / "checkpoints" / name(run) / "state.pt"


def series(digits_dir: Path, *flags) -> list[str]:
    """The command of a series of three runs."""
    words = [sys.executable, odd_runs.__file__, "--data", "digits", "--data_dir", digits_dir]
    words += ["--runs", 3, "--iter_max", STEPS, "--iter_save", 50, *flags]
    return [str(word) for word in words]


def finish(folder: Path, words: list[str]) -> subprocess.CompletedProcess:
    settings = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(words, cwd=folder, **settings)


def start_slowly(folder: Path, words: list[str], **streams) -> subprocess.Popen:
    """Start a series whose runs take half a minute, and wait till runs 0 and 1 train."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
    settings["env"] = {**os.environ, "SECONDS_A_STEP": "0.25"}
    settings["start_new_session"] = True  # a signal to its processes spares those of the tests
    process = subprocess.Popen(words, cwd=folder, **settings)
    while process.poll() is None and not all(state(folder, run).exists() for run in [0, 1]):
        time.sleep(0.01)
    assert process.poll() is None
    return process


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory, digits_dir) -> tuple[Path, str]:
    """The folder of a series of one run after another, and what it printed."""
    folder = tmp_path_factory.mktemp("in_turn")
    result = finish(folder, series(digits_dir))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_side_by_side_all_is_as_one_after_another(in_turn, tmp_path, digits_dir):
    """Files and summary by the bit, and the lines of each run, with its number before them."""
    folder, printed = in_turn
    result = finish(tmp_path, series(digits_dir, "--jobs", 2))
    assert result.returncode == 0, result.stderr
    assert SUMMARY in stored(tmp_path)
    assert stored(tmp_path) == stored(folder)

    said, summary = result.stdout.split("\n\n3 runs (0, 1, 2)")
    of_runs, wanted_summary = printed.split("\n\n3 runs (0, 1, 2)")
    assert summary == wanted_summary
    of_each = re.split(r"(?=^model=)", of_runs, flags=re.M)[1:]
    for run, wanted in enumerate(of_each):
        prefix = f"run {run}: "
        lines = [line for line in said.splitlines() if line.startswith(prefix)]
        assert [in_no_time(line.removeprefix(prefix)) for line in lines] == [
            in_no_time(line) for line in wanted.splitlines() if line
        ]
    assert all(re.match(r"run [012]: ", line) for line in said.splitlines())


def in_no_time(line: str) -> str:
    return re.sub(r"in \d+:\d\d:\d\d", "in no time", line)


def test_a_failed_run_of_several_at_once_is_reported(tmp_path, digits_dir):
    """As one that another process holds; the other is done and summarised."""
    (tmp_path / "logs" / name(0)).mkdir(parents=True)
    with filelock.FileLock(tmp_path / "logs" / name(0) / ".lock"):
        result = finish(tmp_path, series(digits_dir, "--jobs", 2, "--runs", 2, "--iter_max", 10))
    line = only_error(result)
    assert line.startswith("run 0: ")
    assert "is in use by another process" in line
    assert json.loads((tmp_path / SUMMARY).read_text())["runs"] == [1]


def test_ctrl_c_stops_all_runs_and_the_same_command_resumes(in_turn, tmp_path, digits_dir):
    """A terminal sends it to every process; a second one while states are saved loses nothing."""
    words = series(digits_dir, "--jobs", 2)
    process = start_slowly(tmp_path, words)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    *lines, last = errors.splitlines()
    assert last.endswith("stopped; the same command resumes every run from its last state")
    for run in [0, 1]:
        step = torch.load(state(tmp_path, run))["step"]
        assert 0 < step < STEPS
        assert f"run {run}: stopped at step {step}, state saved" in lines
    assert not state(tmp_path, 2).exists()

    assert finish(tmp_path, words).returncode == 0
    assert stored(tmp_path) == stored(in_turn[0])


@pytest.mark.long
def test_a_hang_up_ends_bars_and_says_what_is_still_to_be_overwritten(tmp_path, digits_dir):
    """On a terminal each run has a bar. What had begun is not started over again."""
    terminal, screen = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    words = series(digits_dir, "--jobs", 2, "--overwrite", 1)
    process = start_slowly(tmp_path, words, stdout=screen, stderr=screen)
    os.close(screen)
    shown = ""
    while not all(re.search(rf"run {run}: +\d+%.* \d+/{STEPS} \[", shown) for run in [0, 1]):
        shown += os.read(terminal, 10_000).decode()
    process.send_signal(signal.SIGHUP)
    while True:
        try:
            shown += os.read(terminal, 10_000).decode()
        except OSError:  # all programs have closed it
            break
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    assert f"step 1 of {STEPS}" not in shown
    advice = shown.splitlines()[-1].split("stopped; to resume: ")[1]
    rest, same = advice.split(" && ")
    assert shlex.split(rest)[-10:] == "--run 2 --runs 1 --seed 2 --jobs 2 --overwrite 1".split()
    assert shlex.split(same)[2:] == words[2:-2]


def test_runs_whose_parent_is_killed_end(tmp_path, digits_dir):
    """With their states saved."""
    process = start_slowly(tmp_path, series(digits_dir, "--jobs", 2))
    process.kill()
    process.communicate(timeout=60)  # until all that could write to its streams have ended
    for run in [0, 1]:
        assert 0 < torch.load(state(tmp_path, run))["step"] < STEPS


# ---------------------------------------------------------------------------------------------
# The processes alone


def test_lines_stay_whole_and_a_dead_process_takes_none_down(monkeypatch, capfd):
    """The cores are divided among the runs, but in the environment of this process."""
    monkeypatch.setattr(jobs, "core_count", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    runs = run_vae.parse(["--runs", "3"]).of_series()
    results, number = jobs.side_by_side(runs, 2, odd_runs.print_much)
    done = (0, {"threads": 2.0})
    assert (results, number) == ({0: done, 1: (1, {}), 2: done}, 0)
    assert "OMP_NUM_THREADS" not in os.environ
    out, errors = capfd.readouterr()
    died = "run 1: error: its process died, exit code -9; checkpoints are intact"
    died += "; if memory was short, use a smaller --jobs"
    lines = out.splitlines() + errors.splitlines()
    wanted = [f"run {run}: line {number}" for run in range(3) for number in range(200)]
    assert sorted(lines) == sorted([died, *wanted])


def test_auto_takes_all_cores_and_one_gpu(monkeypatch):
    monkeypatch.setattr(jobs, "core_count", lambda: 2)
    run = run_vae.parse(["--runs", "3", "--jobs", "auto"])
    found = [jobs.how_many(run, Processes(device, 0, 1)) for device in ("cpu", "cuda", "mps")]
    assert found == [2, 1, 1]


def test_the_processes_of_torchrun_do_one_run_at_a_time(script, monkeypatch, tmp_path):
    torchrun = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for variable, value in torchrun.items():
        monkeypatch.setenv(variable, str(value))
    assert "argument --jobs:" in only_error(script("vae", "--runs", 2, "--jobs", 2))
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_looked_for_once(main, no_network):
    """By the process that starts the others."""
    result = main("vae", "--data", "mnist", "--runs", 3, "--jobs", 2)
    assert result.stdout.count("downloading") == 1
    assert "MNIST cannot be downloaded" in only_error(result)


def test_a_stopped_overwrite_names_what_is_left():
    """Runs 4, 7 and 8 had not begun: they are still to be overwritten, with the same threads."""
    flags = "--runs 6 --run 3 --seed 8 --jobs auto --overwrite=1 --data digits".split()
    advice = launch.how_to_resume(run_vae.parse(flags), [4, 7, 8], count=2)
    *rest, same = advice.removeprefix("to resume: ").split(" && ")
    runs = [run_vae.parse(shlex.split(command)[2:]) for command in [*rest, same]]
    found = [(run.run, run.runs, run.seed, run.overwrite, run.jobs) for run in runs]
    assert found == [(4, 1, 9, 1, 2), (7, 2, 12, 1, 2), (3, 6, 8, 0, 2)]


def test_a_users_own_threads_win_over_the_share(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with jobs.share_of_threads(2):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"

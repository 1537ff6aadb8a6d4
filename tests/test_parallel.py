"""Several processes train and evaluate the same model as one, and end together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, checkpoint_steps, table, torchrun, tree, weights

SHORT = ("--iter_max", 20, "--iter_save", 10)


def distance(a: dict, b: dict) -> float:
    """The norm of the difference over the norm of the weights: Adam may turn the rounding of a gradient that is nearly
    zero into a step of its own size, so single weights can differ by more than the whole does."""
    ours, theirs = (torch.cat([value.double().flatten() for value in weights.values()]) for weights in (a, b))
    return ((ours - theirs).norm() / ours.norm()).item()


def assert_same_training(one: Path, many: Path, name: str, step: int = 20) -> None:
    """The weights and the table of a run in two folders are the same, but for the rounding of sums."""
    assert distance(weights(one, name, step), weights(many, name, step)) < 1e-4
    for row, wanted in zip(table(many, name), table(one, name), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in wanted.items()}, rel=1e-4
        )


def last_figure(result: subprocess.CompletedProcess) -> float:
    return float(result.stdout.strip().splitlines()[-1].split(": ")[1].split(". ")[0])


def complaints(result: subprocess.CompletedProcess, script: str = "run_vae.py") -> list[str]:
    """What our scripts say on standard error, without torchrun's own report; no traceback of ours may be there."""
    assert result.returncode != 0
    assert str(ROOT / "codebase") not in result.stderr and "in one_run" not in result.stderr, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith(f"{script}: ")]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    made = [tmp_path / "one", tmp_path / "many"]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def wrapped(tmp_path, digits_dir):
    """Two processes of run_vae.py in which something was changed first; the code sees RANK and at_step(n, fault)."""

    def run(code: str, *flags) -> subprocess.CompletedProcess:
        path = tmp_path / "wrapper.py"
        path.write_text(f"{SETTING}\n{code}\nsys.exit(run_vae.main(sys.argv[1:]))\n")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", path]
        words += ["--data", "digits", "--data_dir", digits_dir, *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        given = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(list(map(str, words)), **given)

    return run


SETTING = """
import os, signal, sys, time
import torch
from codebase import evaluate, train
from codebase.runtime import processes
import run_vae
RANK = int(os.environ["RANK"])

def at_step(n, fault, backward=train.backward):
    steps = iter(range(1, 1 << 60))
    def faulty(*args):
        if next(steps) == n:
            fault()
        return backward(*args)
    train.backward = faulty

def send(number):
    return lambda: os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    "model, flags, part",
    [
        ("ssvae", [], ""),
        pytest.param("ssvae", ["--labels", 200], "_labels=200", marks=pytest.mark.long),
        pytest.param("gmvae", ["--train_iw", 5], "_train_iw=5", marks=pytest.mark.long),
        pytest.param("fsvae", [], "", marks=pytest.mark.long),
    ],
)
def test_two_processes_train_the_same_model_as_one(model, flags, part, folders, digits_dir, script):
    one, many = folders
    alone = script(model, *SHORT, *flags, cwd=one)
    together = torchrun(2, model, many, digits_dir, *SHORT, *flags)
    assert together.returncode == 0, together.stderr
    assert_same_training(one, many, NAMES[model].replace("_data", f"{part}_data"))
    assert last_figure(together) == pytest.approx(last_figure(alone), rel=1e-3)
    assert together.stdout.count("trained to step") == 1 and "steps: plain (2 processes)" in together.stdout


@pytest.mark.long
def test_a_series_of_runs_on_three_processes_equals_that_of_one(folders, digits_dir, script):
    one, many = folders
    alone = script("vae", *SHORT, "--runs", 2, cwd=one)
    together = torchrun(3, "vae", many, digits_dir, *SHORT, "--runs", 2)
    assert together.returncode == 0, together.stderr
    for run in range(2):
        assert_same_training(one, many, NAMES["vae"].replace("0000", f"000{run}"))
    assert together.stdout.count("trained to step") == alone.stdout.count("trained to step") == 2
    summaries = [json.loads(next(folder.glob("logs/*_summary.json")).read_text()) for folder in (one, many)]
    assert summaries[0]["runs"] == summaries[1]["runs"] == [0, 1]
    for mine, wanted in zip(summaries[1]["each"], summaries[0]["each"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-3)


@pytest.mark.long
def test_a_run_goes_on_with_more_processes_and_evaluation_shares_the_samples(folders, digits_dir, script):
    """GMVAE with --run, which torchrun takes for an option of its own unless -- comes before the script."""
    (one, many), name = folders, NAMES["gmvae"].replace("0000", "0003")
    assert script("gmvae", *SHORT, "--run", 3, cwd=one).returncode == 0
    assert script("gmvae", "--iter_max", 10, "--run", 3, cwd=many).returncode == 0
    together = torchrun(2, "gmvae", many, digits_dir, *SHORT, "--run", 3)
    assert together.returncode == 0 and "going on from step 10" in together.stdout, together.stderr
    assert_same_training(one, many, name)
    flags = (*SHORT, "--run", 3, "--train", 0, "--iw", 10, 100, 300)
    alone, together = script("gmvae", *flags, cwd=many), torchrun(3, "gmvae", many, digits_dir, *flags)
    for ours, wanted in zip(together.stdout.splitlines()[-4:], alone.stdout.splitlines()[-4:], strict=True):
        assert float(ours.split(": ")[-1]) == pytest.approx(float(wanted.split(": ")[-1]), rel=1e-4)


@pytest.mark.long
def test_training_on_the_iwae_bound_of_ones_own_images_and_the_bounds_of_all_test_images_are_shared(
    folders, digits_dir, script
):
    """With pieces of several samples of a batch, and pieces of a hundred test images."""
    (one, many), name = folders, "model=vae_z=10_train_iw=15_data=mine_run=0000"
    pixels = np.random.RandomState(0).randint(0, 256, (330, 784)).astype(np.uint8)
    np.savez(one.parent / "mine.npz", x=pixels[:200], x_test=pixels[200:])
    flags = (*SHORT, "--train_iw", 15, "--test", "all", "--data", one.parent / "mine.npz")
    alone, together = script("vae", *flags, cwd=one), torchrun(2, "vae", many, digits_dir, *flags)
    assert together.returncode == 0, together.stderr
    assert_same_training(one, many, name)
    assert last_figure(together) == pytest.approx(last_figure(alone), rel=1e-4)
    figures = [json.loads((folder / "logs" / name / "results.json").read_text())["figures_all"] for folder in folders]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    rows = [(folder / "logs" / name / "test.csv").read_text().split() for folder in folders]
    assert len(rows[0]) == len(rows[1]) == 3  # one process writes them
    for row, wanted in zip(rows[1][1:], rows[0][1:], strict=True):
        assert list(map(float, row.split(","))) == pytest.approx(list(map(float, wanted.split(","))), rel=1e-4)


def test_a_failed_run_ends_all_processes_with_one_line_and_its_series(wrapped, tmp_path):
    broken = tmp_path / "checkpoints" / NAMES["vae"] / "state.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing that can be read")
    hasty = """first_to_fail = processes.Ranks.first_to_fail
processes.Ranks.first_to_fail = lambda self: (time.sleep(0.1 if RANK == 0 else 0), first_to_fail(self))[1]"""
    lines = complaints(wrapped(hasty, *SHORT, "--runs", 2), "wrapper.py")  # whoever comes first
    assert len(lines) == 1 and "state.pt" in lines[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [NAMES["vae"]]
    assert checkpoint_steps(tmp_path, "vae") == []


@pytest.mark.long
def test_processes_without_a_shared_folder_stop_and_go_on_together_whoever_gets_the_signal(wrapped, tmp_path, script):
    one, first, other = (tmp_path / name for name in ("one", "rank0", "rank1"))
    for folder in (one, first, other):
        folder.mkdir()
    assert script("vae", *SHORT, cwd=one).returncode == 0
    shutil.copytree(one / "checkpoints", other / "checkpoints")  # further on, and not to be used
    before, apart = tree(other), "os.chdir(f'rank{RANK}')\n"
    state = first / "checkpoints" / NAMES["vae"] / "state.pt"

    lines = complaints(wrapped(apart + "if RANK == 1: at_step(12, send(signal.SIGTERM))", *SHORT), "wrapper.py")
    assert len(lines) == 1 and "stopped at step 12, state saved" in lines[0]
    assert torch.load(state)["step"] == 12

    # eight steps finish this run; the eighth of the next one is interrupted, and there is no third
    result = wrapped(apart + "if RANK == 0: at_step(16, send(signal.SIGINT))", *SHORT, "--runs", 3)
    assert "going on from step 12" in result.stdout
    assert_same_training(one, first, NAMES["vae"])
    lines, second = complaints(result, "wrapper.py"), NAMES["vae"].replace("0000", "0001")
    assert len(lines) == 1 and "stopped at step 8, state saved" in lines[0]
    assert torch.load(state.parent.with_name(second) / "state.pt")["step"] == 8
    assert {path.name for path in (first / "checkpoints").iterdir()} == {NAMES["vae"], second}
    assert tree(other) == before  # the first process alone writes


@pytest.mark.long
def test_a_stop_whose_state_cannot_be_stored_is_not_said_to_be_saved(wrapped, tmp_path):
    full = """from codebase import checkpoint
save_state = checkpoint.save_state
def failing(name, state):
    if state["step"] == 12:
        time.sleep(1)
        raise OSError(28, "No space left on device")
    save_state(name, state)
checkpoint.save_state = failing
at_step(12, send(signal.SIGTERM))"""
    lines = complaints(wrapped(full, *SHORT), "wrapper.py")
    assert len(lines) == 1 and "No space left on device" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_refused_in_one_line(tmp_path, digits_dir):
    lines = complaints(torchrun(2, "vae", tmp_path, digits_dir, "--device", "cuda"))
    assert len(lines) == 1 and "--device" in lines[0] and not list(tmp_path.iterdir())


def test_a_bad_command_line_is_refused_in_one_line(tmp_path, digits_dir):
    result = torchrun(2, "vae", tmp_path, digits_dir, "--z", 0)
    assert len(lines := complaints(result)) == 1 and "--z" in lines[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--k", 5], ["--iter_max", "x"]])
def test_the_first_process_alone_speaks_of_a_bad_command_line(flags, script, monkeypatch):
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = script("vae", *flags)
        assert result.returncode == 2
        said.append(result.stderr.splitlines())
    assert len(said[0]) == 1 and flags[0] in said[0][0] and not said[1]


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tmp_path, digits_dir):
    lines = complaints(torchrun(2, "vae", tmp_path, digits_dir, "--iter_max", 5, "--batch_size", 1))
    assert len(lines) == 1 and "takes at least one image per process" in lines[0]


def test_a_process_that_dies_in_training_ends_all_with_one_line_and_the_run_goes_on(wrapped, tmp_path, script):
    lines = complaints(wrapped("if RANK == 1: at_step(16, send(signal.SIGKILL))", *SHORT), "wrapper.py")
    assert len(lines) == 1 and "another process of this run died" in lines[0]
    assert checkpoint_steps(tmp_path, "vae") == [10]
    result = script("vae", *SHORT)
    assert result.returncode == 0 and "going on from step 10" in result.stdout
    assert [row["step"] for row in table(tmp_path, NAMES["vae"])] == ["20"]


@pytest.mark.parametrize("seconds", [pytest.param(0, marks=pytest.mark.long), 3])
@pytest.mark.long
def test_a_process_that_dies_in_evaluation_ends_all_with_one_line(seconds, wrapped, tmp_path):
    """Whether the other one waits for it, or is busy when torchrun ends it."""
    late = f"""bounds = evaluate.bounds
def faulty(*args, **kwargs):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({seconds})
    return bounds(*args, **kwargs)
evaluate.bounds = faulty"""
    result = wrapped(late, *SHORT)
    assert "trained to step 20" in result.stdout and checkpoint_steps(tmp_path, "vae") == [10, 20]
    assert len(complaints(result, "wrapper.py")) == 1, result.stderr


def test_an_error_of_one_process_alone_is_reported_in_its_words(wrapped):
    full = """def fault():
    raise torch.OutOfMemoryError("CUDA out of memory: the second card is full")
if RANK == 1: at_step(5, fault)"""
    lines = complaints(wrapped(full, *SHORT), "wrapper.py")
    assert len(lines) == 1 and "the second card is full" in lines[0] and "smaller --batch_size" in lines[0]

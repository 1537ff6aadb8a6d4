"""Several processes train and evaluate as one, share the work, and end together."""

import contextlib
import importlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    ROOT,
    checkpoint_steps,
    lines,
    only_error,
    results,
    same,
    state,
    table,
    tree,
    weights,
)
from untrained import ALL, made, rows

from codebase import evaluate, train
from codebase.models.gmvae import GMVAE
from codebase.runtime.parallel import Processes, join

SHORT = ("--iter_max", 20, "--iter_save", 10)
FAULTY = Path(__file__).with_name("faulty_vae.py")


@pytest.fixture
def processes(digits_dir, tmp_path):
    """processes(2, path, "--z", 4): a script on so many processes, on drawn digits."""

    def run(count: int, path: Path, *flags) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc_per_node={count}", "--", path, *flags]
        words += ["--data", "digits", "--data_dir", digits_dir]
        settings = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([str(word) for word in words], cwd=tmp_path, **settings)

    return run


# ---------------------------------------------------------------------------------------------
# Three processes that are started once, for what does not end them


def in_process(task: tuple[int, int, Callable, tuple]) -> Any:
    """Call a function as the process of that rank among three."""
    rank, port, function, arguments = task
    torch.set_num_threads(1)
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    with mock.patch.dict(os.environ, environment):
        return function(*arguments)


@pytest.fixture(scope="module")
def three():
    """Call a function in three processes at once; return what it returns in each of them."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:

        def call(function: Callable, *arguments) -> list[Any]:
            with socket.create_server(("localhost", 0)) as server:
                port = server.getsockname()[1]
            tasks = [(rank, port, function, arguments) for rank in range(3)]
            return pool.map_async(in_process, tasks, chunksize=1).get(timeout=200)

        yield call


def call_main(folder: Path, model: str, *flags) -> tuple[int, str, str]:
    """The exit code of a script and what it printed, without its plots being rendered."""
    os.chdir(folder)
    out = io.StringIO()
    err = io.StringIO()
    main = importlib.import_module(f"run_{model}").main
    with (
        mock.patch("matplotlib.figure.Figure.savefig"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main([str(flag) for flag in flags])
    return code, out.getvalue(), err.getvalue()


def test_same_number_of_processes_same_bits(three, tmp_path):
    """In one piece and in two: so every step is computed twice, by the same weights."""
    pixels = np.random.RandomState(0).randint(256, size=(530, 784), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=pixels[:300], x_test=pixels[300:])
    name = NAMES["vae"].replace("digits", "mine")
    whole = tmp_path / "whole"
    parted = tmp_path / "parted"
    flags = ["--data", tmp_path / "mine.npz", "--iter_save", 10, "--test", "all", "--iter_max"]
    for folder, step in [(whole, 20), (parted, 10), (parted, 20)]:
        folder.mkdir(exist_ok=True)
        answers = three(call_main, folder, "vae", *flags, step)
        assert [code for code, _, _ in answers] == [0, 0, 0], answers
        assert [bool(out) for _, out, _ in answers] == [True, False, False]
    assert "resuming from step 10" in answers[0][1]
    assert same(weights(parted, name, 20), weights(whole, name, 20))
    assert table(parted, name) == table(whole, name)
    assert results(parted, name) == results(whole, name)


# ---------------------------------------------------------------------------------------------
# The gradient


class RowNoise:
    """Noise in place of torch.randn_like that belongs to the images, whoever computes them."""

    def __init__(self):
        self.rows = torch.arange(0)

    def __call__(self, m: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        of_all = torch.randn(*m.shape[:-2], 100, m.shape[-1], generator=generator)
        return of_all[..., self.rows, :]


SETTINGS = {"gmvae": {"k": 20, "train_iw": 5}}


def one_step(kind: str, processes: Processes) -> tuple[dict, dict, dict, int]:
    """Gradient, terms and new weights of a step on 100 images, and how many were computed here."""
    model = made(kind, **SETTINGS.get(kind, {}))
    index = torch.randperm(100)
    noise = RowNoise()

    def batch(chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise.rows = chosen
        return rows(kind, chosen)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train.plain_step(model, optimizer, batch, processes)
    with mock.patch("torch.randn_like", noise):
        terms = step(index)
    gradient = {name: value.grad for name, value in model.named_parameters()}
    return gradient, terms, dict(model.state_dict()), len(noise.rows)


def one_step_of_three(kind: str) -> tuple[dict, dict, dict, int]:
    with join("cpu") as processes:
        return one_step(kind, processes)


@ALL
def test_gradient_of_unequal_shares_is_that_of_one(kind, three):
    gradient, terms, _, count = one_step(kind, Processes())
    assert count == 100
    answers = three(one_step_of_three, kind)
    assert [answer[3] for answer in answers] == [34, 33, 33]
    for of_three, terms_of_three, new_weights, _ in answers:
        torch.testing.assert_close(terms_of_three, terms)
        assert of_three.keys() == gradient.keys()
        for name, value in gradient.items():
            scale = value.abs().max()
            torch.testing.assert_close(of_three[name] / scale, value / scale, rtol=0, atol=1e-5)
        assert same(new_weights, answers[0][2])  # they stay one model


# ---------------------------------------------------------------------------------------------
# Evaluation


def bounds(processes: Processes) -> tuple[dict, int]:
    """Bounds of 230 images, and how many images were encoded here."""
    torch.manual_seed(0)
    model = GMVAE(k=20)
    x = (torch.rand(230, 784) < 0.3).float()
    encoded = []
    model.enc.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    means = evaluate.bounds(model, x, [1, 10, 130], processes=processes)
    return means, sum(encoded)


def bounds_of_three() -> tuple[dict, int]:
    with join("cpu") as processes:
        return bounds(processes)


def test_evaluation_is_shared_by_images(three):
    means, count = bounds(Processes())
    assert count == 230
    assert three(bounds_of_three) == [(means, 100), (means, 100), (means, 30)]


@pytest.mark.long
def test_a_run_resumes_with_more_processes(processes, script):
    """With --run, which torchrun takes for its own option unless -- comes before the script.

    The evaluation of a hundred images is the same on one process and on three.
    """
    flags = ["--iter_max", 20, "--run", 3]
    lines(script("gmvae", "--iter_max", 10, "--run", 3))
    said = lines(processes(2, ROOT / "run_gmvae.py", *flags))
    assert "resuming from step 10" in said
    assert any("steps before were of 1 processes: the bits will differ" in line for line in said)
    assert "steps: plain (2 processes)" in said

    flags += ["--train", 0, "--iw", 10, 100, 300]
    alone = lines(script("gmvae", *flags))
    assert "IWAE-300" in alone[-1]
    assert lines(processes(3, ROOT / "run_gmvae.py", *flags))[-4:] == alone[-4:]


# ---------------------------------------------------------------------------------------------
# Failures, signals and refusals end all processes, with one line


def only_complaint(result: subprocess.CompletedProcess) -> str:
    """The one line of our scripts on stderr, which is no traceback; torchrun says more."""
    assert result.returncode != 0
    assert str(ROOT / "codebase") not in result.stderr, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith(f"{FAULTY.name}: ")]
    assert len(said) == 1, result.stderr
    return said[0]


@pytest.mark.long
def test_processes_without_a_shared_folder_stop_together(processes, tmp_path, script):
    """The second one gets the signal, and has another state in its folder."""
    first = tmp_path / "rank0"
    other = tmp_path / "rank1"
    first.mkdir()
    other.mkdir()
    lines(script("vae", *SHORT, cwd=other))  # further on, and not to be used
    before = tree(other)
    stopped = processes(2, FAULTY, "terminated at 12", *SHORT, "--overwrite", 1)
    line = only_complaint(stopped)
    assert "stopped at step 12, state saved; to resume: torchrun ... -- " in line
    assert "--overwrite" not in line
    assert state(first)["step"] == 12
    assert tree(other) == before  # the first process alone writes


def torchrun_says(monkeypatch, rank: int) -> None:
    """This process is told what torchrun tells one of two processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))


def test_the_first_process_speaks_of_bad_commands(script, monkeypatch):
    torchrun_says(monkeypatch, 0)
    assert "--iter_max" in only_error(script("vae", "--iter_max", "x"))
    torchrun_says(monkeypatch, 1)
    silent = script("vae", "--iter_max", "x")
    assert (silent.returncode, silent.stderr) == (2, "")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    assert "--z" in only_error(script("vae", "--z", "x"))  # a rank alone mutes no error


def test_world_size_alone_is_told_in_one_line(script, monkeypatch, tmp_path):
    """Some cluster images set it for every job."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE" in only_error(script("vae", "--iter_max", 2))
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_gpus_are_refused(script, monkeypatch, tmp_path):
    torchrun_says(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for flags in ([], ["--device", "cuda"]):
        assert "--device" in only_error(script("vae", "--iter_max", 2, *flags))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_ends_all(processes, tmp_path, script):
    """And the run resumes from its last state."""
    line = only_complaint(processes(2, FAULTY, "killed at 16", *SHORT))
    assert "another process of this run died" in line
    assert checkpoint_steps(tmp_path, "vae") == [10]
    assert "resuming from step 10" in lines(script("vae", *SHORT))
    assert [row["step"] for row in table(tmp_path, NAMES["vae"])] == ["20"]


@pytest.mark.long
def test_an_error_of_one_process_is_told(processes):
    line = only_complaint(processes(2, FAULTY, "out of memory at 5", *SHORT))
    assert "the second card is full" in line
    assert "smaller --batch_size" in line

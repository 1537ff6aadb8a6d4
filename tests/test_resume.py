"""A step of a training depends on the weights, the optimizer and (seed, number of the step) alone.

So nothing random is stored, and a run may be stopped and resumed anywhere.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, same, weights

import run_vae
from codebase import checkpoint, data, evaluate, train
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime.launch import own_torch_settings
from codebase.runtime.parallel import Processes, step_seed

STANDARD_ERRORS = 5  # the seeds are fixed, so that no test fails by chance


def stored_state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / NAMES["vae"] / "state.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------
# The seeds of the steps


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_no_two_steps_share_a_seed(seed, rank):
    steps = np.arange(200_000)
    seeds = step_seed(seed, steps, rank)
    assert len(np.unique(seeds)) == len(steps)
    assert seeds.min() >= 0
    assert seeds.max() < 2**32  # a larger one would be cut, and might be that of another step


def test_runs_and_processes_share_no_seed():
    """Of the first 100,000 steps of ten runs on eight processes."""
    steps = np.arange(100_000)
    seeds = []
    for seed in range(10):
        for rank in range(8):
            seeds.append(step_seed(seed, steps, rank).astype(np.uint32))
    ascending = np.sort(np.concatenate(seeds))
    assert len(ascending) == 10 * 8 * len(steps)
    assert (ascending[1:] > ascending[:-1]).all()


def test_the_largest_seed_and_step_are_taken():
    processes = Processes("cpu", rank=7, size=8)
    with torch.random.fork_rng([]):
        processes.seed_step(2**31, 10**9 - 1)
        first = torch.rand(5)
        torch.rand(3)
        processes.seed_step(2**31, 10**9 - 1)
        assert torch.equal(torch.rand(5), first)


def drawn_in_steps(seed: int, steps: int, count: int, draw) -> torch.Tensor:
    """What draw(count) returns first in each of so many steps: (steps, count)."""
    processes = Processes()
    rows = []
    with torch.random.fork_rng([]):
        for step in range(steps):
            processes.seed_step(seed, step)
            rows.append(draw(count).double())
    return torch.stack(rows)


def uniform_bytes(count: int) -> torch.Tensor:
    """What pixels are binarised by, scaled to variance 1."""
    noise = torch.randint(0, 255, (count,), dtype=torch.uint8)
    return (noise.double() - 127) / math.sqrt((255**2 - 1) / 12)


DRAWS = {"normals": torch.randn, "bytes": uniform_bytes}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("lag", [1, 2])
def test_neighbouring_steps_are_uncorrelated(kind, seed, lag):
    x = drawn_in_steps(seed, 3000, 200, DRAWS[kind])
    products = x[lag:] * x[:-lag]  # of variance 1, where there is no correlation
    overall = products.sum() / math.sqrt(products.numel())
    per_position = products.sum(0) / math.sqrt(len(products))
    assert abs(overall) < STANDARD_ERRORS
    assert per_position.abs().max() < STANDARD_ERRORS


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", DRAWS)
def test_what_a_step_draws_has_no_trend(kind, seed):
    """Neither with the number of the step nor within it, and no mean."""
    x = drawn_in_steps(seed, 3000, 200, DRAWS[kind])
    steps = torch.arange(len(x), dtype=torch.float64)
    steps = (steps - steps.mean()) / steps.std()
    trend = (steps[:, None] * x).sum(0) / math.sqrt(len(x))
    means = x.sum(0) / math.sqrt(len(x))
    assert trend.abs().max() < STANDARD_ERRORS
    assert abs(trend.sum()) / math.sqrt(len(trend)) < STANDARD_ERRORS
    assert means.abs().max() < STANDARD_ERRORS
    assert abs(means.sum()) / math.sqrt(len(means)) < STANDARD_ERRORS
    assert x.var() == pytest.approx(1, abs=0.02)


def test_processes_and_runs_have_their_own_noise():
    """Their streams of one step are uncorrelated too."""
    draws = []
    with torch.random.fork_rng([]):
        for seed in range(3):
            for rank in range(3):
                Processes("cpu", rank, 3).seed_step(seed, 5)
                draws.append(torch.randn(100_000))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(9)
    assert correlation.abs().max() < STANDARD_ERRORS / math.sqrt(100_000)


# ---------------------------------------------------------------------------------------------
# A step out of the blue


def step_from(state: dict, digits_dir: Path) -> tuple[dict, dict]:
    """The step that follows a stored state, of no run: terms and weights."""
    words = ["--data", "digits", "--data_dir", str(digits_dir)]
    run = run_vae.parse(words).changed(device="cpu")
    train_set = data.load(run, "train")
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr, fused=True)
    model.load_state_dict(state["model"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    processes = Processes()

    def batch(index):
        return (train_set.binary(index),)

    step = train.plain_step(model, optimizer, batch, processes)
    order = train.order(len(train_set), run.batch_size, run.seed, state["step"], "cpu")
    processes.seed_step(run.seed, state["step"])
    return step(next(order)), model.state_dict()


@pytest.mark.parametrize("drawn", [0, 1, 1234])
def test_a_step_out_of_the_blue(drawn, script, digits_dir, monkeypatch, tmp_path):
    """Its terms and weights are those of the run, whatever was drawn before."""
    add = train.Metrics.add
    of_run = []

    def record(metrics, terms):
        of_run.append(terms)
        add(metrics, terms)

    monkeypatch.setattr(train.Metrics, "add", record)
    assert script("vae", "--iter_max", 3).returncode == 0
    state = stored_state(tmp_path)
    assert script("vae", "--iter_max", 4).returncode == 0
    with own_torch_settings("cpu"):
        torch.manual_seed(drawn)
        torch.randn(drawn)
        terms, model = step_from(state, digits_dir)
    assert len(of_run) == 4
    assert same(terms, of_run[3])
    assert same(model, weights(tmp_path, NAMES["vae"], 4))


# ---------------------------------------------------------------------------------------------
# What is stored


def tensors_in(content) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    found = []
    if isinstance(content, dict):
        for value in content.values():
            found += tensors_in(value)
    return found


def test_nothing_random_is_in_the_state(script, tmp_path):
    assert script("vae", "--iter_max", 3).returncode == 0
    state = stored_state(tmp_path)
    keys = {"format", "step", "settings", "compiled", "processes", "model", "optimizer", "metrics"}
    assert state.keys() == keys
    assert keys == {"format", *checkpoint.STATE_KEYS}
    assert state["metrics"].keys() == {"names", "rows", "steps", "sums", "tests", "seconds"}
    # Torch gives the states of its generators as bytes.
    assert {tensor.dtype for tensor in tensors_in(state)} == {torch.float32}


def test_runs_of_a_seed_store_the_same(script, tmp_path):
    """Apart from the time that they took."""
    states = []
    for folder, drawn in [("first", 5), ("second", 6)]:
        (tmp_path / folder).mkdir()
        torch.manual_seed(drawn)
        assert script("vae", "--iter_max", 3, cwd=tmp_path / folder).returncode == 0
        state = stored_state(tmp_path / folder)
        del state["metrics"]["seconds"]
        states.append(state)
    first, second = states
    for one, other in zip(tensors_in(first), tensors_in(second), strict=True):
        assert torch.equal(one, other)
    assert first["metrics"] == second["metrics"]
    assert first["settings"] == second["settings"]


# ---------------------------------------------------------------------------------------------
# The random numbers of who calls it


@pytest.mark.parametrize("model", ["vae", "ssvae"])
def test_main_keeps_the_callers_random_numbers(model, script):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert script(model, "--iter_max", 1, "--batch_size", 10).returncode == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_fails_keeps_them_too(script, monkeypatch):
    def fail(*args, **kwargs):
        torch.rand(3)
        raise ValueError("a bug")

    monkeypatch.setattr(evaluate, "bounds", fail)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert script("vae", "--iter_max", 2).returncode == 1
    assert torch.equal(torch.get_rng_state(), before)


def digits(count: int) -> data.Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 784), dtype=torch.uint8, generator=generator)
    return data.Images(pixels, torch.arange(count) % 10)


EVALUATIONS = {
    "bounds": lambda: evaluate.bounds(VAE(), torch.zeros(130, 784), ms=[1, 10]),
    "bounds of a mixture": lambda: evaluate.bounds(GMVAE(k=5), torch.zeros(30, 784), ms=[1]),
    "latent use": lambda: evaluate.latent_use(VAE(), digits(30)),
    "confusion": lambda: evaluate.confusion_matrix(SSVAE(), digits(30)),
}


@pytest.mark.parametrize("which", EVALUATIONS)
def test_evaluation_keeps_the_callers_random_numbers(which, monkeypatch):
    """They are those that the making of the model leaves, and evaluation draws its own."""
    after_model = []
    eval_mode = evaluate.eval_mode

    def recording(model, seed=0):
        after_model.append(torch.get_rng_state())
        return eval_mode(model, seed)

    monkeypatch.setattr(evaluate, "eval_mode", recording)
    torch.manual_seed(5)
    first = EVALUATIONS[which]()
    assert torch.equal(torch.get_rng_state(), after_model[0])
    torch.manual_seed(5)
    second = EVALUATIONS[which]()
    if which == "confusion":
        assert torch.equal(first, second)
    else:
        assert first == second


def test_bounds_do_not_depend_on_what_was_drawn():
    model = VAE()
    x = torch.zeros(130, 784)
    torch.manual_seed(5)
    first = evaluate.bounds(model, x, ms=[1, 10])
    torch.rand(7)
    assert evaluate.bounds(model, x, ms=[1, 10]) == first
    assert evaluate.bounds(model, x, ms=[1, 10], seed=1) != first

"""A step of a training depends on the weights, the optimizer and (seed, number of the step) alone.

So nothing random is stored, and a run may be stopped and resumed anywhere.
"""

import copy
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    checkpoint_steps,
    lines,
    only_error,
    random_images,
    same,
    signal_at,
    state,
    table,
    tree,
    weights,
)

import run_vae
from codebase import checkpoint, data, evaluate, train
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime.launch import own_torch_settings
from codebase.runtime.parallel import Processes, step_seed

STANDARD_ERRORS = 5  # the seeds are fixed, so that no test fails by chance


def folders(place: Path, *names: str) -> list[Path]:
    """New folders of these names."""
    made = [place / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


# ---------------------------------------------------------------------------------------------
# The seeds of the steps


@pytest.mark.parametrize("seed, rank", [(0, 0), (1, 7), (2**31, 1)])
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


def uniform_bytes(count: int) -> torch.Tensor:
    """What pixels are binarised by, scaled to variance 1."""
    noise = torch.randint(0, 255, (count,), dtype=torch.uint8)
    return (noise.double() - 127) / math.sqrt((255**2 - 1) / 12)


@pytest.fixture(scope="module", params=[torch.randn, uniform_bytes], ids=["normals", "bytes"])
def drawn(request) -> torch.Tensor:
    """What 3000 steps of a run draw first, 200 numbers each."""
    processes = Processes()
    rows = []
    with torch.random.fork_rng([]):
        for step in range(3000):
            processes.seed_step(3, step)
            rows.append(request.param(200).double())
    return torch.stack(rows)


@pytest.mark.parametrize("lag", [1, 2])
def test_neighbouring_steps_are_uncorrelated(drawn, lag):
    products = drawn[lag:] * drawn[:-lag]  # of variance 1, where there is no correlation
    overall = products.sum() / math.sqrt(products.numel())
    per_position = products.sum(0) / math.sqrt(len(products))
    assert abs(overall) < STANDARD_ERRORS
    assert per_position.abs().max() < STANDARD_ERRORS


def test_what_a_step_draws_has_no_trend(drawn):
    """Neither with the number of the step nor within it, and no mean."""
    steps = torch.arange(len(drawn), dtype=torch.float64)
    steps = (steps - steps.mean()) / steps.std()
    trend = (steps[:, None] * drawn).sum(0) / math.sqrt(len(drawn))
    means = drawn.sum(0) / math.sqrt(len(drawn))
    assert trend.abs().max() < STANDARD_ERRORS
    assert abs(trend.sum()) / math.sqrt(len(trend)) < STANDARD_ERRORS
    assert means.abs().max() < STANDARD_ERRORS
    assert abs(means.sum()) / math.sqrt(len(means)) < STANDARD_ERRORS
    assert drawn.var() == pytest.approx(1, abs=0.02)


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
# In parts as in one piece


def assert_same_training(one: Path, two: Path, name: str, step: int) -> None:
    """Weights, tables and moments are equal bit for bit, those of the open row too."""
    assert same(weights(one, name, step), weights(two, name, step))
    assert table(one, name) == table(two, name)
    first = state(one, name)
    second = state(two, name)
    assert first["step"] == second["step"] == step
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for number, moments in first["optimizer"].items():
        assert same(moments, second["optimizer"][number])
    for key in ("names", "steps", "sums"):
        assert first["metrics"][key] == second["metrics"][key]


VARIANTS = [
    ("vae", "", ""),
    ("vae", "--lr 0.05", "_lr=0.05"),
    ("gmvae", "--train_iw 3", "_train_iw=3"),
    ("ssvae", "", ""),
    ("ssvae", "--labels 200", "_labels=200"),
    ("fsvae", "", ""),
]


@pytest.mark.parametrize("model, flags, part", VARIANTS)
def test_parts_are_one_piece_bit_for_bit(model, flags, part, few, script, tmp_path):
    whole, parts = folders(tmp_path, "whole", "parts")
    name = NAMES[model].replace("_data", f"{part}_data")
    flags = ["--iter_save", 3, *flags.split()]
    lines(script(model, "--iter_max", 7, *flags, cwd=whole))
    lines(script(model, "--iter_max", 4, *flags, cwd=parts))
    for file in ("test.csv", "metrics.csv"):  # they are completed from the state
        (parts / "logs" / name / file).unlink()
    assert "resuming from step 4" in lines(script(model, "--iter_max", 7, *flags, cwd=parts))
    assert_same_training(whole, parts, name, 7)
    wanted = table(whole, name, "test.csv")
    assert [row for row in table(parts, name, "test.csv") if row["step"] != "4"] == wanted


def test_a_run_may_be_parted_anywhere(few, script, tmp_path, monkeypatch):
    """At a row of the table, between two, beyond a pass over the images, with a rest at the end."""
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    whole, parts = folders(tmp_path, "whole", "parts")
    odd = ("--batch_size", 70)  # a pass of 1,500 images ends within the 22nd batch
    lines(script("vae", "--iter_max", 25, *odd, cwd=whole))
    for stop in (10, 15, 20, 25):
        lines(script("vae", "--iter_max", stop, "--iter_save", 100 - stop, *odd, cwd=parts))
        rows = list(range(10, stop + 1, 10))
        if stop % 10:
            rows.append(stop)
        assert [row["step"] for row in table(parts, NAMES["vae"])] == [str(row) for row in rows]
    assert checkpoint_steps(whole, "vae") == [25]
    assert checkpoint_steps(parts, "vae") == [10, 15, 20, 25]
    assert_same_training(whole, parts, NAMES["vae"], 25)


@pytest.mark.parametrize("model", ["vae", "ssvae", "fsvae"])
def test_watching_changes_no_bit_of_training(model, few, script, tmp_path, monkeypatch):
    """However often a run is evaluated, stored, or its table written."""
    seldom, often = folders(tmp_path, "seldom", "often")
    lines(script(model, "--iter_max", 9, "--iter_save", 1000, cwd=seldom))
    monkeypatch.setattr(train, "WRITE_EVERY", 0)
    lines(script(model, "--iter_max", 9, "--iter_save", 3, cwd=often))
    assert_same_training(seldom, often, NAMES[model], 9)
    thrice = table(often, NAMES[model], "test.csv")
    assert [row["step"] for row in thrice] == ["3", "6", "9"]
    assert table(seldom, NAMES[model], "test.csv") == thrice[-1:]


def test_an_interrupted_run_may_end_there(few, script, tmp_path, monkeypatch):
    """At exactly that step: checkpoint, table and pictures are made, and --train 0 finds them."""
    stopped, whole = folders(tmp_path, "stopped", "whole")
    begin = 0
    for step, number in ((3, signal.SIGINT), (10, signal.SIGTERM), (12, signal.SIGINT)):
        with monkeypatch.context() as patch:
            signal_at(patch, step - begin, number)
            line = only_error(script("vae", "--iter_max", 30, cwd=stopped), 128 + number)
        assert f"stopped at step {step}, state saved; the same command resumes from there" in line
        assert step not in checkpoint_steps(stopped, "vae")
        trained = lines(script("vae", "--iter_max", step, cwd=stopped))
        assert step in checkpoint_steps(stopped, "vae")
        assert (stopped / "logs" / NAMES["vae"] / "curves.png").exists()
        assert table(stopped, NAMES["vae"])[-1]["step"] == str(step)
        loaded = lines(script("vae", "--iter_max", step, "--train", 0, "--iw", 1, cwd=stopped))
        assert any(f"model-{step:05d}.pt" in line for line in loaded)
        assert trained[-1] in loaded
        begin = step
    lines(script("vae", "--iter_max", 12, cwd=whole))
    assert_same_training(whole, stopped, NAMES["vae"], 12)


def test_an_interrupted_run_says_how_far_it_is(few, script, tmp_path, monkeypatch):
    """It has no checkpoint yet that could be given."""
    with monkeypatch.context() as patch:
        signal_at(patch, 7, signal.SIGINT)
        assert script("vae", "--iter_max", 20).returncode == 130
    before = tree(tmp_path)
    line = only_error(script("vae", "--iter_max", 5))
    assert "is at step 7" in line
    assert "give 7 or more" in line
    assert "[]" not in line
    assert tree(tmp_path) == before
    lines(script("vae", "--iter_max", 7))


def test_a_finished_run_is_not_trained_again(few, script, tmp_path):
    first = lines(script("vae", "--iter_max", 3))
    before = tree(tmp_path / "checkpoints")
    again = lines(script("vae", "--iter_max", 3))
    assert again[-1] == first[-1]
    assert any("trained before" in line for line in again)
    assert tree(tmp_path / "checkpoints") == before


def test_runs_of_a_seed_store_the_same(few, script, tmp_path):
    """Apart from the time that they took, and whatever was drawn before."""
    states = []
    for folder, drawn in zip(folders(tmp_path, "first", "second"), (5, 6), strict=True):
        torch.manual_seed(drawn)
        lines(script("vae", "--iter_max", 3, cwd=folder))
        states.append(state(folder))
        del states[-1]["metrics"]["seconds"]
    first, second = states
    for one, other in zip(tensors_in(first), tensors_in(second), strict=True):
        assert torch.equal(one, other)
    assert first["metrics"] == second["metrics"]
    assert first["settings"] == second["settings"]


# ---------------------------------------------------------------------------------------------
# A step out of the blue, and what is stored


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


def test_a_step_out_of_the_blue(script, digits_dir, monkeypatch, tmp_path):
    """Its terms and weights are those of the run, whatever was drawn before."""
    add = train.Metrics.add
    of_run = []

    def record(metrics, terms):
        of_run.append(terms)
        add(metrics, terms)

    monkeypatch.setattr(train.Metrics, "add", record)
    lines(script("vae", "--iter_max", 3))
    stored = state(tmp_path)
    lines(script("vae", "--iter_max", 4))
    assert len(of_run) == 4
    for drawn in (0, 1234):
        with own_torch_settings("cpu"):
            torch.manual_seed(drawn)
            torch.randn(drawn)
            terms, model = step_from(copy.deepcopy(stored), digits_dir)
        assert same(terms, of_run[3])
        assert same(model, weights(tmp_path, NAMES["vae"], 4))


def tensors_in(content) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    found = []
    if isinstance(content, dict):
        for value in content.values():
            found += tensors_in(value)
    return found


def test_nothing_random_is_in_the_state(few, script, tmp_path):
    lines(script("vae", "--iter_max", 3))
    stored = state(tmp_path)
    keys = {"format", "step", "settings", "compiled", "processes", "model", "optimizer", "metrics"}
    assert stored.keys() == keys
    assert keys == {"format", *checkpoint.STATE_KEYS}
    assert stored["metrics"].keys() == {"names", "rows", "steps", "sums", "tests", "seconds"}
    # Torch gives the states of its generators as bytes.
    assert {tensor.dtype for tensor in tensors_in(stored)} == {torch.float32}


# ---------------------------------------------------------------------------------------------
# The random numbers of who calls it


def test_main_keeps_the_callers_random_numbers(few, script, monkeypatch):
    """Where it fails, too."""

    def fail(*args, **kwargs):
        torch.rand(3)
        raise ValueError("a bug")

    torch.manual_seed(5)
    before = torch.get_rng_state()
    for model in ("vae", "ssvae"):
        lines(script(model, "--iter_max", 1, "--batch_size", 10))
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(evaluate, "bounds", fail)
    assert script("vae", "--iter_max", 2, "--run", 1).returncode == 1
    assert torch.equal(torch.get_rng_state(), before)


EVALUATIONS = {
    "bounds": (VAE, lambda model: evaluate.bounds(model, torch.zeros(130, 784), ms=[1, 10])),
    "mixture": (
        lambda: GMVAE(k=5),
        lambda model: evaluate.bounds(model, torch.zeros(30, 784), ms=[1]),
    ),
    "latent use": (VAE, lambda model: evaluate.latent_use(model, random_images(30, 784))),
    "confusion": (SSVAE, lambda model: evaluate.confusion_matrix(model, random_images(30, 784))),
}


@pytest.mark.parametrize("which", EVALUATIONS)
def test_evaluation_keeps_the_callers_random_numbers(which):
    """And draws its own, whatever was drawn before."""
    make, evaluated = EVALUATIONS[which]
    torch.manual_seed(5)
    model = make()
    found = []
    for _ in range(2):
        before = torch.get_rng_state()
        found.append(evaluated(model))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
    first, second = found
    if which == "confusion":
        assert torch.equal(first, second)
    else:
        assert first == second


def test_evaluation_on_a_cpu_touches_no_gpu(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a GPU's random numbers were touched")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ["get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"]:
        monkeypatch.setattr(torch.cuda, name, touched)
    evaluate.bounds(VAE(), torch.zeros(3, 784), ms=[1])

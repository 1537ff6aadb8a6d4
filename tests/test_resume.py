"""A step of a training depends on the weights, the optimizer and (seed, number of the step) alone.

So nothing random is stored, and a run may be stopped and resumed anywhere.
"""

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
    same,
    signal_at,
    state,
    table,
    tree,
    weights,
)

from codebase import checkpoint, data, evaluate, train
from codebase.models.vae import VAE
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


def test_runs_and_processes_share_no_seed():
    """Of the first ten million steps of ten runs on eight processes: a step adds 1 to the seed."""
    assert step_seed(3, 1_000_000, 2) == (step_seed(3, 0, 2) + 1_000_000) % 2**32
    firsts = sorted(step_seed(seed, 0, rank) for seed in range(10) for rank in range(8))
    distances = np.diff([*firsts, firsts[0] + 2**32])  # the seed after the greatest one is 0
    assert distances.min() > 10_000_000


def uniform_bytes(count: int) -> torch.Tensor:
    """What pixels are binarised by, scaled to variance 1."""
    noise = torch.randint(0, 255, (count,), dtype=torch.uint8)
    return (noise.double() - 127) / math.sqrt((255**2 - 1) / 12)


@pytest.mark.parametrize("draw", [torch.randn, uniform_bytes])
def test_neighbouring_steps_are_uncorrelated(draw):
    """What 3000 steps of a run draw first, 200 numbers each."""
    processes = Processes()
    rows = []
    with torch.random.fork_rng([]):
        for step in range(3000):
            processes.seed_step(3, step)
            rows.append(draw(200).double())
    drawn = torch.stack(rows)
    products = drawn[1:] * drawn[:-1]  # of variance 1, where there is no correlation
    overall = products.sum() / math.sqrt(products.numel())
    per_position = products.sum(0) / math.sqrt(len(products))
    assert abs(overall) < STANDARD_ERRORS
    assert per_position.abs().max() < STANDARD_ERRORS


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
    ("vae", "--lr 0.05", "_lr=0.05"),
    ("gmvae", "--train_iw 3", "_train_iw=3"),
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


@pytest.mark.parametrize("model", ["ssvae", "fsvae"])
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
# The learning rate along half a cosine

COSINE = ["--schedule", "cosine", "--lr", 0.004, "--iter_max", 6, "--iter_save", 2]
COSINE_NAME = NAMES["vae"].replace("_data", "_lr=0.004_schedule=cosine_data")


def test_a_run_takes_the_rate_of_its_step(script, digits_dir, tmp_path):
    """Its weights are those of a plain loop with torch's own scheduler."""
    lines(script("vae", *COSINE))

    torch.manual_seed(0)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    images = data.drawn_digits(str(digits_dir), "train", False)
    batches = train.order(len(images), 100, 0, 0, "cpu")
    for step in range(6):
        Processes().seed_step(0, step)
        loss, _ = model.loss(images.binary(next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    for name, value in weights(tmp_path, COSINE_NAME, 6).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_along_the_same_cosine(few, script, tmp_path, monkeypatch):
    whole, parts = folders(tmp_path, "whole", "parts")
    lines(script("vae", *COSINE, cwd=whole))
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGINT)
        only_error(script("vae", *COSINE, cwd=parts), 130)
    assert "resuming from step 3" in lines(script("vae", *COSINE, cwd=parts))
    assert same(weights(parts, COSINE_NAME, 6), weights(whole, COSINE_NAME, 6))


def test_another_end_of_the_cosine_is_refused(few, script, tmp_path):
    lines(script("vae", *COSINE))
    before = tree(tmp_path)
    line = only_error(script("vae", *COSINE, "--iter_max", 8))
    assert "--iter_max" in line
    assert "was made with 6, not 8" in line
    assert tree(tmp_path) == before
    # Its checkpoints can be evaluated, each of them.
    lines(script("vae", *COSINE, "--iter_max", 4, "--train", 0, "--iw", 1))


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


def test_nothing_random_is_in_the_state(few, script, tmp_path):
    lines(script("vae", "--iter_max", 3))
    stored = state(tmp_path)
    keys = {"format", "step", "settings", "compiled", "processes", "device", "threads"}
    keys |= {"model", "optimizer", "metrics"}
    assert stored.keys() == keys
    assert keys == {"format", "device", "threads", *checkpoint.STATE_KEYS}
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


def test_evaluation_keeps_the_callers_random_numbers():
    """And draws its own, whatever was drawn before."""
    model = VAE()
    found = []
    for drawn in (5, 6):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        found.append(evaluate.bounds(model, torch.zeros(130, 784), ms=[1, 10]))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_other_threads_are_said(few, script, monkeypatch):
    """Sums of other threads round otherwise."""
    lines(script("vae", "--iter_max", 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    resumed = lines(script("vae", "--iter_max", 3))
    assert "the steps before were of 1 threads: the bits will differ" in resumed
    assert not any("the bits will differ" in line for line in lines(script("vae", "--iter_max", 4)))

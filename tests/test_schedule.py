"""The learning rate along half a cosine: --schedule cosine."""

import math

import pytest
import torch
from conftest import same, tree, weights

import run_vae
from codebase import data, train
from codebase.models.vae import VAE
from codebase.runtime.parallel import Processes

NAME = "model=vae_z=10_schedule=cosine_data=digits_run=0000"
COSINE = ["--schedule", "cosine", "--iter_max", 6, "--iter_save", 2]


def test_the_rate_falls_along_half_a_cosine():
    run = run_vae.parse(["--schedule", "cosine", "--iter_max", "1000", "--lr", "0.004"])
    assert train.rate_of_step(run, 0) == 0.004
    assert train.rate_of_step(run, 500) == pytest.approx(0.002)
    assert train.rate_of_step(run, 250) == pytest.approx(0.004 * (1 + math.sqrt(0.5)) / 2)
    assert 0 < train.rate_of_step(run, 999) < 1e-8
    constant = run.changed(schedule="constant")
    assert train.rate_of_step(constant, 999) == 0.004


def test_a_run_takes_the_rate_of_its_step(script, digits_dir, tmp_path):
    """Its weights are those of a plain loop with torch's own scheduler."""
    assert script("vae", *COSINE).returncode == 0

    torch.manual_seed(0)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
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
    for name, value in weights(tmp_path, NAME, 6).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_along_the_same_cosine(script, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert script("vae", *COSINE, cwd=whole).returncode == 0

    def fail(step, *args):
        store(step, *args)
        if step == 2:
            raise OSError("the machine stops here")

    store = train.store
    monkeypatch.setattr(train, "store", fail)
    assert script("vae", *COSINE, cwd=parts).returncode == 1
    monkeypatch.setattr(train, "store", store)
    resumed = script("vae", *COSINE, cwd=parts)
    assert "resuming from step 2" in resumed.stdout
    assert same(weights(parts, NAME, 6), weights(whole, NAME, 6))


def test_another_number_of_steps_is_refused(script, tmp_path):
    assert script("vae", *COSINE).returncode == 0
    before = tree(tmp_path)
    refused = script("vae", "--schedule", "cosine", "--iter_max", 8)
    assert refused.returncode == 2
    assert "--iter_max" in refused.stderr
    assert "was made with 6, not 8" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert tree(tmp_path) == before
    # Its checkpoints can be evaluated, each of them.
    evaluated = script("vae", "--schedule", "cosine", "--iter_max", 4, "--train", 0, "--iw", 1)
    assert evaluated.returncode == 0

"""Evaluation: bounds, latent use, confusion matrix, printed lines, what it leaves alone, memory."""

import json
import math
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from conftest import MNIST, REFERENCE, needs_mnist, needs_reference
from torch.utils._python_dispatch import TorchDispatchMode
from untrained import ALL, BINARY, binary, made, noise, prior, spread_out

from codebase import checkpoint, data, evaluate, utils

EVALUATIONS = {
    "vae": lambda model: evaluate.bounds(model, binary(130), (1, 10)),
    "gmvae": lambda model: evaluate.latent_use(model, noise(30)),
    "ssvae": lambda model: evaluate.confusion_matrix(model, noise(30)).tolist(),
    "fsvae": lambda model: evaluate.conditional_bound(model, noise(30, 3072)),
}


@ALL
def test_evaluation_leaves_a_program_as_it_was(kind):
    """The model's mode and gradients, and the random numbers, on which it does not depend."""
    for training in (True, False):
        model = made(kind).train(training)
        torch.manual_seed(9)
        wanted = torch.rand(3)
        torch.manual_seed(9)
        first = EVALUATIONS[kind](model)
        assert torch.equal(torch.rand(3), wanted)
        assert EVALUATIONS[kind](model) == first
        assert {module.training for module in model.modules()} == {training}
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())


@BINARY
@pytest.mark.parametrize("chunk", [7, 1000])
def test_bounds_are_those_of_torch_distributions(kind, settings, chunk, monkeypatch):
    """Of all their samples, however many are decoded at a time."""
    model = spread_out(made(kind, **settings))
    x = binary(5)
    ms = (1, 7, 30, 100, 130, 250)
    drawn = []
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 5 * chunk + 3)
    model.dec.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[0]))
    found = evaluate.bounds(model, x, ms)
    assert {len(z) for z in drawn} == {chunk}
    z = torch.cat(drawn)
    assert 250 <= len(z) < 250 + chunk and z.shape[1:] == (5, 10)
    assert len(z.unique()) > 0.99 * z.numel()
    with torch.no_grad():
        m, v = model.enc(x)
        q = td.Independent(td.Normal(m, v.sqrt()), 1)
        log_p_x = td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1)
        log_p_z = prior(model).log_prob(z)
        log_q_z = q.log_prob(z)
        log_w = (log_p_x + log_p_z - log_q_z).double()
        kl = (log_q_z - log_p_z)[:100].mean()
        if kind == "vae":
            kl = td.kl_divergence(q, prior(model).expand([5])).mean()
        wanted = {"kl": kl.item(), "rec": -log_p_x[:100].mean().item()}
        wanted["nelbo"] = wanted["kl"] + wanted["rec"]
        for m in ms:
            groups = log_w[: max(100 // m, 1) * m].unflatten(0, (-1, m))
            wanted[f"niwae_{m}"] = -(groups.logsumexp(1) - math.log(m)).mean().item()
            wanted[f"ess_{m}"] = (1 / groups.softmax(1).square().sum(1)).mean().item()
    assert found == pytest.approx(wanted, rel=1e-5, abs=2e-3)


@pytest.mark.parametrize("kind, settings", [("vae", {}), ("gmvae", {"k": 5})])
def test_iwae_tightens_to_the_log_likelihood(kind, settings):
    """Which the midpoint rule has exactly where z has one dimension: of each image, and in mean."""
    model = spread_out(made(kind, z_dim=1, **settings))
    x = binary(4)
    with torch.no_grad():
        z = torch.linspace(-12, 12, 12_001)[:, None]
        log_p_x = torch.stack([utils.log_bernoulli_with_logits(row, model.dec(z)) for row in x])
        exact = -((log_p_x + model.log_prior(z)).logsumexp(1) + math.log(24 / 12_000))
    assert exact.max() - exact.min() > 1
    of_each = evaluate.bounds(model, x, (1, 10, 100, 20_000), reduce=False)
    assert of_each["niwae_20000"].tolist() == pytest.approx(exact.tolist(), abs=0.1)
    mean = {name: values.mean() for name, values in of_each.items()}
    assert mean["niwae_20000"].item() == pytest.approx(exact.mean().item(), abs=0.05)
    assert mean["niwae_1"] > mean["niwae_10"] > mean["niwae_100"] > exact.mean() - 0.02
    assert mean["nelbo"] > exact.mean()


def test_bounds_can_be_had_of_every_image():
    """In the images' order; a figure of all is their mean."""
    model = spread_out(made("vae"))
    x = binary(100).repeat(3, 1)[:230]
    mean = evaluate.bounds(model, x, (10,))
    of_each = evaluate.bounds(model, x, (10,), reduce=False)
    assert of_each.keys() == mean.keys()
    for name, values in of_each.items():
        assert values.shape == (230,)
        assert values.mean().item() == pytest.approx(mean[name], rel=1e-5)
    with torch.no_grad():
        wanted = utils.kl_normal(*model.enc(x), torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(of_each["kl"].float(), wanted)


def test_pixels_outside_zero_to_one_are_refused():
    words = r"pixels in \[0, 1\], not from (nan|-?[\d.]+) to (nan|[\d.]+)"
    for x in [255 * binary(3), binary(3) - 0.01, binary(3) * math.nan]:
        with pytest.raises(ValueError, match=words):
            evaluate.bounds(made("vae"), x, ())
    assert math.isfinite(evaluate.bounds(made("vae"), binary(3) * 0.5, ())["nelbo"])


ORIGINAL = [
    ("vae", "model=vae_z=10_run=0000", 20_000),
    pytest.param("gmvae", "model=gmvae_z=10_k=500_run=0000", 20_000, marks=pytest.mark.long),
    ("ssvae", "model=ssvae_gw=001_cw=100_run=0000", 30_000),
]


@needs_mnist
@needs_reference
@pytest.mark.parametrize("kind, name, step", ORIGINAL)
def test_original_checkpoints_have_their_reported_figures(kind, name, step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(REFERENCE / "checkpoints")
    stored = json.loads((REFERENCE / "checkpoints" / "reported.json").read_text())
    reported = stored[f"{name}/model-{step}.pt"]
    model = checkpoint.load_model_by_name(made(kind, name=name), step)
    test = data.mnist(str(MNIST), "test", check=1)
    if kind == "ssvae":
        accuracy = evaluate.accuracy(evaluate.confusion_matrix(model, test))
        assert accuracy == pytest.approx(reported["accuracy"], abs=1e-4)
        return
    values = json.loads((REFERENCE / "values.json").read_text())
    old = values["protocol_2018"][f"reference_{kind}"]["2018"]
    for wanted, which in [(reported, "subset"), (old, "2018")]:
        found = evaluate.bounds(model, data.test_subset(test, which))
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=0.25)


# ---------------------------------------------------------------------------------------------
# Other metrics, and what is printed


def test_a_conditional_bound_weighs_images_alike(monkeypatch):
    model = made("fsvae")
    images = noise(12, 3072)
    index = torch.arange(10)
    with torch.no_grad():
        qm, qv = model.enc(images.scaled(index), images.one_hot(index))
    wanted = utils.kl_normal(qm, qv, torch.zeros(1), torch.ones(1)).mean().item()
    monkeypatch.setattr(evaluate, "ROWS", 7)  # pieces of 7 and 3 images
    found = evaluate.conditional_bound(model, images, most=10)
    assert found["kl"] == pytest.approx(wanted, rel=1e-5)
    assert found["nelbo"] == pytest.approx(found["kl"] + found["rec"], rel=1e-5)


def test_confusion_has_true_digits_as_rows(monkeypatch):
    model = made("ssvae")
    images = noise(25)
    guesses = model.cls(images.pixels / 255).argmax(-1)
    monkeypatch.setattr(evaluate, "ROWS", 7)
    counts = evaluate.confusion_matrix(model, images)
    wanted = torch.zeros(10, 10, dtype=torch.int64)
    for digit, guess in zip(images.labels, guesses, strict=True):
        wanted[digit, guess] += 1
    assert torch.equal(counts, wanted) and not torch.equal(counts, counts.T)
    right = (guesses == images.labels).sum().item()
    assert evaluate.accuracy(counts) == right / 25


def test_latent_use_counts_what_images_move():
    model = made("gmvae", z_dim=4, k=3)
    images = noise(200)
    with torch.no_grad():
        model.enc.net[4].weight[:2].zero_()  # two of the four posterior means do not depend on x
        model.enc.net[4].weight[2:4].mul_(50)
        model.z_pre[0, 0] = 1e3  # a component far from every image
    found = evaluate.latent_use(model, images)
    assert found["active"] == 2 and 1 <= found["components"] <= 2
    assert evaluate.latent_use(made("vae"), images).keys() == {"active"}


def test_printed_lines_are_those_looked_for(capsys):
    evaluate.print_bounds({"nelbo": 3.5, "kl": 1.0, "rec": 2.5, "niwae_10": 3.25, "ess_10": 2.0})
    evaluate.print_accuracy(0.9429, " (a remark)")
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[2, 7] = 1
    counts[2, 2] = 3
    evaluate.print_confusion(counts)
    bounds, iwae, accuracy, _, head, *rows = capsys.readouterr().out.splitlines()
    assert bounds == "NELBO: 3.5. KL: 1.0. Rec: 2.5" and iwae == "Negative IWAE-10: 3.25"
    assert accuracy == "Test set classification accuracy: 0.9429 (a remark)"
    assert head.split() == ["true", *"0123456789", "accuracy"]
    assert [row.split() for row in rows][2] == [*"20030000100", "0.7500"]


class Largest(TorchDispatchMode):
    """Inside, remember the size of the largest tensor that is made."""

    elements = 0
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                # An expanded tensor has fewer bytes than its elements would take.
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_memory_grows_with_neither_images_nor_k():
    sizes = []
    for n in (100, 300):
        model = made("gmvae", k=20)
        with Largest() as largest:
            evaluate.bounds(model, binary(n), (1,))
        sizes.append(largest.bytes)
    assert sizes[0] == sizes[1]
    for k in (500, 100_000):
        model = made("gmvae", z_dim=2, k=k)
        with Largest() as largest:
            evaluate.bounds(model, binary(5), (1,))
            evaluate.latent_use(model, noise(400))
        assert largest.bytes <= evaluate.MEMORY["cpu"]


def peak_memory() -> float:
    """The most megabytes that this process has had so far."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) / 1024


def memory_of_bounds(m: int) -> float:
    """The megabytes by which bounds of 100 images raise this process's peak."""
    model = made("vae")
    x = binary(100)
    evaluate.bounds(model, x, [1])

    def log_densities(x, qm, qv, z):
        return z.sum(-1), z.sum(-1), z.sum(-1)

    model.log_densities = log_densities  # without the networks, whose memory was needed already
    before = peak_memory()
    evaluate.bounds(model, x, [1, 1000, m])
    return peak_memory() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_the_largest_m_takes_200_megabytes():
    """In a process of its own, whose peak is not that of other tests."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert 30 < pool.apply(memory_of_bounds, (100_000,)) < 200

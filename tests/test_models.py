"""The four models: weights, bounds against exact values, losses, samples, files of weights."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from conftest import needs_cuda, same
from untrained import ALL, BINARY, KINDS, batch, binary, made, one_hot, prior, spread_out

from codebase import checkpoint
from codebase.models import nns
from codebase.runtime.files import UsageError

SIZES = {  # of the layers of each network, in the order in which they are made
    "vae": {"enc": [784, 300, 300, 20], "dec": [10, 300, 300, 784]},
    "gmvae": {"enc": [784, 300, 300, 20], "dec": [10, 300, 300, 784]},
    "ssvae": {
        "enc": [794, 300, 300, 128],
        "dec": [74, 300, 300, 784],
        "cls": [784, 300, 300, 10],
    },
    "fsvae": {"enc": [3082, 500, 500, 20], "dec": [20, 500, 500, 3072]},
}


TERMS = {"train/loss", "gen/elbo", "gen/kl_z", "gen/rec"}


@ALL
def test_the_seed_fixes_the_weights(kind):
    """Their keys, shapes and first values are what other code reads; nn changes none."""
    torch.manual_seed(3)
    wanted = {}
    for network, sizes in SIZES[kind].items():
        for i in range(3):
            layer = torch.nn.Linear(sizes[i], sizes[i + 1])
            wanted[f"{network}.net.{2 * i}.weight"] = layer.weight
            wanted[f"{network}.net.{2 * i}.bias"] = layer.bias
    if kind == "gmvae":
        wanted["z_pre"] = torch.randn(1, 1000, 10) / math.sqrt(5000)
        wanted["pi"] = torch.full((500,), 1 / 500)
    else:
        wanted["z_prior_m"] = torch.zeros(1)
        wanted["z_prior_v"] = torch.ones(1)
    model = made(kind, seed=3)
    assert same(model.state_dict(), wanted) and model.name == kind
    assert same(made(kind, seed=3, nn="v1").state_dict(), wanted)


@pytest.mark.parametrize("shapes", [((7, 5), (7, 3)), ((7, 5), (4, 1, 3))])
def test_a_network_is_its_plain_layers(shapes):
    torch.manual_seed(0)
    network = nns.Network(5, 3, 8, 6)
    x, y = (torch.randn(shape, requires_grad=True) for shape in shapes)
    w0, b0, w1, b1, w2, b2 = network.parameters()
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    both = torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], -1)
    plain = F.linear(F.elu(F.linear(F.elu(F.linear(both, w0, b0)), w1, b1)), w2, b2)
    found = network(x, y)
    torch.testing.assert_close(found, plain)
    inputs = [x, y, *network.parameters()]
    ours = torch.autograd.grad(found.square().sum(), inputs)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_classifier_has_relus():
    network = made("ssvae").cls
    w0, b0, w1, b1, w2, b2 = network.parameters()
    x = binary(5)
    plain = F.linear(F.relu(F.linear(F.relu(F.linear(x, w0, b0)), w1, b1)), w2, b2)
    torch.testing.assert_close(network(x), plain)


# ---------------------------------------------------------------------------------------------
# Bounds of VAE and GMVAE


@BINARY
def test_the_elbo_is_that_of_torch_distributions(kind, settings):
    """The loss is it too, with one importance sample or none asked for; beta weighs its KL."""
    model = made(kind, **settings)
    x = binary(20)
    torch.manual_seed(2)
    nelbo, kl, rec = model.negative_elbo_bound(x)
    torch.manual_seed(2)
    m, v = model.enc(x)
    z = m + v.sqrt() * torch.randn_like(m)
    q = td.Independent(td.Normal(m, v.sqrt()), 1)
    wanted = q.log_prob(z) - prior(model).log_prob(z)
    if kind == "vae":
        wanted = td.kl_divergence(q, prior(model).expand([20]))
    torch.testing.assert_close(kl, wanted.mean())
    torch.testing.assert_close(rec, -td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1).mean())
    torch.testing.assert_close(nelbo, kl + rec)
    for given, loss_wanted in [
        ({}, nelbo),
        ({"train_iw": 1}, nelbo),
        ({"beta": 4.0}, rec + 4 * kl),
    ]:
        weighed = made(kind, **settings, **given)
        torch.manual_seed(2)
        loss, terms = weighed.loss(x)
        torch.testing.assert_close(loss, loss_wanted)
        assert loss.requires_grad
        assert set(terms) == TERMS
        torch.testing.assert_close(list(terms.values()), [loss, -nelbo, kl, rec])


@BINARY
def test_log_densities_are_those_of_torch_distributions(kind, settings):
    """Of every sample and image; the bound is the log mean of the weights that they make."""
    model = made(kind, **settings)
    x = binary(5)
    for iw in (1, 2, 30):
        torch.manual_seed(4)
        niwae, kl, rec = model.negative_iwae_bound(x, iw)
        torch.manual_seed(4)
        qm, qv = model.enc(x)
        z = qm + qv.sqrt() * torch.randn(iw, 5, 10)
        log_p_x = td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1)
        log_p_z = prior(model).log_prob(z)
        log_q_z = td.Normal(qm, qv.sqrt()).log_prob(z).sum(-1)
        found = model.log_densities(x, qm, qv, z)
        torch.testing.assert_close(found, (log_p_x, log_p_z, log_q_z))
        log_w = log_p_x + log_p_z - log_q_z
        torch.testing.assert_close(niwae, -(log_w.logsumexp(0) - math.log(iw)).mean())
        torch.testing.assert_close(kl, (log_q_z - log_p_z).mean(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(rec, -log_p_x.mean())
        assert niwae <= kl + rec + 1e-4


def test_the_iwae_bound_has_its_published_value():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (97, 784)).float()
    model = KINDS["vae"](z_dim=10)
    torch.manual_seed(0)
    assert model.negative_iwae_bound(x, iw=10)[0].item() == pytest.approx(544.3607, abs=0.15)


def test_samples_are_counted_by_whole_numbers():
    """Of any kind, from one on."""
    model = made("vae")
    x = binary(3)
    torch.manual_seed(1)
    wanted = model.negative_iwae_bound(x, 10)
    for iw in (np.uint8(10), torch.tensor(10)):
        torch.manual_seed(1)
        torch.testing.assert_close(model.negative_iwae_bound(x, iw), wanted, rtol=0, atol=0)
    for iw in (0, -1, 1.5, "3", np.int64(0), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="iw"):
            model.negative_iwae_bound(x, iw)


@BINARY
def test_train_iw_makes_the_bound_the_loss(kind, settings):
    model = spread_out(made(kind, **settings, train_iw=2))
    x = binary(20)
    torch.manual_seed(1)
    niwae, kl, rec = model.negative_iwae_bound(x, 2)
    wanted = torch.autograd.grad(niwae, list(model.parameters()))
    torch.manual_seed(1)
    loss, terms = model.loss(x)
    torch.testing.assert_close((loss, terms["train/loss"]), (niwae, niwae), rtol=0, atol=0)
    torch.testing.assert_close(terms["gen/elbo"], -(kl + rec))
    torch.testing.assert_close((terms["gen/kl_z"], terms["gen/rec"]), (kl, rec))
    assert loss < kl + rec - 1  # by far another value
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# SSVAE and FSVAE


def label_by_label(model, x, eps):
    """The SSVAE's bound as the handout has it, one label at a time."""
    log_q = model.cls(x).log_softmax(-1)
    kl_z = rec = 0
    for digit in range(10):
        y = torch.eye(10)[digit].expand(len(x), -1)
        m, v = model.enc(x, y)
        logits = model.dec(m + v.sqrt() * eps[digit], y)
        p = td.Normal(torch.zeros_like(m), torch.ones_like(m))
        weight = log_q[:, digit].exp()
        kl_z = kl_z + weight * td.kl_divergence(td.Normal(m, v.sqrt()), p).sum(-1)
        rec = rec - weight * td.Bernoulli(logits=logits).log_prob(x).sum(-1)
    uniform = td.Categorical(logits=torch.zeros_like(log_q))
    kl_y = td.kl_divergence(td.Categorical(logits=log_q), uniform)
    return kl_z.mean(), kl_y.mean(), rec.mean()


@pytest.mark.parametrize("certainty", [0.0, 1.0, 1000.0])
def test_the_ssvae_bound_sums_over_labels(certainty):
    """From a uniform classifier to one whose probabilities underflow."""
    model = made("ssvae")
    x = binary(8)
    with torch.no_grad():
        model.cls.net[4].weight.mul_(certainty)
        model.cls.net[4].bias.mul_(certainty)
    torch.manual_seed(5)
    nelbo, kl_z, kl_y, rec = model.negative_elbo_bound(x)
    torch.manual_seed(5)
    expected = label_by_label(model, x, torch.randn(10, 8, 64))
    torch.testing.assert_close((kl_z, kl_y, rec), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nelbo, kl_z + kl_y + rec)
    nelbo.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


SSVAE_TERMS = TERMS | {"gen/kl_y", "class/ce", "class/acc"}


def test_the_ssvae_loss_weighs_both_terms():
    model = made("ssvae", gen_weight=3, class_weight=7)
    x, xl, yl = batch("ssvae", 10)
    loss, terms = model.loss(x, xl, yl)
    assert set(terms) == SSVAE_TERMS
    torch.testing.assert_close(loss, -3 * terms["gen/elbo"] + 7 * terms["class/ce"])
    ce = -(yl * model.cls(xl).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(terms["class/ce"], ce)
    torch.testing.assert_close(model.classification_cross_entropy(xl, yl), ce)
    right = model.cls(xl).argmax(-1) == yl.argmax(-1)
    torch.testing.assert_close(terms["class/acc"], right.float().mean())


def test_without_weight_nothing_generative_is_computed():
    model = made("ssvae", gen_weight=0)
    x, xl, yl = batch("ssvae")
    model.enc.register_forward_hook(lambda *_: pytest.fail("the encoder was used"))
    loss, terms = model.loss(x, xl, yl)
    torch.testing.assert_close(loss, 100 * model.classification_cross_entropy(xl, yl))
    assert set(terms) == SSVAE_TERMS


def test_the_fsvae_bound_is_that_of_torch_distributions():
    model = made("fsvae")
    x, y = batch("fsvae")
    torch.manual_seed(1)
    nelbo, kl, rec = model.negative_elbo_bound(x, y)
    torch.manual_seed(1)
    m, v = model.enc(x, y)
    mean = model.compute_mean_given(m + v.sqrt() * torch.randn_like(m), y)
    wanted = -td.Normal(mean, math.sqrt(0.1)).log_prob(x).sum(-1).mean()
    torch.testing.assert_close(rec, wanted)
    standard = td.Normal(torch.zeros_like(m), torch.ones_like(m))
    wanted = td.kl_divergence(td.Normal(m, v.sqrt()), standard).sum(-1).mean()
    torch.testing.assert_close(kl, wanted)
    torch.testing.assert_close(nelbo, kl + rec)
    torch.manual_seed(1)
    loss, terms = model.loss(x, y)
    torch.testing.assert_close(list(terms.values()), [loss, -nelbo, kl, rec])
    assert set(terms) == TERMS
    other = one_hot(6).flip(0)
    torch.testing.assert_close(model.reconstruct(x, y, other), model.dec(m, other))


WRONG_LABELS = [torch.ones(10, 1), torch.arange(10), torch.ones(1, 10, 10), torch.ones(3, 10)]


@pytest.mark.parametrize("y", WRONG_LABELS)
def test_labels_that_are_not_one_hot_raise(y):
    x = binary(10)
    pixels = torch.rand(10, 3072)
    for call in (
        lambda: made("ssvae").classification_cross_entropy(x, y),
        lambda: made("ssvae", gen_weight=0).loss(x, x, y),
        lambda: made("fsvae").negative_elbo_bound(pixels, y),
    ):
        with pytest.raises(ValueError, match=r"y must be .*\(batch, 10\), not \(") as caught:
            call()
        assert str(tuple(y.shape)) in str(caught.value)


# ---------------------------------------------------------------------------------------------
# All models


BOUNDS = {
    "vae": lambda x: made("vae").negative_elbo_bound(x),
    "gmvae": lambda x: made("gmvae").negative_iwae_bound(x, 2),
    "ssvae": lambda x: made("ssvae").negative_elbo_bound(x),
    "torch.func": lambda x: torch.func.grad(lambda x: made("vae").loss(x)[0])(x),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_pixels_outside_zero_to_one_warn(bound):
    x = binary(3)
    for wrong in (255 * x, 2 * x - 1, x * math.nan):
        with pytest.warns(UserWarning, match=r"pixels outside \[0, 1\]"):
            BOUNDS[bound](wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BOUNDS[bound](x)
        BOUNDS[bound](x * 0.5)
        made("fsvae").loss(3 * torch.randn(6, 3072), one_hot(6))  # its pixels are free


def test_a_bound_can_be_mapped_over_images():
    """Where pixels cannot be looked at."""
    model = made("vae")
    of_one = lambda row: model.negative_elbo_bound(row[None])[0]  # noqa: E731
    assert torch.func.vmap(of_one, randomness="different")(255 * binary(3)).isfinite().all()


@BINARY
@pytest.mark.parametrize("n", [0, 3])
def test_models_of_binary_pixels_draw_images(kind, settings, n):
    model = made(kind, **settings)
    z = model.sample_z(n)
    assert z.shape == (n, 10)
    torch.testing.assert_close(model.compute_sigmoid_given(z), model.dec(z).sigmoid())
    assert model.sample_sigmoid(n).shape == (n, 784)
    for x in (model.sample_x(n), model.sample_x_given(z)):
        assert x.shape == (n, 784) and set(x.unique().tolist()) <= {0.0, 1.0}


def test_samples_of_the_mixture_follow_its_components():
    model = made("gmvae", z_dim=2, k=3)
    with torch.no_grad():
        model.z_pre[0, :3] = torch.tensor([[-5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])
        model.z_pre[0, 3:] = -5.0
    z = model.sample_z(3000)
    m, v = model.prior()
    nearest = torch.cdist(z, m[0]).argmin(1)
    assert torch.bincount(nearest, minlength=3).min() > 850
    assert (z - m[0, nearest]).var(0).tolist() == pytest.approx(v[0, 0].tolist(), rel=0.2)


# ---------------------------------------------------------------------------------------------
# Files of weights


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Store a model's weights, changed: stored("vae", change) returns them and their path."""
    monkeypatch.chdir(tmp_path)

    def store(kind, change):
        model = made(kind, seed=1)
        path = checkpoint.save_model_by_name(model, 7)
        torch.save(change(torch.load(path, weights_only=True)), path)
        return model.state_dict(), path

    return store


def test_a_checkpoint_is_a_bare_state_dict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made("vae", name="mine")
    path = checkpoint.save_model_by_name(model, 42)
    assert str(path) == "checkpoints/mine/model-00042.pt"
    found = torch.load(path, weights_only=True)
    assert same(found, model.state_dict())
    assert {value.device.type for value in found.values()} == {"cpu"}


def without(*keys):
    return lambda state: {key: state[key] for key in state if key not in keys}


OTHER_CONSTANTS = [
    ("vae", without("z_prior_m", "z_prior_v")),
    ("fsvae", without("z_prior_v")),
    ("fsvae", lambda state: {**state, "x_v": torch.ones(1)}),
    ("ssvae", lambda state: {**state, "y_prior": torch.ones(1)}),
]


@pytest.mark.parametrize("kind, change", OTHER_CONSTANTS)
def test_constants_may_be_missing_or_more(kind, change, stored):
    wanted, path = stored(kind, change)
    model = made(kind, seed=2)
    model.z_prior_v.fill_(3)
    assert checkpoint.load_model_by_name(model, 7) is model
    if "z_prior_v" not in torch.load(path, weights_only=True):
        assert model.z_prior_v.item() == 3  # it stays the model's own
        model.z_prior_v.fill_(1)
    assert same(model.state_dict(), wanted)


@pytest.mark.parametrize("kind, key", [("vae", "enc.net.0.bias"), ("gmvae", "pi")])
def test_other_missing_keys_are_refused(kind, key, stored):
    stored(kind, without(key))
    with pytest.raises(UsageError, match=f"has no {key}"):
        checkpoint.load_model_by_name(made(kind), 7)


WRAPPERS = {
    "'module.'": lambda state: {f"module.{key}": state[key] for key in state},
    "'module._orig_mod.'": lambda state: {f"module._orig_mod.{key}": state[key] for key in state},
    "'state_dict'": lambda state: {"epoch": 3, "state_dict": state},
    "'model_state_dict'": lambda state: {"model_state_dict": state, "loss": 1.5},
}


@pytest.mark.parametrize("found", WRAPPERS)
def test_wrapped_weights_are_refused_with_their_conversion(found, stored):
    wanted, path = stored("vae", WRAPPERS[found])
    model = made("vae", seed=2)
    with pytest.raises(UsageError) as caught:
        checkpoint.load_model_by_name(model, 7)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and found in message
    assert same(model.state_dict(), made("vae", seed=2).state_dict())
    exec(message.partition("in Python: ")[2], {})  # what it says to do helps
    checkpoint.load_model_by_name(model, 7)
    assert same(model.state_dict(), wanted)


# ---------------------------------------------------------------------------------------------
# On a GPU


@needs_cuda
@ALL
def test_losses_and_gradients_on_cuda_are_the_cpus(kind, monkeypatch):
    found = []
    for device in ("cpu", "cuda"):
        stream = torch.Generator().manual_seed(1)
        monkeypatch.setattr(
            torch, "randn_like", lambda m, s=stream: torch.randn(m.shape, generator=s).to(m.device)
        )
        model = made(kind).to(device)
        loss, terms = model.loss(*(value.to(device) for value in batch(kind, 40)))
        loss.backward()
        found.append(terms | {name: value.grad for name, value in model.named_parameters()})
        assert {value.device.type for value in found[-1].values()} == {device}
    on_cpu, on_cuda = found
    for name, value in on_cpu.items():
        scale = value.abs().amax().clamp(min=1)
        torch.testing.assert_close(on_cuda[name].cpu() / scale, value / scale, rtol=1e-4, atol=1e-4)

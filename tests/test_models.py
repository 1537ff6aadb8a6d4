"""The four models: weights, bounds against exact values, losses, samples, files of weights."""

import math
import warnings

import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from conftest import same
from untrained import ALL, BINARY, KINDS, batch, binary, made, one_hot, prior

from codebase import checkpoint
from codebase.models import nns
from codebase.runtime.files import UsageError

SIZES = {  # of the layers of each network, in the order in which they are made
    "vae": {"enc": [784, 300, 300, 20], "dec": [10, 300, 300, 784]},
    "gmvae": {"enc": [784, 300, 300, 20], "dec": [10, 300, 300, 784]},
    "ssvae": {"enc": [794, 300, 300, 128], "dec": [74, 300, 300, 784], "cls": [784, 300, 300, 10]},
    "fsvae": {"enc": [3082, 500, 500, 20], "dec": [20, 500, 500, 3072]},
}


def terms_of(loss, nelbo, kl, rec) -> dict[str, torch.Tensor]:
    """The terms of a loss as a model names them."""
    return {"train/loss": loss, "gen/elbo": -nelbo, "gen/kl_z": kl, "gen/rec": rec}


def assert_terms(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """By name, and in this order, which is that of the columns of metrics.csv."""
    assert list(found) == list(wanted)
    torch.testing.assert_close(found, wanted)


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
    constants = {"pi", "z_prior_m", "z_prior_v"} & wanted.keys()
    assert dict(model.named_buffers()).keys() == constants  # all else is learned
    assert same(made(kind, seed=3, nn="v1").state_dict(), wanted)


def test_a_network_is_its_plain_layers():
    """With ELUs, and in a classifier with ReLUs; a second input stands behind the first."""
    torch.manual_seed(0)
    network = nns.Network(5, 3, 8, 6)
    w0, b0, w1, b1, w2, b2 = network.parameters()
    x = torch.randn(7, 5)
    y = torch.randn(4, 1, 3)
    both = torch.cat([x.expand(4, 7, 5), y.expand(4, 7, 3)], -1)
    plain = F.linear(F.elu(F.linear(F.elu(F.linear(both, w0, b0)), w1, b1)), w2, b2)
    torch.testing.assert_close(network(x, y), plain)
    network = made("ssvae").cls
    w0, b0, w1, b1, w2, b2 = network.parameters()
    x = binary(5)
    plain = F.linear(F.relu(F.linear(F.relu(F.linear(x, w0, b0)), w1, b1)), w2, b2)
    torch.testing.assert_close(network(x), plain)


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
        assert_terms(terms, terms_of(loss_wanted, nelbo, kl, rec))


@BINARY
def test_the_iwae_bound_is_that_of_torch_distributions(kind, settings):
    """With train_iw it is the loss."""
    model = made(kind, **settings)
    x = binary(5)
    for iw in (1, 30):
        torch.manual_seed(4)
        niwae, kl, rec = model.negative_iwae_bound(x, iw)
        torch.manual_seed(4)
        qm, qv = model.enc(x)
        z = qm + qv.sqrt() * torch.randn(iw, 5, 10)
        log_p_x = td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1)
        log_p_z = prior(model).log_prob(z)
        log_q_z = td.Normal(qm, qv.sqrt()).log_prob(z).sum(-1)
        log_w = log_p_x + log_p_z - log_q_z
        torch.testing.assert_close(niwae, -(log_w.logsumexp(0) - math.log(iw)).mean())
        torch.testing.assert_close(kl, (log_q_z - log_p_z).mean(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(rec, -log_p_x.mean())
    model = made(kind, **settings, train_iw=30)
    torch.manual_seed(4)
    loss, terms = model.loss(x)
    assert_terms(terms, terms_of(niwae, kl + rec, kl, rec))
    torch.testing.assert_close(loss, niwae)


def test_the_iwae_bound_has_its_published_value():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (97, 784)).float()
    model = KINDS["vae"](z_dim=10)
    torch.manual_seed(0)
    assert model.negative_iwae_bound(x, iw=10)[0].item() == pytest.approx(544.3607, abs=0.15)


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


@pytest.mark.parametrize("certainty", [1.0, 1000.0])
def test_the_ssvae_bound_sums_over_labels(certainty):
    """Of a classifier whose probabilities underflow, too."""
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


def test_the_ssvae_loss_weighs_both_terms():
    model = made("ssvae", gen_weight=3, class_weight=7)
    x, xl, yl = batch("ssvae", 10)
    ce = -(yl * model.cls(xl).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model.classification_cross_entropy(xl, yl), ce)
    right = model.cls(xl).argmax(-1) == yl.argmax(-1)
    torch.manual_seed(6)
    nelbo, kl_z, kl_y, rec = model.negative_elbo_bound(x)
    wanted = {
        "train/loss": 3 * nelbo + 7 * ce,
        "gen/elbo": -nelbo,
        "gen/kl_z": kl_z,
        "gen/kl_y": kl_y,
        "gen/rec": rec,
        "class/ce": ce,
        "class/acc": right.float().mean(),
    }
    torch.manual_seed(6)
    loss, terms = model.loss(x, xl, yl)
    torch.testing.assert_close(loss, wanted["train/loss"])
    assert_terms(terms, wanted)
    without = made("ssvae", gen_weight=0)  # which computes nothing generative
    without.enc.register_forward_hook(lambda *_: pytest.fail("the encoder was used"))
    loss, terms = without.loss(x, xl, yl)
    torch.testing.assert_close(loss, 100 * ce)
    assert terms.keys() == wanted.keys()


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
    torch.testing.assert_close(loss, nelbo)
    assert_terms(terms, terms_of(nelbo, nelbo, kl, rec))
    other = one_hot(6).flip(0)
    torch.testing.assert_close(model.reconstruct(x, y, other), model.dec(m, other))


def test_labels_that_are_not_one_hot_raise():
    y = torch.arange(10)
    words = r"y must be .*\(batch, 10\), not \(10,\)"
    with pytest.raises(ValueError, match=words):
        made("ssvae").loss(binary(10), binary(10), y)
    with pytest.raises(ValueError, match=words):
        made("fsvae").negative_elbo_bound(torch.rand(10, 3072), y)


def test_pixels_outside_zero_to_one_warn():
    for wrong in (255 * binary(3), 2 * binary(3) - 1, binary(3) * math.nan):
        with pytest.warns(UserWarning, match=r"pixels outside \[0, 1\]"):
            made("vae").negative_elbo_bound(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("vae").negative_elbo_bound(binary(3) * 0.5)
        made("fsvae").loss(3 * torch.randn(6, 3072), one_hot(6))  # its pixels are free


@BINARY
def test_models_of_binary_pixels_draw_images(kind, settings):
    model = made(kind, **settings)
    torch.manual_seed(1)
    z = model.sample_z(3)
    p = model.dec(z).sigmoid()
    x = torch.bernoulli(p)
    assert z.shape == (3, 10)
    torch.testing.assert_close(model.compute_sigmoid_given(z), p)
    torch.manual_seed(1)
    torch.testing.assert_close(model.sample_sigmoid(3), p)
    torch.manual_seed(1)
    assert torch.equal(model.sample_x(3), x)
    x = model.sample_x_given(z)
    assert x.shape == (3, 784)
    assert set(x.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["vae", "ssvae", "fsvae"])
def test_samples_of_a_normal_prior_are_standard(kind):
    model = made(kind)
    torch.manual_seed(1)
    z = model.sample_z(4)
    torch.manual_seed(1)
    assert torch.equal(z, torch.randn(4, model.z_dim))


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


OTHER_CONSTANTS = [
    ("vae", lambda state: {key: state[key] for key in state if "prior" not in key}),
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


def test_other_missing_keys_are_refused(stored):
    stored("vae", lambda state: {key: state[key] for key in state if key != "enc.net.0.bias"})
    with pytest.raises(UsageError, match=r"has no enc\.net\.0\.bias"):
        checkpoint.load_model_by_name(made("vae"), 7)


def test_wrapped_weights_are_refused_with_their_conversion(stored):
    wanted, path = stored("vae", lambda state: {f"module.{key}": state[key] for key in state})
    model = made("vae", seed=2)
    with pytest.raises(UsageError) as caught:
        checkpoint.load_model_by_name(model, 7)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and "'module.'" in message
    assert same(model.state_dict(), made("vae", seed=2).state_dict())
    exec(message.partition("in Python: ")[2], {})  # what it says to do helps
    checkpoint.load_model_by_name(model, 7)
    assert same(model.state_dict(), wanted)

"""The four models: keys, bounds against exact values, evaluation, the original code's files."""

import json
import math
import multiprocessing
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from conftest import (
    MNIST,
    NAMES,
    REFERENCE,
    Largest,
    needs_cuda,
    needs_mnist,
    needs_reference,
    same,
    weights,
)

from codebase import checkpoint, data, evaluate, utils
from codebase.models import nns
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime import log
from codebase.runtime.files import UsageError
from codebase.runtime.parallel import Processes

KINDS = {"vae": VAE, "gmvae": GMVAE, "ssvae": SSVAE, "fsvae": FSVAE}
BINARY = pytest.mark.parametrize("kind, settings", [("vae", {}), ("gmvae", {"k": 20})])
LAYERS = {f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


def made(kind: str, seed: int = 0, **settings) -> torch.nn.Module:
    """A model whose weights are fixed by the seed."""
    torch.manual_seed(seed)
    return KINDS[kind](**settings)


def binary(n: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def one_hot(n: int) -> torch.Tensor:
    return torch.eye(10)[torch.arange(n) % 10]


def batch(kind: str, n: int = 6) -> tuple[torch.Tensor, ...]:
    """What the loss of a model takes, for n images."""
    if kind == "fsvae":
        return torch.rand(n, 3072, generator=torch.Generator().manual_seed(0)), one_hot(n)
    return (binary(n), binary(10, seed=1), one_hot(10)) if kind == "ssvae" else (binary(n),)


@pytest.mark.parametrize(
    "kind, networks, constants",
    [
        ("vae", ("enc", "dec"), {"z_prior_m", "z_prior_v"}),
        ("gmvae", ("enc", "dec"), {"z_pre", "pi"}),
        ("ssvae", ("enc", "dec", "cls"), {"z_prior_m", "z_prior_v"}),
        ("fsvae", ("enc", "dec"), {"z_prior_m", "z_prior_v"}),
    ],
)
def test_state_dicts_have_the_keys_and_shapes_that_other_code_reads(kind, networks, constants):
    state = made(kind).state_dict()
    assert set(state) == {f"{network}.{key}" for network in networks for key in LAYERS} | constants
    first = {"vae": (300, 784), "gmvae": (300, 784), "ssvae": (300, 794), "fsvae": (500, 3082)}[
        kind
    ]
    assert state["enc.net.0.weight"].shape == first
    if kind == "gmvae":
        assert state["z_pre"].shape == (1, 1000, 10) and torch.equal(
            state["pi"], torch.full((500,), 1 / 500)
        )


def test_the_seed_fixes_weights_in_the_order_encoder_decoder_classifier_prior():
    torch.manual_seed(3)
    sizes = [(784, 300), (300, 300), (300, 20), (10, 300), (300, 300), (300, 784)]
    layers = [torch.nn.Linear(*size) for size in sizes]
    z_pre = torch.randn(1, 1000, 10) / math.sqrt(5000)
    torch.manual_seed(3)
    model = GMVAE()
    assert torch.equal(model.enc.net[4].weight, layers[2].weight) and torch.equal(
        model.dec.net[4].bias, layers[5].bias
    )
    assert torch.equal(model.z_pre, z_pre)
    torch.manual_seed(3)
    sizes = [
        (794, 300),
        (300, 300),
        (300, 128),
        (74, 300),
        (300, 300),
        (300, 784),
        (784, 300),
        (300, 300),
        (300, 10),
    ]
    layers = [torch.nn.Linear(*size) for size in sizes]
    torch.manual_seed(3)
    model = SSVAE()
    assert torch.equal(model.dec.net[4].bias, layers[5].bias) and torch.equal(
        model.cls.net[4].bias, layers[8].bias
    )


@pytest.mark.parametrize("shapes", [((7, 5), (7, 3)), ((7, 5), (4, 1, 3)), ((4, 7, 5), (4, 1, 3))])
def test_a_network_of_two_inputs_equals_its_plain_layers_in_value_and_gradient(shapes):
    torch.manual_seed(0)
    network = nns.Network(5, 3, 8, 6)
    x, y = (torch.randn(shape, requires_grad=True) for shape in shapes)
    w0, b0, w1, b1, w2, b2 = network.parameters()
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    both = torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], -1)
    plain = F.linear(F.elu(F.linear(F.elu(F.linear(both, w0, b0)), w1, b1)), w2, b2)
    torch.testing.assert_close(network(x, y), plain)
    inputs = [x, y, *network.parameters()]
    ours, wanted = (
        torch.autograd.grad(out.square().sum(), inputs) for out in (network(x, y), plain)
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_the_iwae_bound_reproduces_the_published_value():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (97, 784)).float()
    vae = VAE(z_dim=10)
    torch.manual_seed(0)
    assert vae.negative_iwae_bound(x, iw=10)[0].item() == pytest.approx(544.3607, abs=0.15)


@BINARY
def test_the_elbo_is_kl_plus_rec_and_beta_changes_the_loss_alone(kind, settings):
    model = made(kind, **settings)
    x = binary(20)
    torch.manual_seed(1)
    nelbo, kl, rec = model.negative_elbo_bound(x)
    torch.testing.assert_close(nelbo, kl + rec)
    model = made(kind, **settings, beta=4.0)
    torch.manual_seed(1)
    loss, summaries = model.loss(x)
    torch.testing.assert_close(loss, rec + 4 * kl)
    torch.testing.assert_close(summaries["gen/elbo"], -nelbo)
    assert set(summaries) == {"train/loss", "gen/elbo", "gen/kl_z", "gen/rec"}
    assert loss.requires_grad


def test_the_vae_elbo_equals_the_one_of_torch_distributions():
    model = made("vae")
    x = binary(5)
    torch.manual_seed(2)
    _, kl, rec = model.negative_elbo_bound(x)
    torch.manual_seed(2)
    m, v = model.enc(x)
    z = m + v.sqrt() * torch.randn_like(m)
    q = td.Normal(m, v.sqrt())
    p = td.Normal(torch.zeros_like(m), torch.ones_like(m))
    torch.testing.assert_close(kl, td.kl_divergence(q, p).sum(-1).mean())
    torch.testing.assert_close(rec, -td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1).mean())


@BINARY
def test_one_importance_sample_is_the_sampled_elbo_and_more_are_never_above_it(kind, settings):
    model = made(kind, **settings)
    x = binary(20)
    niwae, kl, rec = model.negative_iwae_bound(x, 1)
    torch.testing.assert_close(niwae, kl + rec)
    for m in (2, 7, 50):
        niwae, kl, rec = model.negative_iwae_bound(x, m)
        assert niwae <= kl + rec + 1e-4


@pytest.mark.parametrize(
    "iw", [0, -1, 1.5, None, "3", np.int64(0), np.float64(3), torch.tensor(1.5)]
)
def test_fewer_than_one_importance_sample_is_an_error_that_names_iw(iw):
    with pytest.raises(ValueError, match="iw"):
        made("vae").negative_iwae_bound(binary(2), iw)


@pytest.mark.parametrize("iw", [np.int64(10), np.uint8(10), torch.tensor(10)])
def test_importance_samples_may_be_counted_by_a_whole_number_of_any_kind(iw):
    model = made("vae")
    x = binary(3)
    torch.manual_seed(1)
    wanted = model.negative_iwae_bound(x, 10)
    torch.manual_seed(1)
    torch.testing.assert_close(model.negative_iwae_bound(x, iw), wanted, rtol=0, atol=0)


def spread_out(model):
    """Give an untrained model a decoder that depends on z, so that its bounds have gaps."""
    with torch.no_grad():
        model.dec.net[0].weight.mul_(20)
        model.dec.net[4].weight.mul_(3)
    return model


@pytest.mark.parametrize("kind, settings", [("vae", {}), ("gmvae", {"k": 5})])
def test_iwae_tightens_with_m_and_tends_to_the_exact_log_likelihood(kind, settings):
    model = spread_out(made(kind, z_dim=1, **settings))
    x = binary(4)
    with torch.no_grad():
        z = torch.linspace(-12, 12, 12_001)[:, None]
        logits = model.dec(z)
        log_joint = torch.stack(
            [utils.log_bernoulli_with_logits(row, logits) + model.log_prior(z) for row in x]
        )
        exact = (
            -(log_joint.logsumexp(1) + math.log(24 / 12_000)).mean().item()
        )  # integral over z by the midpoint rule
    found = evaluate.bounds(model, x, ms=(1, 10, 100, 20_000))
    assert found["niwae_1"] > found["niwae_10"] > found["niwae_100"] > exact - 0.02
    assert found["niwae_20000"] == pytest.approx(exact, abs=0.05)
    assert found["nelbo"] > exact


def test_the_iwae_bound_can_be_trained_on():
    model = made("vae")
    x = binary(20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = evaluate.bounds(model, x, (10,))["niwae_10"]
    for _ in range(20):
        optimizer.zero_grad()
        model.negative_iwae_bound(x, 10)[0].backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert evaluate.bounds(model, x, (10,))["niwae_10"] < before - 50


def test_the_iwae_bound_encodes_each_image_once():
    model = made("vae")
    rows = []
    model.enc.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    model.negative_iwae_bound(binary(3), 50)
    assert rows == [(3, 784)]


def prior(model) -> td.Distribution:
    """p(z) of a VAE or GMVAE."""
    if isinstance(model, VAE):
        return td.Independent(td.Normal(torch.zeros(model.z_dim), torch.ones(model.z_dim)), 1)
    m, v = (value[0] for value in model.prior())
    return td.MixtureSameFamily(td.Categorical(model.pi), td.Independent(td.Normal(m, v.sqrt()), 1))


@BINARY
def test_log_densities_are_those_of_torch_distributions_for_every_sample_and_image(kind, settings):
    model = made(kind, **settings)
    x = binary(4)
    with torch.no_grad():
        qm, qv = model.enc(x)
        z = torch.randn(7, 4, 10)
        log_p_x, log_p_z, log_q_z = model.log_densities(x, qm, qv, z)
        assert log_p_x.shape == log_p_z.shape == log_q_z.shape == (7, 4)
        torch.testing.assert_close(log_p_x, td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1))
        torch.testing.assert_close(log_p_z, prior(model).log_prob(z))
        torch.testing.assert_close(log_q_z, td.Normal(qm, qv.sqrt()).log_prob(z).sum(-1))


@BINARY
def test_an_images_densities_do_not_depend_on_the_rest_of_the_batch(kind, settings):
    model = made(kind, **settings)
    x = binary(6)
    with torch.no_grad():
        qm, qv = model.enc(x)
        z = utils.sample_gaussian(qm.expand(3, *qm.shape), qv)
        together = model.log_densities(x, qm, qv, z)
        for i in range(6):
            of_one = slice(i, i + 1)
            alone = model.log_densities(x[of_one], *model.enc(x[of_one]), z[:, of_one])
            for found, wanted in zip(alone, together, strict=True):
                torch.testing.assert_close(found[:, 0], wanted[:, i], rtol=1e-5, atol=1e-3)


@BINARY
def test_the_iwae_bound_is_the_log_mean_of_the_importance_weights(kind, settings):
    model = made(kind, **settings)
    x = binary(5)
    torch.manual_seed(4)
    niwae, kl, rec = model.negative_iwae_bound(x, 30)
    torch.manual_seed(4)
    qm, qv = model.enc(x)
    z = qm + qv.sqrt() * torch.randn(30, 5, 10)
    log_p_x = td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1)
    kl_z = td.Normal(qm, qv.sqrt()).log_prob(z).sum(-1) - prior(model).log_prob(z)
    torch.testing.assert_close(niwae, -((log_p_x - kl_z).logsumexp(0) - math.log(30)).mean())
    torch.testing.assert_close((kl, rec), (kl_z.mean(), -log_p_x.mean()), rtol=1e-5, atol=1e-4)


@BINARY
def test_a_model_trained_on_the_iwae_bound_has_it_as_its_loss_beside_the_terms_of_the_elbo(
    kind, settings
):
    model = spread_out(made(kind, **settings, train_iw=5))
    x = binary(20)
    torch.manual_seed(1)
    niwae, kl, rec = model.negative_iwae_bound(x, 5)
    wanted = torch.autograd.grad(niwae, list(model.parameters()))
    torch.manual_seed(1)
    loss, summaries = model.loss(x)
    torch.testing.assert_close((loss, summaries["train/loss"]), (niwae, niwae), rtol=0, atol=0)
    torch.testing.assert_close(summaries["gen/elbo"], -(kl + rec))
    torch.testing.assert_close((summaries["gen/kl_z"], summaries["gen/rec"]), (kl, rec))
    assert loss < kl + rec - 1  # by far another value
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())), wanted, rtol=0, atol=0
    )


@BINARY
def test_one_sample_is_trained_on_as_ever(kind, settings):
    x = binary(20)
    found = []
    for given in ({}, {"train_iw": 1}):
        model = made(kind, **settings, **given)
        torch.manual_seed(1)
        found.append(model.loss(x)[0])
        torch.manual_seed(1)
        assert torch.equal(found[-1], model.negative_elbo_bound(x)[0])
    assert torch.equal(*found)


class Loss(torch.nn.Module):
    """A model's loss as a module that can be called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model.loss(*inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_gives_the_loss_and_the_gradients_of_backward(kind):
    loss = Loss(made(kind))
    inputs = batch(kind)
    torch.manual_seed(1)
    wanted = loss(*inputs)
    wanted.backward()
    torch.manual_seed(1)
    parameters = {name: value.detach() for name, value in loss.named_parameters()}
    call = torch.func.grad_and_value(
        lambda values: torch.func.functional_call(loss, values, inputs)
    )
    gradients, value = call(parameters)
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(
        gradients, {name: value.grad for name, value in loss.named_parameters()}
    )
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_hooks_on_the_layers_of_every_network_are_called(kind):
    model = made(kind)
    called = set()
    layers = {name: module for name, module in model.named_modules() if ".net." in name}
    assert len(layers) == 5 * (3 if kind == "ssvae" else 2)
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model.loss(*batch(kind))
    assert called == set(layers)


@pytest.mark.parametrize(
    "kind, call, shapes",
    [
        ("vae", lambda model: model.negative_elbo_bound(torch.zeros(3, 10)), ["3x10", "784x300"]),
        (
            "gmvae",
            lambda model: model.negative_iwae_bound(torch.zeros(3, 10), 2),
            ["3x10", "784x300"],
        ),
        ("vae", lambda model: model.compute_sigmoid_given(torch.zeros(3, 11)), ["3x11", "10x300"]),
        ("ssvae", lambda model: model.negative_elbo_bound(torch.zeros(3, 10)), ["3x10", "784x300"]),
        (
            "ssvae",
            lambda model: model.enc(torch.zeros(3, 10), torch.zeros(10, 1, 10)),
            ["3x10", "784x300"],
        ),
        (
            "ssvae",
            lambda model: model.dec(torch.zeros(3, 64), torch.zeros(10, 1, 5)),
            ["10x5", "10x300"],
        ),
        (
            "fsvae",
            lambda model: model.negative_elbo_bound(torch.zeros(3, 10), one_hot(3)),
            ["3x20", "3082x500"],
        ),
    ],
)
def test_a_wrong_shape_is_an_error_of_torch_that_names_the_shapes(kind, call, shapes):
    with pytest.raises(RuntimeError) as caught:
        call(made(kind))
    assert all(shape in str(caught.value) for shape in shapes)
    assert "primitive" not in str(caught.value)


def test_samples_of_the_mixture_prior_follow_its_components():
    torch.manual_seed(0)
    model = GMVAE(z_dim=2, k=3)
    with torch.no_grad():
        model.z_pre[0, :3] = torch.tensor([[-5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])
        model.z_pre[0, 3:] = -5.0
    z = model.sample_z(3000)
    nearest = torch.cdist(z, model.prior()[0][0]).argmin(1)
    assert torch.bincount(nearest, minlength=3).min() > 850
    assert model.sample_x(4).shape == (4, 784) and set(model.sample_x(4).unique().tolist()) <= {
        0.0,
        1.0,
    }


def ssvae_label_by_label(model, x, eps):
    """The bound of the handout, one label at a time."""
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
    kl_y = td.kl_divergence(
        td.Categorical(logits=log_q), td.Categorical(logits=torch.zeros_like(log_q))
    )
    return kl_z.mean(), kl_y.mean(), rec.mean()


@pytest.mark.parametrize("certainty", [0.0, 1.0, 1000.0])
def test_the_ssvae_bound_agrees_with_the_labels_summed_one_by_one(certainty):
    model = made("ssvae")
    x = binary(8)
    with torch.no_grad():  # from a uniform classifier to one whose probabilities underflow
        model.cls.net[4].weight.mul_(certainty)
        model.cls.net[4].bias.mul_(certainty)
    torch.manual_seed(5)
    nelbo, kl_z, kl_y, rec = model.negative_elbo_bound(x)
    torch.manual_seed(5)
    expected = ssvae_label_by_label(model, x, torch.randn(10, 8, 64))
    torch.testing.assert_close((kl_z, kl_y, rec), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nelbo, kl_z + kl_y + rec)
    nelbo.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_the_ssvae_encoder_sees_each_image_once():
    model = made("ssvae")
    shapes = []
    model.enc.register_forward_hook(
        lambda module, inputs, output: shapes.append([tuple(i.shape) for i in inputs])
    )
    model.negative_elbo_bound(binary(8))
    assert shapes == [[(8, 784), (10, 1, 10)]]


def test_without_generative_weight_no_generative_work_is_done():
    model = made("ssvae", gen_weight=0)
    x = binary(10)
    y = one_hot(10)
    model.enc.register_forward_hook(lambda *_: pytest.fail("the encoder was used"))
    loss, summaries = model.loss(x, x, y)
    torch.testing.assert_close(loss, 100 * model.classification_cross_entropy(x, y))
    assert set(summaries) == {
        "train/loss", "gen/elbo", "gen/kl_z", "gen/kl_y", "gen/rec", "class/ce", "class/acc",
    }  # fmt: skip


def test_the_ssvae_loss_weighs_bound_and_cross_entropy():
    model = made("ssvae", gen_weight=3, class_weight=7)
    x = binary(10)
    y = one_hot(10)
    loss, summaries = model.loss(x, x, y)
    torch.testing.assert_close(loss, -3 * summaries["gen/elbo"] + 7 * summaries["class/ce"])


def test_the_fsvae_bound_equals_the_one_of_torch_distributions():
    model = made("fsvae")
    (x, y) = batch("fsvae")
    torch.manual_seed(1)
    nelbo, kl, rec = model.negative_elbo_bound(x, y)
    torch.manual_seed(1)
    m, v = model.enc(x, y)
    mean = model.compute_mean_given(m + v.sqrt() * torch.randn_like(m), y)
    wanted = -td.Normal(mean, math.sqrt(0.1)).log_prob(x).sum(-1).mean()
    torch.testing.assert_close(rec, wanted)
    torch.testing.assert_close(nelbo, kl + rec)
    assert model.reconstruct(x, y, one_hot(6).flip(0)).shape == (6, 3072)


@pytest.mark.parametrize("kind", ["vae", "gmvae"])
def test_no_samples_are_an_empty_batch(kind):
    model = made(kind)
    assert model.sample_z(0).shape == (0, 10)
    assert model.sample_x(0).shape == model.sample_sigmoid(0).shape == (0, 784)


LABELLED = {
    "ssvae cross-entropy": lambda y: made("ssvae").classification_cross_entropy(binary(10), y),
    "ssvae loss": lambda y: made("ssvae").loss(binary(10), binary(10), y),
    "ssvae loss gw=0": lambda y: made("ssvae", gen_weight=0).loss(binary(10), binary(10), y),
    "fsvae bound": lambda y: made("fsvae").negative_elbo_bound(torch.rand(10, 3072), y),
    "fsvae loss": lambda y: made("fsvae").loss(torch.rand(10, 3072), y),
}


WRONG_LABELS = [
    torch.ones(10, 1),
    torch.ones(10, 11),
    torch.arange(10),
    torch.ones(10),
    torch.ones(10, 1, 10),
    torch.ones(1, 10, 10),
    torch.ones(3, 10),
]


@pytest.mark.parametrize("y", WRONG_LABELS)
@pytest.mark.parametrize("call", LABELLED)
def test_labels_that_are_not_one_hot_are_refused(call, y):
    with pytest.raises(ValueError, match=r"y must be .*\(batch, 10\), not \(") as caught:
        LABELLED[call](y)
    assert str(tuple(y.shape)) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_traced_whole_by_the_compiler(kind):
    model = made(kind)
    inputs = batch(kind)
    torch.compiler.reset()
    traced = torch.compile(model.loss, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    wanted = model.loss(*inputs)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(traced(*inputs)[0], wanted)


BOUNDS = {
    "vae": lambda x: made("vae").negative_elbo_bound(x),
    "vae iwae": lambda x: made("vae").negative_iwae_bound(x, 2),
    "gmvae": lambda x: made("gmvae").negative_elbo_bound(x),
    "gmvae iwae": lambda x: made("gmvae").negative_iwae_bound(x, 2),
    "ssvae": lambda x: made("ssvae").negative_elbo_bound(x),
    "loss": lambda x: made("vae").loss(x),
    "torch.func.grad": lambda x: torch.func.grad(lambda x: made("vae").loss(x)[0])(x),
}
NORMALISED = [255 * binary(3), 2 * binary(3) - 1, (binary(3) - 0.13) / 0.31, binary(3) * math.nan]


@pytest.mark.parametrize("x", NORMALISED)
@pytest.mark.parametrize("bound", BOUNDS)
def test_pixels_outside_zero_to_one_are_warned_of(bound, x):
    with pytest.warns(UserWarning, match=r"pixels outside \[0, 1\]"):
        BOUNDS[bound](x)


def per_image(model, x):
    """The bound of every image alone, by torch.func.vmap."""
    bound = torch.func.vmap(
        lambda row: model.negative_elbo_bound(row[None])[0], randomness="different"
    )
    return bound(x)


def test_pixels_from_zero_to_one_bring_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (binary(3), binary(3) * 0.5):
            for bound in BOUNDS.values():
                bound(x)
            assert per_image(made("vae"), x).shape == (3,)
        made("fsvae").loss(3 * torch.randn(6, 3072), one_hot(6))  # its pixels are free


def test_a_transformed_bound_takes_any_pixels():
    assert per_image(made("vae"), 255 * binary(3)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_courses_choice_of_networks_is_ignored(kind):
    assert same(made(kind, nn="v1").state_dict(), made(kind).state_dict())


def test_networks_have_the_courses_names_of_calling():
    vae = made("vae")
    ssvae = made("ssvae")
    fsvae = made("fsvae")
    x = binary(6)
    called = []
    for network in (vae.enc, vae.dec, ssvae.enc, ssvae.dec, ssvae.cls, fsvae.enc, fsvae.dec):
        network.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(vae.enc.encode(x), vae.enc(x))
    torch.testing.assert_close(vae.dec.decode(torch.ones(6, 10)), vae.dec(torch.ones(6, 10)))
    torch.testing.assert_close(ssvae.enc.encode(x, one_hot(6)), ssvae.enc(x, one_hot(6)))
    torch.testing.assert_close(
        ssvae.dec.decode(torch.ones(6, 64), y=one_hot(6)), ssvae.dec(torch.ones(6, 64), one_hot(6))
    )
    torch.testing.assert_close(ssvae.cls.classify(x), ssvae.cls(x))
    assert len(called) == 10


@pytest.mark.parametrize("kind", ["vae", "ssvae", "fsvae"])
@pytest.mark.parametrize("missing", [("z_prior_m", "z_prior_v"), ("z_prior_v",)])
def test_constants_that_a_file_lacks_stay_the_models(kind, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = made(kind, seed=1)
    model = made(kind, seed=2)
    model.z_prior_v.fill_(3)
    path = checkpoint.save_model_by_name(stored, 7)
    torch.save({key: value for key, value in torch.load(path).items() if key not in missing}, path)
    checkpoint.load_model_by_name(model, 7)
    assert model.z_prior_v.item() == 3
    model.z_prior_v.fill_(1)
    assert same(model.state_dict(), stored.state_dict())


@pytest.mark.parametrize(
    "kind, key", [("vae", "enc.net.0.bias"), ("gmvae", "z_pre"), ("gmvae", "pi")]
)
def test_other_keys_that_a_file_lacks_are_refused(kind, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made(kind)
    path = checkpoint.save_model_by_name(model, 7)
    torch.save({name: value for name, value in torch.load(path).items() if name != key}, path)
    with pytest.raises(UsageError, match=f"has no {key}"):
        checkpoint.load_model_by_name(model, 7)


WRAPPERS = {
    "'module.'": lambda state: {f"module.{key}": value for key, value in state.items()},
    "'_orig_mod.'": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "'module._orig_mod.'": lambda state: {
        f"module._orig_mod.{key}": value for key, value in state.items()
    },
    "'state_dict'": lambda state: {"epoch": 3, "state_dict": state},
    "'model_state_dict'": lambda state: {"model_state_dict": state, "loss": 1.5},
}


@pytest.mark.parametrize("found", WRAPPERS)
def test_wrapped_weights_are_refused_with_their_conversion(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = made("vae", seed=1)
    model = made("vae", seed=2)
    path = checkpoint.save_model_by_name(stored, 7)
    torch.save(WRAPPERS[found](torch.load(path)), path)
    with pytest.raises(UsageError) as caught:
        checkpoint.load_model_by_name(model, 7)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and found in message
    assert same(model.state_dict(), made("vae", seed=2).state_dict())
    exec(message.partition("in Python: ")[2], {})  # what it says to do helps
    checkpoint.load_model_by_name(model, 7)
    assert same(model.state_dict(), stored.state_dict())


@pytest.mark.parametrize("kind, constant", [("fsvae", "x_v"), ("ssvae", "y_prior")])
def test_constants_of_older_files_are_ignored(kind, constant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = made(kind, seed=1)
    model = made(kind, seed=2)
    path = checkpoint.save_model_by_name(stored, 7)
    torch.save({**torch.load(path), constant: torch.ones(1)}, path)
    assert checkpoint.load_model_by_name(model, 7) is model
    assert same(model.state_dict(), stored.state_dict())


def test_a_checkpoint_is_a_bare_state_dict_of_cpu_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made("vae", name="mine")
    path = checkpoint.save_model_by_name(model, 42)
    assert str(path) == "checkpoints/mine/model-00042.pt"
    stored = torch.load(path, weights_only=True)
    assert same(stored, model.state_dict())
    assert {value.device.type for value in stored.values()} == {"cpu"}


def split(kind: str, n: int) -> data.Images:
    """Noise in the shape of a split."""
    stream = torch.Generator().manual_seed(5)
    pixels = torch.randint(
        0, 256, (n, 3072 if kind == "fsvae" else 784), dtype=torch.uint8, generator=stream
    )
    return data.Images(pixels, torch.arange(n) % 10)


EVALUATIONS = {
    "vae": lambda model: evaluate.bounds(model, binary(5), (1, 10, 130)),
    "gmvae": lambda model: evaluate.latent_use(model, split("gmvae", 30)),
    "ssvae": lambda model: evaluate.confusion_matrix(model, split("ssvae", 30)).tolist(),
    "fsvae": lambda model: evaluate.conditional_bound(model, split("fsvae", 30)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_mode_gradients_and_the_random_stream_as_they_were(kind, training):
    model = made(kind).train(training)
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    first, second = (EVALUATIONS[kind](model) for _ in range(2))
    assert first == second and torch.equal(torch.rand(3), wanted)
    assert {module.training for module in model.modules()} == {training} and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@BINARY
@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_bounds_are_those_of_all_their_samples_whatever_the_chunks(
    kind, settings, chunk, monkeypatch
):
    model = spread_out(made(kind, **settings))
    x = binary(5)
    ms = (1, 7, 30, 100, 130, 250)
    drawn = []
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 5 * chunk + 3)
    model.dec.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[0]))
    found = evaluate.bounds(model, x, ms)
    assert {len(z) for z in drawn} == {chunk}
    z = torch.cat(drawn)
    assert (
        250 <= len(z) < 250 + chunk
        and z.shape[1:] == (5, 10)
        and len(z.unique()) > 0.99 * z.numel()
    )
    with torch.no_grad():
        q = td.Independent(td.Normal(model.enc(x)[0], model.enc(x)[1].sqrt()), 1)
        log_p_x = td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1)
        log_p_z = prior(model).log_prob(z)
        log_q_z = q.log_prob(z)
        log_w = (log_p_x + log_p_z - log_q_z).double()
        standard = td.Independent(td.Normal(torch.zeros(10), torch.ones(10)), 1)
        kl = (
            td.kl_divergence(q, standard).mean()
            if kind == "vae"
            else (log_q_z - log_p_z)[:100].mean()
        )
        wanted = {"kl": kl.item(), "rec": -log_p_x[:100].mean().item()}
        wanted["nelbo"] = wanted["kl"] + wanted["rec"]
        for m in ms:
            groups = log_w[: max(100 // m, 1) * m].unflatten(0, (-1, m))
            wanted[f"niwae_{m}"] = -(groups.logsumexp(1) - math.log(m)).mean().item()
            wanted[f"ess_{m}"] = (1 / groups.softmax(1).square().sum(1)).mean().item()
    assert found == pytest.approx(wanted, rel=1e-5, abs=2e-3)


@BINARY
def test_bounds_and_the_models_own_iwae_bound_agree_at_the_same_samples(
    kind, settings, monkeypatch
):
    model = spread_out(made(kind, **settings))
    x = binary(5)
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 5 * 200)
    found = evaluate.bounds(model, x, (200,), seed=6)
    torch.manual_seed(6)
    assert found["niwae_200"] == pytest.approx(
        model.negative_iwae_bound(x, 200)[0].item(), abs=1e-3
    )


@BINARY
@pytest.mark.parametrize("count, rows", [(230, 1000), (230, 100), (100, 1000), (200, 300)])
def test_many_images_bounds_average_their_pieces(kind, settings, count, rows, monkeypatch):
    """Every hundred has samples of its own, the first one those that it has alone."""
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: rows)
    model = spread_out(made(kind, **settings))
    x = binary(count)
    ms = [1, 10, 130]
    found = evaluate.bounds(model, x, ms, seed=3)
    wanted = dict.fromkeys(found, 0.0)
    for number, piece in enumerate(x.split(100)):
        alone = evaluate.bounds(model, piece, ms, seed=3 + 10**9 * number)
        assert alone.keys() == found.keys()
        assert (alone == found) == (count == 100)
        for name, value in alone.items():
            wanted[name] += value * len(piece) / count
    assert found == pytest.approx(wanted, rel=1e-6)


@BINARY
def test_bounds_of_equal_images_in_different_pieces_have_different_samples(
    kind, settings, monkeypatch
):
    model = spread_out(made(kind, **settings))
    x = binary(100).repeat(2, 1)
    drawn = []
    model.dec.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[0]))
    evaluate.bounds(model, x, ())
    first, second = torch.cat(drawn).flatten(0, 1).reshape(2, -1, 10)
    assert not (first == second).any()


EARLIER = {  # what revisions that took a hundred images at most found, with 100 evaluations of each
    "vae": {
        "nelbo": 1647.79004, "kl": 0.36987, "rec": 1647.42017,
        "niwae_1": 1647.79175, "niwae_10": 1169.41504, "niwae_150": 921.79218,
        "ess_1": 1.0, "ess_10": 1.00656, "ess_150": 1.01766,
    },
    "gmvae": {
        "nelbo": 1647.50708, "kl": 0.0868, "rec": 1647.42017,
        "niwae_1": 1647.50708, "niwae_10": 1168.31372, "niwae_150": 920.35468,
        "ess_1": 1.0, "ess_10": 1.00643, "ess_150": 1.0175,
    },
}  # fmt: skip


@BINARY
def test_bounds_of_a_hundred_images_are_those_of_earlier_revisions(kind, settings):
    found = evaluate.bounds(spread_out(made(kind, **settings)), binary(100), (1, 10, 150))
    assert found == pytest.approx(EARLIER[kind], rel=1e-4)


@BINARY
def test_the_memory_of_an_evaluation_does_not_grow_with_the_number_of_images(kind, settings):
    model = made(kind, **settings)
    sizes = []
    for n in (100, 300):
        x = binary(n)
        with Largest() as largest:
            evaluate.bounds(model, x, (1,))
        sizes.append(largest.bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "x", [255 * binary(3), binary(3) - 0.01, binary(3) + 0.01, binary(3) * float("nan")]
)
def test_bounds_of_pixels_outside_zero_to_one_are_refused_with_the_range(x):
    with pytest.raises(
        ValueError, match=r"pixels in \[0, 1\], not from (nan|-?[\d.]+) to (nan|[\d.]+)"
    ):
        evaluate.bounds(made("vae"), x, ())


@BINARY
@pytest.mark.parametrize("count", [5, 230])
def test_bounds_can_be_had_of_every_image(kind, settings, count):
    model = spread_out(made(kind, **settings))
    x = binary(count)
    ms = (1, 10, 130)
    mean = evaluate.bounds(model, x, ms)
    of_each = evaluate.bounds(model, x, ms, reduce=False)
    assert of_each.keys() == mean.keys()
    for name, values in of_each.items():
        assert values.shape == (count,)
        assert values.mean().item() == pytest.approx(mean[name], rel=1e-5)


def test_bounds_of_every_image_are_in_the_images_order():
    model = made("vae")
    x = binary(230)
    with torch.no_grad():
        qm, qv = model.enc(x)
    found = evaluate.bounds(model, x, (), reduce=False)["kl"]
    wanted = utils.kl_normal(qm, qv, model.z_prior_m, model.z_prior_v)
    torch.testing.assert_close(found.float(), wanted)


def test_estimates_of_every_image_tend_to_its_log_likelihood():
    model = spread_out(made("vae", z_dim=1))
    x = binary(4)
    with torch.no_grad():
        z = torch.linspace(-12, 12, 12_001)[:, None]
        logits = model.dec(z)
        log_joint = torch.stack(
            [utils.log_bernoulli_with_logits(row, logits) + model.log_prior(z) for row in x]
        )
        exact = log_joint.logsumexp(1) + math.log(24 / 12_000)
    found = -evaluate.bounds(model, x, (20_000,), reduce=False)["niwae_20000"]
    assert found.tolist() == pytest.approx(exact.tolist(), abs=0.1)
    assert exact.max() - exact.min() > 1


def test_bounds_of_grey_pixels_are_taken():
    assert math.isfinite(evaluate.bounds(made("vae"), binary(3) * 0.5, ())["nelbo"])


@pytest.mark.parametrize("rank, size", [(0, 1), (0, 3), (1, 3)])
def test_a_long_evaluation_shows_its_progress(rank, size, capsys, monkeypatch):
    """In the main process alone, of its own share, and only where it is wanted."""
    bar = log.tqdm
    at_once = {"delay": 0, "mininterval": 0, "miniters": 1, "position": 0}
    monkeypatch.setattr(log, "tqdm", lambda **options: bar(**{**options, **at_once}))
    model = made("vae")
    x = binary(250)
    processes = Processes("cpu", rank, size)
    monkeypatch.setattr(processes, "add_up", lambda tensors: None)  # there are no others
    wanted = evaluate.bounds(model, x, [1], processes=processes)
    assert capsys.readouterr().err == ""
    assert evaluate.bounds(model, x, [1], processes=processes, progress=True) == wanted
    said = []
    for line in capsys.readouterr().err.splitlines():
        if line.strip():
            said.append(line.split(",")[0])
    # A hundred samples of each piece of images; ten at a time, and twenty of the half one.
    wanted = {
        (0, 1): [f"sample {n} of 300" for n in [*range(0, 201, 10), *range(220, 301, 20), 300]],
        (0, 3): [f"sample {n} of 100" for n in [*range(0, 101, 10), 100]],
        (1, 3): [],
    }
    assert said == wanted[rank, size]


def test_an_evaluation_of_a_few_seconds_shows_no_progress(capsys):
    evaluate.bounds(made("vae"), binary(100), (1,), progress=True)
    assert capsys.readouterr().err == ""


class Elsewhere:
    """A GMVAE on a device that this machine may not have, as far as memory goes."""

    def __init__(self, device: str, k: int, z_dim: int = 10):
        self.device = torch.device(device)
        self.k = k
        self.z_dim = z_dim

    def parameters(self):
        yield self


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_as_many_rows_as_memory_allows(device):
    most = evaluate.rows_at_once(Elsewhere(device, 0))
    counts = []
    for k in [500, 20_000, 100_000]:
        count = evaluate.rows_at_once(Elsewhere(device, k))
        # Pairs of rows and components are in float64, or on mps with all of their 10 dimensions.
        pair = 3 * 4 * 10 if device == "mps" else 2 * 8
        assert count * (784 * 4 + k * pair) <= evaluate.MEMORY[device] <= 2**30
        counts.append(count)
    few, many, large = counts
    assert most >= few > many > large >= 1
    assert evaluate.rows_at_once(Elsewhere(device, 2000, 2000)) >= 1
    if device == "cpu":
        assert most <= 1000  # what a cache holds
    if device == "mps":
        assert 10 * few < evaluate.rows_at_once(Elsewhere("cuda", 500))


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


def peak_memory() -> float:
    """The most megabytes that this process has had so far."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_the_largest_m_takes_200_megabytes():
    """In a process of its own, whose peak is not that of other tests."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert 30 < pool.apply(memory_of_bounds, (100_000,)) < 200


@pytest.mark.parametrize("k", [500, 100_000])
def test_the_memory_of_an_evaluation_does_not_grow_with_k(k):
    model = made("gmvae", z_dim=2, k=k)
    x = binary(5)
    images = split("gmvae", 400)
    for work in (
        lambda: evaluate.bounds(model, x, (1,)),
        lambda: evaluate.latent_use(model, images),
    ):
        with Largest() as largest:
            work()
        assert largest.bytes <= evaluate.MEMORY["cpu"]


def test_a_conditional_bound_weighs_every_image_alike(monkeypatch):
    model = made("fsvae")
    images = split("fsvae", 10)
    with torch.no_grad():
        qm, qv = model.enc(images.scaled(torch.arange(10)), images.one_hot(torch.arange(10)))
    wanted = utils.kl_normal(qm, qv, torch.zeros(1), torch.ones(1)).mean().item()
    monkeypatch.setattr(evaluate, "ROWS", 7)  # pieces of 7 and 3 images
    found = evaluate.conditional_bound(model, images)
    assert found["kl"] == pytest.approx(wanted, rel=1e-5)
    assert found["nelbo"] == pytest.approx(found["kl"] + found["rec"], rel=1e-5)


def test_a_confusion_matrix_has_a_row_for_each_true_digit_and_a_column_for_each_assigned_one(
    monkeypatch,
):
    model = made("ssvae")
    images = split("ssvae", 25)
    guesses = model.cls(images.pixels / 255).argmax(-1)
    monkeypatch.setattr(evaluate, "ROWS", 7)
    counts = evaluate.confusion_matrix(model, images)
    wanted = torch.zeros(10, 10, dtype=torch.int64)
    for digit, guess in zip(images.labels, guesses, strict=True):
        wanted[digit, guess] += 1
    assert torch.equal(counts, wanted) and counts.sum() == 25 and not torch.equal(counts, counts.T)


def test_latent_use_counts_the_dimensions_and_components_that_images_move():
    model = made("gmvae", z_dim=4, k=3)
    x = split("gmvae", 200)
    with torch.no_grad():
        model.enc.net[4].weight[:2].zero_()  # two of the four posterior means do not depend on x
        model.enc.net[4].weight[2:4].mul_(50)
        model.z_pre[0, 0] = 1e3  # a component far from every image
    found = evaluate.latent_use(model, x)
    assert found["active"] == 2 and 1 <= found["components"] <= 2
    assert evaluate.latent_use(made("vae"), x).keys() == {"active"}


def test_a_bound_of_many_samples_is_not_rounded_away(monkeypatch):
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 1)
    model = made("vae")
    many = 5000
    monkeypatch.setattr(
        model,
        "log_densities",
        lambda *_: (torch.full((1, 1), -97.3), torch.zeros(1, 1), torch.zeros(1, 1)),
    )
    found = evaluate.bounds(model, binary(1), (many,))
    assert found[f"niwae_{many}"] == pytest.approx(97.3, abs=1e-5)
    assert found[f"ess_{many}"] == pytest.approx(many, rel=1e-5)


@needs_mnist
@needs_reference
@pytest.mark.parametrize(
    "kind, name, step",
    [
        ("vae", "model=vae_z=10_run=0000", 20_000),
        ("gmvae", "model=gmvae_z=10_k=500_run=0000", 20_000),
        ("ssvae", "model=ssvae_gw=001_cw=100_run=0000", 30_000),
    ],
)
def test_checkpoints_of_the_original_code_evaluate_to_their_reported_figures(
    kind, name, step, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(REFERENCE / "checkpoints")
    reported = json.loads((REFERENCE / "checkpoints" / "reported.json").read_text())[
        f"{name}/model-{step}.pt"
    ]
    model = checkpoint.load_model_by_name(made(kind, name=name), step)
    test = data.mnist(str(MNIST), "test", check=1)
    if "accuracy" in reported:
        counts = evaluate.confusion_matrix(model, test)
        assert counts.diag().sum().item() / 10_000 == pytest.approx(reported["accuracy"], abs=1e-4)
    else:
        old = json.loads((REFERENCE / "values.json").read_text())["protocol_2018"][
            f"reference_{kind}"
        ]["2018"]
        for wanted, images in (
            (reported, data.test_subset(test)),
            (old, data.test_subset(test, "2018")),
        ):
            found = evaluate.bounds(model, images)
            assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=0.25)


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_on_cuda_are_those_on_the_cpu(kind, monkeypatch):
    found = []
    for device in ("cpu", "cuda"):
        stream = torch.Generator().manual_seed(1)
        monkeypatch.setattr(
            torch, "randn_like", lambda m, s=stream: torch.randn(m.shape, generator=s).to(m.device)
        )
        model = made(kind).to(device)
        loss, summaries = model.loss(*(value.to(device) for value in batch(kind, 40)))
        loss.backward()
        found.append(summaries | {name: value.grad for name, value in model.named_parameters()})
        assert {value.device.type for value in found[-1].values()} == {device}
    on_cpu, on_cuda = found
    for name, value in on_cpu.items():
        scale = value.abs().amax().clamp(min=1)
        torch.testing.assert_close(on_cuda[name].cpu() / scale, value / scale, rtol=1e-4, atol=1e-4)


@needs_cuda
@BINARY
def test_bounds_on_cuda_are_those_on_the_cpu(kind, settings, monkeypatch):
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 5 * 50)
    found = []
    for device in ("cpu", "cuda"):
        stream = torch.Generator().manual_seed(1)
        monkeypatch.setattr(
            torch, "randn_like", lambda m, s=stream: torch.randn(m.shape, generator=s).to(m.device)
        )
        found.append(
            evaluate.bounds(made(kind, **settings).to(device), binary(5).to(device), (1, 10, 130))
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_on_cuda_goes_on_bit_for_bit(kind, script, tmp_path):
    for folder, *steps in (("whole", 20), ("parts", 10, 20)):
        (tmp_path / folder).mkdir()
        for step in steps:
            result = script(kind, "--device", "cuda", "--iter_max", step, cwd=tmp_path / folder)
            assert result.returncode == 0 and " on cuda " in result.stdout, result.stderr
    whole, parts = (weights(tmp_path / folder, NAMES[kind], 20) for folder in ("whole", "parts"))
    assert same(whole, parts) and {value.device.type for value in whole.values()} == {"cpu"}
    assert not same(whole, weights(tmp_path / "parts", NAMES[kind], 10))


def test_bounds_of_seeds_a_million_apart_share_no_samples():
    """As those of neighbouring seeds may: a standard error over these would be too small."""
    torch.manual_seed(0)
    model = VAE()
    x = (torch.rand(100, 784) < 0.2).float()
    first = evaluate.bounds(model, x, [], reduce=False)["nelbo"]
    spread = {}
    for seed in (1_000_000, 2_000_000, 3_000_000):
        spread[seed] = (evaluate.bounds(model, x, [], seed, reduce=False)["nelbo"] - first).std()
    assert max(spread.values()) < 1.5 * min(spread.values())

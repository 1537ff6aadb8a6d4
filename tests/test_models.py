"""The four models: keys, bounds against references and exact likelihoods, and the checkpoints of the original code."""

import json
import math

import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from conftest import REFERENCE, needs_mnist, needs_reference

from codebase import checkpoint, evaluate, utils
from codebase.models import nns
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE


def binary(n: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def one_hot(n: int) -> torch.Tensor:
    return torch.eye(10)[torch.arange(n) % 10]


LAYERS = {f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "model, networks, constants",
    [
        (VAE, ("enc", "dec"), {"z_prior_m", "z_prior_v"}),
        (GMVAE, ("enc", "dec"), {"z_pre", "pi"}),
        (SSVAE, ("enc", "dec", "cls"), {"z_prior_m", "z_prior_v"}),
        (FSVAE, ("enc", "dec"), {"z_prior_m", "z_prior_v"}),
    ],
)
def test_state_dicts_have_the_keys_and_shapes_that_other_code_reads(model, networks, constants):
    state = model().state_dict()
    assert set(state) == {f"{network}.{key}" for network in networks for key in LAYERS} | constants
    first = {VAE: (300, 784), GMVAE: (300, 784), SSVAE: (300, 794), FSVAE: (500, 3082)}[model]
    assert state["enc.net.0.weight"].shape == first
    if model is GMVAE:
        assert state["z_pre"].shape == (1, 1000, 10) and torch.equal(state["pi"], torch.full((500,), 1 / 500))


def test_the_seed_fixes_weights_in_the_order_encoder_decoder_classifier_prior():
    torch.manual_seed(3)
    sizes = [(784, 300), (300, 300), (300, 20), (10, 300), (300, 300), (300, 784)]
    layers = [torch.nn.Linear(*size) for size in sizes]
    z_pre = torch.randn(1, 1000, 10) / math.sqrt(5000)
    torch.manual_seed(3)
    model = GMVAE()
    assert torch.equal(model.enc.net[4].weight, layers[2].weight) and torch.equal(model.dec.net[4].bias, layers[5].bias)
    assert torch.equal(model.z_pre, z_pre)


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
    ours, wanted = (torch.autograd.grad(out.square().sum(), inputs) for out in (network(x, y), plain))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_the_iwae_bound_reproduces_the_published_value():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (97, 784)).float()
    vae = VAE(z_dim=10)
    torch.manual_seed(0)
    assert vae.negative_iwae_bound(x, iw=10)[0].item() == pytest.approx(544.3607, abs=0.15)


@pytest.mark.parametrize("model", [VAE(), GMVAE(k=20)])
def test_the_elbo_is_kl_plus_rec_and_beta_changes_the_loss_alone(model):
    x = binary(20)
    torch.manual_seed(1)
    nelbo, kl, rec = model.negative_elbo_bound(x)
    torch.testing.assert_close(nelbo, kl + rec)
    model.beta = 4.0
    torch.manual_seed(1)
    loss, summaries = model.loss(x)
    model.beta = 1.0
    torch.testing.assert_close(loss, rec + 4 * kl)
    torch.testing.assert_close(summaries["gen/elbo"], -nelbo)
    assert set(summaries) == {"train/loss", "gen/elbo", "gen/kl_z", "gen/rec"}
    assert loss.requires_grad


def test_the_vae_elbo_equals_the_one_of_torch_distributions():
    model, x = VAE(), binary(5)
    torch.manual_seed(2)
    _, kl, rec = model.negative_elbo_bound(x)
    torch.manual_seed(2)
    m, v = model.enc(x)
    z = m + v.sqrt() * torch.randn_like(m)
    q, p = td.Normal(m, v.sqrt()), td.Normal(torch.zeros_like(m), torch.ones_like(m))
    torch.testing.assert_close(kl, td.kl_divergence(q, p).sum(-1).mean())
    torch.testing.assert_close(rec, -td.Bernoulli(logits=model.dec(z)).log_prob(x).sum(-1).mean())


@pytest.mark.parametrize("model", [VAE(), GMVAE(k=20)])
def test_one_importance_sample_is_the_sampled_elbo_and_more_are_never_above_it(model):
    x = binary(20)
    niwae, kl, rec = model.negative_iwae_bound(x, 1)
    torch.testing.assert_close(niwae, kl + rec)
    for m in (2, 7, 50):
        niwae, kl, rec = model.negative_iwae_bound(x, m)
        assert niwae <= kl + rec + 1e-4


@pytest.mark.parametrize("iw", [0, -1, 1.5, None])
def test_fewer_than_one_importance_sample_is_an_error_that_names_iw(iw):
    with pytest.raises(ValueError, match="iw"):
        VAE().negative_iwae_bound(binary(2), iw)


def spread_out(model):
    """Give an untrained model a decoder that depends on z, so that its bounds have gaps."""
    with torch.no_grad():
        model.dec.net[0].weight.mul_(20)
        model.dec.net[4].weight.mul_(3)
    return model


@pytest.mark.parametrize("make", [lambda: VAE(z_dim=1), lambda: GMVAE(z_dim=1, k=5)])
def test_iwae_tightens_with_m_and_tends_to_the_exact_log_likelihood(make):
    torch.manual_seed(0)
    model, x = spread_out(make()), binary(4)
    with torch.no_grad():
        z = torch.linspace(-12, 12, 48_001)[:, None]
        log_joint = torch.stack([utils.log_bernoulli_with_logits(row, model.dec(z)) + model.log_prior(z) for row in x])
        exact = -(log_joint.logsumexp(1) + math.log(24 / 48_000)).mean().item()  # integral over z by the midpoint rule
    found = evaluate.bounds(model, x, ms=(1, 10, 100, 20_000))
    assert found["niwae_1"] > found["niwae_10"] > found["niwae_100"] > exact - 0.02
    assert found["niwae_20000"] == pytest.approx(exact, abs=0.05)
    assert found["nelbo"] > exact


def test_the_iwae_bound_can_be_trained_on():
    torch.manual_seed(0)
    model, x = VAE(), binary(50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = evaluate.bounds(model, x, (10,))["niwae_10"]
    for _ in range(30):
        optimizer.zero_grad()
        model.negative_iwae_bound(x, 10)[0].backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert evaluate.bounds(model, x, (10,))["niwae_10"] < before - 50


def test_the_iwae_bound_encodes_each_image_once():
    model, rows = VAE(), []
    model.enc.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    model.negative_iwae_bound(binary(3), 50)
    assert rows == [(3, 784)]


@pytest.mark.parametrize("model", [VAE(), GMVAE(k=20)])
def test_an_images_terms_do_not_depend_on_the_rest_of_the_batch(model):
    x = binary(6)
    torch.manual_seed(0)
    together = model.importance(x, 1)[0][0]
    noise = torch.Generator().manual_seed(0)
    eps = torch.randn(6, 10, generator=noise)
    with pytest.MonkeyPatch.context() as patch:
        for i in range(6):
            patch.setattr(torch, "randn_like", lambda m, i=i: eps[i].reshape(m.shape))
            torch.testing.assert_close(model.importance(x[i : i + 1], 1)[0][0, 0], together[i], rtol=1e-5, atol=1e-3)


def test_samples_of_the_mixture_prior_follow_its_components():
    torch.manual_seed(0)
    model = GMVAE(z_dim=2, k=3)
    with torch.no_grad():
        model.z_pre[0, :3] = torch.tensor([[-5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])
        model.z_pre[0, 3:] = -5.0
    z = model.sample_z(3000)
    nearest = torch.cdist(z, model.prior()[0][0]).argmin(1)
    assert torch.bincount(nearest, minlength=3).min() > 850
    assert model.sample_x(4).shape == (4, 784) and set(model.sample_x(4).unique().tolist()) <= {0.0, 1.0}


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
    kl_y = td.kl_divergence(td.Categorical(logits=log_q), td.Categorical(logits=torch.zeros_like(log_q)))
    return kl_z.mean(), kl_y.mean(), rec.mean()


@pytest.mark.parametrize("certainty", [0.0, 1.0, 1000.0])
def test_the_ssvae_bound_agrees_with_the_labels_summed_one_by_one(certainty):
    torch.manual_seed(0)
    model, x = SSVAE(), binary(8)
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
    model, shapes = SSVAE(), []
    model.enc.register_forward_hook(lambda module, inputs, output: shapes.append([tuple(i.shape) for i in inputs]))
    model.negative_elbo_bound(binary(8))
    assert shapes == [[(8, 784), (10, 1, 10)]]


def test_without_generative_weight_no_generative_work_is_done():
    model, x, y = SSVAE(gen_weight=0), binary(10), one_hot(10)
    model.enc.register_forward_hook(lambda *_: pytest.fail("the encoder was used"))
    loss, summaries = model.loss(x, x, y)
    torch.testing.assert_close(loss, 100 * model.classification_cross_entropy(x, y))
    assert set(summaries) == {
        "train/loss", "gen/elbo", "gen/kl_z", "gen/kl_y", "gen/rec", "class/ce", "class/acc",
    }  # fmt: skip


def test_the_ssvae_loss_weighs_bound_and_cross_entropy():
    model, x, y = SSVAE(gen_weight=3, class_weight=7), binary(10), one_hot(10)
    loss, summaries = model.loss(x, x, y)
    torch.testing.assert_close(loss, -3 * summaries["gen/elbo"] + 7 * summaries["class/ce"])


def test_the_fsvae_bound_equals_the_one_of_torch_distributions():
    torch.manual_seed(0)
    model, x, y = FSVAE(), torch.rand(6, 3072), one_hot(6)
    torch.manual_seed(1)
    nelbo, kl, rec = model.negative_elbo_bound(x, y)
    torch.manual_seed(1)
    m, v = model.enc(x, y)
    mean = model.compute_mean_given(m + v.sqrt() * torch.randn_like(m), y)
    wanted = -td.Normal(mean, math.sqrt(0.1)).log_prob(x).sum(-1).mean()
    torch.testing.assert_close(rec, wanted)
    torch.testing.assert_close(nelbo, kl + rec)
    assert model.reconstruct(x, y, one_hot(6).flip(0)).shape == (6, 3072)


@pytest.mark.parametrize("model, reference", [(FSVAE(), "x_v"), (SSVAE(), "y_prior")])
def test_constants_of_older_files_are_ignored(model, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save_model_by_name(model, 7)
    torch.save({**torch.load(path), reference: torch.ones(1)}, path)
    assert checkpoint.load_model_by_name(model, 7) is model


def test_a_checkpoint_is_a_bare_state_dict_of_cpu_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save_model_by_name(VAE(name="mine"), 42)
    assert str(path) == "checkpoints/mine/model-00042.pt"
    stored = torch.load(path, weights_only=True)
    VAE().load_state_dict(stored)
    assert {value.device.type for value in stored.values()} == {"cpu"}


def test_evaluation_leaves_mode_gradients_and_the_random_stream_as_they_were():
    model, x = VAE(), binary(5)
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    first, second = (evaluate.bounds(model, x, (1, 10)) for _ in range(2))
    assert first == second and torch.equal(torch.rand(3), wanted) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_latent_use_counts_the_dimensions_and_components_that_images_move():
    torch.manual_seed(0)
    model, x = GMVAE(z_dim=4, k=3), binary(200)
    with torch.no_grad():
        model.enc.net[4].weight[:2].zero_()  # two of the four posterior means do not depend on x
        model.enc.net[4].weight[2:4].mul_(50)
        model.z_pre[0, 0] = 1e3  # a component far from every image
    found = evaluate.latent_use(model, x)
    assert found["active"] == 2 and 1 <= found["components"] <= 2


@needs_mnist
@needs_reference
@pytest.mark.parametrize(
    "make, name, step",
    [
        (lambda name: VAE(name=name), "model=vae_z=10_run=0000", 20_000),
        (lambda name: GMVAE(name=name), "model=gmvae_z=10_k=500_run=0000", 20_000),
        (lambda name: SSVAE(name=name), "model=ssvae_gw=001_cw=100_run=0000", 30_000),
    ],
)
def test_checkpoints_of_the_original_code_evaluate_to_their_reported_figures(make, name, step, tmp_path, monkeypatch):
    from argparse import Namespace

    from conftest import MNIST

    from codebase import data

    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(REFERENCE / "checkpoints")
    reported = json.loads((REFERENCE / "checkpoints" / "reported.json").read_text())[f"{name}/model-{step}.pt"]
    model = checkpoint.load_model_by_name(make(name), step)
    test = data.load(Namespace(data="mnist", data_dir=str(MNIST), check_data=1, device="cpu"), "test")
    if "accuracy" in reported:
        counts = evaluate.confusion(model, test)
        assert counts.diag().sum().item() / 10_000 == pytest.approx(reported["accuracy"], abs=1e-4)
    else:
        found = evaluate.bounds(model, data.test_subset(test))
        assert {key: found[key] for key in reported} == pytest.approx(reported, abs=0.25)

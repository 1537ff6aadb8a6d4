"""codebase.utils against published values, torch.distributions and the limits of its arguments."""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributions as td
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from codebase import utils

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
INF = math.inf


def drawn(kind: str, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    """Numbers from -10 to 10, variances from 1e-6 to 1e6, or binary pixels."""
    uniform = torch.rand(shape, dtype=torch.float64)
    if kind == "real":
        return (20 * uniform - 10).to(dtype)
    if kind == "variance":
        return (10 ** (12 * uniform - 6)).to(dtype)
    return uniform.round().to(dtype)


def normal(m, v) -> td.Independent:
    return td.Independent(td.Normal(m, v.sqrt()), 1)


def mixture(m, v) -> td.MixtureSameFamily:
    weights = td.Categorical(torch.ones(m.shape[:-1], dtype=m.dtype))
    return td.MixtureSameFamily(weights, normal(m, v))


def kl_of_logits(a, b):
    return utils.kl_cat(a.softmax(-1), a.log_softmax(-1), b.log_softmax(-1))


EACH = (7, 5)
CASES = {  # ours, torch's, and what they take
    "log_normal": (
        utils.log_normal,
        lambda x, m, v: normal(m, v).log_prob(x),
        [("real", EACH), ("real", EACH), ("variance", EACH)],
    ),
    "shared mixture": (
        utils.log_normal_mixture,
        lambda z, m, v: mixture(m, v).log_prob(z),
        [("real", EACH), ("real", (1, 9, 5)), ("variance", (1, 9, 5))],
    ),
    "mixture of each example": (
        utils.log_normal_mixture,
        lambda z, m, v: mixture(m, v).log_prob(z),
        [("real", EACH), ("real", (7, 9, 5)), ("variance", (7, 9, 5))],
    ),
    "log_bernoulli": (
        utils.log_bernoulli_with_logits,
        lambda x, logits: td.Bernoulli(logits=logits).log_prob(x).sum(-1),
        [("binary", EACH), ("real", EACH)],
    ),
    "kl_normal": (
        utils.kl_normal,
        lambda qm, qv, pm, pv: td.kl_divergence(normal(qm, qv), normal(pm, pv)),
        [("real", EACH), ("variance", EACH), ("real", EACH), ("variance", EACH)],
    ),
    "kl_cat": (
        kl_of_logits,
        lambda a, b: td.kl_divergence(td.Categorical(logits=a), td.Categorical(logits=b)),
        [("real", EACH), ("real", EACH)],
    ),
}


def seeded_gaussian(*shape):
    torch.manual_seed(0)
    m = torch.randn(*shape)
    return m, torch.exp(torch.randn_like(m))


def test_published_values_are_reproduced():
    m, v = seeded_gaussian(3, 5)
    z = utils.sample_gaussian(m, v)
    density = utils.log_normal(z, m, v)
    assert density.tolist() == pytest.approx([-6.9819622, -7.6092825, -4.8691502], abs=1e-5)
    torch.manual_seed(0)
    z = utils.reparameterization(m, v)
    wanted = [3.1794934273, -0.5144982934, -4.8044347763, 0.9323326349, -1.5944868326]
    assert z[0].tolist() == pytest.approx(wanted, abs=1e-5)
    m, v = seeded_gaussian(3, 4, 5)
    z = utils.sample_gaussian(m[:, 0], v[:, 0])
    density = utils.log_normal_mixture(z, m, v)
    assert density.tolist() == pytest.approx([-4.8879452, -7.7989111, -8.3332138], abs=1e-5)
    assert utils.reparameterization is utils.sample_gaussian


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchs(case, dtype):
    ours, reference, takes = CASES[case]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for seed in range(10):
        torch.manual_seed(seed)
        inputs = [drawn(kind, shape, dtype) for kind, shape in takes]
        exact = [value.double() for value in inputs]  # the references run in float64
        varied = [i for i, (kind, _) in enumerate(takes) if kind != "binary"]
        for i in varied:
            inputs[i].requires_grad_()
            exact[i] = exact[i].detach().requires_grad_()
        value = ours(*inputs)
        wanted = reference(*exact)
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted, **close)
        gradients = torch.autograd.grad(value.sum(), [inputs[i] for i in varied])
        gradients_wanted = torch.autograd.grad(wanted.sum(), [exact[i] for i in varied])
        for found, right in zip(gradients, gradients_wanted, strict=True):
            scale = right.abs().amax().clamp(min=1)
            torch.testing.assert_close(found.double() / scale, right / scale, **close)


def test_tiny_variances_leave_a_mixture_accurate():
    torch.manual_seed(0)
    m = 10 * torch.rand(1, 50, 10)
    v = torch.full((1, 50, 10), 1e-8)
    z = m[0, :20] + 1e-4 * torch.randn(20, 10)
    exact = mixture(m.double(), v.double()).log_prob(z.double())
    value = utils.log_normal_mixture(z, m, v)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m, v", [((1, 5, 3), ()), ((3,), (1, 5, 3)), ((1, 1, 3), (1, 1, 3))])
def test_a_mixture_takes_whatever_broadcasts(m, v):
    """Of one component, too."""
    torch.manual_seed(0)
    z = torch.randn(4, 3)
    m = torch.randn(m)
    v = torch.rand(v) + 0.1
    of_each = td.Normal(m.double(), v.double().sqrt()).log_prob(z[:, None].double()).sum(-1)
    wanted = of_each.logsumexp(-1) - math.log(of_each.shape[-1])
    value = utils.log_normal_mixture(z, m, v)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_log_sums_are_stable_at_both_ends():
    x = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [-1e4, 1e4], [-INF, -INF]])
    sums = [1e4 + math.log(2), -1e4 + math.log(2), 1e4, -INF]
    means = [1e4, -1e4, 1e4 - math.log(2), -INF]
    assert utils.log_sum_exp(x, 1).tolist() == pytest.approx(sums, rel=1e-6)
    assert utils.log_mean_exp(x, 1).tolist() == pytest.approx(means, rel=1e-6)
    assert torch.equal(utils.log_sum_exp(x), x.logsumexp(0))


def test_zero_probabilities_count_nothing():
    logits = torch.tensor([[0.0, -300.0, -INF]], requires_grad=True)
    uniform = torch.full((1, 3), -math.log(3))
    value = utils.kl_cat(logits.softmax(-1), logits.log_softmax(-1), uniform)
    assert value.item() == pytest.approx(math.log(3))
    value.sum().backward()
    assert torch.isfinite(logits.grad[:, :2]).all()


@DTYPES
def test_kl_cat_is_never_negative(dtype):
    """Of distributions that differ from the uniform one by rounding and a little more."""
    torch.manual_seed(0)
    scales = torch.logspace(-9, -3, 500, dtype=dtype)[:, None]
    log_q = (scales * torch.randn(500, 10, dtype=dtype)).log_softmax(-1)
    log_p = torch.full_like(log_q, -math.log(10))
    plain = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert plain.min() < 0 <= utils.kl_cat(log_q.exp(), log_q, log_p).min()


def test_parameters_split_along_any_axis():
    h = torch.randn(2, 6, 4)
    m, v = utils.gaussian_parameters(h, dim=1)
    assert torch.equal(m, h[:, :3])
    torch.testing.assert_close(v, torch.nn.functional.softplus(h[:, 3:]) + 1e-8)
    vanished = utils.gaussian_parameters(torch.full((1, 2), -200.0))[1]
    assert vanished.item() == pytest.approx(1e-8)


def test_duplicate_repeats_the_whole_batch():
    x = torch.arange(12).reshape(2, 3, 2)
    assert torch.equal(utils.duplicate(x, 3), torch.cat([x, x, x]))


def test_samples_take_one_draw_like_the_mean():
    m = torch.randn(4, 3)
    v = torch.rand(3)
    torch.manual_seed(3)
    wanted = m + v.sqrt() * torch.randn_like(m)
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(utils.sample_gaussian(m, v), wanted)
    assert torch.equal(torch.rand(1), following)


def test_importing_utils_loads_neither_files_nor_models():
    words = [sys.executable, "-X", "importtime", "-c", "import codebase.utils"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = [line.split("|")[-1].strip() for line in found.stderr.splitlines()]
    assert {name for name in loaded if "codebase" in name} == {"codebase", "codebase.utils"}


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64])
numbers = st.floats(-1e30, 1e30)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(shape=shapes, dtype=dtypes, m=numbers, x=numbers, v=st.floats(1e-30, 1e30))
def test_finite_inputs_never_give_nan(shape, dtype, m, x, v):
    x, m, v = (torch.full(shape, value, dtype=dtype) for value in (x, m, v))
    results = [utils.log_normal(x, m, v), utils.kl_normal(x, v, m, v), utils.sample_gaussian(m, v)]
    results.append(utils.log_normal_mixture(x, m.unsqueeze(-2), v.unsqueeze(-2)))
    results.append(utils.log_bernoulli_with_logits(x.sigmoid(), m))
    results += [utils.log_mean_exp(x, -1), utils.log_sum_exp(m), kl_of_logits(x, m)]
    for result in results:
        assert not result.isnan().any()

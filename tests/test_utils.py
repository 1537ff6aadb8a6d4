"""codebase.utils against published values, torch.distributions and the limits of its arguments."""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributions as td
from conftest import ROOT, Largest
from hypothesis import given, settings
from hypothesis import strategies as st

from codebase import utils


def random(*shape, low, high, dtype):
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64).to(dtype)


def variances(*shape, dtype):
    return (10 ** random(*shape, low=-6, high=6, dtype=torch.float64)).to(dtype)


def seeded_gaussian(*shape):
    torch.manual_seed(0)
    m = torch.randn(*shape)
    return m, torch.exp(torch.randn_like(m))


def test_sample_gaussian_reproduces_the_published_values():
    m, v = seeded_gaussian(3, 5)
    torch.manual_seed(0)
    z = utils.sample_gaussian(m, v)
    assert z[0].tolist() == pytest.approx(
        [3.1794934273, -0.5144982934, -4.8044347763, 0.9323326349, -1.5944868326], abs=1e-5
    )
    assert utils.reparameterization is utils.sample_gaussian


def test_log_normal_reproduces_the_published_values():
    m, v = seeded_gaussian(3, 5)
    value = utils.log_normal(utils.sample_gaussian(m, v), m, v)
    assert value.tolist() == pytest.approx([-6.9819622040, -7.6092824936, -4.8691501617], abs=1e-5)


def test_log_normal_mixture_reproduces_the_published_values():
    m, v = seeded_gaussian(3, 4, 5)
    value = utils.log_normal_mixture(utils.sample_gaussian(m[:, 0], v[:, 0]), m, v)
    assert value.tolist() == pytest.approx([-4.8879451752, -7.7989110947, -8.3332138062], abs=1e-5)


def mixture_reference(z, m, v):
    components = td.Independent(td.Normal(m, v.sqrt()), 1)
    weights = td.Categorical(torch.ones(m.shape[:-1], dtype=m.dtype))
    return td.MixtureSameFamily(weights, components).log_prob(z)


CASES = {
    "log_normal": (
        utils.log_normal,
        lambda x, m, v: td.Normal(m, v.sqrt()).log_prob(x).sum(-1),
        lambda t: (
            random(7, 5, low=-10, high=10, dtype=t),
            random(7, 5, low=-10, high=10, dtype=t),
            variances(7, 5, dtype=t),
        ),
    ),
    "shared mixture": (
        utils.log_normal_mixture,
        mixture_reference,
        lambda t: (
            random(7, 5, low=-10, high=10, dtype=t),
            random(1, 9, 5, low=-10, high=10, dtype=t),
            variances(1, 9, 5, dtype=t),
        ),
    ),
    "mixture of each example": (
        utils.log_normal_mixture,
        mixture_reference,
        lambda t: (
            random(7, 5, low=-10, high=10, dtype=t),
            random(7, 9, 5, low=-10, high=10, dtype=t),
            variances(7, 9, 5, dtype=t),
        ),
    ),
    "log_bernoulli": (
        utils.log_bernoulli_with_logits,
        lambda x, logits: td.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1),
        lambda t: (torch.rand(7, 5).round().to(t), random(7, 5, low=-10, high=10, dtype=t)),
    ),
    "kl_normal": (
        utils.kl_normal,
        lambda qm, qv, pm, pv: td.kl_divergence(
            td.Normal(qm, qv.sqrt()), td.Normal(pm, pv.sqrt())
        ).sum(-1),
        lambda t: (
            random(7, 5, low=-10, high=10, dtype=t),
            variances(7, 5, dtype=t),
            random(7, 5, low=-10, high=10, dtype=t),
            variances(7, 5, dtype=t),
        ),
    ),
    "kl_cat": (
        lambda a, b: utils.kl_cat(a.softmax(-1), a.log_softmax(-1), b.log_softmax(-1)),
        lambda a, b: td.kl_divergence(td.Categorical(logits=a), td.Categorical(logits=b)),
        lambda t: (
            random(7, 5, low=-10, high=10, dtype=t),
            random(7, 5, low=-10, high=10, dtype=t),
        ),
    ),
}


@pytest.mark.parametrize(
    "dtype, rtol, atol", [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-5)]
)
@pytest.mark.parametrize("case", CASES)
def test_densities_agree_with_torch_distributions_in_value_and_gradient(case, dtype, rtol, atol):
    ours, reference, arguments = CASES[case]
    for seed in range(20):
        torch.manual_seed(seed)
        given = [argument.requires_grad_() for argument in arguments(dtype)]
        exact = [
            argument.detach().double().requires_grad_() for argument in given
        ]  # references run in float64
        value, expected = ours(*given), reference(*exact)
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
        gradients = torch.autograd.grad(value.sum(), given[-1:] if "bernoulli" in case else given)
        expected_gradients = torch.autograd.grad(
            expected.sum(), exact[-1:] if "bernoulli" in case else exact
        )
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            scale = wanted.abs().amax().clamp(min=1)
            torch.testing.assert_close(
                gradient.double() / scale, wanted / scale, rtol=rtol, atol=atol
            )


def test_log_bernoulli_of_certain_pixels_is_within_rounding():
    logits = torch.tensor([[12.0, -15.0, 20.0, -25.0]])
    x = (logits > 0).float()
    exact = -torch.log1p(torch.exp(-logits.double().abs())).sum(-1)
    value = utils.log_bernoulli_with_logits(x, logits)
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=2e-6)


def test_log_bernoulli_has_second_derivatives_at_zero_logits():
    def of_ones(logits):
        return utils.log_bernoulli_with_logits(torch.ones(3), logits)

    wanted = -0.25 * torch.eye(3)
    torch.testing.assert_close(torch.func.hessian(of_ones)(torch.zeros(3)), wanted)
    torch.testing.assert_close(torch.autograd.functional.hessian(of_ones, torch.zeros(3)), wanted)


def test_the_gradient_of_log_bernoulli_at_logits_of_exactly_zero_is_x_less_a_half():
    x, logits = (
        torch.tensor([[0.0, 1.0, 0.25], [1.0, 0.0, 0.5]]),
        torch.zeros(2, 3, requires_grad=True),
    )
    value = utils.log_bernoulli_with_logits(x, logits)
    value.sum().backward()
    assert torch.equal(logits.grad, x - 0.5)
    torch.testing.assert_close(value, torch.full((2,), -3 * math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_densities_can_be_transformed_by_torch_func(case, dtype):
    density, _, arguments = CASES[case]
    torch.manual_seed(0)
    values = [value if len(value) == 7 else value[0] for value in arguments(dtype)]
    axes = tuple(
        0 if len(value) == 7 else None for value in values
    )  # a mixture may be shared by the batch
    torch.testing.assert_close(torch.func.vmap(density, axes)(*values), density(*values))
    last = values[-1].clone().requires_grad_()
    density(*values[:-1], last).sum().backward()
    gradient = torch.func.grad(lambda value: density(*values[:-1], value).sum())(values[-1])
    torch.testing.assert_close(gradient, last.grad)
    of_each = torch.func.vmap(torch.func.grad(density, argnums=0), axes)(*values)
    assert of_each.shape == values[0].shape and of_each.isfinite().all()


def test_samples_can_be_transformed_by_torch_func():
    m, v = seeded_gaussian(7, 5)
    drawn = torch.func.vmap(utils.sample_gaussian, randomness="different")(m, v)
    assert drawn.shape == (7, 5) and len(drawn.unique()) == 35
    h = torch.randn(7, 6)
    torch.testing.assert_close(
        torch.func.vmap(utils.gaussian_parameters)(h), utils.gaussian_parameters(h)
    )
    of_each = torch.func.vmap(lambda row: utils.log_mean_exp(row, 0))(h)
    torch.testing.assert_close(of_each, utils.log_mean_exp(h, 1))
    of_v = torch.func.grad(lambda v: utils.sample_gaussian(m, v).sum())(v)
    assert of_v.shape == v.shape and of_v.all()


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    x, logits = torch.rand(4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    arguments = [argument.requires_grad_() for argument in (x, logits)]
    assert torch.autograd.gradcheck(utils.log_bernoulli_with_logits, arguments)
    assert torch.autograd.gradgradcheck(utils.log_bernoulli_with_logits, arguments)


def mixture_of_pairs(z, m, v):
    """log_normal_mixture of shared components (1, mix, dim), by way of the pairwise function."""
    return utils.log_mean_exp(utils.log_normal_pairwise(z, m[0], v[0]), -1)


@pytest.mark.parametrize("mixture", [utils.log_normal_mixture, mixture_of_pairs])
def test_a_shared_mixture_stays_accurate_when_variances_are_tiny(mixture):
    torch.manual_seed(0)
    m, v = 10 * torch.rand(1, 50, 10), torch.full((1, 50, 10), 1e-8)
    z = m[0, :20] + 1e-4 * torch.randn(20, 10)
    exact = mixture_reference(z.double(), m.double(), v.double())
    torch.testing.assert_close(mixture(z, m, v).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_pairwise_densities_and_gradients_are_those_of_torch(dtype, tolerance):
    for seed in range(10):
        torch.manual_seed(seed)
        z = random(3, 7, 5, low=-10, high=10, dtype=dtype).requires_grad_()
        m = random(9, 5, low=-10, high=10, dtype=dtype).requires_grad_()
        v = variances(9, 5, dtype=dtype).requires_grad_()
        value = utils.log_normal_pairwise(z, m, v)
        wide = [argument.double() for argument in (z, m, v)]
        expected = td.Normal(wide[1], wide[2].sqrt()).log_prob(wide[0].unsqueeze(-2)).sum(-1)
        assert value.shape == (3, 7, 9) and value.dtype == dtype
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(value.double(), expected, **close)
        gradients = torch.autograd.grad(value.sum(), (z, m, v))
        for gradient, wanted in zip(
            gradients, torch.autograd.grad(expected.sum(), (z, m, v)), strict=True
        ):
            scale = wanted.abs().amax().clamp(min=1)
            torch.testing.assert_close(gradient / scale, wanted / scale, **close)


def test_pairwise_densities_make_no_tensor_of_all_dimensions():
    z, m = torch.randn(100, 10, requires_grad=True), torch.randn(500, 10, requires_grad=True)
    with Largest() as largest:
        utils.log_normal_pairwise(z, m, torch.rand(500, 10) + 0.1).sum().backward()
    assert largest.elements <= 100 * 500


@pytest.mark.parametrize("mixture", [utils.log_normal_mixture, mixture_of_pairs])
def test_whole_numbers_are_not_truncated_by_a_mixture(mixture):
    torch.manual_seed(0)
    z, m, v = torch.tensor([[1, 2], [-3, 0]]), torch.randn(1, 4, 2), torch.rand(1, 4, 2) + 0.1
    torch.testing.assert_close(mixture(z, m, v), mixture(z.float(), m, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 3)])
def test_a_mixture_of_one_point_is_a_number(shape, dtype):
    z, m, v = (
        torch.randn(3, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.rand(shape, dtype=dtype) + 0.1,
    )
    value = utils.log_normal_mixture(z, m, v)
    assert value.shape == ()
    torch.testing.assert_close(value, utils.log_normal_mixture(z[None], m, v)[0])


@pytest.mark.parametrize(
    "m, v",
    [((1, 5, 3), ()), ((1, 5, 3), (1,)), ((1, 5, 3), (3,)), ((3,), (1, 5, 3)), ((1, 5, 1),) * 2],
)
def test_a_mixture_takes_whatever_broadcasts(m, v):
    z, m, v = torch.randn(4, 3), torch.randn(m), torch.rand(v) + 0.1
    direct = (
        torch.distributions.Normal(m.double(), v.double().sqrt())
        .log_prob(z[:, None].double())
        .sum(-1)
    )
    value = utils.log_normal_mixture(z, m, v)
    torch.testing.assert_close(
        value.double(), direct.logsumexp(-1) - math.log(direct.shape[-1]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("components", [1, 10_000])
def test_mixtures_of_one_and_of_ten_thousand_components_work(components):
    z, m, v = torch.randn(3, 4), torch.randn(1, components, 4), torch.rand(1, components, 4) + 0.1
    torch.testing.assert_close(
        utils.log_normal_mixture(z, m, v).double(),
        mixture_reference(z.double(), m.double(), v.double()),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 4)])
def test_a_mixture_a_hundred_standard_deviations_away_has_a_finite_log_density(shape):
    value = utils.log_normal_mixture(
        torch.full((2, 4), 100.0), torch.zeros(shape), torch.ones(shape)
    )
    assert value.tolist() == pytest.approx([-20000 - 2 * math.log(2 * math.pi)] * 2, rel=1e-6)


def test_log_means_of_all_minus_infinity_are_minus_infinity():
    x = torch.full((2, 3), -math.inf)
    assert utils.log_mean_exp(x, 1).tolist() == [-math.inf] * 2
    assert utils.log_sum_exp(x).tolist() == [-math.inf] * 3


def test_log_sums_are_stable_from_minus_to_plus_ten_thousand():
    x = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [-1e4, 1e4]])
    assert utils.log_sum_exp(x, 1).tolist() == pytest.approx(
        [1e4 + math.log(2), -1e4 + math.log(2), 1e4], rel=1e-6
    )
    assert utils.log_mean_exp(x, 1).tolist() == pytest.approx(
        [1e4, -1e4, 1e4 - math.log(2)], rel=1e-6
    )


def test_zero_probabilities_count_nothing_in_kl_cat_and_have_finite_gradients():
    logits = torch.tensor([[0.0, -300.0, -math.inf]], requires_grad=True)
    q, log_q = logits.softmax(-1), logits.log_softmax(-1)
    value = utils.kl_cat(q, log_q, torch.full((1, 3), -math.log(3)))
    assert value.item() == pytest.approx(math.log(3))
    value.sum().backward()
    assert torch.isfinite(logits.grad[:, :2]).all()


def test_gaussian_parameters_split_along_any_axis():
    h = torch.randn(2, 6, 4)
    m, v = utils.gaussian_parameters(h, dim=1)
    assert torch.equal(m, h[:, :3]) and torch.allclose(
        v, torch.nn.functional.softplus(h[:, 3:]) + 1e-8
    )


def test_duplicate_repeats_the_batch_as_the_slow_axis():
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(utils.duplicate(x, 3), torch.cat([x, x, x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_keep_the_dtype(dtype):
    x, v = torch.rand(3, 4, dtype=dtype), torch.rand(3, 4, dtype=dtype) + 0.5
    values = [utils.sample_gaussian(x, v), utils.log_normal(x, x, v), utils.kl_normal(x, v, x, v)]
    values += [utils.log_bernoulli_with_logits(x, v), *utils.gaussian_parameters(x)]
    values += [utils.log_normal_mixture(x, x[None], v[None]), utils.log_mean_exp(x, 1)]
    assert {value.dtype for value in values} == {dtype}


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: utils.log_normal(torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(3, 5)),
            ["4", "5"],
        ),
        (
            lambda: utils.kl_normal(torch.zeros(2), torch.ones(3), torch.zeros(1), torch.ones(1)),
            ["2", "3"],
        ),
        (
            lambda: utils.log_normal_mixture(
                torch.zeros(3, 4), torch.zeros(1, 2, 5), torch.ones(1, 2, 5)
            ),
            ["4", "5"],
        ),
        (
            lambda: utils.log_normal_pairwise(
                torch.zeros(3, 4), torch.zeros(2, 5), torch.ones(2, 5)
            ),
            ["3x8", "10x2"],
        ),
        (
            lambda: utils.log_bernoulli_with_logits(torch.zeros(3, 4), torch.zeros(3, 5)),
            ["4", "5"],
        ),
        (lambda: utils.kl_cat(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4)), ["3", "4"]),
        (lambda: utils.gaussian_parameters(torch.zeros(2, 5)), ["even", "dim -1", "5"]),
        (lambda: utils.sample_gaussian(torch.zeros(2), torch.ones(3)), ["2", "3"]),
        (lambda: utils.log_mean_exp(torch.zeros(2), 3), ["3"]),
        (lambda: utils.duplicate(torch.zeros(2), -1), ["-1"]),
        (lambda: utils.log_normal("x", torch.zeros(2), torch.ones(2)), []),
        (lambda: utils.sample_gaussian([1.0], None), []),
        (lambda: utils.log_normal(torch.zeros(2), torch.zeros(2)), ["'v'"]),
    ],
)
def test_wrong_arguments_raise_an_error_with_both_sizes(call, words):
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "m, v", [((1, 3), (4, 3)), ((3,), (4, 3)), ((4, 3), (3,)), ((4, 1), (1, 3))]
)
def test_every_entry_of_a_sample_has_its_own_noise(m, v):
    assert len(utils.sample_gaussian(torch.zeros(m), torch.ones(v)).unique()) == 12


@pytest.mark.parametrize("v", [(4, 3), (3,), (1,), ()])
def test_samples_take_one_draw_shaped_like_the_mean(v):
    m, v = torch.randn(4, 3), torch.rand(v)
    torch.manual_seed(3)
    wanted = m + v.sqrt() * torch.randn_like(m)
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(utils.sample_gaussian(m, v), wanted)
    assert torch.equal(torch.rand(1), following)


def nearly_uniform(dtype):
    """Distributions that differ from the uniform one by rounding and a little more."""
    torch.manual_seed(0)
    scales = torch.logspace(-9, -3, 500, dtype=dtype)[:, None]
    return (scales * torch.randn(500, 10, dtype=dtype)).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_cat_of_distributions_is_never_negative(dtype):
    log_q = nearly_uniform(dtype)
    log_p = torch.full_like(log_q, -math.log(10))
    plain = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert plain.min() < 0 <= utils.kl_cat(log_q.exp(), log_q, log_p).min()


def test_kl_cat_keeps_its_derivatives_where_it_is_zero():
    def kl(logits):
        return utils.kl_cat(logits.softmax(-1), logits.log_softmax(-1), log_p)

    log_p = torch.full((10,), -math.log(10))
    for logits in torch.randn(20, 10, generator=torch.Generator().manual_seed(0)) * 1e-4:
        q = logits.double().softmax(-1)
        t = q.log() + math.log(10)
        exact = q * (t - (q * t).sum())
        gradient = torch.func.grad(kl)(logits)
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=3e-8)
        assert gradient.any()
    uniform_hessian = torch.eye(10) / 10 - 1 / 100
    torch.testing.assert_close(torch.func.hessian(kl)(torch.zeros(10)), uniform_hessian)


def test_kl_cat_of_no_distributions_is_the_plain_sum():
    q, p = torch.tensor([[0.1, 0.2]]), torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(utils.kl_cat(q, q.log(), p.log()), (q * (q / p).log()).sum(-1))


def test_importing_utils_loads_neither_files_nor_models():
    program = "import sys; from codebase import utils; print(*sorted(n for n in sys.modules if 'codebase' in n))"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.split() == ["codebase", "codebase.utils"], found.stderr


def test_unknown_names_of_utils_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"codebase\.utils.*no_such_name"):
        _ = utils.no_such_name


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=shapes,
    dtype=dtypes,
    m=st.floats(-1e30, 1e30),
    x=st.floats(-1e30, 1e30),
    v=st.floats(1e-30, 1e30),
)
def test_finite_inputs_never_give_a_silent_nan(shape, dtype, m, x, v):
    x, m, v = (torch.full(shape, value, dtype=dtype) for value in (x, m, v))
    results = [utils.log_normal(x, m, v), utils.kl_normal(x, v, m, v), utils.sample_gaussian(m, v)]
    results += [
        utils.log_normal_mixture(x, m.unsqueeze(-2), v.unsqueeze(-2)),
        utils.log_bernoulli_with_logits(x.sigmoid(), m),
    ]
    results += [utils.log_mean_exp(x, -1), utils.log_sum_exp(m)]
    results += [utils.kl_cat(x.softmax(-1), x.log_softmax(-1), m.log_softmax(-1))]
    for result in results:
        assert not result.isnan().any()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(shape=shapes, dtype=dtypes, scale=st.floats(0, 1e4))
def test_log_mean_exp_lies_between_mean_and_maximum(shape, dtype, scale):
    x = scale * torch.randn(shape, dtype=dtype)
    value = utils.log_mean_exp(x, 0)
    slack = 1e-5 * (1 + x.abs().amax())
    assert (value <= x.amax(0) + slack).all() and (value >= x.mean(0) - slack).all()

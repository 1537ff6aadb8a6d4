"""Densities, divergences and samplers of the models: pure functions on tensors.

Variances are variances (never log-variances or standard deviations), densities are in nats, and every density or
divergence sums over the last axis, one number per example. Shapes below are the usual ones; whatever broadcasts works.
A call whose arguments are no tensors or do not fit together raises TypeError or ValueError with every argument's shape.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _names_arguments(function):
    """Re-raise what torch says of bad arguments with their names and shapes; costs nothing where all is well."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)):
                raise
            try:
                bound = inspect.signature(function).bind(*args, **kwargs).arguments
            except TypeError as wrong_call:
                raise TypeError(f"{function.__name__}: {wrong_call}") from None
            shown = ", ".join(f"{name} {_describe(value)}" for name, value in bound.items())
            kind = TypeError if isinstance(error, (TypeError, AttributeError)) else ValueError
            raise kind(f"{function.__name__}: {str(error).splitlines()[0]} (given {shown})") from error

    return wrapper


def _describe(value) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"= {value!r:.60}"


@_names_arguments
def sample_gaussian(m: Tensor, v: Tensor) -> Tensor:
    """Draw z ~ N(m, diag v) by reparameterisation, z = m + sqrt(v) * eps with eps ~ N(0, I).

    m, v: mean and variance, (batch, ...). Returns a tensor like m; gradients reach m and v.
    Source: Kingma & Welling 2014, section 2.4.
    """
    return m + v.sqrt() * torch.randn_like(m)


reparameterization = sample_gaussian


@_names_arguments
def log_normal(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(x; m, diag v) = -1/2 sum_d [ (x_d - m_d)^2 / v_d + log(2 pi v_d) ].

    x, m, v: (batch, ..., dim), v > 0. Returns nats, (batch, ...).
    """
    return -0.5 * ((x - m).square() / v + torch.log(2 * math.pi * v)).sum(-1)


@_names_arguments
def log_normal_mixture(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log (1/mix) sum_k N(z; m_k, diag v_k), the density of a uniformly weighted mixture of Gaussians.

    z: (batch, dim); m, v: (batch, mix, dim) or (1, mix, dim), v > 0. Returns nats, (batch,).
    Components shared by the batch cost one matrix product and no (batch, mix, dim) tensor.
    """
    return log_mean_exp(log_normal_components(z, m, v), -1)


def log_normal_components(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(z_b; m_k, diag v_k) of every component: arguments as in log_normal_mixture, nats, (batch, mix)."""
    shared = all(size == 1 for size in (*m.shape[:-2], *v.shape[:-2]))
    if shared and z.dtype != torch.float64 and z.device.type != "mps":  # mps has no float64
        return _log_normal_shared(z, m, v).to(z.dtype)
    return log_normal(z.unsqueeze(-2), m, v)


def _log_normal_shared(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(z_b; m_k, diag v_k) for all pairs, (batch, dim) and (1, mix, dim) to (batch, mix), in float64.

    (z - m)^2 / v is expanded to [z^2, z, 1] times [-1/2v, m/v, -m^2/2v]. In float64 the cancellation costs about
    (1e-8 t)^2 nats, t = |m| / sqrt(v), less than the 6e-8 t nats that the float32 rounding of z itself makes.
    """
    dim = z.shape[-1]
    m, v = torch.broadcast_tensors(m.reshape(m.shape[-2:]).double(), v.reshape(v.shape[-2:]).double())
    if m.shape[-1] != dim:
        raise ValueError("z and the components differ in their last axis")
    z = z.double()
    constant = -0.5 * (m.square() / v + torch.log(2 * math.pi * v)).sum(-1)
    return F.linear(torch.cat([z.square(), z], -1), torch.cat([-0.5 / v, m / v], -1), constant)


@_names_arguments
def gaussian_parameters(h: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Split h into the mean, its first half along dim, and the variance, softplus(second half) + 1e-8.

    h: real tensor of even size along dim. Raises ValueError where that size is odd.
    """
    if h.shape[dim] % 2:
        raise ValueError(f"the size along dim {dim} must be even")
    m, h = torch.chunk(h, 2, dim)
    return m, F.softplus(h) + 1e-8


class _LogBernoulli(torch.autograd.Function):
    """sum_d x_d l_d - softplus(l_d) with few logarithms, which are slow on CPUs; gradient x - sigmoid(l)."""

    @staticmethod
    def forward(ctx, x, logits):
        ctx.save_for_backward(x, logits)
        positive = logits.clamp(min=0)
        linear = (x * logits).sub_(positive).sum(-1)  # 0 where a pixel is surely right
        tail = torch.sub(logits, positive, alpha=2, out=positive).exp_()  # softplus(l) = max(l, 0) + log(1 + exp(-|l|))
        for _ in range(3):  # log(1 + a) + log(1 + b) = log(1 + (a + b + ab)): halves are folded onto each other
            if tail.shape[-1] % 2 == 0:
                a, b = tail.chunk(2, -1)
                tail = torch.addcmul(a, b, a + 1)
        return linear.sub_(tail.log1p_().sum(-1))

    @staticmethod
    def backward(ctx, grad):
        x, logits = ctx.saved_tensors
        grad, grad_x, grad_logits = grad.unsqueeze(-1), None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * logits).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            grad_logits = (x - torch.sigmoid(logits)).mul_(grad).sum_to_size(logits.shape)
        return grad_x, grad_logits


@_names_arguments
def log_bernoulli_with_logits(x: Tensor, logits: Tensor) -> Tensor:
    """log Bern(x; sigmoid(logits)) = sum_d [ x_d l_d - softplus(l_d) ].

    x in [0, 1] and logits: (batch, dim). Returns nats, (batch,).
    """
    return _LogBernoulli.apply(x, logits)


@_names_arguments
def kl_normal(qm: Tensor, qv: Tensor, pm: Tensor, pv: Tensor) -> Tensor:
    """KL(N(qm, diag qv) || N(pm, diag pv)) = 1/2 sum_d [ log pv/qv + (qv + (qm - pm)^2) / pv - 1 ].

    qm, qv: (batch, dim); pm, pv broadcast against them; variances > 0. Returns nats, (batch,).
    Source: Kingma & Welling 2014, appendix B, for a general prior.
    """
    return 0.5 * (pv.log() - qv.log() + qv / pv - 1 + (qm - pm).square() / pv).sum(-1)


@_names_arguments
def kl_cat(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum_d q_d (log q_d - log p_d) of categorical distributions; 0 log 0 counts as 0.

    q, log_q, log_p: (batch, dim). Returns nats, (batch,).
    """
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)


@_names_arguments
def log_sum_exp(x: Tensor, dim: int = 0) -> Tensor:
    """log sum exp(x) over dim, without overflow; all -inf gives -inf."""
    return torch.logsumexp(x, dim)


@_names_arguments
def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """log mean exp(x) over dim, without overflow; all -inf gives -inf."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


@_names_arguments
def duplicate(x: Tensor, rep: int) -> Tensor:
    """Repeat the whole batch rep times: (batch, ...) to (rep * batch, ...), the repetition being the slow axis."""
    return x.expand(rep, *x.shape).reshape(rep * x.shape[0], *x.shape[1:])

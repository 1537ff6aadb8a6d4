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
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)):
                raise
            given = signature.bind_partial(*args, **kwargs).arguments  # a TypeError where there is no such argument
            shown = ", ".join(
                f"{name} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} = {value!r:.60}"
                for name, value in given.items()
            )
            kind = TypeError if isinstance(error, (TypeError, AttributeError)) else ValueError
            raise kind(f"{function.__name__}: {str(error).splitlines()[0]} (given {shown})") from error

    return wrapper


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
    """log N(z_b; m_k, diag v_k) of every component: arguments as in log_normal_mixture, nats, (batch, mix).

    Where all of the batch shares the components, (z - m)^2 / v is expanded to [z^2, z, 1] times [-1/2v, m/v, -m^2/2v],
    one product of matrices. In float64 the cancellation costs about (1e-8 t)^2 nats, t = |m| / sqrt(v), less than the
    6e-8 t nats that the float32 rounding of z itself makes.
    """
    alike = min(m.dim(), v.dim()) > 1 and z.shape[-1] == m.shape[-1] == v.shape[-1]
    shared = alike and all(size == 1 for size in (*m.shape[:-2], *v.shape[:-2]))
    if not shared or z.dtype == torch.float64 or z.device.type == "mps":  # mps has no float64
        return log_normal(z.unsqueeze(-2), m, v)
    z64, m, v = z.double(), *torch.broadcast_tensors(m.flatten(0, -2).double(), v.flatten(0, -2).double())
    constant = -0.5 * (m.square() / v + torch.log(2 * math.pi * v)).sum(-1)
    return F.linear(torch.cat([z64.square(), z64], -1), torch.cat([-0.5 / v, m / v], -1), constant).to(z.dtype)


@_names_arguments
def gaussian_parameters(h: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Split h into the mean, its first half along dim, and the variance, softplus(second half) + 1e-8.

    h: real tensor of even size along dim. Raises ValueError where that size is odd.
    """
    if h.shape[dim] % 2:
        raise ValueError(f"the size along dim {dim} must be even")
    m, h = torch.chunk(h, 2, dim)
    return m, F.softplus(h) + 1e-8


@_names_arguments
def log_bernoulli_with_logits(x: Tensor, logits: Tensor) -> Tensor:
    """log Bern(x; sigmoid(logits)) = sum_d [ x_d l_d - softplus(l_d) ].

    x in [0, 1] and logits: (batch, dim). Returns nats, (batch,).
    """
    size = logits.abs()  # softplus(l) = l/2 + |l|/2 - log sigmoid(|l|): nothing cancels where a pixel is nearly certain
    return ((x - 0.5) * logits - 0.5 * size + F.logsigmoid(size)).sum(-1)


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

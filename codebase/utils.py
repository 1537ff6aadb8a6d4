"""The equations of the models: densities, divergences and samplers, as pure functions on tensors.

Variances are variances (never log-variances or standard deviations). Densities are in nats.
Every density and every divergence sums over the last axis: one number per example.
Shapes in the docstrings are the usual ones; whatever broadcasts works.
Arguments that do not fit together raise torch's own error, which says both sizes.
"""

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Samplers ---------------------------------------------------------------------------------------


def sample_gaussian(m: Tensor, v: Tensor) -> Tensor:
    """Draw z ~ N(m, diag v) as z = m + sqrt(v) * eps, eps ~ N(0, I); gradients reach m and v.

    m, v: mean and variance, (batch, ...). Returns (batch, ...), every entry with noise of its own.
    Source: Kingma & Welling 2014, section 2.4.
    """
    full_m, _ = torch.broadcast_tensors(m, v)
    return m + v.sqrt() * torch.randn_like(full_m)


reparameterization = sample_gaussian


def gaussian_parameters(h: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Split a network's output into a mean and a variance.

    h: real tensor of even size along dim. Returns m, the first half along dim, and v, the softplus
    of the second half plus 1e-8. Raises ValueError where the size along dim is odd.
    """
    size = h.shape[dim]
    if size % 2 == 1:
        raise ValueError(f"gaussian_parameters takes h of even size along dim {dim}, not {size}")
    m, before_softplus = torch.chunk(h, 2, dim)
    return m, F.softplus(before_softplus) + 1e-8


# Densities --------------------------------------------------------------------------------------


def log_normal(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(x; m, diag v) = -1/2 sum_d [ (x_d - m_d)^2 / v_d + log(2 pi v_d) ], in nats.

    x, m, v: (batch, ..., dim), v > 0. Returns (batch, ...).
    """
    return -0.5 * ((x - m).square() / v + torch.log(2 * math.pi * v)).sum(-1)


def log_normal_mixture(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log p(z) = log (1/mix) sum_k N(z; m_k, diag v_k), in nats.

    z: (batch, dim); m, v: (batch, mix, dim) or (1, mix, dim), v > 0. Returns (batch,).
    A single z of shape (dim,) gives a number of shape ().
    """
    if z.dim() == 1:
        return log_normal_mixture(z.unsqueeze(0), m, v).squeeze(0)
    return log_mean_exp(log_normal(z.unsqueeze(-2), m, v), -1)


def log_normal_pairwise(z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """log N(z_b; m_k, diag v_k) in nats of every z and every component that all of them share.

    z: (..., batch, dim); m, v: (mix, dim), v > 0. Returns (..., batch, mix).
    The terms (z - m)^2 / v are expanded to [z^2, z, 1] times [-1/2v, m/v, -m^2/2v]. That is one
    product of matrices, and no tensor of shape (batch, mix, dim) is made.
    The product is in float64. There the cancellation costs about (1e-8 t)^2 nats, t = |m|/sqrt(v),
    which is less than the 6e-8 t nats that the float32 rounding of z itself makes.
    """
    dtype = torch.promote_types(z.dtype, m.dtype)
    if dtype == torch.float64 or z.device.type == "mps":  # nothing wider is there to compute in
        return log_normal(z.unsqueeze(-2), m, v)
    z = z.double()
    m = m.double()
    v = v.double()
    constant = -0.5 * (m.square() / v + torch.log(2 * math.pi * v)).sum(-1)  # (mix,)
    powers = torch.cat([z.square(), z], -1)  # (..., batch, 2 dim)
    factors = torch.cat([-0.5 / v, m / v], -1)  # (mix, 2 dim)
    return F.linear(powers, factors, constant).to(dtype)


def log_bernoulli_with_logits(x: Tensor, logits: Tensor) -> Tensor:
    """log Bern(x; sigmoid(l)) = sum_d [ x_d l_d - softplus(l_d) ], in nats, l the logits.

    x in [0, 1] and logits: (batch, dim). Returns (batch,).
    """
    return (x * logits - F.softplus(logits)).sum(-1)


# Divergences ------------------------------------------------------------------------------------


def kl_normal(qm: Tensor, qv: Tensor, pm: Tensor, pv: Tensor) -> Tensor:
    """KL(q || p) = 1/2 sum_d [ log pv_d/qv_d + (qv_d + (qm_d - pm_d)^2) / pv_d - 1 ], in nats.

    q = N(qm, diag qv) and p = N(pm, diag pv).
    qm, qv: (batch, dim); pm, pv broadcast against them; variances > 0. Returns (batch,).
    Source: Kingma & Welling 2014, appendix B, for a general prior.
    """
    return 0.5 * (pv.log() - qv.log() + qv / pv - 1 + (qm - pm).square() / pv).sum(-1)


def kl_cat(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum_d q_d (log q_d - log p_d), in nats; 0 log 0 counts as 0.

    q and p are categorical distributions.
    q, log_q, log_p: (batch, dim). Returns (batch,).
    """
    kl = (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)
    # Of nearly equal distributions the terms cancel, and their rounding may end below zero. There
    # the value is 0 and the gradient stays that of the sum, which a clamp would set to zero.
    # A sum further below zero is of no distributions and is returned as it is.
    rounding = 10 * torch.finfo(kl.dtype).eps
    return torch.where((kl < 0) & (kl > -rounding), kl - kl.detach(), kl)


# Sums of exponentials ---------------------------------------------------------------------------


def log_sum_exp(x: Tensor, dim: int = 0) -> Tensor:
    """log sum exp(x) over dim, without overflow; all -inf gives -inf."""
    return torch.logsumexp(x, dim)


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """log mean exp(x) over dim, without overflow; all -inf gives -inf."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


# Batches ----------------------------------------------------------------------------------------


def duplicate(x: Tensor, rep: int) -> Tensor:
    """Repeat the whole batch: (batch, ...) to (rep * batch, ...), repetition is the slow axis."""
    return x.expand(rep, *x.shape).reshape(rep * x.shape[0], *x.shape[1:])


# The course's other names -----------------------------------------------------------------------

COURSE_NAMES = (
    "load_model_by_name",
    "save_model_by_name",
    "get_mnist_data",
    "get_svhn_data",
    "evaluate_lower_bound",
    "evaluate_classifier",
)


def __getattr__(name: str) -> Any:
    """Find the course's other names when they are first asked for.

    The module that has them reads files and knows the models, and both stand above utils.
    Importing it here, by its name, keeps utils free of them for everybody who does not ask.
    """
    if name in COURSE_NAMES:
        return getattr(importlib.import_module("codebase.course"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

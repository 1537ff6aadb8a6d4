"""Figures of a trained model: bounds on the course subset, accuracy on the test split."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from codebase import utils

SAMPLES = 100  # evaluations that NELBO, KL and Rec are averages over; IWAE-m takes SAMPLES // m, at least one
ROWS = 1000  # decoder rows at a time: few enough to stay in a CPU's cache


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and of the accelerator in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def quietly(model, seed: int = 0) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with a random stream of its own; everything is put back after."""
    training, random = model.training, random_state()
    torch.manual_seed(seed)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        set_random_state(random)


def bounds(model, x: Tensor, ms: tuple[int, ...] = (1, 10, 100, 1000), seed: int = 0, ranks=None) -> dict[str, float]:
    """NELBO, KL, Rec and the IWAE-m bounds of a VAE or GMVAE on binary images x (n, 784), in nats per image.

    NELBO, KL and Rec are averages over 100 samples of z per image; IWAE-m is an average over max(100 // m, 1) groups
    of m, ess_m their mean effective sample size (sum w)^2 / sum w^2. All share the same samples, drawn chunk by chunk,
    so that memory does not grow with m. ranks: the processes that share the chunks, if there are several.
    """
    few, many = [m for m in ms if m <= SAMPLES], sorted(m for m in ms if m > SAMPLES)
    chunk = max(1, (ROWS if x.device.type == "cpu" else 50 * ROWS) // len(x))
    terms = x.new_zeros(3, SAMPLES, len(x))  # log_w, kl, rec of the first samples
    sums = x.new_full((2, len(many), len(x)), -math.inf)  # log of sum w and of sum w^2 over the first m
    with quietly(model):
        for start in range(0, max([SAMPLES, *many]), chunk):
            if ranks and start // chunk % ranks.size != ranks.rank:
                continue
            torch.manual_seed(seed + start)
            found = torch.stack(model.importance(x, chunk))
            kept = terms[:, start : start + chunk]
            kept.copy_(found[:, : kept.shape[1]])
            for row, m in enumerate(many):
                log_w = found[0, : max(0, m - start)]
                if len(log_w):
                    new = torch.stack([log_w.logsumexp(0), (2 * log_w).logsumexp(0)])
                    sums[:, row] = torch.logaddexp(sums[:, row], new)
        if ranks:
            terms, sums = ranks.sum(terms), ranks.logsumexp(sums)
    log_w, kl, rec = terms
    figures = {"nelbo": (kl + rec).mean(), "kl": kl.mean(), "rec": rec.mean()}
    logs = {m: _grouped(log_w, m) for m in few} | {m: sums[:, row] for row, m in enumerate(many)}
    for m in ms:
        figures[f"niwae_{m}"] = (math.log(m) - logs[m][0]).mean()
    for m in ms:
        figures[f"ess_{m}"] = (2 * logs[m][0] - logs[m][1]).exp().mean()
    return {name: value.item() for name, value in figures.items()}


def _grouped(log_w: Tensor, m: int) -> Tensor:
    """log sum w and log sum w^2 of groups of m samples: (SAMPLES, n) to (2, SAMPLES // m, n)."""
    groups = log_w[: SAMPLES // m * m].unflatten(0, (-1, m))
    return torch.stack([groups.logsumexp(1), (2 * groups).logsumexp(1)])


def latent_use(model, x: Tensor) -> dict[str, float]:
    """How much of z a VAE or GMVAE uses on binary images x (n, 784).

    active: dimensions of z whose posterior mean varies over the images by more than 0.01 (Burda et al. 2016, 5.2);
    components: of a mixture prior, those that are the likeliest source of the posterior mean of at least one image.
    """
    with quietly(model):
        m = torch.cat([model.enc(rows)[0] for rows in x.split(ROWS)])
        found = {"active": (m.var(0) > 0.01).sum().item()}
        if hasattr(model, "prior"):
            prior = model.prior()
            best = [utils.log_normal_components(rows, *prior).argmax(-1) for rows in m.split(ROWS)]
            found["components"] = torch.cat(best).unique().numel()
    return found


def confusion(model, images) -> Tensor:
    """How often each digit (row) was classified as each (column), (10, 10), on grey-level pixels."""
    counts = torch.zeros(100, dtype=torch.int64)
    with quietly(model):
        for pixels, labels in zip(images.pixels.split(ROWS), images.labels.split(ROWS), strict=True):
            guessed = model.cls(pixels.float() / 255).argmax(-1)
            counts += torch.bincount(10 * labels + guessed, minlength=100).cpu()
    return counts.reshape(10, 10)


def conditional_bound(model, images) -> dict[str, float]:
    """NELBO, KL and Rec of an FSVAE over a split, one sample of z per image, in nats per image."""
    total = torch.zeros(3)
    with quietly(model):
        for index in torch.arange(len(images), device=images.labels.device).split(ROWS):
            x, y = images.scaled(index), images.one_hot(index)
            total += torch.stack(model.negative_elbo_bound(x, y)).cpu() * len(index)
    return dict(zip(("nelbo", "kl", "rec"), (total / len(images)).tolist(), strict=True))

"""Figures of a trained model: bounds on the course subset, use of the latent space, accuracy on the test split."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from codebase import utils
from codebase.data import Images
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime.device import eval_mode
from codebase.runtime.processes import ALONE, Processes
from codebase.runtime.report import progress_bar

IMAGES = 100  # images that are evaluated at a time
SAMPLES = 100  # evaluations that NELBO, KL and Rec are averages over; IWAE-m takes SAMPLES // m, at least one
ROWS = 1000  # rows of a network at a time: few enough to stay in a CPU's cache
MEMORY = {"cpu": 2**27, "cuda": 2**30, "mps": 2**29}  # bytes that they may take, where that is less


def chunk_rows(model: BinaryVAE, device: torch.device) -> int:
    """How many samples of z go through the decoder and the prior at once: as memory, and a CPU's cache, allow."""
    # See log_normal_pairwise for what differs on mps.
    pairs = getattr(model, "k", 0) * (4 * model.z_dim if device.type == "mps" else 1)
    rows = MEMORY[device.type] // (4 * (4 * 784 + 6 * pairs))
    return max(1, min(rows, ROWS) if device.type == "cpu" else rows)


def bounds(
    model: BinaryVAE,
    x: Tensor,
    ms: tuple[int, ...] = (1, 10, 100, 1000),
    seed: int = 0,
    group: Processes = ALONE,
    progress: bool = False,
    reduce: bool = True,
) -> dict[str, float] | dict[str, Tensor]:
    """NELBO, KL, Rec and the IWAE-m bounds of a VAE or GMVAE on images x (n, 784) in [0, 1], in nats per image.

    NELBO, KL and Rec are averages over 100 samples of z per image; IWAE-m is an average over max(100 // m, 1) groups
    of m, ess_m their mean effective sample size (sum w)^2 / sum w^2. All share the same samples, drawn chunk by chunk,
    so that memory grows neither with m nor with n. Of several processes each takes its share of the chunks. progress:
    whether a long evaluation shows how far it is.
    reduce: whether the figures are averaged over the images. Without it each is a tensor (n,), a
    number per image: -niwae_1000 then estimates log p(x) of every image.
    Raises ValueError where pixels are outside of [0, 1], where there are no images, or where an m
    is below 1.
    """
    if not len(x) or min(ms, default=1) < 1:
        raise ValueError(f"bounds takes at least one image and m from 1 on, not {len(x)} images and m = {ms}")
    if not 0 <= x.min() <= x.max() <= 1:
        raise ValueError(f"bounds takes pixels in [0, 1], not from {x.min():g} to {x.max():g}")
    pieces = x.split(IMAGES)
    figures = []
    chunk = max(1, chunk_rows(model, x.device) // len(pieces[0]))
    starts = range(chunk * group.rank, max(SAMPLES, *ms, 1), chunk * group.size)
    with eval_mode(model), progress_bar(0, len(pieces) * len(starts), progress and group.main, "chunks") as bar:
        for number, piece in enumerate(pieces):
            own_seed = seed + 10**9 * number
            figures.append(_bounds_of_piece(model, piece, ms, own_seed, group, starts, bar))
    of_each = {name: torch.cat([piece[name] for piece in figures]) for name in figures[0]}
    if not reduce:
        return of_each
    return {name: value.mean().item() for name, value in of_each.items()}


def _bounds_of_piece(
    model: BinaryVAE, x: Tensor, ms: tuple[int, ...], seed: int, group: Processes, starts: range, bar: tqdm
) -> dict[str, Tensor]:
    """bounds of each of the images that are evaluated at a time.

    starts: the first samples of this process's chunks.
    """
    chunk = starts.step // group.size
    terms = x.new_zeros(3, SAMPLES, len(x))  # log_w, kl and rec of the first samples
    large = sorted(m for m in ms if m > SAMPLES)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # of a million terms the last still count
    sums = torch.full((len(large), 2, len(x)), -math.inf, dtype=wide, device=x.device)  # log of sum w and of sum w^2
    qm, qv = model.enc(x)
    for start in starts:
        torch.manual_seed(seed + start)
        z = utils.sample_gaussian(qm.expand(chunk, *qm.shape), qv)
        log_p_x, log_p_z, log_q_z = model.log_densities(x, qm, qv, z)  # (chunk, n)
        log_w = log_p_x + log_p_z - log_q_z
        if start < SAMPLES:
            kept = torch.stack([log_w, model.kl(qm, qv, z).expand_as(log_w), -log_p_x])
            terms[:, start : start + chunk] = kept[:, : SAMPLES - start]
        for row, m in enumerate(large):
            if start < m:
                sums[row] = torch.logaddexp(sums[row], log_sums(log_w[: m - start]))
        bar.update()
    of_all = sums.new_zeros(group.size, *sums.shape)
    of_all[group.rank] = sums
    group.sum([terms, of_all])
    log_w, kl, rec = terms
    logs = dict(zip(large, of_all.logsumexp(0), strict=True))
    logs |= {m: log_sums(log_w[: SAMPLES // m * m].unflatten(0, (-1, m)), 1) for m in ms if m <= SAMPLES}
    figures = {"nelbo": kl + rec, "kl": kl, "rec": rec}  # (evaluations, n)
    figures |= {f"niwae_{m}": math.log(m) - logs[m][0] for m in ms}
    figures |= {f"ess_{m}": (2 * logs[m][0] - logs[m][1]).exp() for m in ms}
    return {name: value.reshape(-1, len(x)).to(wide).mean(0) for name, value in figures.items()}


def log_sums(log_w: Tensor, dim: int = 0) -> Tensor:
    """log sum w and log sum w^2 over dim, stacked."""
    return torch.stack([log_w.logsumexp(dim), (2 * log_w).logsumexp(dim)])


def latent_use(model: BinaryVAE, images: Images) -> dict[str, float]:
    """How much of z a VAE or GMVAE uses on a split, binarised once.

    active: dimensions of z whose posterior mean varies over the images by more than 0.01 (Burda et al. 2016, 5.2);
    components: of a mixture prior, those that are the likeliest source of the posterior mean of at least one image.
    """
    with eval_mode(model):
        positions = torch.arange(len(images), device=images.labels.device).split(ROWS)
        m = torch.cat([model.enc(images.binary(index))[0] for index in positions])
        found = {"active": (m.var(0, correction=0) > 0.01).sum().item()}
        if isinstance(model, GMVAE):
            pieces = m.split(min(ROWS, chunk_rows(model, m.device)))
            best = [model.log_components(rows).argmax(-1) for rows in pieces]
            found["components"] = torch.cat(best).unique().numel()
    return found


def confusion(model: SSVAE, images: Images) -> Tensor:
    """How often each digit (row) was classified as each (column), (10, 10), on grey-level pixels."""
    counts = torch.zeros(100, dtype=torch.int64)
    with eval_mode(model):
        for index in torch.arange(len(images), device=images.labels.device).split(ROWS):
            guessed = model.cls(images.scaled(index)).argmax(-1)
            counts += torch.bincount(10 * images.labels[index] + guessed, minlength=100).cpu()
    return counts.reshape(10, 10)


def accuracy(counts: Tensor) -> float:
    """The share of a confusion matrix that lies on its diagonal."""
    return counts.diag().sum().item() / counts.sum().item()


def conditional_bound(model: FSVAE, images: Images, most: int | None = None) -> dict[str, float]:
    """NELBO, KL and Rec of an FSVAE over a split, or the first images of it, in nats; one sample of z per image."""
    total, count = torch.zeros(3), min(len(images), most or len(images))
    with eval_mode(model):
        for index in torch.arange(count, device=images.labels.device).split(ROWS):
            found = torch.stack(model.negative_elbo_bound(images.scaled(index), images.one_hot(index)))
            total += found.cpu() * len(index)
    return dict(zip(("nelbo", "kl", "rec"), (total / count).tolist(), strict=True))

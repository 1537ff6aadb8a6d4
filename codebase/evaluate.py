"""Evaluation: a model and images in, metrics out."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from codebase import utils
from codebase.data import Images
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime import log
from codebase.runtime.files import RunError
from codebase.runtime.parallel import Processes, seed_generator

PIECE = 100  # images whose log weights are computed at a time
SAMPLES = 100  # samples that NELBO, KL and Rec are averages over
ROWS = 1000  # rows that go through a network at a time: few enough for a CPU's cache
GPU_ROWS = 100_000
MEMORY = {"cpu": 2**27, "cuda": 2**30, "mps": 2**29}  # bytes that they may take


@contextlib.contextmanager
def eval_mode(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Without gradients, in evaluation mode, with random numbers of its own.

    The model's mode and the caller's random numbers are put back after it; not those of Apple's
    GPUs, whose generator torch.random.fork_rng does not know.
    """
    weight = next(model.parameters())
    devices = [weight.device] if weight.is_cuda else []
    was_training = model.training
    model.eval()
    try:
        # The model's GPU, where it is on one, need not be the current one.
        with torch.cuda.device_of(weight), torch.random.fork_rng(devices), torch.no_grad():
            seed_generator(weight.device.type, seed)
            yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------------------------------------
# Bounds of log p(x)


def bounds(
    model: BinaryVAE,
    x: Tensor,
    ms: Sequence[int] = (1, 10, 100, 1000),
    seed: int = 0,
    processes: Processes | None = None,
    progress: bool = False,
    reduce: bool = True,
) -> dict:
    """NELBO, KL, Rec and the IWAE-m bounds of a VAE or GMVAE on images x (n, 784) in [0, 1].

    nelbo, kl and rec are averages over 100 samples of z per image, niwae_m over max(100 // m, 1)
    groups of m of the same samples; ess_m is their effective sample size (sum w)^2 / sum w^2.
    All are in nats, means over the images, or with reduce=False tensors (n,). Of several
    processes each takes its share of the images. The samples are fixed by the seed; seeds that
    differ by a million share none. Raises ValueError where pixels are outside [0, 1], where there
    are no images, or where an m is below 1.
    Source: Burda et al. 2016, equation 8.
    """
    check_what_is_bounded(x, ms)
    if processes is None:
        processes = Processes(x.device.type)
    names = ["nelbo", "kl", "rec"] + [f"niwae_{m}" for m in ms] + [f"ess_{m}" for m in ms]
    table = x.new_zeros(len(names), len(x))
    samples = max([SAMPLES, *ms])
    pieces = list(zip(x.split(PIECE), table.split(PIECE, 1), strict=True))
    own = range(processes.rank, len(pieces), processes.size)
    shown = progress and processes.main
    with eval_mode(model), log.progress_bar(0, len(own) * samples, shown, "samples") as bar:
        for number in own:
            images, columns = pieces[number]
            piece_seed = seed + 10**9 * number  # far apart, for a chunk adds its first sample
            columns.copy_(bounds_of_piece(model, images, ms, samples, piece_seed, bar))
    processes.add_up([table])
    if reduce:
        means = table.cpu().double().mean(1)  # mps has no float64
        return dict(zip(names, means.tolist(), strict=True))
    return dict(zip(names, table, strict=True))


def check_what_is_bounded(x: Tensor, ms: Sequence[int]) -> None:
    """Raise ValueError where bounds cannot be computed of these images, or with these m."""
    if len(x) == 0 or min(ms, default=1) < 1:
        raise ValueError(f"bounds takes images and m from 1 on, not {len(x)} images and m = {ms}")
    if not (x.min() >= 0 and x.max() <= 1):  # nor is NaN
        raise ValueError(f"bounds takes pixels in [0, 1], not from {x.min():g} to {x.max():g}")


def bounds_of_piece(
    model: BinaryVAE, x: Tensor, ms: Sequence[int], samples: int, seed: int, bar: log.tqdm
) -> Tensor:
    """What bounds returns of each of these images, a row a name: (names, n)."""
    qm, qv = model.enc(x)
    log_w = x.new_empty(samples, len(x))  # 4 MB per 10,000 samples of 100 images
    kl = x.new_empty(SAMPLES, len(x))
    rec = x.new_empty(SAMPLES, len(x))
    chunk = max(1, rows_at_once(model) // len(x))
    for start in range(0, samples, chunk):
        # Whole chunks always, so that the samples do not depend on how many are wanted.
        seed_generator(x.device.type, seed + start)
        z = utils.sample_gaussian(qm.expand(chunk, *qm.shape), qv)
        log_p_x, log_p_z, log_q_z = model.log_densities(x, qm, qv, z)  # (chunk, n)
        copy_rows(log_w, start, log_p_x + log_p_z - log_q_z)
        copy_rows(kl, start, model.kl(qm, qv, z).expand_as(log_p_x))
        copy_rows(rec, start, -log_p_x)
        bar.update(min(chunk, samples - start))

    rows = [(kl + rec).mean(0), kl.mean(0), rec.mean(0)]
    weights = []
    for m in ms:
        count = max(SAMPLES // m, 1)
        weights.append(log_w[: count * m].view(count, m, len(x)))
    for groups in weights:
        rows.append(-utils.log_mean_exp(groups, 1).mean(0))
    for groups in weights:
        rows.append((1 / groups.softmax(1).square().sum(1)).mean(0))
    return torch.stack(rows)


def copy_rows(table: Tensor, start: int, rows: Tensor) -> None:
    """Copy rows into a table from that row on, as many as it has room for."""
    room = max(0, min(len(rows), len(table) - start))
    table[start : start + room] = rows[:room]


def rows_at_once(model: BinaryVAE) -> int:
    """How many samples of z go through the decoder and the prior at a time."""
    device = next(model.parameters()).device.type
    rows = ROWS if device == "cpu" else GPU_ROWS
    pairs = getattr(model, "k", 0)
    if device == "mps":  # see utils.log_normal_pairwise
        pairs *= 4 * model.z_dim
    numbers = 4 * 784 + 6 * pairs + 10 * model.z_dim  # that are in memory at once for a row
    bytes_per_row = 4 * numbers
    return max(1, min(rows, MEMORY[device] // bytes_per_row))


def latent_use(model: BinaryVAE, images: Images) -> dict[str, float]:
    """How much of z a VAE or GMVAE uses on a split of images, binarised at random.

    active: dimensions of z whose posterior mean has a variance above 0.01 over the images (Burda
    et al. 2016, 5.2); components: of a mixture prior, those that are the likeliest source of the
    posterior mean of at least one image.
    """
    with eval_mode(model):
        z = posterior_means(model, images)
        metrics = {"active": int((z.var(0, correction=0) > 0.01).sum())}
        if isinstance(model, GMVAE):
            likeliest = []
            for some in z.split(rows_at_once(model)):
                likeliest.append(model.log_components(some).argmax(-1))
            metrics["components"] = torch.cat(likeliest).unique().numel()
    return metrics


def posterior_means(model: BinaryVAE, images: Images) -> Tensor:
    """The mean of q(z | x) of each image, binarised at random: (n, z_dim)."""
    widest = max(784, 2 * model.z_dim)
    rows = max(1, ROWS * 784 // widest)
    return torch.cat([model.enc(images.binary(index))[0] for index in blocks(images, rows)])


def blocks(images: Images, rows: int = ROWS) -> Sequence[Tensor]:
    """The positions of all images, in blocks of as many as go through a network at a time."""
    return torch.arange(len(images), device=images.labels.device).split(rows)


# ---------------------------------------------------------------------------------------------
# Classification, and bounds given the label


def confusion_matrix(model: SSVAE, images: Images) -> Tensor:
    """How often each digit (row) was classified as each (column), on grey pixels: (10, 10).

    Raises RunError where a logit is not finite.
    """
    counts = torch.zeros(100, dtype=torch.int64)
    with eval_mode(model):
        for index in blocks(images):
            logits = model.cls(images.scaled(index))
            if not torch.isfinite(logits).all():
                raise RunError("logits of the classifier not finite: the weights diverged")
            pairs = 10 * images.labels[index] + logits.argmax(-1)
            counts += torch.bincount(pairs, minlength=100).cpu()
    return counts.reshape(10, 10)


def accuracy(confusion: Tensor) -> float:
    """The share of a confusion matrix that lies on its diagonal."""
    return confusion.diag().sum().item() / confusion.sum().item()


def tables(confusion: Tensor) -> dict[str, list]:
    """A confusion matrix, and the accuracy on each digit, as results.json has them."""
    per_digit = confusion.diag() / confusion.sum(1).clamp(min=1)
    return {"confusion": confusion.tolist(), "per_digit_accuracy": per_digit.tolist()}


def conditional_bound(model: FSVAE, images: Images, most: int | None = None) -> dict[str, float]:
    """NELBO, KL and Rec of an FSVAE on a split, or the first images of it, in nats.

    One sample of z is drawn per image.
    """
    if most is not None:
        images = images.first(most)
    total = torch.zeros(3)
    with eval_mode(model):
        for index in blocks(images):
            x = images.scaled(index)
            terms = model.negative_elbo_bound(x, images.one_hot(index))
            total += torch.stack(terms).cpu() * len(index)
    return dict(zip(["nelbo", "kl", "rec"], (total / len(images)).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------
# The lines that scripts around the assignment look for


def print_bounds(metrics: dict[str, float], remark: str = "") -> None:
    """Print NELBO, KL and Rec, and a line for each IWAE-m bound."""
    print("NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**metrics) + remark)
    for name, value in metrics.items():
        if name.startswith("niwae_"):
            print(f"Negative IWAE-{name.removeprefix('niwae_')}: {value}")


def print_accuracy(accuracy: float, remark: str = "") -> None:
    """Print the share of the test set that was classified right."""
    print(f"Test set classification accuracy: {accuracy}{remark}")


def print_confusion(confusion: Tensor) -> None:
    """Print a confusion matrix: rows are true digits, columns assigned ones."""
    print("\ntrue  " + "".join(f"{digit:>6}" for digit in range(10)) + "  accuracy")
    for digit, row in enumerate(confusion.tolist()):
        share = row[digit] / max(1, sum(row))
        print(f"{digit:>4}  " + "".join(f"{count:>6}" for count in row) + f"  {share:8.4f}")

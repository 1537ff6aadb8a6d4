"""Plots: a model and images in, pictures in logs/<model.name>/ out.

Pictures are drawn without pyplot, so that a notebook's own figures and backend stay as they are.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from codebase.data import Images
from codebase.evaluate import eval_mode, posterior_means
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime.files import log_dir, write

ZOOM = 2
MOST_POINTS = 10_000  # of a latent map
TERMS = {  # of the loss: title and colour
    "loss": ("loss", "#0072B2"),
    "nelbo": ("NELBO", "#56B4E9"),
    "rec": ("reconstruction", "#D55E00"),
    "kl": ("KL of z", "#009E73"),
    "kl_y": ("KL of y", "#CC79A7"),
    "ce": ("cross-entropy", "#000000"),
    "acc": ("accuracy", "#E69F00"),
}


# ---------------------------------------------------------------------------------------------
# The plots of each model; each function returns their names


def of_vae(model: BinaryVAE, x: Tensor, test_set: Images) -> list[str]:
    """Draw what a VAE or GMVAE makes: 200 samples E[x | z], reconstructions, interpolations.

    x: images (n, 784) in [0, 1], drawn above their reconstructions; beside these the latent map
    of the test set, and the curves of the training.
    """
    folder = log_dir(model.name)
    with eval_mode(model):
        samples = model.sample_sigmoid(200)
        reconstructions = model.reconstruct(x)
        between = interpolations(model, x)
    return [
        grid(samples, folder / "samples.png"),
        grid(in_pairs_of_rows(x, reconstructions), folder / "reconstructions.png"),
        grid(between, folder / "interpolations.png", columns=12),
        latent_map(model, test_set, folder / "latent.png"),
        *curves(folder),
    ]


def of_ssvae(model: SSVAE, confusion: Tensor) -> list[str]:
    """Draw the confusion matrix, the curves and, of a generative model, digits in styles."""
    folder = log_dir(model.name)
    plots = [confusion_plot(confusion, folder / "confusion.png"), *curves(folder)]
    if model.gen_weight:
        plots.append(styles(model, model.compute_sigmoid_given, folder / "styles.png"))
    return plots


def of_fsvae(model: FSVAE, name: str = "samples") -> list[str]:
    """Draw every digit in 20 styles, as <name>.png, and the curves of the training."""
    folder = log_dir(model.name)
    plot = styles(model, model.compute_mean_given, folder / f"{name}.png")
    return [plot, *curves(folder)]


# ---------------------------------------------------------------------------------------------
# Grids of images


def grid(images: Tensor, path: Path, columns: int = 20) -> str:
    """Draw images (n, 784), or (n, 3072) as data.Images has them, row by row as a PNG.

    Values are in [0, 1]; n is a multiple of columns. Returns the name of the picture.
    """
    side = 28
    channels = 1
    if images.shape[1] == 3072:
        side = 32
        channels = 3
    rows = len(images) // columns
    tiles = images.detach().clamp(0, 1).cpu().reshape(rows, columns, channels, side, side)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels)
    pixels = (picture.expand(-1, -1, 3) * 255).to(torch.uint8).numpy()
    pixels = pixels.repeat(ZOOM, 0).repeat(ZOOM, 1)
    return save(path, lambda file: Image.fromarray(pixels).save(file, format="png"))


def in_pairs_of_rows(above: Tensor, below: Tensor, columns: int = 20) -> Tensor:
    """Images (n, d) by rows, each row of the first above that of the second; black where n ends."""
    missing = -len(above) % columns
    rows = []
    for images in [above, below]:
        rows.append(F.pad(images, (0, 0, 0, missing)).reshape(-1, columns, images.shape[1]))
    return torch.stack(rows, 1).flatten(0, 2)


def interpolations(model: BinaryVAE, x: Tensor, pairs: int = 10, steps: int = 12) -> Tensor:
    """Decode even steps between the latent codes of pairs of images: (pairs * steps, 784)."""
    z = model.enc(x)[0]
    start = z[torch.arange(pairs) * len(x) // pairs]
    end = start.roll(-1, 0)
    weight = torch.linspace(0, 1, steps, device=z.device)[:, None]
    between = start[:, None].lerp(end[:, None], weight)  # (pairs, steps, z_dim)
    return model.compute_sigmoid_given(between.flatten(0, 1))


def styles(
    model: SSVAE | FSVAE, decode: Callable[[Tensor, Tensor], Tensor], path: Path, columns: int = 20
) -> str:
    """Draw every label (a row) in the same styles z (a column each); return the plot's name."""
    with eval_mode(model):
        z = model.sample_z(columns)
        y = torch.eye(10, device=z.device)
        images = decode(z.repeat(10, 1), y.repeat_interleave(columns, 0))
    return grid(images, path, columns)


# ---------------------------------------------------------------------------------------------
# Figures with axes


def latent_map(model: BinaryVAE, images: Images, path: Path) -> str:
    """Draw posterior means of at most 10,000 images by digit, and a GMVAE's means of the prior.

    Shown is z itself where it has two dimensions, else its two first principal components.
    Returns the name of the plot.
    """
    shown = images.first(MOST_POINTS)
    prior = torch.empty(0, model.z_dim)
    with eval_mode(model):
        z = posterior_means(model, shown).cpu()
        if isinstance(model, GMVAE):
            prior = model.prior()[0][0].detach().cpu()
        centre, axes = principal_axes(z)
    points = (z - centre) @ axes
    prior = (prior - centre) @ axes
    labels = shown.labels.cpu()

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    for digit in labels.unique().tolist():
        x, y = points[labels == digit].T
        colour = f"C{digit}" if digit >= 0 else "C7"
        label = str(digit) if digit >= 0 else "no label"
        size = max(3, 2000 / len(z))
        axis.scatter(x, y, s=size, color=colour, alpha=0.5, linewidths=0, label=label)
    if len(prior):
        x, y = prior.T
        axis.scatter(x, y, s=12, color="black", marker="x", linewidths=0.6, label="prior")
    kind = "z" if model.z_dim <= 2 else "principal component"
    axis.set_title(f"posterior means of {len(z):,} test images")
    axis.set_xlabel(f"{kind} 1")
    if model.z_dim > 1:
        axis.set_ylabel(f"{kind} 2")
    larger = 3 if len(z) > 1000 else 1
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=larger, frameon=False)
    return save_figure(path, figure)


def principal_axes(z: Tensor) -> tuple[Tensor, Tensor]:
    """A centre (z_dim,) and two axes (z_dim, 2) to show points z (n, z_dim) by.

    Of more than two dimensions these are the mean and the two directions in which the points vary
    most, found by subspace iteration on more directions than are kept: in time linear in z_dim.
    """
    dim = z.shape[1]
    if dim <= 2:
        return z.new_zeros(dim), torch.eye(dim, 2)
    centre = z.mean(0)
    directions = min(30, *z.shape)
    axes = torch.pca_lowrank(z - centre, directions, center=False, niter=10)[2][:, :2]
    axes = torch.where(axes.sum(0) < 0, -axes, axes)  # an axis has no sign of its own
    return centre, F.pad(axes, (0, 2 - axes.shape[1]))  # a single point has one axis


def curves(folder: Path) -> list[str]:
    """Draw the terms of the loss over the steps, from metrics.csv, if it is there.

    NELBO and accuracy of test.csv stand beside those of the training.
    """
    columns = read_table(folder / "metrics.csv")
    tests = read_table(folder / "test.csv")
    if not columns:
        return []
    terms = [name for name in TERMS if name in columns and columns[name].any()]
    if not terms:
        terms = ["loss"]  # of a run that has just begun
        columns = {"step": np.zeros(0), "loss": np.zeros(0)}
    if "nelbo" in terms and np.array_equal(columns.get("loss"), columns["nelbo"]):
        terms.remove("nelbo")
    beside = {"acc": tests.get("accuracy")}
    beside["nelbo" if "nelbo" in terms else "loss"] = tests.get("nelbo")

    figure = Figure(figsize=(4 * len(terms), 3.2), layout="constrained")
    axes = figure.subplots(1, len(terms), squeeze=False)[0]
    for axis, name in zip(axes, terms, strict=True):
        column = columns[name]
        title, colour = TERMS[name]
        axis.plot(columns["step"], column, color=colour, linewidth=1)
        settled = column[len(column) // 20 :]  # the first steps may leave the plot
        if beside.get(name) is not None:
            dots = {"markersize": 3, "linewidth": 0.8, "label": "test images"}
            axis.plot(tests["step"], beside[name], "ko--", **dots)
            axis.legend(frameon=False)
            settled = np.concatenate([settled, beside[name]])
        settled = settled[np.isfinite(settled)]
        if len(settled) > 1 and np.ptp(settled) > 0:
            margin = 0.1 * np.ptp(settled)
            axis.set_ylim(settled.min() - margin, settled.max() + margin)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.set_ylabel("share" if name == "acc" else "nats per image")
        axis.grid(alpha=0.3)
    return [save_figure(folder / "curves.png", figure)]


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns of a .csv file by name, or none.

    There are none where the file is not there or empty, or where another program has stored it in a
    form of its own, as with semicolons.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        names = rows[0]
        values = np.array(rows[1:], float).reshape(len(rows) - 1, len(names))
    except (ValueError, IndexError):
        return {}
    return dict(zip(names, values.T, strict=True)) if "step" in names else {}


def confusion_plot(confusion: Tensor, path: Path) -> str:
    """Draw a confusion matrix in percent of the true digit: rows true, columns assigned ones."""
    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(percent.numpy(), cmap="cividis", vmin=0, vmax=100)
    for row, column in confusion.nonzero().tolist():
        colour = "black" if percent[row, column] > 50 else "white"
        count = int(confusion[row, column])
        axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(10))
    axis.set_yticks(range(10))
    axis.set_xlabel("assigned digit")
    axis.set_ylabel("true digit")
    figure.colorbar(image, label="percent of the true digit")
    return save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> str:
    return save(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save(path: Path, draw: Callable[[io.BytesIO], None]) -> str:
    """Write what draw(file) draws, whole; return the name of the file."""
    buffer = io.BytesIO()
    draw(buffer)
    write(path, buffer.getvalue())
    return path.name

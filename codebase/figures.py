"""Pictures in logs/<model.name>/: grids of images, latent map, training curves, confusion matrix.

They are drawn on matplotlib's Figure objects: pyplot, its backend and the open figures of a
notebook stay as they are.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import image
from matplotlib.figure import Figure
from torch import Tensor

from codebase.data import Images
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime.device import eval_mode
from codebase.runtime.files import log_dir, write

ZOOM = 2
DPI = 110
LATENT_IMAGES = 10_000  # as many points as the latent map shows at most
CHUNK_ELEMENTS = 2_000_000  # numbers of z that are encoded at once
TITLES = {
    "loss": "loss",
    "nelbo": "NELBO",
    "rec": "reconstruction",
    "kl": "KL of z",
    "kl_y": "KL of y",
    "ce": "cross-entropy",
    "acc": "accuracy",
}
COLOURS = {
    "loss": "#0072B2",
    "nelbo": "#56B4E9",
    "rec": "#D55E00",
    "kl": "#009E73",
    "kl_y": "#CC79A7",
    "ce": "#000000",
    "acc": "#E69F00",
}


def of_binary_vae(model: BinaryVAE, x: Tensor, test: Images) -> list[str]:
    """Draw 200 samples (E[x given z]), images x (n, 784) above their reconstructions, and more.

    These are interpolations between ten pairs of them, the latent map of the test images, and
    curves. Returns the names of the pictures.
    """
    with eval_mode(model):
        samples = model.sample_sigmoid(200)
        decoded = model.reconstruct(x)
        z = model.enc(x)[0]
        start = z[torch.arange(10) * len(x) // 10]
        end = start.roll(-1, 0)
        steps = [torch.lerp(start, end, step / 11) for step in range(12)]
        between = model.compute_sigmoid_given(torch.stack(steps, 1).flatten(0, 1))
    folder = log_dir(model.name)
    return [
        grid(samples, folder / "samples.png"),
        grid(_in_turn(x, decoded), folder / "reconstructions.png"),
        grid(between, folder / "interpolations.png", columns=12),
        latent(model, test, folder / "latent.png"),
        *curves(folder),
    ]


def of_ssvae(model: SSVAE, counts: Tensor) -> list[str]:
    """Draw the confusion matrix, curves, and, of a generative model, every digit in 20 styles.

    Returns the names of the pictures.
    """
    folder = log_dir(model.name)
    names = [confusion(counts, folder / "confusion.png"), *curves(folder)]
    if model.gen_weight:
        names.append(style_and_content(model, model.compute_sigmoid_given, folder / "styles.png"))
    return names


def of_fsvae(model: FSVAE, name: str) -> list[str]:
    """Draw every digit in 20 styles, as <name>.png, and curves; return the names."""
    folder = log_dir(model.name)
    styles = style_and_content(model, model.compute_mean_given, folder / f"{name}.png")
    return [styles, *curves(folder)]


def _in_turn(above: Tensor, below: Tensor, columns: int = 20) -> Tensor:
    """A row of images of the one, below it the same row of the other, and so on; black fills up."""
    rows = []
    for start in range(0, len(above), columns):
        for images in (above, below):
            row = images[start : start + columns]
            rows.append(F.pad(row, (0, 0, 0, columns - len(row))))
    return torch.cat(rows)


def grid(pixels: Tensor, path: Path, columns: int = 20) -> str:
    """Tile images (n, 784) or (n, 3072, channel-major) with values in [0, 1], row by row, as a PNG.

    Returns the picture's name.
    """
    side, channels = 32, 3
    if pixels.shape[1] == 784:
        side, channels = 28, 1
    tiles = pixels.detach().clamp(0, 1).cpu().reshape(-1, columns, channels, side, side)
    tiled = tiles.permute(0, 3, 1, 4, 2).reshape(len(tiles) * side, columns * side, channels)
    coloured = tiled.expand(-1, -1, 3).numpy()
    buffer = io.BytesIO()
    image.imsave(buffer, coloured.repeat(ZOOM, 0).repeat(ZOOM, 1), format="png")
    write(path, buffer.getvalue())
    return path.name


def style_and_content(
    model: SSVAE | FSVAE,
    decode: Callable[..., Tensor],
    path: Path,
    columns: int = 20,
) -> str:
    """Every label (rows) in the same styles z (columns): decode(z, y) at the same z each time."""
    with eval_mode(model):
        z = model.sample_z(columns)
        y = torch.eye(10, device=z.device)
        images = decode(z.repeat(10, 1), y.repeat_interleave(columns, 0))
    return grid(images, path, columns)


def latent(model: BinaryVAE, images: Images, path: Path) -> str:
    """Draw posterior means of at most 10,000 images, coloured by digit, and a GMVAE's prior means.

    Shown is z itself where it has two dimensions, else its two first principal components. Returns
    the picture's name.
    """
    count = min(len(images), LATENT_IMAGES)
    chunk = min(1000, max(1, CHUNK_ELEMENTS // model.z_dim))
    z = torch.empty(count, model.z_dim)
    prior = torch.empty(0, model.z_dim)
    with eval_mode(model):
        for index in torch.arange(count, device=images.labels.device).split(chunk):
            z[index.cpu()] = model.enc(images.binary(index))[0].cpu()
        if isinstance(model, GMVAE):
            prior = model.prior()[0][0].detach().cpu()
        if model.z_dim > 2:
            centre = z.mean(0)
            z -= centre  # in place: z may be large
            axes = _principal_axes(z)
            z = z @ axes
            prior = (prior - centre) @ axes
    if z.shape[1] < 2:  # a line
        z = F.pad(z, (0, 1))
        prior = F.pad(prior, (0, 1))
    labels = images.labels[:count].cpu()

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    size = max(3, 2000 / len(z))
    for digit in labels.unique().tolist():
        name, colour = str(digit), f"C{digit}"
        if digit < 0:
            name, colour = "no label", "C7"
        points = z[labels == digit]
        axis.scatter(*points.T, s=size, color=colour, alpha=0.5, linewidths=0, label=name)
    if len(prior):
        axis.scatter(*prior.T, s=12, color="black", marker="x", linewidths=0.6, label="prior")
    kind = "principal component"
    if model.z_dim <= 2:
        kind = "z"
    axis.set_xlabel(f"{kind} 1")
    if model.z_dim > 1:
        axis.set_ylabel(f"{kind} 2")
    axis.set_title(f"posterior means of {len(z):,} test images")
    marker_scale = 1
    if len(z) > 1000:
        marker_scale = 3
    axis.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        markerscale=marker_scale,
        frameon=False,
    )
    return _save(figure, path)


def _principal_axes(centred: Tensor) -> Tensor:
    """The two directions in which points (n, dim) with mean 0 vary most, as columns (dim, 2).

    By randomised subspace iteration, in linear time, on more directions than are kept, so that it
    converges to the axes of the exact decomposition; one column where there is a single point. It
    draws from torch's default stream.
    """
    directions = min(30, *centred.shape)
    axes = torch.pca_lowrank(centred, directions, center=False, niter=10)[2][:, :2]
    return torch.where(axes.sum(0) < 0, -axes, axes)  # a principal axis has no sign of its own


def curves(folder: Path) -> list[str]:
    """Draw the terms of the loss over the steps, from metrics.csv, if it is there.

    What test.csv holds of images that were not trained on stands beside the same metric of the
    training. Returns the picture's name.
    """
    columns = _table(folder / "metrics.csv")
    tests = _table(folder / "test.csv")
    if not columns:
        return []
    values = {name: columns[name] for name in TITLES if name in columns and columns[name].any()}
    if not values:  # of a run that has just begun
        values = {"loss": np.zeros(0)}
    if "nelbo" in values and np.array_equal(values.get("loss"), values["nelbo"]):
        del values["nelbo"]
    bound = "loss"
    if "nelbo" in values:
        bound = "nelbo"
    tested = {bound: tests.get("nelbo"), "acc": tests.get("accuracy")}

    figure = Figure(figsize=(4 * len(values), 3.2), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axis, (name, column) in zip(panels, values.items(), strict=True):
        axis.plot(columns["step"][: len(column)], column, color=COLOURS[name], linewidth=1)
        settled = column[len(column) // 20 :]  # the first steps may leave the picture
        on_test = tested.get(name)
        if on_test is not None:
            marks = {"markersize": 3, "linewidth": 0.8, "label": "test images"}
            axis.plot(tests["step"], on_test, "ko--", **marks)
            axis.legend(frameon=False)
            settled = np.concatenate([settled, on_test])
        settled = settled[np.isfinite(settled)]
        if len(settled) > 1 and np.ptp(settled):
            margin = 0.1 * np.ptp(settled)
            axis.set_ylim(settled.min() - margin, settled.max() + margin)
        unit = "nats per image"
        if name == "acc":
            unit = "share"
        axis.set(xlabel="training step", ylabel=unit, title=TITLES[name])
        axis.grid(alpha=0.3)
    return [_save(figure, folder / "curves.png")]


def _table(path: Path) -> dict[str, np.ndarray]:
    """The columns of a table by name, or none where it is not there."""
    if not path.exists():
        return {}
    rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    if not rows:
        return {}
    names = rows[0]
    numbers = np.array(rows[1:], float).reshape(len(rows) - 1, len(names))
    return dict(zip(names, numbers.T, strict=True))


def confusion(counts: Tensor, path: Path) -> str:
    """The confusion matrix, rows true digits, columns assigned ones, in percent of the row."""
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=100)
    for row, column in counts.nonzero().tolist():
        colour = "white"
        if share[row, column] > 50:
            colour = "black"
        number = int(counts[row, column])
        axis.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    axis.set(xticks=range(10), yticks=range(10), xlabel="assigned digit", ylabel="true digit")
    figure.colorbar(shown, label="percent of the true digit")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> str:
    """Store a figure as a PNG; return its name."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write(path, buffer.getvalue())
    return path.name

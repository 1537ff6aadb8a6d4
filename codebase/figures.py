"""Pictures in logs/<model.name>/: grids of images, the latent map, training curves, the confusion matrix."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codebase.data import Images
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime.device import eval_mode
from codebase.runtime.files import log_dir, write

matplotlib.use("Agg")
from matplotlib import image, pyplot

ZOOM = 2
TITLES = {"loss": "loss", "nelbo": "NELBO", "rec": "reconstruction", "kl": "KL of z", "kl_y": "KL of y"}
TITLES |= {"ce": "cross-entropy", "acc": "accuracy"}
COLOURS = dict(zip(TITLES, "#0072B2 #56B4E9 #D55E00 #009E73 #CC79A7 #000000 #E69F00".split(), strict=True))


def of_binary_vae(model: BinaryVAE, x: Tensor, test: Images) -> list[str]:
    """Draw 200 samples (E[x given z]), images x (n, 784) above their reconstructions, interpolations between ten pairs
    of them, the latent map of the test images, and curves; return the names.
    """
    with eval_mode(model):
        samples, decoded, z = model.sample_sigmoid(200), model.reconstruct(x), model.enc(x)[0]
        ends = z[torch.arange(10) * len(x) // 10]
        steps = torch.linspace(0, 1, 12, device=z.device)[:, None]
        between = model.compute_sigmoid_given(ends[:, None].lerp(ends.roll(-1, 0)[:, None], steps).flatten(0, 1))
    rows = (F.pad(images, (0, 0, 0, -len(x) % 20)).split(20) for images in (x, decoded))
    pairs = torch.cat([half for pair in zip(*rows, strict=True) for half in pair])
    folder = log_dir(model.name)
    drawn = [grid(samples, folder / "samples.png"), grid(pairs, folder / "reconstructions.png")]
    drawn += [grid(between, folder / "interpolations.png", 12), latent(model, test, folder / "latent.png")]
    return drawn + curves(folder)


def of_ssvae(model: SSVAE, counts: Tensor) -> list[str]:
    """Draw the confusion matrix, curves, and, of a generative model, every digit in 20 styles; return the names."""
    folder = log_dir(model.name)
    styles = [style_and_content(model, model.compute_sigmoid_given, folder / "styles.png")] if model.gen_weight else []
    return [confusion(counts, folder / "confusion.png"), *curves(folder), *styles]


def of_fsvae(model: FSVAE, name: str) -> list[str]:
    """Draw every digit in 20 styles, as <name>.png, and curves; return the names."""
    folder = log_dir(model.name)
    return [style_and_content(model, model.compute_mean_given, folder / f"{name}.png"), *curves(folder)]


def grid(pixels: Tensor, path: Path, columns: int = 20) -> str:
    """Tile images (n, 784) or (n, 3072, channel-major) with values in [0, 1], row by row, as a PNG; return its name."""
    side, channels = (28, 1) if pixels.shape[1] == 784 else (32, 3)
    tiles = pixels.detach().clamp(0, 1).cpu().reshape(-1, columns, channels, side, side)
    tiled = tiles.permute(0, 3, 1, 4, 2).reshape(len(tiles) * side, columns * side, channels).expand(-1, -1, 3).numpy()
    return _save(path, lambda file: image.imsave(file, tiled.repeat(ZOOM, 0).repeat(ZOOM, 1), format="png"))


def style_and_content(model: SSVAE | FSVAE, decode: Callable[..., Tensor], path: Path, columns: int = 20) -> str:
    """Every label (rows) in the same styles z (columns): decode(z, y) at the same latents each time."""
    with eval_mode(model):
        z = model.sample_z(columns)
        y = torch.eye(10, device=z.device)
        return grid(decode(z.repeat(10, 1), y.repeat_interleave(columns, 0)), path, columns)


def latent(model: BinaryVAE, images: Images, path: Path) -> str:
    """Draw posterior means of at most 10,000 images, coloured by digit, and as crosses a GMVAE's means of the prior.

    Shown is z itself where it has two dimensions, else its two first principal components. Returns the picture's name.
    """
    with eval_mode(model):
        index = torch.arange(min(len(images), 10_000), device=images.labels.device)
        z = torch.cat([model.enc(images.binary(some))[0] for some in index.split(1000)]).cpu()
        prior = model.prior()[0][0].detach().cpu() if isinstance(model, GMVAE) else z[:0]
    centre, axes = z.new_zeros(model.z_dim), torch.eye(model.z_dim)
    if model.z_dim > 2:
        centre = z.mean(0)
        axes = torch.linalg.eigh((z - centre).T @ (z - centre))[1].flip(1)[:, :2]
        axes = axes * axes.sum(0).sign()  # an eigenvector has no sign of its own
    z, prior = (F.pad((points - centre) @ axes, (0, max(0, 2 - model.z_dim))) for points in (z, prior))
    labels = images.labels[index].cpu()
    figure, axis = pyplot.subplots(figsize=(6.4, 5.6), layout="constrained")
    for digit in labels.unique().tolist():
        those = z[labels == digit]
        colour, name = (f"C{digit}", str(digit)) if digit >= 0 else ("C7", "no label")
        axis.scatter(*those.T, s=max(3, 2000 / len(z)), color=colour, alpha=0.5, linewidths=0, label=name)
    axis.scatter(*prior.T, s=12, color="black", marker="x", linewidths=0.6, label="prior" if len(prior) else None)
    kind, title = "z" if model.z_dim <= 2 else "principal component", f"posterior means of {len(z):,} test images"
    axis.set(xlabel=f"{kind} 1", ylabel=f"{kind} 2" if model.z_dim > 1 else "", title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3 if len(z) > 1000 else 1, frameon=False)
    return _save(path, lambda file: figure.savefig(file, format="png", dpi=110))


def curves(folder: Path) -> list[str]:
    """Draw the terms of the loss over the steps, from metrics.csv, if it is there; return the picture's name.

    What test.csv holds of images that were not trained on stands beside the same figure of the training.
    """
    columns, tests = _table(folder / "metrics.csv"), _table(folder / "test.csv")
    if not columns:
        return []
    values = {name: columns[name] for name in TITLES if name in columns and columns[name].any()}
    values = values or {"loss": np.zeros(0)}  # of a run that has just begun
    if "nelbo" in values and np.array_equal(values.get("loss"), values["nelbo"]):
        del values["nelbo"]
    tested = {("nelbo" if "nelbo" in values else "loss"): tests.get("nelbo"), "acc": tests.get("accuracy")}
    figure, axes = pyplot.subplots(1, len(values), figsize=(4 * len(values), 3.2), layout="constrained", squeeze=False)
    for axis, (name, column) in zip(axes[0], values.items(), strict=True):
        axis.plot(columns["step"][: len(column)], column, color=COLOURS[name], linewidth=1)
        settled = column[len(column) // 20 :]  # the first steps may leave the picture
        if tested.get(name) is not None:
            axis.plot(tests["step"], tested[name], "ko--", markersize=3, linewidth=0.8, label="test images")
            axis.legend(frameon=False)
            settled = np.concatenate([settled, tested[name]])
        settled = settled[np.isfinite(settled)]
        if len(settled) > 1 and np.ptp(settled):
            axis.set_ylim(settled.min() - 0.1 * np.ptp(settled), settled.max() + 0.1 * np.ptp(settled))
        unit = "share" if name == "acc" else "nats per image"
        axis.set(xlabel="training step", ylabel=unit, title=TITLES[name])
        axis.grid(alpha=0.3)
    return [_save(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))]


def _table(path: Path) -> dict[str, np.ndarray]:
    """The columns of a table by name, or none where it is not there."""
    lines = path.read_text().splitlines() if path.exists() else []
    names, *rows = [line for line in csv.reader(lines) if line] or [[]]
    return dict(zip(names, np.array(rows, float).reshape(len(rows), len(names)).T, strict=True))


def confusion(counts: Tensor, path: Path) -> str:
    """The confusion matrix, rows the true digit, columns the assigned one, in percent of the row."""
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axis = pyplot.subplots(figsize=(5.6, 5), layout="constrained")
    shown = axis.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=100)
    for row, column in counts.nonzero().tolist():
        colour = "black" if share[row, column] > 50 else "white"
        axis.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axis.set(xticks=range(10), yticks=range(10), xlabel="assigned digit", ylabel="true digit")
    figure.colorbar(shown, label="percent of the true digit")
    return _save(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _save(path: Path, draw: Callable[[io.BytesIO], None]) -> str:
    buffer = io.BytesIO()
    draw(buffer)
    pyplot.close("all")
    write(path, buffer.getvalue())
    return path.name

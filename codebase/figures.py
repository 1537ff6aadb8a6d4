"""Pictures in logs/<model.name>/: grids of images, training curves, the confusion matrix."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from codebase.models.fsvae import FSVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime.device import eval_mode
from codebase.runtime.files import log_dir, write

matplotlib.use("Agg")
from matplotlib import image, pyplot

ZOOM = 2
TITLES = {"loss": "loss", "rec": "reconstruction", "kl": "KL of z", "kl_y": "KL of y", "ce": "cross-entropy"}
COLOURS = dict(zip(TITLES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), strict=True))


def of_binary_vae(model: BinaryVAE, x: Tensor) -> list[str]:
    """Draw 200 samples (E[x given z]), images x (n, 784) above their reconstructions, and curves; return the names."""
    with eval_mode(model):
        samples, decoded = model.sample_sigmoid(200), model.reconstruct(x)
    pairs = torch.cat([half for pair in zip(x.split(20), decoded.split(20), strict=True) for half in pair])
    folder = log_dir(model.name)
    return [grid(samples, folder / "samples.png"), grid(pairs, folder / "reconstructions.png"), *curves(folder)]


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


def curves(folder: Path) -> list[str]:
    """Draw the terms of the loss over the steps, from metrics.csv, if it is there; return the picture's name."""
    if not (folder / "metrics.csv").exists():
        return []
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = {name: np.array([float(row.get(name, 0)) for row in rows]) for name in TITLES}
    shown = [name for name in TITLES if values[name].any()] or ["loss"]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        axis.plot([int(row["step"]) for row in rows], values[name], color=COLOURS[name], linewidth=1)
        settled = values[name][len(rows) // 20 :]  # the first steps may leave the picture
        if len(settled) > 1 and np.ptp(settled):
            axis.set_ylim(settled.min() - 0.1 * np.ptp(settled), settled.max() + 0.1 * np.ptp(settled))
        axis.set(xlabel="training step", ylabel="nats per image", title=TITLES[name])
        axis.grid(alpha=0.3)
    return [_save(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))]


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

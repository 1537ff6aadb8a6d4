"""Pictures in logs/<name>/: grids of images, training curves, the confusion matrix."""

import csv
import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from codebase import checkpoint

matplotlib.use("Agg")
from matplotlib import image, pyplot

ZOOM = 2


def grid(pixels: Tensor, columns: int, path: Path) -> str:
    """Tile images (n, 784) or (n, 3072, channel-major) with values in [0, 1], row by row, as a PNG; return its name."""
    side, channels = (28, 1) if pixels.shape[1] == 784 else (32, 3)
    tiles = pixels.detach().clamp(0, 1).cpu().reshape(-1, columns, channels, side, side)
    rows = len(tiles)
    tiled = tiles.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels).expand(-1, -1, 3).numpy()
    _save(path, lambda file: image.imsave(file, tiled.repeat(ZOOM, 0).repeat(ZOOM, 1), format="png"))
    return path.name


def reconstructions(x: Tensor, decoded: Tensor, path: Path) -> str:
    """Images (n, d) above their reconstructions, 20 to a row."""
    both = torch.cat([half for pair in zip(x.split(20), decoded.split(20), strict=True) for half in pair])
    return grid(both, 20, path)


def style_and_content(model, decode, path: Path, columns: int = 20) -> str:
    """Every label (rows) in the same styles z (columns): decode(z, y) at the same latents each time."""
    z = model.sample_z(columns)
    y = torch.eye(10, device=z.device)
    return grid(decode(z.repeat(10, 1), y.repeat_interleave(columns, 0)), columns, path)


def curves(folder: Path) -> str:
    """Loss, KL and reconstruction over the steps, from metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    step = [int(row["step"]) for row in rows]
    names = {"loss": "loss", "rec": "reconstruction", "kl": "KL of z", "kl_y": "KL of y", "ce": "cross-entropy"}
    shown = [name for name in names if rows and name in rows[0] and any(float(row[name]) for row in rows)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), layout="constrained", squeeze=False)
    for axis, name, colour in zip(
        axes[0], shown, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), strict=False
    ):
        values = np.array([float(row[name]) for row in rows])
        axis.plot(step, values, color=colour, linewidth=1)
        settled = values[len(values) // 20 :]
        if len(settled) > 1 and settled.max() > settled.min():  # let the first steps leave the picture
            margin = 0.1 * (settled.max() - settled.min())
            axis.set_ylim(settled.min() - margin, settled.max() + margin)
        axis.set(xlabel="training step", ylabel="nats per image", title=names[name])
        axis.grid(alpha=0.3)
    _save(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)
    return "curves.png"


def confusion(counts: Tensor, path: Path) -> str:
    """The confusion matrix, rows the true digit, columns the assigned one, in percent of the row."""
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axis = pyplot.subplots(figsize=(5.6, 5), layout="constrained")
    shown = axis.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=100)
    for row in range(10):
        for column in range(10):
            if counts[row, column]:
                colour = "black" if share[row, column] > 50 else "white"
                axis.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axis.set(xticks=range(10), yticks=range(10), xlabel="assigned digit", ylabel="true digit")
    figure.colorbar(shown, label="percent of the true digit")
    _save(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)
    return path.name


def _save(path: Path, draw) -> None:
    buffer = io.BytesIO()
    draw(buffer)
    checkpoint.write(path, buffer.getvalue())

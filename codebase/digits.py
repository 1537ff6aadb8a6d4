"""Drawn digits, for machines without MNIST or SVHN: glyphs of matplotlib's fonts, each drawn anew.

A glyph is kept as its signed distance field. Every image samples one at positions that are slanted, scaled, turned,
shifted and smoothly bent, and inks what lies within a stroke's width of the outline.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 3  # raise it when the pictures change: the stored copies are named after it
FONTS = "DejaVuSans DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneralItalic STIXGeneral cmss10 cmtt10 cmmi10".split()
FIELD = 64  # a field has FIELD x FIELD points; a glyph is GLYPH points high
GLYPH = 40


def fields() -> Tensor:
    """Signed distances to the outlines, negative inside, in field points: (fonts * 10, FIELD, FIELD)."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath
    from scipy.ndimage import distance_transform_edt

    axis = (np.arange(2 * FIELD) + 0.5) / 2 - FIELD / 2  # two samples per field point
    points = np.stack(np.meshgrid(axis, -axis), -1).reshape(-1, 2)  # rows go down, outlines up
    found = []
    for font in FONTS:
        for digit in "0123456789":
            file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
            polygons = TextPath((0, 0), digit, size=100, prop=FontProperties(fname=file)).to_polygons()
            low, high = np.min([p.min(0) for p in polygons], 0), np.max([p.max(0) for p in polygons], 0)
            inside = np.zeros(len(points), bool)
            for polygon in polygons:  # an outline within another one is a hole
                inside ^= Outline((polygon - (low + high) / 2) * GLYPH / (high - low)[1]).contains_points(points)
            inside = inside.reshape(2 * FIELD, 2 * FIELD)
            distance = distance_transform_edt(~inside) - distance_transform_edt(inside)
            found.append(distance.reshape(FIELD, 2, FIELD, 2).mean((1, 3)) / 2)
    return torch.tensor(np.stack(found), dtype=torch.float32)


def uniform(n: int, seed: int) -> Callable[..., Tensor]:
    """A random stream of its own: uniform(n, seed)(low, high, *shape) draws (n, *shape) numbers in [low, high)."""
    stream = torch.Generator().manual_seed(seed)
    return lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=stream)


def ink(fields: Tensor, labels: Tensor, chance: Callable, side: int, height: tuple[float, float]) -> Tensor:
    """How much of each pixel a digit covers, (n, side, side) in [0, 1]; height: of the glyphs, in pixels."""
    pixel = GLYPH / chance(*height, 1, 1)  # field points per pixel
    at = torch.arange(side) - (side - 1) / 2
    bend = F.interpolate(chance(-5, 5, 2, 4, 4), (side, side), mode="bicubic", align_corners=True)
    x = (at - chance(-1.5, 1.5, 1, 1)) * pixel + bend[:, 0]
    y = (at[:, None] - chance(-1.5, 1.5, 1, 1)) * pixel + bend[:, 1]
    turn = chance(-0.22, 0.22, 1, 1)
    x, y = x - turn * y, y + turn * x
    x = (x + chance(-0.15, 0.45, 1, 1) * y) / chance(0.8, 1.25, 1, 1)
    glyph = fields[10 * chance(0, len(FONTS)).long() + labels].unsqueeze(1)
    where = torch.stack([x, y], -1) / (FIELD / 2)  # -1 ... 1
    distance = F.grid_sample(glyph, where, padding_mode="border", align_corners=False).squeeze(1)
    stroke = chance(-0.1, 1.5, 1, 1)  # how far ink spreads beyond the outline
    return ((stroke - distance) / pixel + 0.5).clamp(0, 1)


def grey(fields: Tensor, labels: Tensor, chance: Callable) -> Tensor:
    """Grey digits like MNIST's, (n, 784) in [0, 1]."""
    return ink(fields, labels, chance, 28, (17.5, 21.5)).flatten(1)


def colour(fields: Tensor, labels: Tensor, chance: Callable) -> Tensor:
    """Colour digits like SVHN's, (n, 3072) in [0, 1], channel-major: gradients, neighbours, blur and noise."""
    cover = ink(fields, labels, chance, 32, (20, 27))
    for direction in (-1, 1):  # about half of the images have a neighbour on each side, cut by the border
        beside = ink(fields, chance(0, 10).long(), chance, 32, (20, 27))
        column = torch.arange(32) - direction * (16 + chance(0, 6).long())[:, None]
        there = (column >= 0) & (column < 32) & (chance(0, 1, 1) < 0.5)
        moved = beside.gather(2, column.clamp(0, 31)[:, None].expand_as(beside))
        cover = cover.maximum(moved * there[:, None])
    soft = F.avg_pool2d(F.pad(cover[:, None], (1, 0, 1, 0), mode="replicate"), 2, stride=1)[:, 0]
    cover = cover.lerp(soft, chance(0, 1, 1, 1))[:, None]
    paper = chance(0.1, 0.9, 1, 1, 1) + chance(-0.15, 0.15, 3, 1, 1)
    light_on_dark = 2 * (paper.mean(1, keepdim=True) < 0.5) - 1
    pen = paper + light_on_dark * chance(0.25, 0.6, 1, 1, 1) + chance(-0.12, 0.12, 3, 1, 1)
    ramp = torch.linspace(-0.5, 0.5, 32)
    light = chance(-0.25, 0.25, 1, 1, 1) * ramp + chance(-0.25, 0.25, 1, 1, 1) * ramp[:, None]
    noise = chance(-0.05, 0.05, 1, 32, 32)
    return (paper.lerp(pen, cover.expand(-1, 3, -1, -1)) + light + noise).clamp(0, 1).flatten(1)


def draw(counts: list[int], seed: int, in_colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """counts[d] images of each digit d, shuffled: pixels (n, 784) or (n, 3072) as bytes, labels (n,)."""
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    shapes, paint = fields(), colour if in_colour else grey
    blocks = (paint(shapes, block, uniform(len(block), seed * 2**20 + i)) for i, block in enumerate(labels.split(1000)))
    return torch.cat([(block * 255).round().to(torch.uint8) for block in blocks]).numpy(), labels.numpy()

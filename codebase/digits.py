"""Drawn digits, for machines without MNIST or SVHN: glyphs of matplotlib's fonts, each drawn anew.

A glyph is kept as a blurred picture. Every image samples one at positions that are scaled, slanted,
turned, shifted and smoothly bent, and inks what is above a threshold: the lower it is, the bolder
the stroke.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 4  # raise it when the pictures change: the stored copies are named after it
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
    "STIXGeneralItalic",
    "STIXGeneral",
    "cmss10",
    "cmtt10",
    "cmmi10",
)
# The affine map from a pixel's place in an image, (x, y, 1), to one in the glyph's picture, (x, y),
# and the most that each of its numbers varies.
PLACE = torch.tensor([[1, 0.15, 0], [0, 1, 0]])
JITTER = torch.tensor([[0.2, 0.3, 0.1], [0.15, 0.1, 0.1]])


def glyphs() -> Tensor:
    """Pictures of the digits, ink being 1, 40 pixels high in the middle of 64.

    They are (fonts * 10, 1, 64, 64), a font's ten digits after another's.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    blur = ImageFilter.GaussianBlur(1.5)
    pictures = []
    for font in FONTS:
        letters = ImageFont.truetype(str(folder / f"{font}.ttf"), 80)  # Pillow 10.1 takes no Path
        for digit in "0123456789":
            page = Image.new("L", (200, 200))
            ImageDraw.Draw(page).text((50, 50), digit, 255, letters)
            glyph = ImageOps.pad(page.crop(page.getbbox()), (40, 40))
            picture = ImageOps.expand(glyph, 12)
            pictures.append(np.array(picture.filter(blur)))
    return torch.tensor(np.stack(pictures)[:, None]) / 255


def ink(
    glyphs: Tensor,
    labels: Tensor,
    chance: Callable,
    side: int,
    zoom: float,
    across: float | Tensor = 0,
) -> Tensor:
    """How much of each pixel a digit covers, (n, 1, side, side) in [0, 1].

    chance(low, high, *shape): uniform random numbers; zoom: the share of the picture's side that
    the image spans; across: the digit's distance from the middle, in half sides.
    """
    n = len(labels)
    place = zoom * (PLACE + JITTER * chance(-1, 1, n, 2, 3))
    place[:, 0, 2] -= zoom * across
    knots = chance(-0.15, 0.15, n, 2, 4, 4)
    bend = F.interpolate(knots, (side, side), mode="bicubic", align_corners=True)
    straight = F.affine_grid(place, [n, 1, side, side], align_corners=False)
    where = straight + bend.movedim(1, -1)
    font = chance(0, len(FONTS), n).long()
    picture = F.grid_sample(glyphs[10 * font + labels], where, align_corners=False)
    threshold = chance(0, 0.4, n, 1, 1, 1)
    return (4 * (picture - threshold)).clamp(0, 1)


def grey(glyphs: Tensor, labels: Tensor, chance: Callable) -> Tensor:
    """Grey digits like MNIST's, (n, 1, 28, 28) in [0, 1]."""
    return ink(glyphs, labels, chance, 28, 0.9)


def colour(glyphs: Tensor, labels: Tensor, chance: Callable) -> Tensor:
    """Colour digits like SVHN's, (n, 3, 32, 32) in [0, 1]: light from a side, neighbours, noise."""
    n = len(labels)
    cover = ink(glyphs, labels, chance, 32, 0.85)
    for side in (-1, 1):  # neighbours, cut by the border or out of sight
        others = chance(0, 10, n).long()
        across = side * chance(1.1, 2.2, n)
        cover = cover.maximum(ink(glyphs, others, chance, 32, 0.85, across))
    shade = chance(0.1, 0.9, n, 1, 1, 1)
    paper = shade + chance(-0.15, 0.15, n, 3, 1, 1)
    contrast = chance(0.25, 0.6, n, 1, 1, 1)
    contrast = contrast.copysign(0.5 - paper.mean(1, keepdim=True))
    pen = contrast + chance(-0.12, 0.12, n, 3, 1, 1)
    corners = chance(-0.2, 0.2, n, 1, 2, 2)
    light = F.interpolate(corners, (32, 32), mode="bilinear", align_corners=True)
    noise = chance(-0.05, 0.05, n, 1, 32, 32)
    return (paper + pen * cover + light + noise).clamp(0, 1)


def draw(counts: list[int], seed: int, in_colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """counts[d] images of each digit d, shuffled.

    Returns bytes (n, 784) or in colour (n, 3072), and labels (n,).
    """
    stream = torch.Generator().manual_seed(seed)
    pictures = glyphs()
    paint = colour if in_colour else grey

    def chance(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=stream)

    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=stream)]
    drawn = []
    for block in labels.split(1000):
        pixels = paint(pictures, block, chance)
        drawn.append((255 * pixels.flatten(1)).round().to(torch.uint8))
    return torch.cat(drawn).numpy(), labels.numpy()

"""Drawn digits, for machines without MNIST or SVHN: glyphs of matplotlib's fonts, each drawn anew.

A glyph is kept as a blurred picture. Every image samples one at positions that are scaled, slanted, turned, shifted and
smoothly bent, and inks what is above a threshold: the lower it is, the bolder the stroke.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 4  # raise it when the pictures change: the stored copies are named after it
FONTS = "DejaVuSans DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneralItalic STIXGeneral cmss10 cmtt10 cmmi10".split()
PLACE = torch.tensor([[1, 0.15, 0], [0, 1, 0]])  # where an image looks in its glyph's picture: (x, y) from (x, y, 1),
JITTER = torch.tensor([[0.2, 0.3, 0.1], [0.15, 0.1, 0.1]])  # and by how much that varies from image to image


def glyphs() -> Tensor:
    """Pictures of the digits, 40 points high in the middle of 64, ink being 1: (fonts * 10, 1, 64, 64)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

    found = []
    for font in FONTS:
        letters = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"), 80)
        for digit in "0123456789":
            page = Image.new("L", (200, 200))
            ImageDraw.Draw(page).text((50, 50), digit, 255, letters)
            picture = ImageOps.expand(ImageOps.pad(page.crop(page.getbbox()), (40, 40)), 12)
            found.append(np.array(picture.filter(ImageFilter.GaussianBlur(1.5))))
    return torch.tensor(np.stack(found)[:, None]) / 255


def ink(glyphs: Tensor, labels: Tensor, chance: Callable, side: int, zoom: float, across: float | Tensor = 0) -> Tensor:
    """How much of each pixel a digit covers, (n, 1, side, side) in [0, 1].

    zoom: of the image's side to the picture's; across: the digit's distance from the middle, in half sides.
    """
    n = len(labels)
    place = zoom * (PLACE + JITTER * chance(-1, 1, n, 2, 3))
    place[:, 0, 2] -= zoom * across
    bend = F.interpolate(chance(-0.15, 0.15, n, 2, 4, 4), (side, side), mode="bicubic", align_corners=True)
    where = F.affine_grid(place, [n, 1, side, side], align_corners=False) + bend.movedim(1, -1)
    picture = F.grid_sample(glyphs[10 * chance(0, len(FONTS), n).long() + labels], where, align_corners=False)
    return (4 * (picture - chance(0, 0.4, n, 1, 1, 1))).clamp(0, 1)


def colour(glyphs: Tensor, labels: Tensor, chance: Callable) -> Tensor:
    """Colour digits like SVHN's, (n, 3, 32, 32) in [0, 1]: light from a side, neighbours and noise."""
    n = len(labels)
    cover = ink(glyphs, labels, chance, 32, 0.85)
    for side in (-1, 1):  # neighbours, cut by the border or out of sight
        beside = ink(glyphs, chance(0, 10, n).long(), chance, 32, 0.85, side * chance(1.1, 2.2, n))
        cover = cover.maximum(beside)
    paper = chance(0.1, 0.9, n, 1, 1, 1) + chance(-0.15, 0.15, n, 3, 1, 1)
    contrast = chance(0.25, 0.6, n, 1, 1, 1).copysign(0.5 - paper.mean(1, keepdim=True))
    pen = contrast + chance(-0.12, 0.12, n, 3, 1, 1)
    light = F.interpolate(chance(-0.2, 0.2, n, 1, 2, 2), (32, 32), mode="bilinear", align_corners=True)
    return (paper + pen * cover + light + chance(-0.05, 0.05, n, 1, 32, 32)).clamp(0, 1)


def draw(counts: list[int], seed: int, in_colour: bool) -> tuple[np.ndarray, np.ndarray]:
    """counts[d] images of each digit d, shuffled: bytes (n, 784) or in colour (n, 3072, channel-major); labels (n,)."""
    stream, pictures = torch.Generator().manual_seed(seed), glyphs()

    def chance(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=stream)

    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    labels, drawn = labels[torch.randperm(len(labels), generator=stream)], []
    for block in labels.split(1000):
        pixels = colour(pictures, block, chance) if in_colour else ink(pictures, block, chance, 28, 0.9)
        drawn.append((255 * pixels.flatten(1)).round().to(torch.uint8))
    return torch.cat(drawn).numpy(), labels.numpy()

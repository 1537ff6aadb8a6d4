"""Drawn digits, for machines without MNIST or SVHN: glyphs of matplotlib's fonts, each drawn anew.

A glyph is kept as its signed distance field. Every image samples one at positions that are slanted, scaled, turned,
shifted and smoothly bent, and inks what lies within a stroke's width of the outline. From the field on only integers
and single + - * / of IEEE floats are used, on a fixed integer stream, so the bytes do not depend on the machine.
"""

import contextlib
import functools
import io
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from codebase import checkpoint

VERSION = 1  # raise it when the pictures change: the stored copies are named after it
FONTS = "DejaVuSans DejaVuSans-Oblique DejaVuSerif-Italic STIXGeneralItalic STIXGeneral cmss10 cmtt10 cmmi10".split()
FIELD = 64  # a field has FIELD x FIELD points; a glyph is GLYPH points high
GLYPH = 40
BLOCK = 500  # images at a time


@functools.cache
def fields() -> np.ndarray:
    """Signed distances to the outlines, negative inside, in field points: (fonts, 10, FIELD, FIELD) float32."""
    import matplotlib
    from fontTools.ttLib import TTFont
    from scipy.ndimage import distance_transform_edt

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the age of some fonts
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fine = 2
    axis = (np.arange(FIELD * fine) + 0.5) / fine - FIELD / 2
    out = np.empty((len(FONTS), 10, FIELD, FIELD), np.float32)
    for row, name in enumerate(FONTS):
        font = TTFont(folder / f"{name}.ttf")
        glyphs, names = font.getGlyphSet(), font.getBestCmap()
        for digit in range(10):
            # the font's own integers, not a renderer's: those differ between versions of FreeType
            start, end = outline(glyphs, names[ord(str(digit))])
            low, high = start.min(0), start.max(0)
            scale = GLYPH / (high[1] - low[1])
            inside = within(*((corner - (low + high) / 2) * (scale, -scale) for corner in (start, end)), axis)
            distance = distance_transform_edt(~inside) - distance_transform_edt(inside)
            coarse = distance.reshape(FIELD, fine, FIELD, fine).mean((1, 3)) / fine
            out[row, digit] = np.rint(coarse * 64) / 64
    return out


def outline(glyphs, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The starts and ends of a glyph's outline as line segments, (n, 2) each."""
    from fontTools.pens.basePen import BasePen

    class Segments(BasePen):
        def _moveTo(self, point):
            self.first = point

        def _closePath(self):
            self._lineTo(self.first)

        def _lineTo(self, point):
            pairs.append((self._getCurrentPoint(), point))

        def _curveToOne(self, b, c, d):  # quadratic curves arrive here too, as cubic ones
            t = np.linspace(0, 1, 9)[:, None]
            curve = [np.array(point, float) for point in (self._getCurrentPoint(), b, c, d)]
            points = sum(k * (1 - t) ** (3 - i) * t**i * curve[i] for i, k in enumerate((1, 3, 3, 1)))
            pairs.extend(itertools.pairwise(points))

    pairs = []
    glyphs[name].draw(Segments(glyphs))
    start, end = np.array(pairs, float).transpose(1, 0, 2)
    return start, end


def within(start: np.ndarray, end: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Which points (y, x) of axis x axis lie inside an odd number of outlines, by the edges to their left."""
    (x0, y0), (x1, y1) = start.T[:, :, None], end.T[:, :, None]
    crossed = (y0 > axis) != (y1 > axis)  # (edges, rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(crossed, x0 + (axis - y0) * (x1 - x0) / (y1 - y0), np.inf)
    return (x[:, :, None] < axis).sum(0) % 2 == 1


class Stream:
    """Uniform numbers from a counter-based integer generator: the same everywhere, whatever numpy's version."""

    def __init__(self, seed: int):
        self.state = np.uint64(seed)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """float32 in [low, high), by SplitMix64 (Steele et al. 2014)."""
        count = int(np.prod(shape))
        with np.errstate(over="ignore"):
            z = self.state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            self.state = z[-1]
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return (unit * np.float32(high - low) + np.float32(low)).reshape(shape)


def bend(stream: Stream, n: int, side: int, strength: float) -> np.ndarray:
    """A smooth displacement: 4 x 4 random values, interpolated by quadratic weights, (n, side, side)."""
    knots = stream.uniform(-strength, strength, n, 4, 4)
    at = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / side)  # 0 ... 2 in a 4-knot spline
    first = np.minimum(at.astype(np.int64), 1)
    t = at - first.astype(np.float32)
    half = np.float32(0.5)
    weights = np.zeros((side, 4), np.float32)
    for offset, w in enumerate((half * (1 - t) * (1 - t), half + t * (1 - t), half * t * t)):
        weights[np.arange(side), first + offset] += w
    rows = sum(weights[:, k, None] * knots[:, None, k, :] for k in range(4))  # (n, side, 4)
    return sum(rows[:, :, None, k] * weights[None, None, :, k] for k in range(4))


def sample(fields: np.ndarray, glyph: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of fields[glyph] at (x, y), (n, side, side) in field points from the centre."""
    last = np.float32(FIELD - 1.001)
    x, y = (np.clip(v + np.float32(FIELD / 2 - 0.5), np.float32(0), last) for v in (x, y))
    column, row = x.astype(np.int32), y.astype(np.int32)
    fx, fy = x - column, y - row
    at = (glyph.astype(np.int32) * (FIELD * FIELD))[:, None, None] + row * FIELD + column
    flat = fields.reshape(-1)
    top = flat.take(at) * (1 - fx) + flat.take(at + 1) * fx
    bottom = flat.take(at + FIELD) * (1 - fx) + flat.take(at + FIELD + 1) * fx
    return top * (1 - fy) + bottom * fy


def ink(fields: np.ndarray, labels: np.ndarray, stream: Stream, side: int, height: tuple[float, float]) -> np.ndarray:
    """How much of each pixel a digit covers, (n, side, side) float32 in [0, 1]; height: of the glyphs, in pixels."""
    n = len(labels)

    def draw(low, high):
        return stream.uniform(low, high, n, 1, 1)

    font = stream.uniform(0, len(FONTS), n).astype(np.int64)
    pixel = GLYPH / draw(*height)  # field points per pixel
    at = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
    x = (at[None, None, :] - draw(-1.5, 1.5)) * pixel + bend(stream, n, side, 10)
    y = (at[None, :, None] - draw(-1.5, 1.5)) * pixel + bend(stream, n, side, 10)
    turn = draw(-0.22, 0.22)
    x, y = x - turn * y, y + turn * x
    x = (x + draw(-0.15, 0.45) * y) / draw(0.8, 1.25)
    edge = draw(-0.1, 1.5)  # how far ink spreads beyond the outline: the stroke's width
    distance = sample(fields, font * 10 + labels, x, y)
    return np.clip((edge - distance) / pixel + np.float32(0.5), np.float32(0), np.float32(1))


def grey(fields: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Grey digits like MNIST's, (n, 784) bytes."""
    return np.rint(ink(fields, labels, Stream(seed), 28, (17.5, 21.5)) * 255).astype(np.uint8).reshape(-1, 784)


def colour(fields: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Colour digits like SVHN's, (n, 3072) bytes, channel-major: gradients, neighbours, blur and noise."""
    stream, n = Stream(seed), len(labels)
    f = np.float32
    cover = ink(fields, labels, stream, 32, (20, 27))
    for direction in (-1, 1):  # about half of the images have a neighbour on each side, cut by the border
        beside = ink(fields, stream.uniform(0, 10, n).astype(np.int64), stream, 32, (20, 27))
        shift = stream.uniform(16, 22, n).astype(np.int64) * direction
        column = np.arange(32)[None, :] - shift[:, None]
        there = (column >= 0) & (column < 32) & (stream.uniform(0, 1, n, 1) < f(0.5))
        moved = np.take_along_axis(beside, np.clip(column, 0, 31)[:, None, :].repeat(32, 1), 2)
        cover = np.maximum(cover, moved * there[:, None, :])
    soft = (cover + np.roll(cover, 1, 1) + np.roll(cover, 1, 2) + np.roll(cover, (1, 1), (1, 2))) * f(0.25)
    cover = cover + (soft - cover) * stream.uniform(0, 1, n, 1, 1)
    paper = stream.uniform(0.1, 0.9, n, 1, 1, 1) + stream.uniform(-0.15, 0.15, n, 3, 1, 1)
    pale = (paper.mean(1, keepdims=True, dtype=np.float64) < 0.5).astype(f) * 2 - 1  # light on dark, dark on light
    pen = paper + pale * stream.uniform(0.25, 0.6, n, 1, 1, 1) + stream.uniform(-0.12, 0.12, n, 3, 1, 1)
    ramp = np.arange(32, dtype=f) / f(31) - f(0.5)
    slope_x, slope_y = stream.uniform(-0.25, 0.25, n, 1, 1, 1), stream.uniform(-0.25, 0.25, n, 1, 1, 1)
    light = slope_x * ramp + slope_y * ramp[:, None]
    noise = stream.uniform(-0.05, 0.05, n, 1, 32, 32)
    pixels = paper + (pen - paper) * cover[:, None] + light + noise
    return np.rint(np.clip(pixels, f(0), f(1)) * 255).astype(np.uint8).reshape(-1, 3072)


def draw(split: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split and their labels, which come in MNIST's own numbers per class, shuffled."""
    from codebase.data import COURSE

    base = {"train": 1, "test": 2}[split] * 2**40
    labels = np.repeat(np.arange(10), COURSE["class_counts"][split])
    labels = labels[np.argsort(Stream(base).uniform(0, 1, len(labels)), kind="stable")]
    starts, shapes, paint = range(0, len(labels), BLOCK), fields(), {"grey": grey, "colour": colour}[kind]
    with ThreadPoolExecutor(2) as pool:
        blocks = pool.map(
            lambda start: paint(shapes, labels[start : start + BLOCK], base + 2**20 * (start + 1)), starts
        )
        return np.concatenate(list(blocks)), labels


def load(data_dir: str, split: str, kind: str):
    """The drawn digits as data.Images, from data_dir where they were stored earlier, else drawn and stored there."""
    import torch

    from codebase.data import Images

    path = Path(data_dir, f"drawn-{kind}-{split}-v{VERSION}.npz")
    try:
        with np.load(path) as stored:
            pixels, labels = stored["pixels"], stored["labels"]
    except Exception:  # absent, damaged or unreadable: it can always be drawn again
        pixels, labels = draw(split, kind)
        buffer = io.BytesIO()
        np.savez(buffer, pixels=pixels, labels=labels)
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs the drawing each time, no more
            checkpoint.write(path, buffer.getvalue())
            for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))

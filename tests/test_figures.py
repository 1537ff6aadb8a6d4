"""The pictures: which image stands where, upright and in its colours; which number belongs to which axis."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from codebase import figures
from codebase.models.fsvae import FSVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE


def picture(path: Path) -> torch.Tensor:
    """A stored picture's colours in [0, 1], (rows, columns, 3), without its zoom."""
    pixels = torch.from_numpy(image.imread(path)[..., :3].copy())
    assert torch.equal(pixels[::2, ::2], pixels[1::2, 1::2])
    return pixels[::2, ::2]


def tile(pixels: torch.Tensor, row: int, column: int, side: int) -> torch.Tensor:
    return pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]


def assert_shows(shown: torch.Tensor, expected: torch.Tensor) -> None:
    """A tile shows an image (784,), or (3072,) with its channels one after another, to a byte's precision."""
    if len(expected) == 784:
        expected = expected.reshape(28, 28, 1).expand(-1, -1, 3)
    else:
        expected = torch.stack([channel.reshape(32, 32) for channel in expected.split(1024)], -1)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("size, side", [(784, 28), (3072, 32)])
def test_a_grid_shows_images_row_by_row_upright_and_in_their_colours(size, side, tmp_path):
    images = torch.rand(60, size, generator=torch.Generator().manual_seed(0))
    assert figures.grid(images, tmp_path / "grid.png") == "grid.png"
    shown = picture(tmp_path / "grid.png")
    assert shown.shape == (3 * side, 20 * side, 3)
    for i in range(60):
        assert_shows(tile(shown, i // 20, i % 20, side), images[i])


def test_a_single_bright_pixel_is_where_it_should_be(tmp_path):
    """Written out, so that no two mistakes cancel: image 23, row 5, column 9, and of a colour image its blue."""
    for size, side, at in ((784, 28, 5 * 28 + 9), (3072, 32, 2 * 1024 + 5 * 32 + 9)):
        images = torch.zeros(40, size)
        images[23, at] = 1
        figures.grid(images, tmp_path / "grid.png")
        channels = (0, 1, 2) if size == 784 else (2,)
        bright = picture(tmp_path / "grid.png").nonzero().tolist()
        assert bright == [[side + 5, 3 * side + 9, channel] for channel in channels]


def test_reconstructions_stand_below_their_images_and_samples_in_rows_of_twenty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, x, samples = VAE(name="run"), torch.bernoulli(torch.full((100, 784), 0.3)), torch.rand(200, 784)
    decoded = model.reconstruct(x).detach()
    model.sample_sigmoid = lambda batch: samples[:batch]
    assert figures.of_binary_vae(model, x) == ["samples.png", "reconstructions.png"]
    shown = picture(tmp_path / "logs/run/reconstructions.png")
    assert shown.shape == (10 * 28, 20 * 28, 3)
    for i in range(100):
        assert_shows(tile(shown, 2 * (i // 20), i % 20, 28), x[i])
        assert_shows(tile(shown, 2 * (i // 20) + 1, i % 20, 28), decoded[i])
    shown = picture(tmp_path / "logs/run/samples.png")
    for i in range(200):
        assert_shows(tile(shown, i // 20, i % 20, 28), samples[i])


@pytest.mark.parametrize(
    "kind, decoder, size", [(SSVAE, "compute_sigmoid_given", 784), (FSVAE, "compute_mean_given", 3072)]
)
def test_every_row_of_the_styles_is_a_label_and_every_column_a_style(kind, decoder, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, styles, half = kind(name="run"), torch.linspace(0.05, 0.95, 20), size // 2

    def decode(z, y):
        """The upper half of the pixels tells the label, the lower half the style."""
        return torch.cat([(y.argmax(-1, keepdim=True) / 10).expand(-1, half), z[:, :1].expand(-1, half)], 1)

    model.sample_z = lambda batch: styles[:batch, None].expand(batch, model.z_dim)
    setattr(model, decoder, decode)
    if kind is SSVAE:
        assert figures.of_ssvae(model, torch.ones(10, 10)) == ["confusion.png", "styles.png"]
    else:
        assert figures.of_fsvae(model, "styles") == ["styles.png"]
    shown, side = picture(tmp_path / "logs/run/styles.png"), {784: 28, 3072: 32}[size]
    assert shown.shape == (10 * side, 20 * side, 3)
    for label in range(10):
        for i, style in enumerate(styles):
            pixels = torch.full((size,), label / 10)
            pixels[half:] = style
            assert_shows(tile(shown, label, i, side), pixels)


@pytest.fixture
def axes(monkeypatch) -> list:
    """The axes of every figure that is drawn from here on."""
    made, subplots = [], figures.pyplot.subplots

    def remembering(*args, **kwargs):
        figure, axis = subplots(*args, **kwargs)
        made.extend(np.atleast_1d(axis).flatten())
        return figure, axis

    monkeypatch.setattr(figures.pyplot, "subplots", remembering)
    return made


def test_the_confusion_matrix_has_true_digits_as_rows_and_assigned_ones_as_columns(axes, tmp_path):
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[2, 7], counts[8, 8], counts[8, 1] = 5, 30, 10  # twos are taken for sevens, a quarter of the eights for ones
    figures.confusion(counts, tmp_path / "confusion.png")
    (axis,) = axes
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true digit", "assigned digit")
    written = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    assert written == {(7, 2): "5", (8, 8): "30", (1, 8): "10"}  # (x, y)
    assert [label.get_text() for label in axis.get_xticklabels()] == list("0123456789")
    pixels = image.imread(tmp_path / "confusion.png")
    colour, scale = figures.pyplot.get_cmap("cividis"), 110 / axis.figure.dpi
    for (true, assigned), share in {(2, 7): 1, (7, 2): 0, (8, 8): 0.75, (8, 1): 0.25, (1, 8): 0}.items():
        x, y = axis.transData.transform((assigned + 0.4, true + 0.4)) * scale  # beside the number that is written there
        found = pixels[int(len(pixels) - y), int(x), :3]
        assert found == pytest.approx(colour(float(share))[:3], abs=0.02), (true, assigned)
    first, last = (axis.transData.transform((0, digit))[1] for digit in (0, 9))
    assert first > last  # the zero is at the top


def test_the_curves_show_each_term_of_the_table_over_the_steps(axes, tmp_path):
    columns = {"loss": [9, 8, 7], "nelbo": [6, 5, 4], "kl": [3, 2, 1], "kl_y": [0, 0, 0], "rec": [7, 6, 6.5]}
    steps = [100, 200, 230]
    rows = zip(steps, *columns.values(), [1, 2, 3], strict=True)
    with (tmp_path / "metrics.csv").open("w") as file:
        csv.writer(file).writerows([["step", *columns, "seconds"], *rows])
    assert figures.curves(tmp_path) == ["curves.png"]
    drawn = {axis.get_title(): axis.lines[0].get_xydata().T.tolist() for axis in axes}
    assert drawn == {
        "loss": [steps, columns["loss"]],
        "reconstruction": [steps, columns["rec"]],
        "KL of z": [steps, columns["kl"]],
    }
    assert {(axis.get_xlabel(), axis.get_ylabel()) for axis in axes} == {("training step", "nats per image")}


@pytest.mark.parametrize("rows", [0, 1])
def test_the_curves_of_a_run_that_has_just_begun_are_drawn(rows, tmp_path):
    head = "step,loss,nelbo,kl,rec,seconds\n" if rows else "step,seconds\n"
    (tmp_path / "metrics.csv").write_text(head + "37,5.0,5.0,2.0,3.0,0.1\n" * rows)
    assert figures.curves(tmp_path) == ["curves.png"] and (tmp_path / "curves.png").stat().st_size > 1000

"""The plots: which image stands where, in which colours; which number belongs to which point."""

import importlib
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image, pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from untrained import BINARY, made

import codebase
from codebase import plots
from codebase.data import Images


def picture(path: Path) -> torch.Tensor:
    """A stored picture's colours in [0, 1], (rows, columns, 3), without its zoom."""
    pixels = torch.from_numpy(image.imread(path)[..., :3].copy())
    assert torch.equal(pixels[::2, ::2], pixels[1::2, 1::2])
    return pixels[::2, ::2]


def tiles(shown: torch.Tensor, side: int = 28) -> torch.Tensor:
    """The images of a picture, (rows, columns, side, side, 3)."""
    rows = shown.unflatten(0, (-1, side)).unflatten(2, (-1, side))
    return rows.permute(0, 2, 1, 3, 4)


def assert_shows(shown: torch.Tensor, expected: torch.Tensor) -> None:
    """Tiles show images (..., 784) or (..., 3072, channel-major), to a byte's precision."""
    if expected.shape[-1] == 784:
        expected = expected.unflatten(-1, (28, 28, 1)).expand(shown.shape)
    else:
        expected = torch.stack(expected.unflatten(-1, (3, 32, 32)).unbind(-3), -1)
    torch.testing.assert_close(shown, expected.detach(), rtol=0, atol=1.01 / 255)


def inked(n: int, labels: list[int] | None = None) -> Images:
    """A split of n images of black and white pixels, binarised to what they are.

    Their labels are 0, ... 9, 0, ... where none are given.
    """
    stream = torch.Generator().manual_seed(n)
    ink = torch.bernoulli(torch.full((n, 784), 0.3), generator=stream)
    if labels is None:
        labels = [position % 10 for position in range(n)]
    return Images((255 * ink).to(torch.uint8), torch.tensor(labels))


def spread_out(kind: str, **settings):
    """A model of which posterior means, and what is decoded from them, differ visibly."""
    model = made(kind, **settings)
    with torch.no_grad():
        model.enc.net[4].weight.mul_(20)
        model.dec.net[0].weight.mul_(10)
        model.dec.net[4].weight.mul_(10)
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the pictures of a model named run go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "logs" / "run"


# ---------------------------------------------------------------------------------------------
# Grids of images


@pytest.mark.parametrize("size, side", [(784, 28), (3072, 32)])
def test_a_grid_shows_images_upright(size, side, tmp_path):
    images = torch.rand(60, size, generator=torch.Generator().manual_seed(0))
    assert plots.grid(images, tmp_path / "grid.png") == "grid.png"
    shown = picture(tmp_path / "grid.png")
    assert shown.shape == (3 * side, 20 * side, 3)
    assert_shows(tiles(shown, side), images.reshape(3, 20, size))


def test_a_single_bright_pixel_is_in_place(tmp_path):
    """Written out, so that no two mistakes cancel: image 23, row 5, column 9; in colour, blue."""
    grey = torch.zeros(40, 784)
    grey[23, 5 * 28 + 9] = 1
    plots.grid(grey, tmp_path / "grid.png")
    bright = picture(tmp_path / "grid.png").nonzero().tolist()
    assert bright == [[28 + 5, 3 * 28 + 9, channel] for channel in [0, 1, 2]]
    colour = torch.zeros(40, 3072)
    colour[23, 2 * 1024 + 5 * 32 + 9] = 1
    plots.grid(colour, tmp_path / "grid.png")
    assert picture(tmp_path / "grid.png").nonzero().tolist() == [[32 + 5, 3 * 32 + 9, 2]]


@BINARY
@pytest.mark.parametrize("n", [100, 27])
def test_reconstructions_stand_below_their_images(kind, settings, n, folder):
    """A last row is filled with black; the other pictures lie beside it."""
    model = spread_out(kind, name="run", **settings)
    x = inked(n).pixels / 255
    samples = torch.rand(200, 784)
    decoded = model.reconstruct(x).detach()
    assert (decoded[0] - decoded[1]).abs().max() > 0.1
    model.sample_sigmoid = lambda batch: samples[:batch]
    names = ["samples.png", "reconstructions.png", "interpolations.png", "latent.png"]
    assert plots.of_vae(model, x, inked(30)) == names
    assert {path.name for path in folder.iterdir()} == set(names)
    shown = tiles(picture(folder / "reconstructions.png"))
    assert shown.shape[:2] == (2 * math.ceil(n / 20), 20)
    for row, wanted in [(0, x), (1, decoded)]:
        found = shown[row::2].flatten(0, 1)
        assert_shows(found[:n], wanted)
        assert not found[n:].any()
    assert_shows(tiles(picture(folder / "samples.png")), samples.reshape(10, 20, 784))


@pytest.mark.parametrize("n", [100, 7])
def test_interpolations_are_even_steps_between_pairs(n, folder):
    """The first column reconstructs an image of each tenth of them, the last the next row's."""
    model = spread_out("vae", name="run")
    x = inked(n).pixels / 255
    plots.of_vae(model, x, inked(30))
    shown = tiles(picture(folder / "interpolations.png"))
    assert shown.shape[:2] == (10, 12)
    z = model.enc(x)[0]
    for row in range(10):
        first = z[row * n // 10]
        last = z[(row + 1) % 10 * n // 10]
        steps = torch.stack([first + (last - first) * step / 11 for step in range(12)])
        assert_shows(shown[row], model.compute_sigmoid_given(steps))
    if n == 100:  # ten of each digit, as the course's: every row goes from a digit to the next
        assert not torch.equal(shown[3, 0], shown[3, 11])
        assert torch.equal(shown[3, 11], shown[4, 0])


@pytest.mark.parametrize(
    "kind, decoder, size",
    [("ssvae", "compute_sigmoid_given", 784), ("fsvae", "compute_mean_given", 3072)],
)
def test_rows_of_styles_are_labels(kind, decoder, size, folder):
    """And columns are styles."""
    model = made(kind, name="run")
    styles = torch.linspace(0.05, 0.95, 20)
    half = size // 2

    def decode(z, y):
        """The upper half of the pixels tells the label, the lower half the style."""
        label = y.argmax(-1, keepdim=True) / 10
        return torch.cat([label.expand(-1, half), z[:, :1].expand(-1, half)], 1)

    model.sample_z = lambda batch: styles[:batch, None].expand(batch, model.z_dim)
    setattr(model, decoder, decode)
    if kind == "ssvae":
        assert plots.of_ssvae(model, torch.ones(10, 10)) == ["confusion.png", "styles.png"]
    else:
        assert plots.of_fsvae(model, "styles") == ["styles.png"]
    shown = tiles(picture(folder / "styles.png"), {784: 28, 3072: 32}[size])
    wanted = torch.empty(10, 20, size)
    wanted[:, :, :half] = torch.arange(10)[:, None, None] / 10
    wanted[:, :, half:] = styles[:, None]
    assert_shows(shown, wanted)


# ---------------------------------------------------------------------------------------------
# Figures with axes


@pytest.fixture
def axes(monkeypatch) -> list:
    """The axes of every figure that is drawn from here on."""
    made = []
    subplots = Figure.subplots

    def remembering(figure, *args, **kwargs):
        axis = subplots(figure, *args, **kwargs)
        made.extend(np.atleast_1d(axis).flatten())
        return axis

    monkeypatch.setattr(Figure, "subplots", remembering)
    return made


def test_the_confusion_plot_has_true_digits_as_rows(axes, tmp_path):
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[2, 7] = 5  # twos are taken for sevens
    counts[8, 8] = 30
    counts[8, 1] = 10  # a quarter of the eights for ones
    plots.confusion_plot(counts, tmp_path / "confusion.png")
    (axis,) = axes
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true digit", "assigned digit")
    written = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    assert written == {(7, 2): "5", (8, 8): "30", (1, 8): "10"}  # (x, y)
    assert [label.get_text() for label in axis.get_xticklabels()] == list("0123456789")
    pixels = image.imread(tmp_path / "confusion.png")
    colour = matplotlib.colormaps["cividis"]
    scale = 110 / axis.figure.dpi
    shares = {(2, 7): 1.0, (7, 2): 0.0, (8, 8): 0.75, (8, 1): 0.25, (1, 8): 0.0}
    for (true, assigned), share in shares.items():
        # Beside the number that is written there.
        x, y = axis.transData.transform((assigned + 0.4, true + 0.4)) * scale
        found = pixels[int(len(pixels) - y), int(x), :3]
        assert found == pytest.approx(colour(share)[:3], abs=0.02), (true, assigned)
    assert axis.transData.transform((0, 0))[1] > axis.transData.transform((0, 9))[1]  # zero on top


def points(axis) -> dict[str, torch.Tensor]:
    """Where each entry of a map's legend has its points, (n, 2); the legend names all of them."""
    found = {}
    for marks in axis.collections:
        at = torch.tensor(np.asarray(marks.get_offsets())).float()
        if len(at):
            found[marks.get_label()] = at
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(found)
    return found


def by_digit(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[str(digit)] for digit in range(10)])


@BINARY
@pytest.mark.parametrize("z_dim", [1, 2])
def test_a_latent_map_shows_z_itself(kind, settings, z_dim, axes, tmp_path):
    """And the means of a mixture; one dimension is flat."""
    model = spread_out(kind, z_dim=z_dim, **settings)
    images = inked(34)  # four digits have an image more
    assert plots.latent_map(model, images, tmp_path / "latent.png") == "latent.png"
    (axis,) = axes
    found = points(axis)
    wanted = torch.zeros(34, 2)
    wanted[:, :z_dim] = model.enc(images.pixels / 255)[0].detach()
    order = images.labels.argsort(stable=True)
    torch.testing.assert_close(by_digit(found), wanted[order], rtol=1e-4, atol=1e-4)
    for marks in axis.collections[:10]:
        assert tuple(marks.get_facecolor()[0])[:3] == to_rgba(f"C{marks.get_label()}")[:3]
    assert list(found) == [*"0123456789"] + ["prior"] * (kind == "gmvae")
    if kind == "gmvae":
        prior = torch.zeros(20, 2)
        prior[:, :z_dim] = model.prior()[0][0].detach()
        torch.testing.assert_close(found["prior"], prior, rtol=1e-4, atol=1e-5)
    assert axis.get_xlabel() == "z 1" and axis.get_ylabel() == ("z 2" if z_dim == 2 else "")
    assert "34 test images" in axis.get_title()


@BINARY
@pytest.mark.parametrize("z_dim", [10, 300])
def test_a_map_shows_the_two_widest_directions(kind, settings, z_dim, axes, tmp_path):
    """The same each time, whatever the random numbers are, and these are left alone."""
    model = spread_out(kind, z_dim=z_dim, **settings)
    images = inked(400)
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        plots.latent_map(model, images, tmp_path / "latent.png")
        assert torch.equal(torch.get_rng_state(), before)
    found, again = (points(axis) for axis in axes)
    assert all(torch.equal(found[name], again[name]) for name in found)
    shown = by_digit(found)
    z = model.enc(images.pixels / 255)[0].detach()[images.labels.argsort(stable=True)]
    directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T
    wanted = (z - z.mean(0)) @ directions
    signs = (wanted * shown).sum(0).sign()
    if z_dim == 10:
        close = {"rtol": 1e-3, "atol": 1e-3 * wanted.abs().max().item()}
        torch.testing.assert_close(shown, wanted * signs, **close)
        if kind == "gmvae":  # on the same map
            prior = (model.prior()[0][0].detach() - z.mean(0)) @ directions * signs
            torch.testing.assert_close(found["prior"], prior, **close)
    for component in range(2):
        both = torch.stack([shown[:, component], wanted[:, component]])
        assert abs(torch.corrcoef(both)[0, 1]) > 0.999
    assert shown[:, 0].var() > shown[:, 1].var()
    assert axes[0].get_xlabel() == "principal component 1"
    assert axes[0].get_ylabel() == "principal component 2"


def test_images_without_labels_are_shown(axes, tmp_path):
    plots.latent_map(made("vae", z_dim=2), inked(12, [3] * 6 + [-1] * 6), tmp_path / "latent.png")
    assert {name: len(at) for name, at in points(axes[0]).items()} == {"no label": 6, "3": 6}


def test_a_map_has_ten_thousand_points(axes, tmp_path):
    few = inked(100)
    many = Images(few.pixels.repeat(101, 1), few.labels.repeat(101))
    plots.latent_map(made("vae", z_dim=2), many, tmp_path / "latent.png")
    assert len(by_digit(points(axes[0]))) == 10_000
    assert "10,000 test images" in axes[0].get_title()


# ---------------------------------------------------------------------------------------------
# Curves

STEPS = [100, 200, 230]
LOSS = {"loss": [9, 8, 7], "kl": [3, 2, 1]}
BOUND = {"nelbo": [6, 5, 4]}
FOUND = {"nelbo": [6.5, 4.5], "kl": [2.5, 2], "rec": [4, 2.5]}


def store_columns(path: Path, columns: dict[str, list]) -> None:
    rows = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def store_curves(folder: Path, columns: dict, tested: dict | None = None) -> None:
    """Write metrics.csv and, of two checkpoints, test.csv."""
    store_columns(folder / "metrics.csv", {"step": STEPS, **columns, "seconds": [1, 2, 3]})
    if tested is not None:
        store_columns(folder / "test.csv", {"step": [100, 230], **tested})


def drawn(axes: list) -> dict[str, list]:
    """The x and y of every line under each title."""
    return {
        axis.get_title(): [line.get_xydata().T.tolist() for line in axis.lines] for axis in axes
    }


def test_curves_show_each_term_over_steps(axes, tmp_path):
    columns = {"loss": [9, 8, 7], "nelbo": [6, 5, 4], "kl": [3, 2, 1], "kl_y": [0, 0, 0]}
    columns |= {"rec": [7, 6, 6.5], "ce": [0.5, 0.4, 0.3], "acc": [0.7, 0.8, 0.9]}
    store_curves(tmp_path, columns)
    assert plots.curves(tmp_path) == ["curves.png"]
    titles = {
        "loss": "loss", "NELBO": "nelbo", "reconstruction": "rec", "KL of z": "kl",
        "cross-entropy": "ce", "accuracy": "acc",
    }  # fmt: skip
    assert drawn(axes) == {title: [[STEPS, columns[name]]] for title, name in titles.items()}
    for axis in axes:
        unit = "share" if axis.get_title() == "accuracy" else "nats per image"
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("training step", unit)


@pytest.mark.parametrize(
    "columns, tested, panel, others",
    [
        (LOSS | {"nelbo": LOSS["loss"]}, FOUND, "loss", {"KL of z"}),  # which is drawn once
        # weighted, or L_m: the loss is of another kind
        (LOSS | BOUND, FOUND, "NELBO", {"loss", "KL of z"}),
        (
            LOSS | {"acc": [0.7, 0.8, 0.9]},
            {"accuracy": [0.6, 0.65]},
            "accuracy",
            {"loss", "KL of z"},
        ),
    ],
)
def test_test_metrics_stand_beside_training(columns, tested, panel, others, axes, tmp_path):
    store_curves(tmp_path, columns, tested)
    plots.curves(tmp_path)
    curves = drawn(axes)
    assert curves.keys() == {panel, *others}
    values = next(iter(tested.values()))
    assert curves[panel][1:] == [[[100, 230], values]]
    assert all(len(curves[title]) == 1 for title in others)
    (axis,) = [axis for axis in axes if axis.get_title() == panel]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["test images"]
    low, high = axis.get_ylim()
    assert low < min(values) and high > max(values)  # none is cut off


TABLES = [  # metrics.csv, test.csv, titles
    ("", "", None),  # of a run that was edited
    ("step,loss\n100,9\n\n", "", {"loss"}),
    ("step,nelbo,seconds\n100,9,1\n", "step\n100\n", {"NELBO"}),
    ("step,loss\n100,9\n200,8\n", "step,nelbo\n100,inf\n200,nan\n", {"loss"}),
    ("step,seconds\n", "", {"loss"}),  # of a run that has just begun
]


@pytest.mark.parametrize("metrics, tested, titles", TABLES)
def test_odd_tables_do_not_stop_the_drawing(metrics, tested, titles, axes, tmp_path):
    (tmp_path / "metrics.csv").write_text(metrics)
    (tmp_path / "test.csv").write_text(tested)
    names = plots.curves(tmp_path)
    if titles is None:
        assert names == []
    else:
        assert names == ["curves.png"] and set(drawn(axes)) == titles
        assert (tmp_path / "curves.png").stat().st_size > 1000


def test_pictures_leave_a_notebooks_figures_alone(tmp_path, monkeypatch):
    before = pyplot.get_backend()
    pyplot.switch_backend("svg")
    mine = pyplot.figure()
    monkeypatch.setattr(codebase, "plots", plots)  # put back after the import below
    monkeypatch.delitem(sys.modules, "codebase.plots")
    try:
        imported = importlib.import_module("codebase.plots")
        imported.grid(torch.rand(20, 784), tmp_path / "grid.png")
        imported.confusion_plot(torch.ones(10, 10), tmp_path / "confusion.png")
        assert pyplot.get_backend() == "svg"
        assert pyplot.get_fignums() == [mine.number]
    finally:
        pyplot.close(mine)
        pyplot.switch_backend(before)

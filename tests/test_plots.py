"""The plots: which image stands where, in which colours; which number belongs to which point."""

import csv
import importlib
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import Largest
from matplotlib import image, pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import codebase
from codebase import plots
from codebase.data import Images
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
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
    """A tile shows an image (784,) or (3072, channel-major), to a byte's precision."""
    if len(expected) == 784:
        expected = expected.reshape(28, 28, 1).expand(-1, -1, 3)
    else:
        expected = torch.stack([channel.reshape(32, 32) for channel in expected.split(1024)], -1)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("size, side", [(784, 28), (3072, 32)])
def test_a_grid_shows_images_upright_in_their_colours(size, side, tmp_path):
    images = torch.rand(60, size, generator=torch.Generator().manual_seed(0))
    assert plots.grid(images, tmp_path / "grid.png") == "grid.png"
    shown = picture(tmp_path / "grid.png")
    assert shown.shape == (3 * side, 20 * side, 3)
    for i in range(60):
        assert_shows(tile(shown, i // 20, i % 20, side), images[i])


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


def inked(n: int, labels: list[int] | None = None) -> Images:
    """A split of n images of black and white pixels, binarised to what they are.

    Their labels are 0, ... 9, 0, ... where none are given.
    """
    stream = torch.Generator().manual_seed(n)
    ink = torch.bernoulli(torch.full((n, 784), 0.3), generator=stream)
    if labels is None:
        labels = [position % 10 for position in range(n)]
    return Images((255 * ink).to(torch.uint8), torch.tensor(labels))


def spread_out(model):
    """Have posterior means, and what is decoded from them, differ between images visibly."""
    with torch.no_grad():
        model.enc.net[4].weight.mul_(20)
        model.dec.net[0].weight.mul_(10)
        model.dec.net[4].weight.mul_(10)
    return model


@pytest.mark.parametrize("kind", [VAE, GMVAE])
def test_reconstructions_stand_below_their_images(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = spread_out(kind(name="run"))
    x = inked(100).pixels / 255
    samples = torch.rand(200, 784)
    decoded = model.reconstruct(x).detach()
    assert (decoded[0] - decoded[1]).abs().max() > 0.1
    model.sample_sigmoid = lambda batch: samples[:batch]
    names = ["samples.png", "reconstructions.png", "interpolations.png", "latent.png"]
    assert plots.of_vae(model, x, inked(30)) == names
    assert {path.name for path in (tmp_path / "logs/run").iterdir()} == set(names)
    shown = picture(tmp_path / "logs/run/reconstructions.png")
    assert shown.shape == (10 * 28, 20 * 28, 3)
    for i in range(100):
        assert_shows(tile(shown, 2 * (i // 20), i % 20, 28), x[i])
        assert_shows(tile(shown, 2 * (i // 20) + 1, i % 20, 28), decoded[i])
    shown = picture(tmp_path / "logs/run/samples.png")
    for i in range(200):
        assert_shows(tile(shown, i // 20, i % 20, 28), samples[i])


@pytest.mark.parametrize("n", [100, 7])
def test_interpolations_are_even_steps_between_ten_pairs(n, tmp_path, monkeypatch):
    """The first column reconstructs an image of each tenth of them, the last the next row's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = spread_out(VAE(name="run"))
    x = inked(n).pixels / 255
    plots.of_vae(model, x, inked(30))
    shown = picture(tmp_path / "logs/run/interpolations.png")
    assert shown.shape == (10 * 28, 12 * 28, 3)
    decoded = model.reconstruct(x).detach()
    z = model.enc(x)[0].detach()
    for row in range(10):
        first = row * n // 10
        last = (row + 1) % 10 * n // 10
        assert_shows(tile(shown, row, 0, 28), decoded[first])
        assert_shows(tile(shown, row, 11, 28), decoded[last])
        for step in range(12):
            between = z[first] + (z[last] - z[first]) * step / 11
            wanted = model.compute_sigmoid_given(between[None])[0].detach()
            assert_shows(tile(shown, row, step, 28), wanted)
    if n == 100:  # ten of each digit, as the course's: every row goes from a digit to the next
        assert not torch.equal(tile(shown, 3, 0, 28), tile(shown, 3, 11, 28))
        assert torch.equal(tile(shown, 3, 11, 28), tile(shown, 4, 0, 28))


def test_a_last_row_is_filled_with_black(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = spread_out(VAE(name="run"))
    x = inked(27).pixels / 255
    decoded = model.reconstruct(x).detach()
    plots.of_vae(model, x, inked(30))
    shown = picture(tmp_path / "logs/run/reconstructions.png")
    assert shown.shape == (4 * 28, 20 * 28, 3)
    for i in range(40):
        above = tile(shown, 2 * (i // 20), i % 20, 28)
        below = tile(shown, 2 * (i // 20) + 1, i % 20, 28)
        if i < 27:
            assert_shows(above, x[i])
            assert_shows(below, decoded[i])
        else:
            assert not above.any() and not below.any()


@pytest.mark.parametrize(
    "kind, decoder, size",
    [(SSVAE, "compute_sigmoid_given", 784), (FSVAE, "compute_mean_given", 3072)],
)
def test_rows_of_styles_are_labels_and_columns_styles(kind, decoder, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = kind(name="run")
    styles = torch.linspace(0.05, 0.95, 20)
    half = size // 2

    def decode(z, y):
        """The upper half of the pixels tells the label, the lower half the style."""
        label = y.argmax(-1, keepdim=True) / 10
        return torch.cat([label.expand(-1, half), z[:, :1].expand(-1, half)], 1)

    model.sample_z = lambda batch: styles[:batch, None].expand(batch, model.z_dim)
    setattr(model, decoder, decode)
    if kind is SSVAE:
        assert plots.of_ssvae(model, torch.ones(10, 10)) == ["confusion.png", "styles.png"]
    else:
        assert plots.of_fsvae(model, "styles") == ["styles.png"]
    shown = picture(tmp_path / "logs/run/styles.png")
    side = {784: 28, 3072: 32}[size]
    assert shown.shape == (10 * side, 20 * side, 3)
    for label in range(10):
        for i, style in enumerate(styles):
            pixels = torch.full((size,), label / 10)
            pixels[half:] = style
            assert_shows(tile(shown, label, i, side), pixels)


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


def test_the_confusion_matrix_has_true_digits_as_rows(axes, tmp_path):
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
    zero = axis.transData.transform((0, 0))
    nine = axis.transData.transform((0, 9))
    assert zero[1] > nine[1]  # the zero is at the top


def points(axis) -> dict[str, torch.Tensor]:
    """Where each entry of a map's legend has its points, (n, 2); the legend names all of them."""
    found = {}
    for marks in axis.collections:
        at = torch.tensor(np.asarray(marks.get_offsets()))
        if len(at):
            found[marks.get_label()] = at
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(found)
    return found


@pytest.mark.parametrize("kind, settings", [(VAE, {}), (GMVAE, {"k": 7})])
def test_a_latent_map_of_two_dimensions_shows_z(kind, settings, axes, tmp_path):
    torch.manual_seed(0)
    model = spread_out(kind(z_dim=2, **settings))
    images = inked(34)  # four digits have an image more
    z = model.enc(images.pixels / 255)[0].detach().double()
    assert plots.latent_map(model, images, tmp_path / "latent.png") == "latent.png"
    (axis,) = axes
    found = points(axis)
    assert [name for name in found if name != "prior"] == list("0123456789")
    for digit in range(10):
        wanted = z[images.labels == digit]
        torch.testing.assert_close(found[str(digit)].double(), wanted, rtol=1e-4, atol=1e-4)
    if kind is GMVAE:
        wanted = model.prior()[0][0].detach()
        torch.testing.assert_close(found["prior"].float(), wanted, rtol=1e-4, atol=1e-5)
    else:
        assert "prior" not in found
    for marks in axis.collections[:10]:
        assert tuple(marks.get_facecolor()[0])[:3] == to_rgba(f"C{marks.get_label()}")[:3]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("z 1", "z 2")
    assert "34 test images" in axis.get_title()


@pytest.mark.parametrize("kind, settings", [(VAE, {}), (GMVAE, {"k": 7})])
def test_a_latent_map_shows_the_two_widest_directions(kind, settings, axes, tmp_path):
    torch.manual_seed(0)
    model = spread_out(kind(z_dim=10, **settings))
    images = inked(50)
    z = model.enc(images.pixels / 255)[0].detach()
    plots.latent_map(model, images, tmp_path / "latent.png")
    (axis,) = axes
    found = points(axis)
    shown = torch.cat([found[str(digit)] for digit in range(10)]).float()
    ordered = torch.cat([z[images.labels == digit] for digit in range(10)])
    centred = ordered - ordered.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    wanted = centred @ directions
    signs = (wanted * shown).sum(0).sign()
    close = {"rtol": 1e-3, "atol": 1e-3 * wanted.abs().max().item()}
    torch.testing.assert_close(shown, wanted * signs, **close)
    assert shown[:, 0].var() > shown[:, 1].var()
    if kind is GMVAE:  # on the same map
        prior = (model.prior()[0][0].detach() - ordered.mean(0)) @ directions * signs
        torch.testing.assert_close(found["prior"].float(), prior, **close)
    assert axis.get_xlabel() == "principal component 1"
    assert axis.get_ylabel() == "principal component 2"


def test_a_latent_map_of_one_dimension_is_flat(axes, tmp_path):
    torch.manual_seed(0)
    model = spread_out(GMVAE(z_dim=1, k=3))
    images = inked(20)
    plots.latent_map(model, images, tmp_path / "latent.png")
    found = points(axes[0])
    z = model.enc(images.pixels / 255)[0].detach()
    for digit in range(10):
        wanted = torch.cat([z[images.labels == digit], torch.zeros(2, 1)], 1)
        torch.testing.assert_close(found[str(digit)].float(), wanted, rtol=1e-4, atol=1e-5)
    prior = model.prior()[0][0].detach()
    torch.testing.assert_close(found["prior"][:, :1].float(), prior, rtol=1e-4, atol=1e-5)
    assert not found["prior"][:, 1].any()


@pytest.mark.parametrize(
    "labels, wanted", [([-1] * 12, ["no label"]), ([3] * 6 + [-1] * 6, ["no label", "3"])]
)
def test_images_without_labels_are_shown_as_such(labels, wanted, axes, tmp_path):
    torch.manual_seed(0)
    plots.latent_map(VAE(z_dim=2), inked(12, labels), tmp_path / "latent.png")
    found = points(axes[0])
    assert list(found) == wanted
    assert sum(len(at) for at in found.values()) == 12


def test_a_latent_map_shows_ten_thousand_images(axes, tmp_path):
    few = inked(100)
    many = Images(few.pixels.repeat(101, 1), few.labels.repeat(101))
    plots.latent_map(VAE(z_dim=2), many, tmp_path / "latent.png")
    assert sum(len(at) for at in points(axes[0]).values()) == 10_000
    assert "10,000 test images" in axes[0].get_title()


STEPS = [100, 200, 230]


def store_curves(folder: Path, columns: dict, tested: dict | None = None) -> None:
    """Write metrics.csv and, of two checkpoints, test.csv."""
    store_columns(folder / "metrics.csv", {"step": STEPS, **columns, "seconds": [1, 2, 3]})
    if tested:
        store_columns(folder / "test.csv", {"step": [100, 230], **tested})


def store_columns(path: Path, columns: dict[str, list]) -> None:
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def drawn_curves(axes: list) -> dict[str, list]:
    """The x and y of every line under each title."""
    drawn = {}
    for axis in axes:
        drawn[axis.get_title()] = [line.get_xydata().T.tolist() for line in axis.lines]
    return drawn


def test_curves_show_each_term_over_the_steps(axes, tmp_path):
    columns = {
        "loss": [9, 8, 7],
        "nelbo": [6, 5, 4],
        "kl": [3, 2, 1],
        "kl_y": [0, 0, 0],
        "rec": [7, 6, 6.5],
    }
    store_curves(tmp_path, columns | {"ce": [0.5, 0.4, 0.3], "acc": [0.7, 0.8, 0.9]})
    assert plots.curves(tmp_path) == ["curves.png"]
    assert drawn_curves(axes) == {
        "loss": [[STEPS, columns["loss"]]],
        "NELBO": [[STEPS, columns["nelbo"]]],
        "reconstruction": [[STEPS, columns["rec"]]],
        "KL of z": [[STEPS, columns["kl"]]],
        "cross-entropy": [[STEPS, [0.5, 0.4, 0.3]]],
        "accuracy": [[STEPS, [0.7, 0.8, 0.9]]],
    }
    for axis in axes:
        unit = "share" if axis.get_title() == "accuracy" else "nats per image"
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("training step", unit)


def test_a_loss_equal_to_nelbo_is_drawn_once(axes, tmp_path):
    columns = {"loss": [6, 5, 4], "nelbo": [6, 5, 4], "kl": [3, 2, 1], "rec": [3, 3, 3]}
    store_curves(tmp_path, columns)
    plots.curves(tmp_path)
    assert set(drawn_curves(axes)) == {"loss", "reconstruction", "KL of z"}


LOSS = {"loss": [9, 8, 7], "kl": [3, 2, 1]}
BOUND = {"nelbo": [6, 5, 4]}
FOUND = {"nelbo": [6.5, 4.5], "kl": [2.5, 2], "rec": [4, 2.5]}


@pytest.mark.parametrize(
    "columns, tested, panel",
    [
        (LOSS | {"nelbo": LOSS["loss"]}, FOUND, "loss"),
        (LOSS | BOUND, FOUND, "NELBO"),  # weighted, or L_m: the loss is of another kind
        (LOSS | {"acc": [0.7, 0.8, 0.9]}, {"accuracy": [0.6, 0.65]}, "accuracy"),
    ],
)
def test_test_metrics_stand_beside_those_of_training(columns, tested, panel, axes, tmp_path):
    store_curves(tmp_path, columns, tested)
    assert plots.curves(tmp_path) == ["curves.png"]
    drawn = drawn_curves(axes)
    values = next(iter(tested.values()))
    assert drawn[panel][1:] == [[[100, 230], values]]
    assert all(len(curves) == 1 for title, curves in drawn.items() if title != panel)
    (axis,) = [axis for axis in axes if axis.get_title() == panel]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["test images"]
    low, high = axis.get_ylim()
    assert low < min(values) and high > max(values)  # none is cut off


@pytest.mark.parametrize(
    "text, shown",
    [("", set()), ("step,loss\n100,9\n\n", {"loss"}), ("step,nelbo,seconds\n100,9,1\n", {"NELBO"})],
)
def test_an_edited_table_does_not_stop_the_drawing(text, shown, axes, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    (tmp_path / "test.csv").write_text("")
    names = plots.curves(tmp_path)
    assert names == (["curves.png"] if shown else [])
    assert set(drawn_curves(axes)) == shown


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_an_infinite_metric_does_not_stop_the_drawing(broken, axes, tmp_path):
    store_curves(tmp_path, LOSS, {"nelbo": [6.5, broken]})
    assert plots.curves(tmp_path) == ["curves.png"]


def test_checkpoints_without_metrics_add_nothing_to_curves(axes, tmp_path):
    store_curves(tmp_path, LOSS)
    (tmp_path / "test.csv").write_text("step\n100\n230\n")
    assert plots.curves(tmp_path) == ["curves.png"]
    assert all(len(curves) == 1 for curves in drawn_curves(axes).values())


@pytest.mark.parametrize("rows", [0, 1])
def test_curves_of_a_run_just_begun_are_drawn(rows, tmp_path):
    head = "step,loss,nelbo,kl,rec,seconds\n" if rows else "step,seconds\n"
    (tmp_path / "metrics.csv").write_text(head + "37,5.0,5.0,2.0,3.0,0.1\n" * rows)
    assert plots.curves(tmp_path) == ["curves.png"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_pictures_leave_a_notebooks_backend_and_figures(tmp_path, monkeypatch):
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


def test_a_latent_map_needs_no_square_of_z(tmp_path):
    """Nothing larger is made than the means of all images, which a matrix z_dim x z_dim is."""
    model = VAE(z_dim=5000)
    with Largest() as largest:
        plots.latent_map(model, inked(900), tmp_path / "latent.png")
    assert largest.elements <= 900 * 5000


def test_a_latent_map_is_the_same_each_time(axes, tmp_path):
    torch.manual_seed(0)
    model = spread_out(VAE(z_dim=100))
    images = inked(200)
    state = torch.get_rng_state()
    plots.latent_map(model, images, tmp_path / "latent.png")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    plots.latent_map(model, images, tmp_path / "latent.png")
    first = points(axes[0])
    second = points(axes[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wide_latent_map_agrees_with_exact_axes(axes, tmp_path):
    torch.manual_seed(0)
    model = spread_out(VAE(z_dim=300))
    images = inked(400)
    z = model.enc(images.pixels / 255)[0].detach().double()
    plots.latent_map(model, images, tmp_path / "latent.png")
    found = points(axes[0])
    shown = torch.cat([found[str(digit)] for digit in range(10)])
    centred = torch.cat([z[images.labels == digit] for digit in range(10)]) - z.mean(0)
    wanted = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    for component in range(2):
        both = torch.stack([shown[:, component], wanted[:, component]])
        assert abs(torch.corrcoef(both)[0, 1]) > 0.999

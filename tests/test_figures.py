"""The pictures: which image stands where, upright and in its colours; which number belongs to which axis or point."""

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
from codebase import figures
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


def inked(n: int, labels: list[int] | None = None) -> Images:
    """A split of n images of black and white pixels, which are binarised to what they are; labels 0, ... 9, 0, ..."""
    pixels = torch.bernoulli(torch.full((n, 784), 0.3), generator=torch.Generator().manual_seed(n)) * 255
    return Images(pixels.to(torch.uint8), torch.arange(n) % 10 if labels is None else torch.tensor(labels))


def spread_out(model):
    """Have the posterior means and what is decoded from them differ from image to image by far more than a byte."""
    with torch.no_grad():
        model.enc.net[4].weight.mul_(20)
        model.dec.net[0].weight.mul_(10)
        model.dec.net[4].weight.mul_(10)
    return model


@pytest.mark.parametrize("kind", [VAE, GMVAE])
def test_reconstructions_stand_below_their_images_and_samples_in_rows_of_twenty(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, x, samples = spread_out(kind(name="run")), inked(100).pixels / 255, torch.rand(200, 784)
    decoded = model.reconstruct(x).detach()
    assert (decoded[0] - decoded[1]).abs().max() > 0.1
    model.sample_sigmoid = lambda batch: samples[:batch]
    names = ["samples.png", "reconstructions.png", "interpolations.png", "latent.png"]
    assert figures.of_binary_vae(model, x, inked(30)) == names
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
def test_interpolations_are_ten_pairs_of_images_with_twelve_even_steps_from_one_to_the_other(n, tmp_path, monkeypatch):
    """The first column is a reconstruction of one image of each tenth of them, the last that of the next row's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, x = spread_out(VAE(name="run")), inked(n).pixels / 255
    figures.of_binary_vae(model, x, inked(30))
    shown = picture(tmp_path / "logs/run/interpolations.png")
    assert shown.shape == (10 * 28, 12 * 28, 3)
    decoded, z = model.reconstruct(x).detach(), model.enc(x)[0].detach()
    for row in range(10):
        first, last = row * n // 10, (row + 1) % 10 * n // 10
        assert_shows(tile(shown, row, 0, 28), decoded[first])
        assert_shows(tile(shown, row, 11, 28), decoded[last])
        for step in range(12):
            between = z[first] + (z[last] - z[first]) * step / 11
            assert_shows(tile(shown, row, step, 28), model.compute_sigmoid_given(between[None])[0].detach())
    if n == 100:  # the course's images are ten of each digit: every row goes from a digit to the next
        assert not torch.equal(tile(shown, 3, 0, 28), tile(shown, 3, 11, 28))
        assert torch.equal(tile(shown, 3, 11, 28), tile(shown, 4, 0, 28))


def test_a_last_row_of_fewer_than_twenty_images_is_filled_up_with_black(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, x = spread_out(VAE(name="run")), inked(27).pixels / 255
    decoded = model.reconstruct(x).detach()
    figures.of_binary_vae(model, x, inked(30))
    shown = picture(tmp_path / "logs/run/reconstructions.png")
    assert shown.shape == (4 * 28, 20 * 28, 3)
    for i in range(40):
        row, column = 2 * (i // 20), i % 20
        assert_shows(tile(shown, row, column, 28), x[i] if i < 27 else torch.zeros(784))
        assert_shows(tile(shown, row + 1, column, 28), decoded[i] if i < 27 else torch.zeros(784))


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
    made = []
    subplots = Figure.subplots

    def remembering(figure, *args, **kwargs):
        axis = subplots(figure, *args, **kwargs)
        made.extend(np.atleast_1d(axis).flatten())
        return axis

    monkeypatch.setattr(Figure, "subplots", remembering)
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
    colour, scale = matplotlib.colormaps["cividis"], 110 / axis.figure.dpi
    for (true, assigned), share in {(2, 7): 1, (7, 2): 0, (8, 8): 0.75, (8, 1): 0.25, (1, 8): 0}.items():
        x, y = axis.transData.transform((assigned + 0.4, true + 0.4)) * scale  # beside the number that is written there
        found = pixels[int(len(pixels) - y), int(x), :3]
        assert found == pytest.approx(colour(float(share))[:3], abs=0.02), (true, assigned)
    first, last = (axis.transData.transform((0, digit))[1] for digit in (0, 9))
    assert first > last  # the zero is at the top


def points(axis) -> dict[str, torch.Tensor]:
    """Where each entry of a map's legend has its points, (n, 2); the legend names every one of them."""
    found = {marks.get_label(): torch.tensor(np.asarray(marks.get_offsets())) for marks in axis.collections}
    found = {name: at for name, at in found.items() if len(at)}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(found)
    return found


@pytest.mark.parametrize("kind, settings", [(VAE, {}), (GMVAE, {"k": 7})])
def test_a_latent_map_of_two_dimensions_shows_z_itself_in_a_colour_for_each_digit(kind, settings, axes, tmp_path):
    torch.manual_seed(0)
    model, images = spread_out(kind(z_dim=2, **settings)), inked(34)  # four digits have an image more
    z = model.enc(images.pixels / 255)[0].detach().double()
    assert figures.latent(model, images, tmp_path / "latent.png") == "latent.png"
    (axis,) = axes
    found = points(axis)
    assert [name for name in found if name != "prior"] == list("0123456789")
    for digit in range(10):
        torch.testing.assert_close(found[str(digit)].double(), z[images.labels == digit], rtol=1e-4, atol=1e-4)
    if kind is GMVAE:
        torch.testing.assert_close(found["prior"].float(), model.prior()[0][0].detach(), rtol=1e-4, atol=1e-5)
    else:
        assert "prior" not in found
    for marks in axis.collections[:10]:
        assert tuple(marks.get_facecolor()[0])[:3] == to_rgba(f"C{marks.get_label()}")[:3]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("z 1", "z 2") and "34 test images" in axis.get_title()


@pytest.mark.parametrize("kind, settings", [(VAE, {}), (GMVAE, {"k": 7})])
def test_a_latent_map_of_more_dimensions_shows_the_two_directions_in_which_the_means_vary_most(
    kind, settings, axes, tmp_path
):
    torch.manual_seed(0)
    model, images = spread_out(kind(z_dim=10, **settings)), inked(50)
    z = model.enc(images.pixels / 255)[0].detach()
    figures.latent(model, images, tmp_path / "latent.png")
    (axis,) = axes
    found = points(axis)
    shown = torch.cat([found[str(digit)] for digit in range(10)]).float()
    ordered = torch.cat([z[images.labels == digit] for digit in range(10)])
    centred = ordered - ordered.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    wanted = centred @ directions
    signs = (wanted * shown).sum(0).sign()
    torch.testing.assert_close(shown, wanted * signs, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert shown[:, 0].var() > shown[:, 1].var()
    if kind is GMVAE:  # on the same map
        prior = (model.prior()[0][0].detach() - ordered.mean(0)) @ directions * signs
        torch.testing.assert_close(found["prior"].float(), prior, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert axis.get_xlabel() == "principal component 1" and axis.get_ylabel() == "principal component 2"


def test_a_latent_map_of_one_dimension_is_a_line(axes, tmp_path):
    torch.manual_seed(0)
    model, images = spread_out(GMVAE(z_dim=1, k=3)), inked(20)
    figures.latent(model, images, tmp_path / "latent.png")
    found = points(axes[0])
    z = model.enc(images.pixels / 255)[0].detach()
    for digit in range(10):
        wanted = torch.cat([z[images.labels == digit], torch.zeros(2, 1)], 1)
        torch.testing.assert_close(found[str(digit)].float(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["prior"][:, :1].float(), model.prior()[0][0].detach(), rtol=1e-4, atol=1e-5)
    assert not found["prior"][:, 1].any()


@pytest.mark.parametrize("labels, wanted", [([-1] * 12, ["no label"]), ([3] * 6 + [-1] * 6, ["no label", "3"])])
def test_images_without_labels_are_shown_as_such(labels, wanted, axes, tmp_path):
    torch.manual_seed(0)
    figures.latent(VAE(z_dim=2), inked(12, labels), tmp_path / "latent.png")
    found = points(axes[0])
    assert list(found) == wanted and sum(map(len, found.values())) == 12


def test_a_latent_map_shows_at_most_ten_thousand_images(axes, tmp_path):
    few = inked(100)
    many = Images(few.pixels.repeat(101, 1), few.labels.repeat(101))
    figures.latent(VAE(z_dim=2), many, tmp_path / "latent.png")
    assert sum(map(len, points(axes[0]).values())) == 10_000 and "10,000 test images" in axes[0].get_title()


STEPS = [100, 200, 230]


def store_curves(folder: Path, columns: dict, tested: dict | None = None) -> None:
    """Write metrics.csv and, of two checkpoints, test.csv."""
    with (folder / "metrics.csv").open("w") as file:
        rows = zip(STEPS, *columns.values(), [1, 2, 3], strict=True)
        csv.writer(file).writerows([["step", *columns, "seconds"], *rows])
    if tested:
        with (folder / "test.csv").open("w") as file:
            csv.writer(file).writerows([["step", *tested], *zip([100, 230], *tested.values(), strict=True)])


def drawn_curves(axes: list) -> dict[str, list]:
    """The x and y of every line under each title."""
    return {axis.get_title(): [line.get_xydata().T.tolist() for line in axis.lines] for axis in axes}


def test_the_curves_show_each_term_of_the_table_over_the_steps(axes, tmp_path):
    columns = {"loss": [9, 8, 7], "nelbo": [6, 5, 4], "kl": [3, 2, 1], "kl_y": [0, 0, 0], "rec": [7, 6, 6.5]}
    store_curves(tmp_path, columns | {"ce": [0.5, 0.4, 0.3], "acc": [0.7, 0.8, 0.9]})
    assert figures.curves(tmp_path) == ["curves.png"]
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


def test_a_loss_that_is_the_nelbo_is_drawn_once(axes, tmp_path):
    store_curves(tmp_path, {"loss": [6, 5, 4], "nelbo": [6, 5, 4], "kl": [3, 2, 1], "rec": [3, 3, 3]})
    figures.curves(tmp_path)
    assert set(drawn_curves(axes)) == {"loss", "reconstruction", "KL of z"}


LOSS, BOUND = {"loss": [9, 8, 7], "kl": [3, 2, 1]}, {"nelbo": [6, 5, 4]}
FOUND = {"nelbo": [6.5, 4.5], "kl": [2.5, 2], "rec": [4, 2.5]}


@pytest.mark.parametrize(
    "columns, tested, panel",
    [
        (LOSS | {"nelbo": LOSS["loss"]}, FOUND, "loss"),
        (LOSS | BOUND, FOUND, "NELBO"),  # weighted, or L_m: the loss is of another kind
        (LOSS | {"acc": [0.7, 0.8, 0.9]}, {"accuracy": [0.6, 0.65]}, "accuracy"),
    ],
)
def test_what_was_found_on_test_images_stands_beside_the_same_figure_of_the_training(
    columns, tested, panel, axes, tmp_path
):
    store_curves(tmp_path, columns, tested)
    assert figures.curves(tmp_path) == ["curves.png"]
    drawn = drawn_curves(axes)
    assert drawn[panel][1:] == [[[100, 230], next(iter(tested.values()))]]
    assert all(len(curves) == 1 for title, curves in drawn.items() if title != panel)
    (axis,) = (axis for axis in axes if axis.get_title() == panel)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["test images"]
    low, high = axis.get_ylim()
    assert low < min(next(iter(tested.values()))) and high > max(next(iter(tested.values())))  # none is cut off


@pytest.mark.parametrize(
    "text, shown", [("", None), ("step,loss\n100,9\n\n", {"loss"}), ("step,nelbo,seconds\n100,9,1\n", {"NELBO"})]
)
def test_a_table_that_someone_emptied_or_edited_does_not_stop_the_drawing(text, shown, axes, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    (tmp_path / "test.csv").write_text("")
    assert figures.curves(tmp_path) == (["curves.png"] if shown else [])
    assert not shown or set(drawn_curves(axes)) == shown


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_stored_figure_that_is_not_finite_does_not_stop_the_drawing(broken, axes, tmp_path):
    store_curves(tmp_path, LOSS, {"nelbo": [6.5, broken]})
    assert figures.curves(tmp_path) == ["curves.png"]


def test_a_table_of_checkpoints_without_figures_adds_nothing_to_the_curves(axes, tmp_path):
    store_curves(tmp_path, LOSS)
    (tmp_path / "test.csv").write_text("step\n100\n230\n")
    assert figures.curves(tmp_path) == ["curves.png"]
    assert all(len(curves) == 1 for curves in drawn_curves(axes).values())


@pytest.mark.parametrize("rows", [0, 1])
def test_the_curves_of_a_run_that_has_just_begun_are_drawn(rows, tmp_path):
    head = "step,loss,nelbo,kl,rec,seconds\n" if rows else "step,seconds\n"
    (tmp_path / "metrics.csv").write_text(head + "37,5.0,5.0,2.0,3.0,0.1\n" * rows)
    assert figures.curves(tmp_path) == ["curves.png"] and (tmp_path / "curves.png").stat().st_size > 1000


def test_pictures_leave_a_notebooks_backend_and_figures(tmp_path, monkeypatch):
    before = pyplot.get_backend()
    pyplot.switch_backend("svg")
    mine = pyplot.figure()
    monkeypatch.setattr(codebase, "figures", figures)  # put back after the import below
    monkeypatch.delitem(sys.modules, "codebase.figures")
    try:
        imported = importlib.import_module("codebase.figures")
        imported.grid(torch.rand(20, 784), tmp_path / "grid.png")
        imported.confusion(torch.ones(10, 10), tmp_path / "confusion.png")
        assert pyplot.get_backend() == "svg"
        assert pyplot.get_fignums() == [mine.number]
    finally:
        pyplot.close(mine)
        pyplot.switch_backend(before)


def test_a_latent_map_needs_no_square_of_z(tmp_path):
    """Five thousand dimensions: neither the matrix z_dim x z_dim nor all images' z at once is made."""
    model = VAE(z_dim=5000)
    with Largest() as largest:
        figures.latent(model, inked(900), tmp_path / "latent.png")
    assert largest.elements <= 900 * 5000


def test_a_latent_map_is_the_same_each_time_and_draws_nothing(axes, tmp_path):
    torch.manual_seed(0)
    model, images = spread_out(VAE(z_dim=100)), inked(200)
    state = torch.get_rng_state()
    figures.latent(model, images, tmp_path / "latent.png")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    figures.latent(model, images, tmp_path / "latent.png")
    first, second = (points(axis) for axis in axes)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wide_latent_map_agrees_with_exact_axes(axes, tmp_path):
    torch.manual_seed(0)
    model, images = spread_out(VAE(z_dim=300)), inked(400)
    z = model.enc(images.pixels / 255)[0].detach().double()
    figures.latent(model, images, tmp_path / "latent.png")
    found = points(axes[0])
    shown = torch.cat([found[str(digit)] for digit in range(10)])
    centred = torch.cat([z[images.labels == digit] for digit in range(10)]) - z.mean(0)
    wanted = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    for component in range(2):
        both = torch.stack([shown[:, component], wanted[:, component]])
        assert abs(torch.corrcoef(both)[0, 1]) > 0.999

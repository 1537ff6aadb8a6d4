"""The plots: which image stands where, in which colours; which number belongs to which point."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from untrained import BINARY, made

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
def test_reconstructions_stand_below_their_images(kind, settings, folder):
    """A last row is filled with black; the other pictures lie beside it."""
    model = spread_out(kind, name="run", **settings)
    x = inked(27).pixels / 255
    samples = torch.rand(200, 784)
    decoded = model.reconstruct(x).detach()
    assert (decoded[0] - decoded[1]).abs().max() > 0.1
    model.sample_sigmoid = lambda batch: samples[:batch]
    names = ["samples.png", "reconstructions.png", "interpolations.png", "latent.png"]
    assert plots.of_vae(model, x, inked(30)) == names
    assert {path.name for path in folder.iterdir()} == set(names)
    shown = tiles(picture(folder / "reconstructions.png"))
    assert shown.shape[:2] == (4, 20)
    for row, wanted in [(0, x), (1, decoded)]:
        found = shown[row::2].flatten(0, 1)
        assert_shows(found[:27], wanted)
        assert not found[27:].any()
    assert_shows(tiles(picture(folder / "samples.png")), samples.reshape(10, 20, 784))


def test_interpolations_are_even_steps_between_pairs(folder):
    """The first column reconstructs an image of each tenth of them, the last the next row's."""
    model = spread_out("vae", name="run")
    x = inked(100).pixels / 255
    plots.of_vae(model, x, inked(30))
    shown = tiles(picture(folder / "interpolations.png"))
    assert shown.shape[:2] == (10, 12)
    z = model.enc(x)[0]
    for row in range(10):
        first = z[row * 10]
        last = z[(row + 1) % 10 * 10]
        steps = torch.stack([first + (last - first) * step / 11 for step in range(12)])
        assert_shows(shown[row], model.compute_sigmoid_given(steps))
    assert torch.equal(shown[3, 11], shown[4, 0])


@pytest.mark.parametrize(
    "kind, decoder, size",
    [("ssvae", "compute_sigmoid_given", 784), ("fsvae", "compute_mean_given", 3072)],
)
def test_rows_of_styles_are_labels(kind, decoder, size, folder):
    """And columns are styles."""
    model = made(kind, name="run")
    styles = torch.linspace(0.05, 0.95, 20)

    def decode(z, y):
        """The first pixel tells the label, the others the style."""
        label = y.argmax(-1, keepdim=True) / 10
        return torch.cat([label, z[:, :1].expand(-1, size - 1)], 1)

    model.sample_z = lambda batch: styles[:batch, None].expand(batch, model.z_dim)
    setattr(model, decoder, decode)
    if kind == "ssvae":
        assert plots.of_ssvae(model, torch.ones(10, 10)) == ["confusion.png", "styles.png"]
    else:
        assert plots.of_fsvae(model, "styles") == ["styles.png"]
    wanted = styles[:, None].repeat(10, 1, size)
    wanted[:, :, 0] = torch.arange(10)[:, None] / 10
    assert_shows(tiles(picture(folder / "styles.png"), {784: 28, 3072: 32}[size]), wanted)


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
    assert axis.transData.transform((0, 0))[1] > axis.transData.transform((0, 9))[1]  # zero on top


@BINARY
@pytest.mark.parametrize("z_dim", [1, 2, 10])
def test_a_latent_map_shows_z_by_digit(kind, settings, z_dim, axes, tmp_path):
    """And the means of a mixture; of many dimensions the two directions that vary most."""
    model = spread_out(kind, z_dim=z_dim, **settings)
    images = inked(400)
    assert plots.latent_map(model, images, tmp_path / "latent.png") == "latent.png"
    (axis,) = axes
    found = {}
    for marks in axis.collections:
        found[marks.get_label()] = torch.tensor(np.asarray(marks.get_offsets())).float()
    shown = torch.cat([found[str(digit)] for digit in range(10)])
    z = model.enc(images.pixels / 255)[0].detach()
    prior = z[:0]
    if kind == "gmvae":
        prior = model.prior()[0][0].detach()
    signs = 1
    if z_dim == 1:  # which is flat
        prior = torch.cat([prior, 0 * prior], 1)
        z = torch.cat([z, 0 * z], 1)
    if z_dim == 10:
        directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T
        prior = (prior - z.mean(0)) @ directions
        z = (z - z.mean(0)) @ directions
    z = z[images.labels.argsort(stable=True)]
    if z_dim == 10:
        signs = (z * shown).sum(0).sign()  # both directions are right
    close = {"rtol": 1e-3, "atol": 1e-3 * z.abs().max().item()}
    torch.testing.assert_close(shown, z * signs, **close)
    if kind == "gmvae":
        torch.testing.assert_close(found["prior"], prior * signs, **close)
    assert axis.get_xlabel() == ("principal component 1" if z_dim == 10 else "z 1")
    assert "400 test images" in axis.get_title()


def test_curves_show_each_term_over_steps(axes, tmp_path):
    """And metrics of the test set beside their term."""
    rows = "100,9,6,3,0.7,1\n200,8,5,2,0.8,2\n230,7,4,1,0.9,3\n"
    (tmp_path / "metrics.csv").write_text(f"step,loss,nelbo,kl,acc,seconds\n{rows}")
    (tmp_path / "test.csv").write_text("step,nelbo,kl\n100,6.5,2.5\n230,4.5,2\n")
    assert plots.curves(tmp_path) == ["curves.png"]
    found = {}
    for axis in axes:
        found[axis.get_title()] = [line.get_xydata().T.tolist() for line in axis.lines]
    steps = [100, 200, 230]
    assert found == {
        "loss": [[steps, [9, 8, 7]]],
        "NELBO": [[steps, [6, 5, 4]], [[100, 230], [6.5, 4.5]]],
        "KL of z": [[steps, [3, 2, 1]]],
        "accuracy": [[steps, [0.7, 0.8, 0.9]]],
    }

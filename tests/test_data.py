"""The data: course subset, binarisation, epochs, damaged files, failed downloads and the drawn digits."""

import hashlib
import socket
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import MNIST, needs_mnist, tree

from codebase import cli, data, digits, train
from codebase.checkpoint import Refused


def arguments(folder, **changes):
    given = {
        "data": "mnist",
        "data_dir": str(folder),
        "check_data": 1,
        "device": "cpu",
        "model": "vae",
        "split": "train",
    }
    return Namespace(**{**given, **changes})


@needs_mnist
def test_the_test_subset_is_the_courses_to_the_last_bit():
    x = data.test_subset(data.load(arguments(MNIST), "test"))
    assert int(x.sum()) == data.COURSE["test_binarized"]["ones"]
    digest = hashlib.sha256(x.numpy().astype(np.uint8).tobytes()).hexdigest()
    assert digest == data.COURSE["test_binarized"]["sha256_uint8"]


@needs_mnist
def test_checking_the_published_files_takes_under_a_third_of_a_second():
    data.load(arguments(MNIST), "train")  # from the disk into the system's cache
    began = time.perf_counter()
    for path in cli.real_files(Namespace(real="mnist", data_dir=MNIST)):
        hashlib.sha256(path.read_bytes()).hexdigest()
    assert time.perf_counter() - began < 3  # 0.05 s where nothing else runs; a tenth of that promise is kept here


def test_subsets_take_ten_images_of_each_digit_and_keep_the_courses_repetitions(digits_dir):
    images = data.load(arguments(digits_dir, data="digits"), "train")
    labelled = data.labelled_set(images)
    assert labelled.labels.tolist() == [digit for digit in range(10) for _ in range(10)]
    positions = images.positions(data.COURSE["train"])
    assert positions[46] == positions[47]  # position 2176 of digit 4 stands in the table twice
    assert len(set(positions.tolist())) == 99


def test_binarisation_draws_every_grey_level_with_its_own_probability():
    torch.manual_seed(0)
    grey = torch.arange(256, dtype=torch.uint8).repeat(40_000, 1)
    drawn = data.binarize(grey)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share, p = drawn.mean(0), torch.arange(256) / 255
    assert share[0] == 0 and share[255] == 1
    deviations = (share - p)[1:-1] / (p * (1 - p) / 40_000).sqrt()[1:-1]
    assert deviations.abs().max() < 4.5 and abs(deviations.mean()) < 0.3


def test_every_epoch_is_a_full_shuffled_pass_whatever_the_batch_size():
    batches = train.order(103, 10, seed=1, start=0, device="cpu")
    stream = torch.cat([next(batches) for _ in range(31)])
    epochs = stream[:309].reshape(3, 103)
    assert all(sorted(epoch.tolist()) == list(range(103)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and epochs[0].tolist() != sorted(epochs[0].tolist())


def test_the_order_can_be_entered_at_any_step():
    from_start = train.order(103, 10, seed=1, start=0, device="cpu")
    skipped = [next(from_start) for _ in range(40)][35]
    assert torch.equal(next(train.order(103, 10, seed=1, start=35, device="cpu")), skipped)
    assert not torch.equal(next(train.order(103, 10, seed=2, start=35, device="cpu")), skipped)


@pytest.fixture(scope="module")
def idx_dir(tmp_path_factory, digits_dir):
    """Files in MNIST's own format and sizes that hold drawn digits."""
    folder = tmp_path_factory.mktemp("idx")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = digits.load(str(digits_dir), split, "grey")
        header = np.array([2051, len(images), 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.pixels.numpy().tobytes())
        header = np.array([2049, len(images)], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + images.labels.to(torch.uint8).numpy().tobytes())
    return folder


@pytest.fixture
def damaged(idx_dir, tmp_path):
    """A copy of the test split's files to damage."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes((idx_dir / "MNIST" / "raw" / name).read_bytes())
        (raw / name.replace("t10k", "train")).write_bytes(b"not read for the test split")
    return tmp_path


def test_files_that_are_not_the_published_ones_are_refused_unless_allowed(damaged):
    with pytest.raises(Refused, match=r"t10k-images-idx3-ubyte.*SHA-256.*--check_data 0"):
        data.load(arguments(damaged), "test")
    images = data.load(arguments(damaged, check_data=0), "test")
    assert images.pixels.shape == (10_000, 784) and images.labels.max() == 9


def truncated(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path):
    path.write_bytes(path.read_bytes() + b"x")


def magic(path: Path):
    path.write_bytes(b"\x00\x00\x08\x77" + path.read_bytes()[4:])


def counts(path: Path):
    path.write_bytes(path.read_bytes()[:4] + b"\x00\x00\x00\x09" + path.read_bytes()[8:])


def label(path: Path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")


def empty(path: Path):
    path.write_bytes(b"")


def folder(path: Path):
    path.unlink()
    path.mkdir()


def gone(path: Path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncated, longer, magic, counts, empty, folder, gone])
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_mnist_file_is_named_with_the_cure_and_left_alone(damaged, name, harm):
    harm(damaged / "MNIST" / "raw" / name)
    before = tree(damaged)
    for check in (0, 1):
        with pytest.raises(Refused, match=rf"{name}.*put an intact copy in its place|SHA-256"):
            data.load(arguments(damaged, check_data=check), "test")
    assert tree(damaged) == before


def test_labels_outside_zero_to_nine_are_refused(damaged):
    label(damaged / "MNIST" / "raw" / "t10k-labels-idx1-ubyte")
    with pytest.raises(Refused, match="labels outside 0 to 9"):
        data.load(arguments(damaged, check_data=0), "test")


@pytest.fixture
def mat_dir(tmp_path):
    """A file in SVHN's layout: one pixel of each image tells its row and column."""
    pixels = np.zeros((32, 32, 3, 12), np.uint8)
    pixels[5, 7, 1, :] = 100 + np.arange(12)  # row 5, column 7, green
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.arange(12, dtype=np.uint8)[:, None] % 10 + 1})
    return tmp_path


def svhn_arguments(folder, **changes):
    return arguments(folder, **{"data": "svhn", "model": "fsvae", "check_data": 0, **changes})


def test_svhn_is_read_as_channel_major_bytes_with_ten_as_zero(mat_dir):
    images = data.load(svhn_arguments(mat_dir), "train")
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (12, 3072)
    assert images.pixels.reshape(12, 3, 32, 32)[:, 1, 5, 7].tolist() == list(range(100, 112))
    assert images.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


@pytest.mark.parametrize("harm", [truncated, magic, empty, folder, gone])
def test_a_damaged_svhn_file_is_named_with_the_cure_and_left_alone(mat_dir, harm):
    path = mat_dir / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2]) if harm is truncated else harm(path)
    before = tree(mat_dir)
    if harm is magic:
        path.write_bytes(b"no matlab file" * 100)
        before = tree(mat_dir)
    with pytest.raises(Refused, match=r"train_32x32.mat.*put an intact copy in its place"):
        data.load(svhn_arguments(mat_dir), "train")
    assert tree(mat_dir) == before


def test_an_unpublished_svhn_file_is_refused_unless_allowed(mat_dir):
    with pytest.raises(Refused, match=r"MD5.*--check_data 0"):
        data.load(svhn_arguments(mat_dir, check_data=1), "train")


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    wanted = cli.real_files(Namespace(real="mnist", data_dir=tmp_path))
    assert data.download("mnist", str(tmp_path), wanted)
    assert tree(tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_a_download_without_an_answer_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(data, "PATIENCE", 6)
        wanted = cli.real_files(Namespace(real="mnist", data_dir=tmp_path))
        assert "no answer" in data.download("mnist", str(tmp_path), wanted)
    assert list(tmp_path.iterdir()) == []
    assert data.PATIENCE <= 20


def test_a_download_moves_whole_files_into_place(tmp_path, monkeypatch):
    code = (
        "import pathlib, sys; from types import SimpleNamespace\n"
        "def fetch(root, download):\n"
        "    raw = pathlib.Path(root, 'MNIST', 'raw'); raw.mkdir(parents=True)\n"
        "    [(raw / (a + '-' + b)).write_bytes(b'whole') for a in ('train', 't10k')\n"
        "     for b in ('images-idx3-ubyte', 'labels-idx1-ubyte')]\n"
        "datasets = SimpleNamespace(MNIST=fetch)\n"
    )
    stand_in = tmp_path / "modules"
    stand_in.mkdir()
    (stand_in / "torchvision.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    place = tmp_path / "data"
    wanted = cli.real_files(Namespace(real="mnist", data_dir=place))
    assert data.download("mnist", str(place), wanted) is None
    assert {path.read_bytes() for path in wanted} == {b"whole"} and len(tree(place)) == 4


def test_drawn_digits_have_mnists_own_numbers_per_class(digits_dir):
    for split in ("train", "test"):
        images = digits.load(str(digits_dir), split, "grey")
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]
        assert images.pixels.dtype == torch.uint8 and images.pixels.shape[1] == 784


def test_drawn_digits_are_the_same_on_every_machine():
    shapes, labels = digits.fields(), np.arange(10)
    grey = hashlib.sha256(digits.grey(shapes, labels, 1).tobytes()).hexdigest()
    colour = hashlib.sha256(digits.colour(shapes, labels, 1).tobytes()).hexdigest()
    assert (grey[:16], colour[:16]) == ("4f7f3f2ab96182e8", "e236896aea7e24c5")


def test_drawn_digits_differ_from_image_to_image_and_are_grey_like_mnist(digits_dir):
    images = digits.load(str(digits_dir), "test", "grey")
    assert len(images.pixels.unique(dim=0)) == len(images)
    assert 0.10 < images.pixels.float().mean() / 255 < 0.17  # MNIST: 0.13
    border = images.pixels.reshape(-1, 28, 28).clone()
    border[:, 2:-2, 2:-2] = 0
    assert (border > 0).float().mean() < 0.02


def test_drawn_digits_can_be_told_apart(digits_dir):
    train_split, test_split = (digits.load(str(digits_dir), split, "grey") for split in ("train", "test"))
    means = torch.stack([train_split.pixels[train_split.labels == d].float().mean(0) for d in range(10)])
    nearest = torch.cdist(test_split.pixels.float(), means).argmin(1)
    assert (nearest == test_split.labels).float().mean() > 0.5


def test_a_damaged_store_of_drawn_digits_is_drawn_again(tmp_path, digits_dir):
    digits.load(str(digits_dir), "test", "grey")
    name = f"drawn-grey-test-v{digits.VERSION}.npz"
    (tmp_path / name).write_bytes((digits_dir / name).read_bytes()[:1000])
    assert len(digits.load(str(tmp_path), "test", "grey")) == 10_000
    assert (tmp_path / name).read_bytes() == (digits_dir / name).read_bytes()

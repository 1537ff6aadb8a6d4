"""The data: subsets, binarisation, epochs, damaged files, the choice of a data set, downloads."""

import errno
import gzip
import hashlib
import io
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import MNIST, needs_mnist, tree

import run_fsvae
import run_vae
from codebase import data, digits, train
from codebase.runtime import download, options
from codebase.runtime.files import Missing, UsageError, model_path, state_path

TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@needs_mnist
def test_the_subset_of_mnist_is_the_courses():
    x = data.test_subset(data.mnist(str(MNIST), "test", check=1))
    assert int(x.sum()) == data.COURSE["test_binarized"]["ones"]
    assert digest(x) == data.COURSE["test_binarized"]["sha256_uint8"]


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().astype(np.uint8).tobytes()).hexdigest()


def ten_of_each(count: int = 10) -> list[int]:
    """The labels of that many images of each digit, class after class."""
    return np.arange(10).repeat(count).tolist()


def test_the_packaged_images_are_the_courses():
    """By checksums: of the binarised subset, and of the labelled images' grey bytes."""
    test = data.course("test")
    labelled = data.course("train")
    x = data.test_subset(test)
    assert x.shape == (100, 784) and int(x.sum()) == data.COURSE["test_binarized"]["ones"]
    assert digest(x) == data.COURSE["test_binarized"]["sha256_uint8"]
    wanted = "661bd79754bf9ee105bae5595beb334001007475c0742d641eb8f19d3fca1679"
    assert digest(labelled.pixels) == wanted
    for images in [test, labelled]:
        assert images.pixels.shape == (100, 784) and images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == ten_of_each()
    assert data.COURSE_IMAGES.stat().st_size < 50_000


def test_old_draws_are_those_of_old_torch():
    test = data.course("test")
    before = torch.get_rng_state()
    old = data.test_subset(test, "2018")
    older = data.test_subset(test, "torch-0.4")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert torch.equal(old, torch.bernoulli(test.pixels / 255))

    probabilities = (test.pixels / 255).flatten().double().numpy()
    stream = np.random.RandomState(0).bytes(8 * old.numel())  # Mersenne Twister, as torch has it
    words = np.frombuffer(stream, "<u4").astype(np.uint64)
    short = words[: old.numel()] & np.uint64(2**24 - 1)
    long = ((words[::2] << np.uint64(32)) | words[1::2]) & np.uint64(2**53 - 1)
    assert np.array_equal(old.flatten() == 1, short / 2**24 <= probabilities)
    assert np.array_equal(older.flatten() == 1, long / 2**53 <= probabilities)


def test_a_whole_split_has_the_present_rule():
    test = data.course("test")
    assert torch.equal(data.test_subset(test, "all"), data.binarize_once(test.pixels))
    many = data.Images(torch.full((230, 784), 128, dtype=torch.uint8), torch.full((230,), -1))
    sizes = [len(data.test_subset(many, which)) for which in ["subset", "2018", "torch-0.4", "all"]]
    assert sizes == [100, 100, 100, 230]


@needs_mnist
def test_the_packaged_images_are_mnists_own():
    for split in ("train", "test"):
        images = data.mnist(str(MNIST), split, check=1)
        course = data.course(split)
        positions = images.positions(split)
        assert torch.equal(images.pixels[positions], course.pixels)
        assert torch.equal(images.labels[positions], course.labels)
        if split == "test":
            assert torch.equal(data.test_subset(images), data.test_subset(course))
        else:
            assert torch.equal(data.labelled_set(images).pixels, course.pixels)


def mnist_run(data_dir, **changes) -> options.Run:
    run = run_vae.parse([]).changed(data="mnist", data_dir=str(data_dir), device="cpu")
    return run.changed(**changes)


def test_without_mnist_the_packaged_images_are_evaluated(
    tmp_path,
):
    run = mnist_run(tmp_path, train=0)
    assert torch.equal(data.load(run, "test").pixels, data.course("test").pixels)
    for in_need in [run.changed(test="all"), run.changed(train=1)]:
        with pytest.raises(UsageError, match="t10k-images-idx3-ubyte cannot be read"):
            data.load(in_need, "test")


def test_mnists_test_split_is_read_whole(published, tmp_path):
    run = mnist_run(tmp_path, train=0)
    assert len(data.load(run, "test")) == 10_000
    flip(published / TEST_FILES[0], -1)
    with pytest.raises(UsageError, match="SHA-256"):
        data.load(run, "test")


@needs_mnist
def test_mnist_is_read_whole_with_its_published_classes():
    for split, count in (("train", 60_000), ("test", 10_000)):
        images = data.load(mnist_run(MNIST), split)
        assert images.pixels.shape == (count, 784) and images.pixels.dtype == torch.uint8
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]


def test_the_labelled_subset_keeps_the_courses_repetitions(digits_dir):
    images = data.drawn_digits(str(digits_dir), "train", colour=False)
    labelled = data.labelled_set(images)
    assert labelled.labels.tolist() == ten_of_each()
    positions = images.positions("train")
    assert torch.equal(images.labels[positions], labelled.labels)
    assert torch.equal(images.pixels[positions], labelled.pixels)
    assert positions[46] == positions[47]  # position 2176 of digit 4 stands in the table twice
    assert len(set(positions.tolist())) == 99


@pytest.mark.parametrize("count", [10, 50, 200, 1000, 3000])
def test_more_labels_are_balanced_fixed_and_none_twice(count, digits_dir):
    images = data.drawn_digits(str(digits_dir), "train", colour=False)
    each = count // 10
    positions = images.positions("train", each)
    assert images.labels[positions].tolist() == ten_of_each(each)
    assert torch.equal(positions, images.positions("train", each))
    by_digit = positions.reshape(10, each)
    course = images.positions("train").reshape(10, 10)
    assert torch.equal(by_digit[:, :10], course[:, :each])  # the course's come first
    new = by_digit[:, 10:].flatten()
    assert len(new.unique()) == len(new)
    assert not torch.isin(new, course).any()
    more = images.positions("train", each + 10).reshape(10, each + 10)
    assert torch.equal(more[:, :each], by_digit)  # a larger set holds the smaller one
    if each >= 20:
        threes = new.reshape(10, -1)[3].tolist()
        assert threes != sorted(threes)
    labelled = data.labelled_set(images, count)
    assert len(labelled) == count and torch.equal(labelled.pixels, images.pixels[positions])


def test_mnist_has_the_labels_that_the_flag_takes():
    assert min(data.COURSE["class_counts"]["train"]) >= 5000


def test_too_few_images_of_a_digit_are_counted():
    images = data.Images(torch.zeros(75, 784, dtype=torch.uint8), torch.arange(75) % 10)
    assert len(data.labelled_set(images, 70)) == 70
    words = "argument --labels: takes 8 images of each digit, and of 5 there are 7"
    with pytest.raises(UsageError, match=words):
        data.labelled_set(images, 80)


def test_another_split_has_its_first_hundred_evaluated():
    stream = torch.Generator().manual_seed(0)
    ink = torch.randint(0, 2, (130, 784), dtype=torch.uint8, generator=stream)
    for labels in [torch.arange(130) % 10, torch.full((130,), -1), torch.arange(7)]:
        images = data.Images(255 * ink[: len(labels)], labels)
        assert torch.equal(data.test_subset(images), ink[: len(labels)][:100].float())


def test_binarisation_draws_each_grey_level_with_its_probability():
    torch.manual_seed(0)
    grey = torch.arange(256, dtype=torch.uint8).repeat(40_000, 1)
    drawn = data.binarize(grey)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share = drawn.mean(0)
    p = torch.arange(256) / 255
    assert share[0] == 0 and share[255] == 1
    deviations = (share - p)[1:-1] / (p * (1 - p) / 40_000).sqrt()[1:-1]
    assert deviations.abs().max() < 4.5 and abs(deviations.mean()) < 0.3


def test_a_batch_holds_what_stands_at_its_positions():
    pixels = torch.tensor([[0, 255], [255, 0], [51, 51]], dtype=torch.uint8)
    images = data.Images(pixels, torch.tensor([7, 0, 3]))
    index = torch.tensor([2, 0, 0])
    scaled = torch.tensor([[0.2, 0.2], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(images.scaled(index), scaled)
    assert images.binary(index)[1:].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(images.one_hot(index), torch.eye(10)[[3, 7, 7]])


def test_every_epoch_is_a_full_shuffled_pass():
    batches = train.order(103, 10, seed=1, start=0, device="cpu")
    stream = torch.cat([next(batches) for _ in range(31)])
    epochs = stream[:309].reshape(3, 103)
    assert all(sorted(epoch.tolist()) == list(range(103)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert epochs[0].tolist() != list(range(103))


def test_a_batch_may_be_larger_than_the_split():
    batches = train.order(7, 10, seed=1, start=0, device="cpu")
    stream = torch.cat([next(batches) for _ in range(7)])
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in stream.reshape(10, 7))


def test_the_order_can_be_entered_at_any_step():
    from_start = train.order(103, 10, seed=1, start=0, device="cpu")
    batches = [next(from_start) for _ in range(40)]
    for start in [1, 10, 11, 35]:
        entered = train.order(103, 10, seed=1, start=start, device="cpu")
        assert torch.equal(next(entered), batches[start])
    other_seed = train.order(103, 10, seed=2, start=35, device="cpu")
    assert not torch.equal(next(other_seed), batches[35])


@pytest.fixture(scope="module")
def idx(digits_dir) -> dict[str, bytes]:
    """The files of MNIST's test split in its own format and sizes, but with drawn digits."""
    images = data.drawn_digits(str(digits_dir), "test", colour=False)
    pixels = images.pixels.numpy()
    labels = images.labels.numpy().astype(np.uint8)
    return {
        TEST_FILES[0]: idx_file([2051, 10_000, 28, 28], pixels),
        TEST_FILES[1]: idx_file([2049, 10_000], labels),
    }


def idx_file(header: list[int], content: np.ndarray) -> bytes:
    return np.array(header, ">i4").tobytes() + content.tobytes()


@pytest.fixture
def raw(idx, tmp_path) -> Path:
    """A folder MNIST/raw with these files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in idx.items():
        (folder / name).write_bytes(content)
        (folder / name.replace("t10k", "train")).write_bytes(b"not read for the test split")
    return folder


@pytest.fixture
def published(idx, raw, monkeypatch) -> Path:
    """The same, with the checksums of these files as the published ones."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in idx.items()}
    monkeypatch.setitem(data.COURSE, "mnist_sha256", digests)
    return raw


def test_unpublished_files_are_refused_unless_allowed(raw, tmp_path):
    with pytest.raises(UsageError, match=r"t10k-images-idx3-ubyte.*SHA-256.*--check_data 0"):
        data.load(mnist_run(tmp_path), "test")
    images = data.load(mnist_run(tmp_path, check_data=0), "test")
    assert images.pixels.shape == (10_000, 784) and images.labels.max() == 9


def flip(path: Path, at: int):
    """Change one byte of a file; a digit stays a digit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, at",
    [
        (TEST_FILES[0], 16),
        (TEST_FILES[0], 16 + 784 * 5000 + 300),
        (TEST_FILES[0], -1),
        (TEST_FILES[1], 8),
        (TEST_FILES[1], -1),
    ],
)
def test_one_changed_byte_is_found_by_checksum_alone(published, tmp_path, name, at):
    before = data.mnist(str(tmp_path), "test", check=1)
    flip(published / name, at)
    words = rf"{name} is not the published file .*SHA-256.*--check_data 0"
    with pytest.raises(UsageError, match=words):
        data.mnist(str(tmp_path), "test", check=1)
    after = data.mnist(str(tmp_path), "test", check=0)
    assert (before.pixels != after.pixels).sum() == ("images" in name)
    assert (before.labels != after.labels).sum() == ("labels" in name)


@needs_mnist
def test_one_changed_byte_of_mnist_is_found(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in TEST_FILES:
        (folder / name).write_bytes((MNIST / "MNIST" / "raw" / name).read_bytes())
    assert len(data.mnist(str(tmp_path), "test", check=1)) == 10_000
    flip(folder / TEST_FILES[0], -5000)
    with pytest.raises(UsageError, match="SHA-256"):
        data.mnist(str(tmp_path), "test", check=1)


def test_the_checked_bytes_are_the_used_bytes(published, tmp_path, monkeypatch):
    def change_after(content):
        digest = hashlib.sha256(content)
        for name in TEST_FILES:
            flip(published / name, -1)
        return digest

    wanted = data.mnist(str(tmp_path), "test", check=1)
    shadow = type("hashlib", (), {"sha256": staticmethod(change_after)})
    monkeypatch.setattr(data, "hashlib", shadow)
    before = tree(published)
    labels = data.read_idx(published / TEST_FILES[1], (2049, 10_000), 1)
    assert tree(published) != before and torch.equal(labels.long(), wanted.labels)


def test_old_processed_files_are_never_used(published, tmp_path):
    processed = published.parent / "processed"
    processed.mkdir()
    black = torch.zeros(10_000, 28, 28).byte(), torch.zeros(10_000).long()
    for name in ["training.pt", "test.pt"]:
        torch.save(black, processed / name)
    images = data.mnist(str(tmp_path), "test", check=1)
    labels = images.labels.to(torch.uint8)
    assert images.pixels.numpy().tobytes() == (published / TEST_FILES[0]).read_bytes()[16:]
    assert labels.numpy().tobytes() == (published / TEST_FILES[1]).read_bytes()[8:]


def truncated(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path):
    path.write_bytes(path.read_bytes() + b"x")


def magic(path: Path):
    path.write_bytes(b"\x00\x00\x08\x77" + path.read_bytes()[4:])


def counts(path: Path):
    path.write_bytes(path.read_bytes()[:4] + b"\x00\x00\x00\x09" + path.read_bytes()[8:])


def stub(path: Path):
    path.write_bytes(path.read_bytes()[:7])


def empty(path: Path):
    path.write_bytes(b"")


def folder(path: Path):
    path.unlink()
    path.mkdir()


def gone(path: Path):
    path.unlink()


START = "does not begin as that file does"
HARMS = {  # in words that say nothing of another harm
    truncated: r"is truncated or too long \([\d,]+ bytes\)",
    longer: r"is truncated or too long \([\d,]+ bytes\)",
    magic: START,
    counts: START,
    stub: START,
    empty: START,
    folder: r"cannot be read \(Is a directory\)",
    gone: r"cannot be read \(No such file or directory\)",
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", TEST_FILES)
def test_a_damaged_mnist_file_is_named_with_cure(published, tmp_path, name, harm):
    harm(published / name)
    before = tree(tmp_path)
    words = rf"{name} {HARMS[harm]}.*: .*put an intact copy in its place$"
    for check in [0, 1]:
        with pytest.raises(UsageError, match=words):
            data.mnist(str(tmp_path), "test", check)
    assert tree(tmp_path) == before


def test_labels_outside_zero_to_nine_are_refused(published, tmp_path):
    path = published / TEST_FILES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    words = f"{path.name} has labels outside 0 to 9: .*put an intact copy in its place"
    with pytest.raises(UsageError, match=words):
        data.mnist(str(tmp_path), "test", check=0)


def mat(count: int, **changes) -> bytes:
    """A file in SVHN's layout, with labels 1, 2, ... 10, 1, ...

    Its images are black but for a green pixel at row 5, column 7, which counts them.
    """
    pixels = np.zeros((32, 32, 3, count), np.uint8)
    pixels[5, 7, 1] = np.arange(count) % 251
    labels = np.arange(count, dtype=np.uint8)[:, None] % 10 + 1
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"X": pixels, "y": labels, **changes})
    return buffer.getvalue()


@pytest.mark.parametrize("count", [12, 20_001])  # in one block, and in two
def test_svhn_is_read_with_ten_as_zero(count, tmp_path):
    (tmp_path / "extra_32x32.mat").write_bytes(mat(count))
    images = data.svhn(str(tmp_path), "extra", check=0)
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (count, 3072)
    counted = torch.arange(count) % 251
    assert torch.equal(images.pixels[:, 1 * 1024 + 5 * 32 + 7].long(), counted)
    assert images.pixels.count_nonzero() == counted.count_nonzero()
    assert images.labels.tolist()[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert images.labels.dtype == torch.int64


def test_an_fsvae_reads_its_two_splits(tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(mat(12))
    (tmp_path / "test_32x32.mat").write_bytes(mat(5))
    run = svhn_run(tmp_path, check_data=0)
    assert [len(data.load(run, split)) for split in ("train", "test")] == [12, 5]
    assert len(data.load(run.changed(split="test"), "train")) == 5


def svhn_run(data_dir, **changes) -> options.Run:
    run = run_fsvae.parse(["--split", "train", "--device", "cpu"])
    return run.changed(data="svhn", data_dir=str(data_dir), **changes)


def half(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_mat(path: Path):
    path.write_bytes(b"no matlab file" * 100)


def other_names(path: Path):
    scipy.io.savemat(path, {"images": np.zeros((32, 32, 3, 2), np.uint8)})


def fewer_labels(path: Path):
    path.write_bytes(mat(12, y=np.ones((11, 1), np.uint8)))


def other_label(path: Path):
    path.write_bytes(mat(12, y=np.full((12, 1), 11, np.uint8)))


def no_bytes(path: Path):
    path.write_bytes(mat(12, X=np.zeros((32, 32, 3, 12))))


NO_MAT = r"is truncated or damaged \(\w+\)"
NO_DIGITS = "holds no 32 x 32 x 3 byte images with labels 1 to 10"
SVHN_HARMS = {
    half: rf"({NO_MAT}|cannot be read \(could not read bytes\))",  # as scipy has it
    no_mat: NO_MAT,
    empty: NO_MAT,
    other_names: NO_MAT,
    fewer_labels: NO_DIGITS,
    other_label: NO_DIGITS,
    no_bytes: NO_DIGITS,
    folder: r"cannot be read \(Is a directory\)",
    gone: r"cannot be read \(No such file or directory\)",
}


@pytest.mark.parametrize("harm", SVHN_HARMS)
def test_a_damaged_svhn_file_is_named_with_cure(harm, tmp_path):
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(mat(12))
    harm(path)
    before = tree(tmp_path)
    words = rf"{path.name} {SVHN_HARMS[harm]}: .*put an intact copy in its place$"
    with pytest.raises(UsageError, match=words):
        data.svhn(str(tmp_path), "train", check=0)
    assert tree(tmp_path) == before


def test_one_changed_byte_of_svhn_is_found(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    path = tmp_path / "train_32x32.mat"
    content = mat(12)
    path.write_bytes(content)
    words = r"train_32x32.mat is not the published file .*MD5.*--check_data 0"
    with pytest.raises(UsageError, match=words):
        data.svhn(str(tmp_path), "train", check=1)
    monkeypatch.setitem(SVHN.split_list, "train", ["", path.name, hashlib.md5(content).hexdigest()])
    before = data.svhn(str(tmp_path), "train", check=1)
    flip(path, content.index(bytes(1000)) + 500)  # among the black pixels
    with pytest.raises(UsageError, match="MD5"):
        data.svhn(str(tmp_path), "train", check=1)
    assert (data.svhn(str(tmp_path), "train", check=0).pixels != before.pixels).sum() == 1


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Which data set a VAE's run has: choose("auto", train=0, stored=["mnist"], test="all").

    stored: the data sets of which it has checkpoints; present: whether MNIST's files are there;
    arrive: whether a download brings them. Returns it, and whether a download was tried.
    """
    tried = []
    monkeypatch.chdir(tmp_path)

    def run(
        asked: str, train: int, stored=(), present=False, arrive=False, test="all"
    ) -> tuple[str, bool]:
        asking = run_vae.parse(["--z", "3", "--iter_max", "300", "--run", "4", "--data", asked])
        asking = asking.changed(train=train, test=test, data_dir=str(tmp_path / "data"))
        asking = asking.changed(words="run_vae.py --z 3 --train 0 --run 4 --train=0".split())
        real = asking.changed(data="mnist")
        for name in stored:
            path = model_path(asking.changed(data=name).name, 300)
            path.parent.mkdir(parents=True)
            path.touch()

        def put_files_in_place():
            for path in download.files(real):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

        def fetch(run):
            if all(path.exists() for path in download.files(run)):
                return None
            tried.append(run)
            return put_files_in_place() if arrive else "no route to host"

        monkeypatch.setattr(download, "fetch", fetch)
        if present:
            put_files_in_place()
        return download.choose_data(asking), bool(tried)

    run.tried = tried
    return run


@pytest.mark.parametrize(
    "asked, train, stored, present, arrive, wanted",
    [
        ("auto", 1, [], True, False, ("mnist", False)),
        ("auto", 1, [], False, True, ("mnist", True)),
        ("auto", 1, [], False, False, ("digits", True)),
        ("auto", 1, ["digits"], True, False, ("mnist", False)),
        ("auto", 1, ["mnist"], False, False, ("digits", True)),
        ("mnist", 1, [], False, True, ("mnist", True)),
        ("digits", 1, [], True, True, ("digits", False)),
        ("digits", 1, [], False, True, ("digits", False)),
        ("auto", 0, ["mnist"], True, False, ("mnist", False)),
        ("auto", 0, ["mnist", "digits"], True, False, ("mnist", False)),
        ("auto", 0, ["mnist"], False, True, ("mnist", True)),
        ("auto", 0, ["digits"], False, True, ("digits", False)),
        ("auto", 0, ["mnist", "digits"], False, True, ("mnist", True)),
        ("auto", 0, ["mnist", "digits"], False, False, ("digits", True)),
        ("digits", 0, ["digits"], False, True, ("digits", False)),
    ],
)
def test_a_run_has_its_data_set_or_digits(
    choose, capsys, asked, train, stored, present, arrive, wanted
):
    assert choose(asked, train, stored, present, arrive) == wanted
    banner = capsys.readouterr().out
    if asked == "auto" and wanted[0] == "digits":
        assert "DRAWN DIGITS instead.\nMetrics are not MNIST's." in banner
        assert ("NO MNIST (no route to host)" in banner) == wanted[1]
    else:
        assert banner == ""


@pytest.mark.parametrize(
    "asked, stored, present, wanted",
    [
        ("auto", ["mnist"], False, "mnist"),
        ("auto", ["mnist"], True, "mnist"),
        ("auto", ["mnist", "digits"], False, "mnist"),
        ("auto", ["digits"], False, "digits"),
        ("mnist", ["mnist"], False, "mnist"),
        ("mnist", ["mnist", "digits"], False, "mnist"),
        ("digits", ["mnist", "digits"], True, "digits"),
    ],
)
@pytest.mark.parametrize("test", ["subset", "2018", "torch-0.4"])
def test_the_packaged_images_need_no_download(choose, capsys, asked, stored, present, wanted, test):
    assert choose(asked, 0, stored, present, arrive=True, test=test) == (wanted, False)
    assert ("DRAWN DIGITS" in capsys.readouterr().out) == (asked == "auto" and wanted == "digits")


@pytest.mark.parametrize("arrive, wanted", [(True, "mnist"), (False, "digits")])
def test_to_train_takes_the_files_whatever_is_evaluated(choose, arrive, wanted):
    assert choose("auto", 1, arrive=arrive, test="subset") == (wanted, True)


@pytest.mark.parametrize("test", ["subset", "all"])
@pytest.mark.parametrize(
    "asked, stored, present, missing",
    [
        ("auto", [], False, "mnist"),
        ("auto", [], True, "mnist"),
        ("auto", ["digits"], True, "mnist"),
        ("mnist", ["digits"], False, "mnist"),
        ("digits", ["mnist"], True, "digits"),
    ],
)
def test_a_missing_checkpoint_is_named_before_downloads(
    choose, asked, stored, present, missing, test
):
    model_path("model=vae_z=03_run=0004", 200).parent.mkdir(parents=True)
    model_path("model=vae_z=03_run=0004", 200).touch()
    state_path("model=vae_z=03_run=0004").touch()
    if "mnist" in stored:
        model_path("model=vae_z=03_run=0004", 300).touch()
        stored = []
    with pytest.raises(Missing) as caught:
        choose(asked, 0, stored, present, arrive=True, test=test)
    assert not choose.tried
    name = "model=vae_z=03_run=0004"
    steps = "200"
    if missing == "digits":
        name = "model=vae_z=03_data=digits_run=0004"
        steps = "none"
    there = f"there is no checkpoints/{name}/model-00300.pt; checkpoints of this run: {steps}"
    assert str(caught.value) == f"{there}; to train one: python run_vae.py --z 3 --run 4"


RAW = Path("MNIST", "raw")
MNIST_NAMES = tuple(data.COURSE["mnist_sha256"])


def near(tmp_path, monkeypatch, there: list[str], data_dir: str = ".", model=run_vae):
    """A run in this folder, from which these files cannot be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "fetch", lambda run: "no route to host")
    for name in there:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"the user's own")
    run = model.parse([])
    return run.changed(data=run.real_data, data_dir=data_dir, device="cpu")


def banner(run, capsys) -> str:
    """What is said where the digits take the place of the real data; the error line says it too."""
    assert download.choose_data(run.changed(data="auto")) == "digits"
    printed = capsys.readouterr().out
    with pytest.raises(UsageError) as caught:
        download.choose_data(run)
    for line in printed.splitlines():
        if line.startswith("But "):
            assert line.removeprefix("But ").removesuffix(".") in str(caught.value)
    return printed


def test_the_banner_names_where_it_looked(tmp_path, monkeypatch, capsys):
    said = banner(near(tmp_path, monkeypatch, [], "data"), capsys)
    assert f"Looked in {tmp_path / 'data' / RAW} for {', '.join(MNIST_NAMES)}." in said
    assert "But" not in said


DOTTED = [name.replace("-idx", ".idx") for name in MNIST_NAMES]
NEAR = {  # the files that are there, --data_dir, what the banner says of them after "there is "
    "the folder MNIST": (
        [f"d/MNIST/raw/{name}" for name in MNIST_NAMES],
        "d/MNIST",
        "d/MNIST/raw/{0} (and 3 more): give --data_dir {tmp_path}/d",
    ),
    "the folder raw": (
        [f"d/MNIST/raw/{name}" for name in MNIST_NAMES],
        "d/MNIST/raw",
        "d/MNIST/raw/{0} (and 3 more): give --data_dir {tmp_path}/d",
    ),
    "flat in the folder": (
        [f"d/{name}" for name in MNIST_NAMES],
        "d",
        "d/{0} (and 3 more): move it to d/MNIST/raw/{0}, and the others likewise",
    ),
    "names with a dot": (
        [f"d/MNIST/raw/{name}" for name in DOTTED],
        "d",
        "d/MNIST/raw/{1} (and 3 more): move it to d/MNIST/raw/{0}, and the others likewise",
    ),
    "packed": (
        [f"d/MNIST/raw/{name}.gz" for name in MNIST_NAMES],
        "d",
        "d/MNIST/raw/{0}.gz (and 3 more): unpack it to d/MNIST/raw/{0}, and the others likewise",
    ),
    "one that is packed, with a dot, flat": (
        [*(f"d/MNIST/raw/{name}" for name in MNIST_NAMES[1:]), f"d/{DOTTED[0]}.gz"],
        "d",
        "d/{1}.gz: unpack it to d/MNIST/raw/{0}",
    ),
}


@pytest.mark.parametrize("case", NEAR)
def test_files_nearly_there_are_named_with_cure(case, tmp_path, monkeypatch, capsys):
    there, data_dir, words = NEAR[case]
    run = near(tmp_path, monkeypatch, there, data_dir)
    before = tree(tmp_path)
    said = banner(run, capsys)
    assert f"But there is {words.format(MNIST_NAMES[0], DOTTED[0], tmp_path=tmp_path)}.\n" in said
    assert "DRAWN DIGITS" in said and tree(tmp_path) == before


def test_the_named_data_dir_works_as_printed(tmp_path, monkeypatch):
    there = [f"my data/MNIST/raw/{name}" for name in MNIST_NAMES]
    run = near(tmp_path, monkeypatch, there, "my data/MNIST")
    given = shlex.split(download.near_miss(run).split(": give ")[1])
    assert given[0] == "--data_dir"
    assert download.is_usable(run.changed(data_dir=given[1]))


def test_another_svhn_split_that_is_there_is_named(tmp_path, monkeypatch, capsys):
    run = near(tmp_path, monkeypatch, ["d/train_32x32.mat", "d/test_32x32.mat"], "d", run_fsvae)
    said = banner(run, capsys)
    assert "But there is d/train_32x32.mat: give --split train to train on it.\n" in said


def test_svhn_in_a_folder_below_is_named(tmp_path, monkeypatch, capsys):
    run = near(tmp_path, monkeypatch, ["d/SVHN/extra_32x32.mat"], "d", run_fsvae)
    said = banner(run, capsys)
    assert "But there is d/SVHN/extra_32x32.mat: move it to d/extra_32x32.mat.\n" in said


@pytest.mark.parametrize(
    "asked, train, stored", [("mnist", 1, []), ("mnist", 0, ["mnist"]), ("auto", 0, ["mnist"])]
)
def test_files_that_cannot_be_had_are_listed(choose, tmp_path, asked, train, stored):
    with pytest.raises(UsageError) as caught:
        choose(asked, train, stored)
    message = str(caught.value)
    reason = "MNIST cannot be downloaded (no route to host)"
    assert message.startswith(f"{reason}; put these files in place by hand: ")
    # --train 0 has no checkpoint of the digits, and needs no training image.
    assert message.endswith("; or use --data digits") == bool(train)
    for name in MNIST_NAMES:
        is_listed = str(tmp_path / "data" / RAW / name) in message
        assert is_listed == (train or name.startswith("t10k"))


def test_a_checkpoint_without_state_is_not_called_trainable(choose):
    model_path("model=vae_z=03_run=0004", 200).parent.mkdir(parents=True)
    model_path("model=vae_z=03_run=0004", 200).touch()
    with pytest.raises(Missing) as caught:
        choose("mnist", 0)
    advice = "it has no state to resume from: give one of these, or train another --run"
    assert str(caught.value).endswith(f"run: 200; {advice}")


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_download_leaves_folders_as_they_were(there, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", fails)
    if there:
        (tmp_path / "data").mkdir()
    assert download.fetch(mnist_run(tmp_path / "data")) == "no route to host"
    assert (tmp_path / "data").exists() == there


def whole(content: bytes, over: threading.Event) -> Iterator[bytes]:
    yield content


def slowly(content: bytes, over: threading.Event) -> Iterator[bytes]:
    size = len(content) // 12
    for start in range(0, len(content), size):
        yield content[start : start + size]
        over.wait(0.25)


def half_then_silence(content: bytes, over: threading.Event) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    over.wait(60)


def half_then_nothing(content: bytes, over: threading.Event) -> Iterator[bytes]:
    yield content[: len(content) // 2]


class Server(ThreadingHTTPServer):
    """A server on this machine: how(content, over) sends files[name], None sends nothing at all."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.how: Callable[..., Iterator[bytes]] | None = whole
        self.asked: list[str] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked.append(name)
        if self.server.how is None:
            return self.server.over.wait(60)
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for piece in self.server.how(content, self.server.over):
                self.wfile.write(piece)
        except OSError:  # whoever asked has gone
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def svhn_server(server, monkeypatch):
    """SVHN's three splits on a server of this machine: 12, 5 and 7 images, and 500 kB more each."""
    from torchvision.datasets import SVHN

    for split, count in (("train", 12), ("test", 5), ("extra", 7)):
        name = f"{split}_32x32.mat"
        content = mat(count, rest=np.zeros(500_000, np.uint8))
        server.files[name] = content
        published = [server.url + name, name, hashlib.md5(content).hexdigest()]
        monkeypatch.setitem(SVHN.split_list, split, published)
    return server


@pytest.fixture
def mnist_server(server, monkeypatch):
    """MNIST's four files, of five images, on a server of this machine; server.raw: unpacked."""
    from torchvision.datasets import MNIST

    pixels = np.random.RandomState(0).randint(0, 256, 5 * 784).astype(np.uint8)
    images = idx_file([2051, 5, 28, 28], pixels)
    labels = idx_file([2049, 5], np.arange(5, dtype=np.uint8))
    server.raw = {name: images if "images" in name else labels for name in MNIST_NAMES}
    server.files = {f"{name}.gz": gzip.compress(content) for name, content in server.raw.items()}
    digests = [(name, hashlib.md5(content).hexdigest()) for name, content in server.files.items()]
    monkeypatch.setattr(MNIST, "resources", digests)
    monkeypatch.setattr(MNIST, "mirrors", [server.url])
    return server


@pytest.mark.parametrize(
    "split, train, present, wanted",
    [
        ("extra", 1, [], ["extra", "test"]),
        ("train", 1, [], ["train", "test"]),
        ("test", 1, [], ["test"]),
        ("extra", 0, [], ["test"]),
        ("train", 1, ["train"], ["test"]),
        ("train", 1, ["train", "test"], []),
        ("train", 0, ["test"], []),
    ],
)
def test_an_fsvae_fetches_its_two_splits(split, train, present, wanted, tmp_path, svhn_server):
    run = svhn_run(tmp_path, split=split, train=train)
    for name in present:
        (tmp_path / f"{name}_32x32.mat").write_bytes(b"the user's own")
    assert download.fetch(run) is None
    assert set(svhn_server.asked) == {f"{name}_32x32.mat" for name in wanted}
    files = {f"{name}_32x32.mat": b"the user's own" for name in present}
    for name in svhn_server.asked:
        files[name] = svhn_server.files[name]
    assert tree(tmp_path) == files


def test_an_fsvae_does_without_a_test_split(tmp_path, svhn_server):
    run = svhn_run(tmp_path)
    del svhn_server.files["test_32x32.mat"]
    assert "404" in download.fetch(run)
    assert list(tree(tmp_path)) == ["train_32x32.mat"]
    assert download.choose_data(run.changed(data="auto")) == "svhn"


@pytest.mark.parametrize(
    "split, served, remark",
    [
        ("train", ["train", "test"], False),
        ("train", ["train"], True),
        ("test", ["test"], True),
    ],
)
def test_an_fsvae_says_where_training_images_were_evaluated(
    split, served, remark, svhn_server, script, tmp_path
):
    for name in ["train", "test", "extra"]:
        if name not in served:
            del svhn_server.files[f"{name}_32x32.mat"]
    place = tmp_path / "data"
    folder = tmp_path / "run"
    place.mkdir()
    folder.mkdir()
    flags = ["--data", "svhn", "--split", split, "--data_dir", place, "--iter_max", 1]
    for training in (1, 0):
        result = script("fsvae", *flags, "--train", training, cwd=folder)
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("NELBO: ")]
        assert ("training images" in line) == remark


def assert_is_mnist(folder: Path, server: Server) -> None:
    """In this folder are the server's four files, and nothing else."""
    assert tree(folder) == {f"MNIST/raw/{name}": server.raw[name] for name in MNIST_NAMES}
    assert {path.name for path in folder.iterdir()} == {"MNIST"}


def test_mnist_arrives_whole(mnist_server, tmp_path, capsys):
    run = mnist_run(tmp_path / "data")  # which is made
    assert download.choose_data(run.changed(data="auto")) == "mnist"
    assert_is_mnist(tmp_path / "data", mnist_server)
    assert "NO MNIST" not in capsys.readouterr().out
    asked = len(mnist_server.asked)
    assert download.fetch(run) is None
    assert len(mnist_server.asked) == asked  # what is there is not fetched again


def test_to_evaluate_fetches_no_file_twice(mnist_server, tmp_path):
    run = mnist_run(tmp_path, train=0, test="all")
    assert len(download.files(run)) == 2
    assert download.fetch(run) is None
    asked = len(mnist_server.asked)
    assert len(tree(tmp_path)) == 4
    assert download.fetch(mnist_run(tmp_path)) is None
    assert len(mnist_server.asked) == asked


def test_a_download_leaves_present_files_alone(mnist_server, tmp_path):
    run = mnist_run(tmp_path)
    there, *missing = download.files(run)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"the user's own")
    assert download.fetch(run) is None
    assert there.read_bytes() == b"the user's own"
    assert all(path.read_bytes() == mnist_server.raw[path.name] for path in missing)


def test_a_silent_mirror_is_passed_over(mnist_server, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    monkeypatch.setattr(MNIST, "mirrors", [nobody, mnist_server.url])
    assert download.fetch(mnist_run(tmp_path)) is None
    assert len(tree(tmp_path)) == 4


def test_svhn_arrives_whole_and_is_read(svhn_server, tmp_path):
    run = svhn_run(tmp_path)
    assert download.choose_data(run) == "svhn"
    assert len(data.load(run, "train")) == 12  # with its checksum
    assert len(data.load(run, "test")) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"train_32x32.mat", "test_32x32.mat"}


def test_a_slow_download_continues_and_shows_progress(svhn_server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(download, "SILENCE", 2)
    svhn_server.how = slowly
    del svhn_server.files["test_32x32.mat"]
    run = svhn_run(tmp_path)
    began = time.monotonic()
    download.fetch(run)
    # Patience for the whole would not do.
    assert time.monotonic() - began > download.SILENCE
    assert download.files(run)[0].read_bytes() == svhn_server.files["train_32x32.mat"]
    shown = capfd.readouterr().err
    assert "100%" in shown and "B/s]" in shown
    assert shown.count("\r") > 4  # it moves


@pytest.mark.parametrize("how", [None, half_then_silence])
@pytest.mark.parametrize("which", ["mnist", "svhn"])
def test_a_dead_download_is_given_up_without_trace(which, how, request, tmp_path, monkeypatch):
    server = request.getfixturevalue(f"{which}_server")
    monkeypatch.setattr(download, "SILENCE", 1)
    server.how = how  # it hangs up after 60 seconds, which would be another reason
    run = mnist_run(tmp_path) if which == "mnist" else svhn_run(tmp_path)
    assert download.fetch(run) == "no answer for 1 seconds"
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_patience_with_a_silent_server_is_seconds():
    assert 5 <= download.SILENCE <= 20


@pytest.mark.parametrize("which", ["mnist", "svhn"])
@pytest.mark.parametrize("harm", ["another file", "cut off", "not there", "nobody listens"])
def test_a_failed_download_leaves_nothing_but_digits(which, harm, request, tmp_path, capsys):
    server = request.getfixturevalue(f"{which}_server")
    if harm == "another file":
        server.files = {name: content[:-1] + b"x" for name, content in server.files.items()}
    elif harm == "cut off":
        server.how = half_then_nothing
    elif harm == "not there":
        server.files = {}
    else:
        server.shutdown()
        server.socket.close()
    run = mnist_run(tmp_path) if which == "mnist" else svhn_run(tmp_path)
    reason = download.fetch(run)
    words = {"not there": "404", "nobody listens": "refused"}.get(harm, "corrupted")
    assert words in reason and "\n" not in reason
    assert list(tmp_path.iterdir()) == []
    assert download.choose_data(run.changed(data="auto")) == "digits"
    assert f"NO {which.upper()} ({reason})" in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"{which.upper()} cannot be downloaded"):
        download.choose_data(run)


def test_a_signal_ends_a_download_without_trace(svhn_server, script, tmp_path):
    # A second one, by the other request, would find nobody who catches it.
    once = iter([signal.SIGTERM])

    def interrupting(content, over):
        half = len(content) // 2
        yield content[:half]
        if len(svhn_server.asked) == 2:  # torchvision asks for redirections first
            # Its progress bar is at work before the half has arrived, and holds a lock for moments.
            while sum(path.stat().st_size for path in place.rglob("*.mat")) < half - 2**15:
                over.wait(0.01)
            over.wait(0.05)
            for number in once:
                os.kill(os.getpid(), number)
        over.wait(60)

    svhn_server.how = interrupting
    place = tmp_path / "data"
    folder = tmp_path / "run"
    place.mkdir()
    folder.mkdir()
    result = script("fsvae", "--data", "svhn", "--split", "train", "--data_dir", place, cwd=folder)
    assert result.returncode == 143 and svhn_server.asked == ["train_32x32.mat"] * 2
    assert list(place.iterdir()) == []


def test_left_over_downloads_are_removed_a_day_later(svhn_server, tmp_path):
    for name, age in ((".download-old", 100_000), (".download-new", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_32x32.mat").write_bytes(b"half")
        os.utime(tmp_path / name, 2 * (time.time() - age,))
    assert download.fetch(svhn_run(tmp_path)) is None
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [".download-new", "test_32x32.mat", "train_32x32.mat"]


def test_simultaneous_downloads_do_not_disturb_each_other(mnist_server, tmp_path):
    run = mnist_run(tmp_path / "data")
    answers = []

    def fetch():
        answers.append(download.fetch(run))

    starts = [threading.Thread(target=fetch) for _ in range(4)]
    try:
        for start in starts:
            start.start()
        for start in starts:
            start.join()
    finally:
        socket.setdefaulttimeout(None)  # which processes, unlike threads, do not share
    assert answers == [None] * 4
    assert_is_mnist(tmp_path / "data", mnist_server)


@pytest.fixture(params=["by the system", "by its rights"])
def unwritable(request, tmp_path, monkeypatch) -> Path:
    """A folder in which nothing can be made."""
    if request.param == "by the system":
        if not Path("/proc/self").is_dir():
            pytest.skip("no such folder on this system")
        return Path("/proc/self")
    folder = tmp_path / "unwritable"
    folder.mkdir()
    (folder / "notes").write_text("the user's own")
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # rights do not bind the superuser

        def refuse(path, *_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(os, "mkdir", refuse)
        monkeypatch.setattr(data, "write", refuse)
    return folder


def test_an_unwritable_folder_gives_the_drawn_digits(mnist_server, unwritable, capsys, digits_dir):
    run = mnist_run(unwritable)
    assert download.choose_data(run.changed(data="auto")) == "digits"
    assert "DRAWN DIGITS instead" in capsys.readouterr().out
    images = data.load(run.changed(data="digits"), "test")
    stored = data.drawn_digits(str(digits_dir), "test", colour=False)
    assert torch.equal(images.pixels, stored.pixels)
    with pytest.raises(UsageError, match=r"MNIST cannot be downloaded.*by hand"):
        download.choose_data(run)


def test_a_folder_that_cannot_be_made_is_named(mnist_server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"argument --data_dir: .*file/data cannot be made"):
        download.fetch(mnist_run(tmp_path / "file" / "data"))


def test_drawn_digits_have_mnists_own_numbers_per_class(digits_dir):
    for split in ("train", "test"):
        images = data.drawn_digits(str(digits_dir), split, colour=False)
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]
        assert images.pixels.dtype == torch.uint8 and images.pixels.shape[1] == 784
        assert images.labels[:100].unique().numel() == 10  # shuffled


@pytest.mark.parametrize("in_colour", [False, True])
def test_drawn_digits_are_the_same_each_time(in_colour):
    counts = [110] * 10
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first = digits.draw(counts, 5, in_colour)
    assert torch.equal(torch.rand(3), wanted)  # with a stream of their own
    try:
        torch.set_num_threads(1)
        again = digits.draw(counts, 5, in_colour)
    finally:
        torch.set_num_threads(threads)
    other = digits.draw(counts, 6, in_colour)
    for part in [0, 1]:  # images, labels
        assert np.array_equal(first[part], again[part])
        assert not np.array_equal(first[part], other[part])
    assert first[0].shape == (1100, 3072 if in_colour else 784)
    assert first[0].dtype == np.uint8


def test_drawn_digits_differ_and_are_mostly_black(digits_dir):
    images = data.drawn_digits(str(digits_dir), "test", colour=False)
    assert len(images.pixels.unique(dim=0)) == len(images)
    assert 0.10 < images.pixels.float().mean() / 255 < 0.17  # MNIST: 0.13
    border = images.pixels.reshape(-1, 28, 28).clone()
    border[:, 2:-2, 2:-2] = 0
    assert (border > 0).float().mean() < 0.02


def test_splits_of_drawn_digits_share_no_image(digits_dir):
    train_split = data.drawn_digits(str(digits_dir), "train", colour=False)
    test_split = data.drawn_digits(str(digits_dir), "test", colour=False)
    trained_on = {row.tobytes() for row in train_split.pixels.numpy()}
    assert trained_on.isdisjoint(row.tobytes() for row in test_split.pixels.numpy())


def test_drawn_digits_can_be_told_apart(digits_dir):
    train_split = data.drawn_digits(str(digits_dir), "train", colour=False)
    test_split = data.drawn_digits(str(digits_dir), "test", colour=False)
    means = []
    for digit in range(10):
        means.append(train_split.pixels[train_split.labels == digit].float().mean(0))
    nearest = torch.cdist(test_split.pixels.float(), torch.stack(means)).argmin(1)
    assert (nearest == test_split.labels).float().mean() > 0.5


def test_damaged_stored_digits_are_drawn_again(tmp_path, digits_dir):
    wanted = data.drawn_digits(str(digits_dir), "test", colour=False)
    name = f"drawn-grey-test-v{digits.VERSION}.npz"
    (tmp_path / name).write_bytes((digits_dir / name).read_bytes()[:1000])
    (tmp_path / f".{name}.123.tmp").write_bytes(b"left by a process that was killed")
    images = data.drawn_digits(str(tmp_path), "test", colour=False)
    assert torch.equal(images.pixels, wanted.pixels) and torch.equal(images.labels, wanted.labels)
    assert tree(tmp_path) == {name: (digits_dir / name).read_bytes()}


def test_stored_digits_are_not_drawn_again(digits_dir, monkeypatch):
    monkeypatch.setattr(digits, "draw", lambda *_: pytest.fail("drawn again"))
    assert len(data.drawn_digits(str(digits_dir), "test", colour=False)) == 10_000

"""The data: the course's subset, MNIST, SVHN, downloads, drawn digits, a user's own images."""

import errno
import gzip
import hashlib
import io
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import (
    MNIST,
    NAMES,
    idx_file,
    lines,
    needs_mnist,
    only_error,
    raising,
    results,
    same,
    table,
    tree,
    weights,
)
from loopback import Server, half_then_silence, slowly, whole

import run_fsvae
import run_vae
from codebase import data, digits, evaluate, train
from codebase.models.vae import VAE
from codebase.runtime import download, options
from codebase.runtime.files import UsageError, model_path

TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_NAMES = tuple(data.COURSE["mnist_sha256"])


def mnist_run(data_dir, **changes) -> options.Run:
    run = run_vae.parse([]).changed(data="mnist", data_dir=str(data_dir), device="cpu")
    return run.changed(**changes)


def svhn_run(data_dir, **changes) -> options.Run:
    run = run_fsvae.parse(["--split", "train", "--device", "cpu"])
    return run.changed(data="svhn", data_dir=str(data_dir), **changes)


# ---------------------------------------------------------------------------------------------
# Images and batches


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().astype(np.uint8).tobytes()).hexdigest()


TEN_OF_EACH = np.arange(10).repeat(10).tolist()  # labels, class after class


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
        assert images.labels.tolist() == TEN_OF_EACH


@needs_mnist
def test_the_subset_of_mnist_is_the_courses():
    """MNIST is read whole, with its published classes, and has the packaged images."""
    for split, count in [("train", 60_000), ("test", 10_000)]:
        images = data.load(mnist_run(MNIST), split)
        assert images.pixels.shape == (count, 784) and images.pixels.dtype == torch.uint8
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]
        positions = images.positions(split)
        assert torch.equal(images.pixels[positions], data.course(split).pixels)
        assert torch.equal(images.labels[positions], data.course(split).labels)
    assert digest(data.test_subset(images)) == data.COURSE["test_binarized"]["sha256_uint8"]


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


@pytest.mark.parametrize("each", [5, 300])
def test_labels_begin_with_the_courses(each, digits_dir):
    """They are balanced and fixed, and none is there twice but the course's own."""
    images = data.drawn_digits(str(digits_dir), "train", colour=False)
    positions = images.positions("train", each)
    labelled = data.labelled_set(images, 10 * each)
    assert torch.equal(labelled.pixels, images.pixels[positions])
    assert torch.equal(labelled.labels, images.labels[positions])
    assert labelled.labels.tolist() == np.arange(10).repeat(each).tolist()
    course = images.positions("train").reshape(10, 10)
    by_digit = positions.reshape(10, each)
    assert torch.equal(by_digit[:, :10], course[:, :each])
    new = by_digit[:, 10:].flatten()
    assert len(new.unique()) == len(new) and not torch.isin(new, course).any()


def test_images_without_a_label_are_not_the_courses_zeros(digits_dir):
    """Labels of -1: the subset is then the first hundred images."""
    images = data.drawn_digits(str(digits_dir), "test", colour=False)
    unlabelled = data.Images(images.pixels, images.labels - (images.labels == 0).long())
    assert unlabelled.labels.min() == -1
    wanted = data.binarize_once(images.pixels[:100])
    assert torch.equal(data.test_subset(unlabelled), wanted)


def test_grey_levels_are_probabilities_of_one():
    torch.manual_seed(0)
    grey = torch.arange(256, dtype=torch.uint8).repeat(40_000, 1)
    drawn = data.binarize(grey)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share = drawn.mean(0)
    p = torch.arange(256) / 255
    deviations = (share - p)[1:-1] / (p * (1 - p) / 40_000).sqrt()[1:-1]
    assert deviations.abs().max() < 4.5 and abs(deviations.mean()) < 0.3


def test_a_batch_holds_what_is_at_its_positions():
    pixels = torch.tensor([[0, 255], [255, 0], [51, 51]], dtype=torch.uint8)
    images = data.Images(pixels, torch.tensor([7, 0, 3]))
    index = torch.tensor([2, 0, 0])
    scaled = torch.tensor([[0.2, 0.2], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(images.scaled(index), scaled)
    assert images.binary(index)[1:].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(images.one_hot(index), torch.eye(10)[[3, 7, 7]])


def test_every_epoch_is_a_shuffled_pass():
    """And the order can be entered at any step."""
    batches = train.order(103, 10, seed=1, start=0, device="cpu")
    steps = [next(batches) for _ in range(103)]
    epochs = torch.cat(steps).reshape(10, 103)
    assert all(sorted(epoch.tolist()) == list(range(103)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for start in [3, 51]:
        entered = train.order(103, 10, seed=1, start=start, device="cpu")
        assert torch.equal(next(entered), steps[start])


# ---------------------------------------------------------------------------------------------
# Files of MNIST and SVHN


@pytest.fixture
def published(digits_dir, tmp_path, monkeypatch) -> Path:
    """A folder MNIST/raw with the test split's files, of drawn digits, as if published."""
    images = data.drawn_digits(str(digits_dir), "test", colour=False)
    labels = images.labels.numpy().astype(np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / TEST_FILES[0]).write_bytes(idx_file([2051, 10_000, 28, 28], images.pixels.numpy()))
    (folder / TEST_FILES[1]).write_bytes(idx_file([2049, 10_000], labels))
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }
    monkeypatch.setitem(data.COURSE, "mnist_sha256", digests)
    return folder


@pytest.mark.parametrize("name, at", [(TEST_FILES[0], 3_920_316), (TEST_FILES[1], -1)])
def test_one_changed_byte_is_found_by_checksum_alone(published, tmp_path, name, at):
    path = published / name
    before = data.load(mnist_run(tmp_path, train=0), "test")
    content = bytearray(path.read_bytes())
    content[at] ^= 1  # a digit stays a digit
    path.write_bytes(content)
    words = rf"{name} is not the published file .*SHA-256.*--check_data 0"
    with pytest.raises(UsageError, match=words):
        data.load(mnist_run(tmp_path, train=0), "test")
    after = data.load(mnist_run(tmp_path, check_data=0), "test")
    assert (before.pixels != after.pixels).sum() == ("images" in name)
    assert (before.labels != after.labels).sum() == ("labels" in name)


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


def test_svhn_is_read_with_ten_as_zero(tmp_path):
    count = 20_001  # read in two blocks
    (tmp_path / "train_32x32.mat").write_bytes(mat(count))
    (tmp_path / "test_32x32.mat").write_bytes(mat(5))
    with pytest.raises(UsageError, match=r"is not the published file .*MD5.*--check_data 0"):
        data.load(svhn_run(tmp_path), "train")
    run = svhn_run(tmp_path, check_data=0)
    images = data.load(run, "train")
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (count, 3072)
    counted = torch.arange(count) % 251
    assert torch.equal(images.pixels[:, 1 * 1024 + 5 * 32 + 7].long(), counted)
    assert images.pixels.count_nonzero() == counted.count_nonzero()
    assert images.labels.tolist()[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert images.labels.dtype == torch.int64
    assert len(data.load(run, "test")) == 5


HARMS = [  # what becomes of a file's content, and what is said of it
    ("pixels", lambda content: content[:-1], r"is truncated or too long \([\d,]+ bytes\)"),
    ("labels", lambda content: content[:-1] + b"\x0b", "has labels outside 0 to 9"),
    ("svhn", lambda content: content[:20_000], r"(is truncated or damaged|cannot be read) \(.*\)"),
    ("svhn", None, r"cannot be read \(No such file or directory\)"),
]


@pytest.mark.parametrize("kind, harm, words", HARMS)
def test_a_damaged_file_is_named_with_cure(kind, harm, words, published, tmp_path):
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(mat(12))
    run = svhn_run(tmp_path, check_data=0)
    if kind != "svhn":
        path = published / TEST_FILES[kind == "labels"]
        run = mnist_run(tmp_path, check_data=0)
    content = path.read_bytes()
    path.unlink()
    if harm:
        path.write_bytes(harm(content))
    before = tree(tmp_path)
    words = rf"{path.name} {words}.*: .*put an intact copy in its place$"
    with pytest.raises(UsageError, match=words):
        data.load(run, "train" if kind == "svhn" else "test")
    assert tree(tmp_path) == before


def store(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


CHOICES = [  # --train, checkpoints, files there, do they arrive; data set, is a download tried
    (1, [], True, False, ("mnist", False)),
    (1, [], False, True, ("mnist", True)),
    (1, [], False, False, ("digits", True)),
    (0, ["mnist", "digits"], True, False, ("mnist", False)),
    (0, ["digits"], False, True, ("digits", False)),
]


@pytest.mark.parametrize("train, stored, present, arrive, wanted", CHOICES)
def test_the_banner_names_where_it_looked(
    train, stored, present, arrive, wanted, tmp_path, monkeypatch, capsys
):
    """Where a run has drawn digits in the place of its data set."""
    monkeypatch.chdir(tmp_path)
    run = run_vae.parse(["--iter_max", "300"]).changed(train=train, test="all", data="auto")
    files = download.files(run)
    for name in stored:
        store(model_path(run.changed(data=name).name, 300))
    tried = []

    def fetch(run) -> str | None:
        tried.append(not files[0].exists())
        for path in files:
            if arrive:
                store(path)
        return None if files[0].exists() else "no route to host"

    monkeypatch.setattr(download, "fetch", fetch)
    for path in files:
        if present:
            store(path)
    assert (download.choose_data(run), any(tried)) == wanted
    banner = capsys.readouterr().out
    if wanted[0] == "mnist":
        assert banner == ""
    else:
        assert "DRAWN DIGITS instead.\nMetrics are not MNIST's." in banner
        assert ("NO MNIST (no route to host)" in banner) == wanted[1]
        names = ", ".join(path.name for path in files)
        assert f"Looked in {tmp_path / 'data' / 'MNIST' / 'raw'} for {names}." in banner


RAW = [f"d/MNIST/raw/{name}" for name in MNIST_NAMES]
TRAIN = "d/train_32x32.mat"
NEAR = [  # script, files that are there, --data_dir, what is said of them after "there is "
    (run_vae, RAW, "d/MNIST/raw", f"{RAW[0]} (and 3 more): give --data_dir "),
    (run_vae, [f"{RAW[0]}.gz", *RAW[1:]], "d", f"{RAW[0]}.gz: unpack it to {RAW[0]}"),
    (run_fsvae, [TRAIN, "d/test_32x32.mat"], "d", f"{TRAIN}: give --split train to train on it"),
]


@pytest.mark.parametrize("script, there, data_dir, words", NEAR, ids=range(3))
def test_files_nearly_there_are_named_with_cure(
    script, there, data_dir, words, tmp_path, monkeypatch, capsys
):
    """In the banner of the drawn digits, and in the error line where the real data is a must."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "fetch", lambda run: "no route to host")
    for name in there:
        store(Path(name))
    before = tree(tmp_path)
    run = script.parse(["--data_dir", data_dir, "--device", "cpu"])
    assert download.choose_data(run) == "digits"
    said = capsys.readouterr().out
    assert f"But there is {words}" in said and "DRAWN DIGITS" in said
    with pytest.raises(UsageError) as caught:
        download.choose_data(run.changed(data=run.real_data))
    assert f"there is {words}" in str(caught.value) and tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


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
    """SVHN's three splits: 12, 5 and 7 images, and 500 kB more each."""
    published = {}
    for split, count in (("train", 12), ("test", 5), ("extra", 7)):
        name = f"{split}_32x32.mat"
        content = mat(count, rest=np.zeros(500_000, np.uint8))
        server.files[name] = content
        published[split] = [server.url + name, name, hashlib.md5(content).hexdigest()]
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", published)
    return server


@pytest.fixture
def mnist_server(server, monkeypatch):
    """MNIST's four files, of five images; server.raw has them unpacked."""
    images = idx_file([2051, 5, 28, 28], grey(5))
    labels = idx_file([2049, 5], np.arange(5, dtype=np.uint8))
    server.raw = {name: images if "images" in name else labels for name in MNIST_NAMES}
    server.files = {f"{name}.gz": gzip.compress(content) for name, content in server.raw.items()}
    digests = [(name, hashlib.md5(content).hexdigest()) for name, content in server.files.items()]
    monkeypatch.setattr("torchvision.datasets.MNIST.resources", digests)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [server.url])
    return server


def test_mnist_arrives_whole_and_once(mnist_server, tmp_path, capsys):
    """What a download left that was killed long ago is removed."""
    (tmp_path / "data" / ".download-old").mkdir(parents=True)
    os.utime(tmp_path / "data" / ".download-old", (0, 0))
    to_evaluate = mnist_run(tmp_path / "data", train=0, test="all")
    assert len(download.files(to_evaluate)) == 2
    assert download.fetch(to_evaluate) is None
    wanted = {f"MNIST/raw/{name}": mnist_server.raw[name] for name in MNIST_NAMES}
    assert tree(tmp_path / "data") == wanted
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    asked = len(mnist_server.asked)
    run = mnist_run(tmp_path / "data")
    assert download.choose_data(run.changed(data="auto")) == "mnist"
    assert len(mnist_server.asked) == asked
    assert "NO MNIST" not in capsys.readouterr().out


@pytest.mark.parametrize("split, wanted", [("extra", ["extra", "test"]), ("train", ["test"])])
def test_an_fsvae_fetches_what_is_missing_of_two_splits(split, wanted, tmp_path, svhn_server):
    """And replaces no file that is there."""
    store(tmp_path / "train_32x32.mat")
    assert download.fetch(svhn_run(tmp_path, split=split)) is None
    files = {"train_32x32.mat": b""}
    for name in wanted:
        files[f"{name}_32x32.mat"] = svhn_server.files[f"{name}_32x32.mat"]
    assert tree(tmp_path) == files
    assert {f"{name}_32x32.mat" for name in wanted} == set(svhn_server.asked)


def test_a_slow_download_continues_and_shows_progress(svhn_server, tmp_path, monkeypatch, capfd):
    assert 5 <= download.SILENCE <= 20
    monkeypatch.setattr(download, "SILENCE", 3)  # the whole takes longer
    svhn_server.how = slowly
    del svhn_server.files["test_32x32.mat"]
    run = svhn_run(tmp_path)
    assert "404" in download.fetch(run)  # of the test split, which is done without
    assert tree(tmp_path) == {"train_32x32.mat": svhn_server.files["train_32x32.mat"]}
    assert "100%" in capfd.readouterr().err
    svhn_server.how = whole
    assert download.choose_data(run.changed(data="auto")) == "svhn"
    assert len(data.load(run, "train")) == 12  # with its checksum


def test_a_dead_download_is_given_up(svhn_server, tmp_path, monkeypatch):
    """Without a trace, when no byte has arrived for a while."""
    monkeypatch.setattr(download, "SILENCE", 1)
    svhn_server.how = half_then_silence  # for 60 seconds; then another reason would be given
    assert download.fetch(svhn_run(tmp_path / "data")) == "no answer for 1 seconds"
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_download_reaches_another_disk(mnist_server, tmp_path, monkeypatch):
    """To which data/MNIST may be a link."""
    replace = os.replace

    def to_the_same_disk(source, goal):
        disks = [tmp_path / "MNIST" in Path(path).parents for path in (source, goal)]
        if disks[0] != disks[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, goal)

    monkeypatch.setattr(os, "replace", to_the_same_disk)
    monkeypatch.setattr(os, "rename", to_the_same_disk)
    assert download.fetch(mnist_run(tmp_path)) is None
    assert tree(tmp_path) == {f"MNIST/raw/{name}": mnist_server.raw[name] for name in MNIST_NAMES}


def test_a_failed_download_leaves_nothing(mnist_server, tmp_path, capsys):
    run = mnist_run(tmp_path / "data")
    for name, content in mnist_server.files.items():
        mnist_server.files[name] = content[:-1] + b"x"
    reason = download.fetch(run)
    assert "corrupted" in reason and "\n" not in reason
    assert list(tmp_path.iterdir()) == []
    assert download.choose_data(run.changed(data="auto")) == "digits"
    assert f"NO MNIST ({reason})" in capsys.readouterr().out
    with pytest.raises(
        UsageError, match=r"MNIST cannot be downloaded .* by hand: .*/train-images-"
    ):
        download.choose_data(run)


def test_a_signal_ends_a_download_without_trace(tmp_path, monkeypatch):
    def interrupted(url, place, name, md5):
        Path(place, name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_url", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(svhn_run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_drawn_digits_resemble_mnist(digits_dir):
    """In numbers and blackness; they differ, can be told apart, and no split has another's."""
    train_split = data.drawn_digits(str(digits_dir), "train", colour=False)
    test_split = data.drawn_digits(str(digits_dir), "test", colour=False)
    for split, images in [("train", train_split), ("test", test_split)]:
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]
        assert images.pixels.dtype == torch.uint8 and images.pixels.shape[1] == 784
    tested = {row.tobytes() for row in test_split.pixels.numpy()}
    assert len(tested) == len(test_split)
    assert tested.isdisjoint(row.tobytes() for row in train_split.pixels.numpy())
    assert 0.10 < test_split.pixels.float().mean() / 255 < 0.17  # MNIST: 0.13
    means = []
    for digit in range(10):
        means.append(train_split.pixels[train_split.labels == digit].float().mean(0))
    nearest = torch.cdist(test_split.pixels.float(), torch.stack(means)).argmin(1)
    assert (nearest == test_split.labels).float().mean() > 0.5


def test_damaged_stored_digits_are_drawn_again(tmp_path, digits_dir, monkeypatch):
    """The same ones, and without the random numbers of others; whole ones are not."""
    before = torch.get_rng_state()
    name = f"drawn-grey-test-v{digits.VERSION}.npz"
    (tmp_path / name).write_bytes((digits_dir / name).read_bytes()[:1000])
    (tmp_path / f".{name}.123.tmp").write_bytes(b"left by a process that was killed")
    images = data.drawn_digits(str(tmp_path), "test", colour=False)
    assert tree(tmp_path) == {name: (digits_dir / name).read_bytes()}
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(digits, "draw", lambda *_: pytest.fail("drawn again"))
    stored = data.drawn_digits(str(digits_dir), "test", colour=False)
    assert torch.equal(images.pixels, stored.pixels) and torch.equal(images.labels, stored.labels)


# ---------------------------------------------------------------------------------------------
# A user's own images

OWN_NAMES = {model: name.replace("digits", "mine") for model, name in NAMES.items()}
OWN_NAMES["ssvae"] = OWN_NAMES["ssvae"].replace("_data", "_labels=50_data")


def grey(n: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, 28, 28)).astype(np.uint8)


def colour(n: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def packed(**arrays) -> bytes:
    """A .npz file of these arrays, without those that are None."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


X = grey(60)
Y = np.arange(60) % 10  # of the first 54, of which the last tenth is not, each digit has five


def right(model: str, **changes) -> bytes:
    """A file that is right for a model but for these arrays."""
    return packed(**{"x": colour(60) if model == "fsvae" else X, "y": Y, **changes})


@pytest.fixture
def own(main, tmp_path):
    """Run a script on mine.npz, of this content if given: own("vae", content=packed(x=x))."""

    def run(model: str, *flags, content: bytes | None = None, **kwargs):
        if content is not None:
            (tmp_path / "mine.npz").write_bytes(content)
        options.read_once.cache_clear()  # as in a process of its own
        if model == "ssvae":
            flags = ("--labels", 50, *flags)
        return main(model, "--data", tmp_path / "mine.npz", *flags, **kwargs)

    return run


@pytest.fixture
def read(tmp_path):
    """A split as a script reads it from a file of these arrays: read("train", x=x, y=y)."""

    def images(split: str, in_colour=False, labelled=False, **arrays) -> data.Images:
        (tmp_path / "mine.npz").write_bytes(packed(**arrays))
        options.read_once.cache_clear()
        return data.own(str(tmp_path / "mine.npz"), split, in_colour, labelled)

    return images


def test_a_file_that_fills_the_memory_is_not_called_damaged(own, monkeypatch):
    monkeypatch.setattr(data, "read_array", raising(MemoryError()))
    line = only_error(own("vae", "--iter_max", 1, content=right("vae")), 1)
    assert "out of memory" in line


def bounds_of(folder: Path, x: np.ndarray, ms: list[int]) -> dict[str, float]:
    """What an evaluation of the VAE's two steps should find on these images."""
    model = VAE()
    model.load_state_dict(weights(folder, OWN_NAMES["vae"], 2))
    return evaluate.bounds(model, data.binarize_once(torch.from_numpy(x).flatten(1)), ms)


@pytest.mark.parametrize("model", OWN_NAMES)
def test_own_images_train_and_resume(model, own, tmp_path):
    """Fifty-four of them, fewer than a batch; the last tenth is held out, and the line says so."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    name = OWN_NAMES[model]
    whole.mkdir()
    parts.mkdir()
    trained = lines(own(model, "--iter_max", 5, content=right(model), cwd=whole))
    assert sum("last tenth, 6 images, is held out" in line for line in trained) == 1
    assert [path.name for path in (whole / "checkpoints").iterdir()] == [name]
    for stop in [2, 5]:
        lines(own(model, "--iter_max", stop, cwd=parts))
    assert same(weights(whole, name, 5), weights(parts, name, 5))
    assert table(whole, name) == table(parts, name)
    evaluated = lines(own(model, "--iter_max", 5, "--train", 0, cwd=whole))
    assert trained[-1] in evaluated and "DRAWN" not in "".join(trained + evaluated)
    assert "test images: 6" in "\n".join(evaluated) and "course" not in "\n".join(evaluated)
    found = results(whole, name)
    digest = hashlib.sha256((tmp_path / "mine.npz").read_bytes()).hexdigest()
    assert found["data"] == f"mine.npz, a file of SHA-256 {digest}" and found["test_images"] == 6


def test_metrics_of_all_images_are_kept_apart(own, tmp_path):
    """The others are of the first hundred; each kind has a summary of its own."""
    x_test = grey(110, seed=1)
    flags = ["--iter_max", 2, "--runs", 2]
    lines(own("vae", *flags, content=packed(x=X, x_test=x_test)))
    lines(own("vae", *flags, "--train", 0, "--test", "all", "--iw", 5))
    found = results(tmp_path, OWN_NAMES["vae"])
    assert found["figures_all"].items() >= bounds_of(tmp_path, x_test, [5]).items()
    of_hundred = bounds_of(tmp_path, x_test[:100], [])
    assert found["figures"]["nelbo"] == pytest.approx(of_hundred["nelbo"], rel=1e-3)
    summaries = sorted(path.name for path in (tmp_path / "logs").glob("*.json"))
    series = "model=vae_z=10_data=mine"
    assert summaries == [f"{series}_summary.json", f"{series}_test=all_summary.json"]


@pytest.mark.parametrize("model, y", [("vae", Y[:12] * 100), ("gmvae", None)])
def test_a_vae_takes_any_labels_or_none(model, y, own, tmp_path):
    """And one test image is enough."""
    said = lines(own(model, "--iter_max", 2, content=packed(x=grey(12), y=y), plots=True))
    warned = sum("is not labels 0 to 9 and is not used" in line for line in said)
    assert warned == (0 if y is None else 1)
    assert (tmp_path / "logs" / OWN_NAMES[model] / "latent.png").stat().st_size > 1000


def test_arrays_of_many_kinds_are_the_same_images(read):
    wanted = torch.from_numpy(X.reshape(60, 784)[:54])
    given = [X, X.reshape(60, 784), X.astype(np.int64), X.astype(">u2"), X / 255]
    given += [(X / 255).astype(np.float16), X[..., None], X[:, None] / 255]
    for x in given:
        images = read("train", x=x, y=Y.astype(np.uint8)[:, None])
        assert torch.equal(images.pixels, wanted), (x.dtype, x.shape)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == Y[:54].tolist() and images.labels.dtype == torch.int64
    switches = read("train", x=X > 127)
    assert torch.equal(switches.pixels, (wanted > 127) * torch.tensor(255, dtype=torch.uint8))
    assert set(switches.labels.tolist()) == {-1}


def test_the_held_out_tenth_is_not_trained_on(read):
    """Unless the file has test images; Keras's names do as well."""
    train = read("train", x=X[:47], y=Y[:47])
    test = read("test", x=X[:47], y=Y[:47])
    both = torch.cat([train.pixels, test.pixels])
    assert torch.equal(both, torch.from_numpy(X[:47]).flatten(1)) and len(test) == 4
    assert torch.cat([train.labels, test.labels]).tolist() == Y[:47].tolist()
    test = read("test", x=X, y=Y, x_test=X[:7], y_test=Y[:7])
    of_keras = read("test", x_train=X, y_train=Y, x_test=X[:7], y_test=Y[:7])
    assert len(test) == 7
    assert torch.equal(of_keras.pixels, test.pixels) and torch.equal(of_keras.labels, test.labels)


def test_a_red_image_is_red_and_upright(read):
    """Channel after channel, as the model and the pictures have them."""
    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[3, 5, 7, 0] = 200  # row 5, column 7, red
    x[4, 5, 7, 2] = 100  # blue
    for given in (x, x / 255, x.transpose(0, 3, 1, 2)):
        images = read("train", in_colour=True, labelled=True, x=given, y=Y[:20])
        assert images.pixels.shape == (18, 3072)
        assert images.pixels.nonzero().tolist() == [[3, 5 * 32 + 7], [4, 2 * 1024 + 5 * 32 + 7]]
        assert images.pixels[images.pixels > 0].tolist() == [200, 100]


def test_a_changed_file_is_not_resumed(own, tmp_path):
    """It is evaluated, and its metrics are not mixed with the other's."""
    lines(own("vae", "--iter_max", 2, content=right("vae")))
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 1))
    (tmp_path / "mine.npz").write_bytes(right("vae", x=grey(60, seed=3)))
    before = tree(tmp_path)
    line = only_error(own("vae", "--iter_max", 4))
    assert "argument --data" in line and "SHA-256" in line and tree(tmp_path) == before
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 2))
    assert "niwae_1" not in results(tmp_path, OWN_NAMES["vae"])["figures"]
    lines(own("vae", "--iter_max", 4, "--overwrite", 1))


WRONG = {  # script, content, words of the line
    "no images": ("vae", packed(pixels=X, y=Y),
        "no images x or x_train; it holds pixels (60, 28, 28), y (60,)"),
    "grey for an FSVAE": ("fsvae", packed(x=X, y=Y), "of shape (n, 32, 32, 3), not ("),
    "pickled images": ("vae", packed(x=np.array([object()] * 60)),
        "holds pickled objects, which are not read"),
    "floats to 255": ("vae", packed(x=X.astype(np.float32)),
        "from 0 to 1, not from 0 to 255; divide them by 255"),
    "whole numbers to one": ("vae", packed(x=(X > 127).astype(np.uint8)), "store them as floats"),
    "NaN": ("vae", packed(x=np.where(X > 250, np.nan, X / 255)), "nan"),
    "no labels": ("ssvae", right("ssvae", y=None), "the labels, which this model needs"),
    "label 10": ("ssvae", right("ssvae", y=Y + 1), "labels 0 to 9, not"),
    "text": ("vae", b"no file of numpy's at all\n" * 100, "no .npz file"),
    "truncated": ("vae", right("vae")[:-22], "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused(wrong, own, tmp_path):
    """In one line, before anything is stored: no more is left than the lock of the run."""
    model, content, words = WRONG[wrong]
    line = only_error(own(model, "--iter_max", 2, content=content))
    assert line.startswith(f"run_{model}.py: error: argument --data: ")
    assert "mine.npz" in line and words in line
    assert [name for name in tree(tmp_path) if not name.endswith(".lock")] == ["mine.npz"]

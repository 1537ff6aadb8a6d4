"""The data: the course's subset, MNIST, SVHN, downloads, drawn digits, a user's own images."""

import errno
import gzip
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import MNIST, needs_mnist, same, table, tree, weights
from loopback import Server, half_then_nothing, half_then_silence, slowly, whole

import run_fsvae
import run_vae
from codebase import data, digits, evaluate, train
from codebase.models.vae import VAE
from codebase.runtime import download, options
from codebase.runtime.files import Missing, UsageError, model_path, state_path

TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_NAMES = tuple(data.COURSE["mnist_sha256"])


def mnist_run(data_dir, **changes) -> options.Run:
    run = run_vae.parse([]).changed(data="mnist", data_dir=str(data_dir), device="cpu")
    return run.changed(**changes)


def svhn_run(data_dir, **changes) -> options.Run:
    run = run_fsvae.parse(["--split", "train", "--device", "cpu"])
    return run.changed(data="svhn", data_dir=str(data_dir), **changes)


# ---------------------------------------------------------------------------------------------
# The course's images


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


def test_other_splits_have_their_first_hundred_evaluated():
    """Or all of them, where all are asked for."""
    ink = torch.bernoulli(torch.full((130, 784), 0.5)).byte()
    for labels in [torch.arange(130) % 10, torch.full((130,), -1), torch.arange(7)]:
        n = len(labels)
        images = data.Images(255 * ink[:n], labels)
        for which, shown in [("subset", 100), ("2018", 100), ("torch-0.4", 100), ("all", 130)]:
            assert torch.equal(data.test_subset(images, which), ink[:n][:shown].float())
    test = data.course("test")
    assert torch.equal(data.test_subset(test, "all"), data.binarize_once(test.pixels))


@pytest.mark.parametrize("each", [5, 10, 300])
def test_labels_begin_with_the_courses(each, digits_dir):
    """They are balanced and fixed, and none is there twice but the course's own."""
    images = data.drawn_digits(str(digits_dir), "train", colour=False)
    positions = images.positions("train", each)
    labelled = data.labelled_set(images, 10 * each)
    assert torch.equal(labelled.pixels, images.pixels[positions])
    assert labelled.labels.tolist() == images.labels[positions].tolist() == ten_of_each(each)
    course = images.positions("train").reshape(10, 10)
    assert course[4, 6] == course[4, 7]  # position 2176 stands in the table twice
    assert len(course.unique()) == 99
    by_digit = positions.reshape(10, each)
    assert torch.equal(by_digit[:, :10], course[:, :each])
    new = by_digit[:, 10:].flatten()
    assert len(new.unique()) == len(new) and not torch.isin(new, course).any()
    more = images.positions("train", each + 10).reshape(10, each + 10)
    assert torch.equal(more[:, :each], by_digit)  # a larger set holds the smaller one
    assert each < 300 or (by_digit[3, 10:].diff() < 0).any()  # shuffled


# ---------------------------------------------------------------------------------------------
# Batches


def test_grey_levels_are_probabilities_of_one():
    torch.manual_seed(0)
    grey = torch.arange(256, dtype=torch.uint8).repeat(40_000, 1)
    drawn = data.binarize(grey)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share = drawn.mean(0)
    p = torch.arange(256) / 255
    assert share[0] == 0 and share[255] == 1
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


@pytest.mark.parametrize("count", [103, 7])  # more than a batch of ten, and fewer
def test_every_epoch_is_a_shuffled_pass(count):
    """And the order can be entered at any step."""
    batches = train.order(count, 10, seed=1, start=0, device="cpu")
    steps = [next(batches) for _ in range(count)]
    epochs = torch.cat(steps).reshape(10, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert epochs[0].tolist() != list(range(count))
    for start in [1, 3, count // 2, count - 1]:
        entered = train.order(count, 10, seed=1, start=start, device="cpu")
        assert torch.equal(next(entered), steps[start])
    other_seed = train.order(count, 10, seed=2, start=3, device="cpu")
    assert not torch.equal(next(other_seed), steps[3])


# ---------------------------------------------------------------------------------------------
# MNIST's files


def idx_file(header: list[int], content: np.ndarray) -> bytes:
    return np.array(header, ">i4").tobytes() + content.tobytes()


@pytest.fixture(scope="module")
def idx(digits_dir) -> dict[str, bytes]:
    """The files of MNIST's test split in its own format and sizes, but with drawn digits."""
    images = data.drawn_digits(str(digits_dir), "test", colour=False)
    labels = images.labels.numpy().astype(np.uint8)
    return {
        TEST_FILES[0]: idx_file([2051, 10_000, 28, 28], images.pixels.numpy()),
        TEST_FILES[1]: idx_file([2049, 10_000], labels),
    }


@pytest.fixture
def raw(idx, tmp_path) -> Path:
    """A folder MNIST/raw with these files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in idx.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def published(idx, raw, monkeypatch) -> Path:
    """The same, with the checksums of these files as the published ones."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in idx.items()}
    monkeypatch.setitem(data.COURSE, "mnist_sha256", digests)
    return raw


def flip(path: Path, at: int):
    """Change one byte of a file; a digit stays a digit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_unpublished_files_are_refused_unless_allowed(raw, tmp_path):
    with pytest.raises(UsageError, match=r"t10k-images-idx3-ubyte.*SHA-256.*--check_data 0"):
        data.load(mnist_run(tmp_path, train=0), "test")
    images = data.load(mnist_run(tmp_path, check_data=0), "test")
    stored = [(raw / name).read_bytes() for name in TEST_FILES]
    assert images.pixels.numpy().tobytes() == stored[0][16:] and len(images) == 10_000
    assert images.labels.to(torch.uint8).numpy().tobytes() == stored[1][8:]


@pytest.mark.parametrize("name, at", [(TEST_FILES[0], 3_920_316), (TEST_FILES[1], -1)])
def test_one_changed_byte_is_found_by_checksum_alone(published, tmp_path, name, at):
    before = data.mnist(str(tmp_path), "test", check=1)
    flip(published / name, at)
    words = rf"{name} is not the published file .*SHA-256.*--check_data 0"
    with pytest.raises(UsageError, match=words):
        data.mnist(str(tmp_path), "test", check=1)
    after = data.mnist(str(tmp_path), "test", check=0)
    assert (before.pixels != after.pixels).sum() == ("images" in name)
    assert (before.labels != after.labels).sum() == ("labels" in name)


# ---------------------------------------------------------------------------------------------
# SVHN's files


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
    run = svhn_run(tmp_path, check_data=0)
    images = data.load(run, "train")
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (count, 3072)
    counted = torch.arange(count) % 251
    assert torch.equal(images.pixels[:, 1 * 1024 + 5 * 32 + 7].long(), counted)
    assert images.pixels.count_nonzero() == counted.count_nonzero()
    assert images.labels.tolist()[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert images.labels.dtype == torch.int64
    assert len(data.load(run, "test")) == 5
    assert len(data.load(run.changed(split="test"), "train")) == 5


NO_MAT = r"(is truncated or damaged \(\w+\)|cannot be read \(could not read bytes\))"
NO_DIGITS = "holds no 32 x 32 x 3 byte images with labels 1 to 10"
GONE = r"cannot be read \(No such file or directory\)"
HARMS = [  # what becomes of a file's content, and what is said of it
    ("pixels", lambda content: content[:-1], r"is truncated or too long \([\d,]+ bytes\)"),
    ("pixels", lambda content: content[1:], "does not begin as that file does"),
    ("labels", lambda content: content[:-1] + b"\x0b", "has labels outside 0 to 9"),
    ("labels", None, GONE),
    ("svhn", lambda content: content[:20_000], NO_MAT),
    ("svhn", lambda content: b"no matlab file" * 100, NO_MAT),
    ("svhn", lambda content: mat(12, y=np.ones((11, 1), np.uint8)), NO_DIGITS),
    ("svhn", lambda content: mat(12, y=np.full((12, 1), 11, np.uint8)), NO_DIGITS),
    ("svhn", None, GONE),
]


@pytest.mark.parametrize("kind, harm, words", HARMS)
def test_a_damaged_file_is_named_with_cure(kind, harm, words, published, tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(mat(12))
    path = tmp_path / "train_32x32.mat"
    if kind != "svhn":
        path = published / TEST_FILES[kind == "labels"]
    content = path.read_bytes()
    path.unlink()
    if harm:
        path.write_bytes(harm(content))
    before = tree(tmp_path)
    words = rf"{path.name} {words}.*: .*put an intact copy in its place$"
    with pytest.raises(UsageError, match=words):
        if kind == "svhn":
            data.svhn(str(tmp_path), "train", check=0)
        else:
            data.mnist(str(tmp_path), "test", check=0)
    assert tree(tmp_path) == before


def test_one_changed_byte_of_svhn_is_found(tmp_path, monkeypatch):
    path = tmp_path / "train_32x32.mat"
    content = mat(12)
    path.write_bytes(content)
    words = r"train_32x32.mat is not the published file .*MD5.*--check_data 0"
    with pytest.raises(UsageError, match=words):
        data.svhn(str(tmp_path), "train", check=1)
    published = {"train": ["", path.name, hashlib.md5(content).hexdigest()]}
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", published)
    before = data.svhn(str(tmp_path), "train", check=1)
    flip(path, content.index(bytes(1000)) + 500)  # among the black pixels
    with pytest.raises(UsageError, match="MD5"):
        data.svhn(str(tmp_path), "train", check=1)
    assert (data.svhn(str(tmp_path), "train", check=0).pixels != before.pixels).sum() == 1


# ---------------------------------------------------------------------------------------------
# Which data set a run has


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Which data set a VAE's run has: choose("auto", train=0, stored=["mnist"]).

    stored: the data sets of which it has checkpoints; present: whether MNIST's files are there;
    arrive: whether a download brings them. Returns it, and whether a download was tried.
    """
    monkeypatch.chdir(tmp_path)

    def run(asked, train, stored=(), present=False, arrive=False) -> tuple[str, bool]:
        asking = run_vae.parse(["--z", "3", "--iter_max", "300", "--run", "4", "--data", asked])
        asking = asking.changed(train=train, test="all", data_dir=str(tmp_path / "data"))
        asking = asking.changed(words="run_vae.py --z 3 --train 0 --run 4 --train=0".split())
        files = download.files(asking.changed(data="mnist"))
        for name in stored:
            store(model_path(asking.changed(data=name).name, 300))

        def fetch(_):
            if all(path.exists() for path in files):
                return None
            run.tried = True
            if not arrive:
                return "no route to host"
            for path in files:
                store(path)

        monkeypatch.setattr(download, "fetch", fetch)
        if present:
            for path in files:
                store(path)
        return download.choose_data(asking), run.tried

    run.tried = False
    return run


def store(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


CHOICES = [  # --data, --train, checkpoints, files there, do they arrive; data set, download tried
    ("auto", 1, [], True, False, ("mnist", False)),
    ("auto", 1, [], False, True, ("mnist", True)),
    ("auto", 1, [], False, False, ("digits", True)),
    ("mnist", 1, [], False, True, ("mnist", True)),
    ("auto", 0, ["mnist", "digits"], True, False, ("mnist", False)),
    ("auto", 0, ["digits"], False, True, ("digits", False)),
    ("auto", 0, ["mnist", "digits"], False, True, ("mnist", True)),
    ("auto", 0, ["mnist", "digits"], False, False, ("digits", True)),
    ("digits", 0, ["digits"], False, True, ("digits", False)),
]


@pytest.mark.parametrize("asked, train, stored, present, arrive, wanted", CHOICES)
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
    "has_state, advice",
    [
        (True, "to train one: python run_vae.py --z 3 --run 4"),
        (False, "it has no state to resume from: give one of these, or train another --run"),
    ],
)
def test_a_missing_checkpoint_is_named_before_downloads(choose, has_state, advice):
    name = "model=vae_z=03_run=0004"
    store(model_path(name, 200))
    if has_state:
        store(state_path(name))
    with pytest.raises(Missing) as caught:
        choose("auto", 0, arrive=True)
    assert not choose.tried
    there = f"there is no checkpoints/{name}/model-00300.pt; checkpoints of this run: 200"
    assert str(caught.value) == f"{there}; {advice}"


@pytest.mark.parametrize("asked, train, stored", [("mnist", 1, []), ("auto", 0, ["mnist"])])
def test_files_that_cannot_be_had_are_listed(choose, tmp_path, asked, train, stored):
    """To evaluate takes no training image, and has no checkpoint of the digits."""
    with pytest.raises(UsageError) as caught:
        choose(asked, train, stored)
    raw = tmp_path / "data" / "MNIST" / "raw"
    listed = ", ".join(str(raw / name) for name in MNIST_NAMES[0 if train else 2 :])
    message = "MNIST cannot be downloaded (no route to host); put these files in place by hand: "
    message += f"{listed}; or use --data digits" if train else listed
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------
# Files that are nearly there


def near(tmp_path, monkeypatch, there: list[str], data_dir: str, model=run_vae) -> options.Run:
    """A run in this folder, with these files, from which none can be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "fetch", lambda run: "no route to host")
    for name in there:
        store(Path(name))
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
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert f"Looked in {raw} for {', '.join(MNIST_NAMES)}." in said
    assert "DRAWN DIGITS" in said and "But" not in said


RAW = [f"d/MNIST/raw/{name}" for name in MNIST_NAMES]
DOTTED = [name.replace("-idx", ".idx") for name in MNIST_NAMES]
TRAIN = "d/train_32x32.mat"
LIKEWISE = "to d/MNIST/raw/{name}, and the others likewise"
NEAR = [  # the files that are there, --data_dir, what the banner says of them after "there is "
    (RAW, "d/MNIST/raw", "{raw} (and 3 more): give --data_dir {tmp_path}/d"),
    ([f"d/{name}" for name in MNIST_NAMES], "d", "d/{name} (and 3 more): move it " + LIKEWISE),
    ([f"{name}.gz" for name in RAW], "d", "{raw}.gz (and 3 more): unpack it " + LIKEWISE),
    ([*RAW[1:], f"d/{DOTTED[0]}.gz"], "d", "d/{dotted}.gz: unpack it to {raw}"),
    ([f"d/MNIST/{DOTTED[0]}"], "d", "d/MNIST/{dotted}: move it to {raw}"),
    ([TRAIN, "d/test_32x32.mat"], "d", f"{TRAIN}: give --split train to train on it"),
    (["d/SVHN/extra_32x32.mat"], "d", "d/SVHN/extra_32x32.mat: move it to d/extra_32x32.mat"),
]


@pytest.mark.parametrize("there, data_dir, words", NEAR, ids=range(7))
def test_files_nearly_there_are_named_with_cure(
    there, data_dir, words, tmp_path, monkeypatch, capsys
):
    script = run_fsvae if "32x32" in words else run_vae
    run = near(tmp_path, monkeypatch, there, data_dir, script)
    before = tree(tmp_path)
    said = banner(run, capsys)
    words = words.format(name=MNIST_NAMES[0], dotted=DOTTED[0], raw=RAW[0], tmp_path=tmp_path)
    assert f"But there is {words}.\n" in said
    assert "DRAWN DIGITS" in said and tree(tmp_path) == before


def test_the_named_data_dir_works_as_printed(tmp_path, monkeypatch):
    there = [f"my data/MNIST/raw/{name}" for name in MNIST_NAMES]
    run = near(tmp_path, monkeypatch, there, "my data/MNIST")
    flag, data_dir = shlex.split(download.near_miss(run).split(": give ")[1])
    assert flag == "--data_dir" and download.is_usable(run.changed(data_dir=data_dir))


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


def assert_is_mnist(folder: Path, server: Server) -> None:
    """In this folder are the server's four files, and nothing else."""
    assert tree(folder) == {f"MNIST/raw/{name}": server.raw[name] for name in MNIST_NAMES}
    assert {path.name for path in folder.iterdir()} == {"MNIST"}


def test_mnist_arrives_whole_and_once(mnist_server, tmp_path, capsys):
    to_evaluate = mnist_run(tmp_path / "data", train=0, test="all")
    assert len(download.files(to_evaluate)) == 2
    assert download.fetch(to_evaluate) is None
    assert_is_mnist(tmp_path / "data", mnist_server)
    asked = len(mnist_server.asked)
    run = mnist_run(tmp_path / "data")
    assert download.choose_data(run.changed(data="auto")) == "mnist"
    assert len(mnist_server.asked) == asked
    assert "NO MNIST" not in capsys.readouterr().out


def test_a_download_replaces_no_present_file(mnist_server, tmp_path, monkeypatch):
    """Where nobody listens, the next mirror is asked."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    mirrors = [nobody, mnist_server.url]
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", mirrors)
    run = mnist_run(tmp_path)
    there, *missing = download.files(run)
    store(there)
    assert download.fetch(run) is None
    assert there.read_bytes() == b""
    assert all(path.read_bytes() == mnist_server.raw[path.name] for path in missing)


SPLITS = [  # --split, --train, what is there, what is fetched
    ("extra", 1, [], ["extra", "test"]),
    ("test", 1, [], ["test"]),
    ("extra", 0, [], ["test"]),
    ("train", 1, ["train"], ["test"]),
]


@pytest.mark.parametrize("split, train, present, wanted", SPLITS)
def test_an_fsvae_fetches_its_two_splits(split, train, present, wanted, tmp_path, svhn_server):
    for name in present:
        store(tmp_path / f"{name}_32x32.mat")
    assert download.fetch(svhn_run(tmp_path, split=split, train=train)) is None
    files = {f"{name}_32x32.mat": b"" for name in present}
    for name in wanted:
        files[f"{name}_32x32.mat"] = svhn_server.files[f"{name}_32x32.mat"]
    assert tree(tmp_path) == files
    assert {f"{name}_32x32.mat" for name in wanted} == set(svhn_server.asked)


def test_a_slow_download_continues_and_shows_progress(svhn_server, tmp_path, monkeypatch, capfd):
    assert 5 <= download.SILENCE <= 20
    monkeypatch.setattr(download, "SILENCE", 2)
    svhn_server.how = slowly
    del svhn_server.files["test_32x32.mat"]
    run = svhn_run(tmp_path)
    began = time.monotonic()
    assert "404" in download.fetch(run)  # of the test split, which is done without
    assert time.monotonic() - began > download.SILENCE  # patience for the whole would not do
    assert tree(tmp_path) == {"train_32x32.mat": svhn_server.files["train_32x32.mat"]}
    shown = capfd.readouterr().err
    assert "100%" in shown and "B/s]" in shown
    assert shown.count("\r") > 4  # it moves
    svhn_server.how = whole
    assert download.choose_data(run.changed(data="auto")) == "svhn"
    assert len(data.load(run, "train")) == 12  # with its checksum


@pytest.fixture
def served(request, tmp_path):
    """The server of a data set, and a run that wants it in a new folder."""
    server = request.getfixturevalue(f"{request.param}_server")
    make = {"mnist": mnist_run, "svhn": svhn_run}[request.param]
    return server, make(tmp_path / "data")


@pytest.mark.parametrize(
    "served, how", [("mnist", None), ("svhn", half_then_silence)], indirect=["served"]
)
def test_a_dead_download_is_given_up(served, how, tmp_path, monkeypatch):
    """Without a trace, when no byte has arrived for a while."""
    server, run = served
    monkeypatch.setattr(download, "SILENCE", 1)
    server.how = how  # it hangs up after 60 seconds, which would be another reason
    assert download.fetch(run) == "no answer for 1 seconds"
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


FAILURES = [
    ("mnist", "another file", "corrupted"),
    ("svhn", "half of it", "corrupted"),
    ("mnist", "none", "404"),
    ("svhn", "no answer", "refused"),
]


@pytest.mark.parametrize("served, sent, words", FAILURES, indirect=["served"])
def test_a_failed_download_leaves_nothing(served, sent, words, tmp_path, capsys):
    server, run = served
    if sent == "another file":
        server.files = {name: content[:-1] + b"x" for name, content in server.files.items()}
    if sent == "half of it":
        server.how = half_then_nothing
    if sent == "none":
        server.files = {}
    if sent == "no answer":
        server.shutdown()
        server.socket.close()
    reason = download.fetch(run)
    assert words in reason and "\n" not in reason
    assert list(tmp_path.iterdir()) == []
    assert download.choose_data(run.changed(data="auto")) == "digits"
    name = run.data.upper()
    assert f"NO {name} ({reason})" in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"{name} cannot be downloaded"):
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
    place.mkdir()
    result = script("fsvae", "--data", "svhn", "--split", "train", "--data_dir", place)
    assert result.returncode == 143 and svhn_server.asked == ["train_32x32.mat"] * 2
    assert list(place.iterdir()) == []


def test_left_over_downloads_are_removed_later(svhn_server, tmp_path):
    """A day after a kill; those of the last day may be under way."""
    for name, age in ((".download-old", 100_000), (".download-new", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_32x32.mat").write_bytes(b"half")
        os.utime(tmp_path / name, 2 * (time.time() - age,))
    assert download.fetch(svhn_run(tmp_path)) is None
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [".download-new", "test_32x32.mat", "train_32x32.mat"]


def test_simultaneous_downloads_arrive_whole(mnist_server, tmp_path):
    run = mnist_run(tmp_path / "data")
    answers = []
    threads = []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: answers.append(download.fetch(run))))
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        socket.setdefaulttimeout(None)  # which processes, unlike threads, do not share
    assert answers == [None] * 4
    assert_is_mnist(tmp_path / "data", mnist_server)


def test_an_unwritable_folder_gives_drawn_digits(
    mnist_server, tmp_path, monkeypatch, capsys, digits_dir
):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)  # for rights do not bind the superuser
    monkeypatch.setattr(data, "write", refuse)
    run = mnist_run(tmp_path)
    assert download.choose_data(run.changed(data="auto")) == "digits"
    assert "DRAWN DIGITS instead" in capsys.readouterr().out
    images = data.load(run.changed(data="digits"), "test")
    stored = data.drawn_digits(str(digits_dir), "test", colour=False)
    assert torch.equal(images.pixels, stored.pixels)


def test_a_folder_that_cannot_be_made(mnist_server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"argument --data_dir: .*file/data cannot be made"):
        download.fetch(mnist_run(tmp_path / "file" / "data"))


# ---------------------------------------------------------------------------------------------
# Drawn digits


def test_drawn_digits_resemble_mnist(digits_dir):
    """In numbers and blackness; they differ, can be told apart, and no split has another's."""
    train_split = data.drawn_digits(str(digits_dir), "train", colour=False)
    test_split = data.drawn_digits(str(digits_dir), "test", colour=False)
    for split, images in [("train", train_split), ("test", test_split)]:
        assert torch.bincount(images.labels).tolist() == data.COURSE["class_counts"][split]
        assert images.pixels.dtype == torch.uint8 and images.pixels.shape[1] == 784
        assert images.labels[:100].unique().numel() == 10  # shuffled
    tested = {row.tobytes() for row in test_split.pixels.numpy()}
    assert len(tested) == len(test_split)
    assert tested.isdisjoint(row.tobytes() for row in train_split.pixels.numpy())
    assert 0.10 < test_split.pixels.float().mean() / 255 < 0.17  # MNIST: 0.13
    border = test_split.pixels.reshape(-1, 28, 28).clone()
    border[:, 2:-2, 2:-2] = 0
    assert (border > 0).float().mean() < 0.02
    means = []
    for digit in range(10):
        means.append(train_split.pixels[train_split.labels == digit].float().mean(0))
    nearest = torch.cdist(test_split.pixels.float(), torch.stack(means)).argmin(1)
    assert (nearest == test_split.labels).float().mean() > 0.5


@pytest.mark.parametrize("in_colour", [False, True])
def test_drawn_digits_are_the_same_each_time(in_colour):
    counts = [110] * 10
    before = torch.get_rng_state()
    first = digits.draw(counts, 5, in_colour)
    again = digits.draw(counts, 5, in_colour)
    other = digits.draw(counts, 6, in_colour)
    assert torch.equal(torch.get_rng_state(), before)  # with a stream of their own
    for part in [0, 1]:  # images, labels
        assert np.array_equal(first[part], again[part])
        assert not np.array_equal(first[part], other[part])
    assert first[0].shape == (1100, 3072 if in_colour else 784)
    assert first[0].dtype == np.uint8


def test_damaged_stored_digits_are_drawn_again(tmp_path, digits_dir, monkeypatch):
    """And whole ones are not."""
    name = f"drawn-grey-test-v{digits.VERSION}.npz"
    (tmp_path / name).write_bytes((digits_dir / name).read_bytes()[:1000])
    (tmp_path / f".{name}.123.tmp").write_bytes(b"left by a process that was killed")
    images = data.drawn_digits(str(tmp_path), "test", colour=False)
    assert tree(tmp_path) == {name: (digits_dir / name).read_bytes()}
    monkeypatch.setattr(digits, "draw", lambda *_: pytest.fail("drawn again"))
    stored = data.drawn_digits(str(digits_dir), "test", colour=False)
    assert torch.equal(images.pixels, stored.pixels) and torch.equal(images.labels, stored.labels)


# ---------------------------------------------------------------------------------------------
# A user's own images

OWN_NAMES = {
    "vae": "model=vae_z=10_data=mine_run=0000",
    "gmvae": "model=gmvae_z=10_k=500_data=mine_run=0000",
    "ssvae": "model=ssvae_gw=001_cw=100_labels=50_data=mine_run=0000",
    "fsvae": "model=fsvae_data=mine_run=0000",
}


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
        if model == "ssvae" and "--labels" not in flags:
            flags += ("--labels", 50)
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


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def refusal(result) -> str:
    """The one line that a refused command says."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def results(folder: Path, model: str) -> dict:
    return json.loads((folder / "logs" / OWN_NAMES[model] / "results.json").read_text())


def loaded(folder: Path) -> VAE:
    model = VAE()
    model.load_state_dict(weights(folder, OWN_NAMES["vae"], 2))
    return model


def binarised(x: np.ndarray) -> torch.Tensor:
    return data.binarize_once(torch.from_numpy(x).flatten(1))


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
    found = results(whole, model)
    digest = hashlib.sha256((tmp_path / "mine.npz").read_bytes()).hexdigest()
    assert found["data"] == f"mine.npz, a file of SHA-256 {digest}" and found["test_images"] == 6


def test_test_images_of_a_file_are_evaluated(own, tmp_path):
    """Seven of them, all of one digit."""
    mine = packed(x=X, y=Y, x_test=grey(7, seed=1), y_test=np.full(7, 3))
    printed = lines(own("vae", "--iter_max", 2, content=mine))
    assert not any("held out" in line for line in printed)
    wanted = evaluate.bounds(loaded(tmp_path), binarised(grey(7, seed=1)), ms=[])
    assert printed[-1] == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**wanted)
    lines(own("ssvae", "--iter_max", 2))
    found = results(tmp_path, "ssvae")
    assert [sum(row) for row in found["confusion"]] == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    accuracy = found["confusion"][3][3] / 7
    assert found["figures"]["accuracy"] == accuracy
    assert found["per_digit_accuracy"] == [0, 0, 0, accuracy, 0, 0, 0, 0, 0, 0]


def test_metrics_of_all_images_are_kept_apart(own, tmp_path):
    """And in a summary of their own."""
    x_test = grey(110, seed=1)
    flags = ["--iter_max", 2, "--runs", 2]
    lines(own("vae", *flags, content=packed(x=X, x_test=x_test)))
    subset = results(tmp_path, "vae")
    lines(own("vae", *flags, "--train", 0, "--test", "all", "--iw", 5))
    both = results(tmp_path, "vae")
    assert both["figures"] == subset["figures"] and "figures_all" not in subset
    wanted = evaluate.bounds(loaded(tmp_path), binarised(x_test), [5])
    assert both["figures_all"].items() >= wanted.items()
    of_hundred = evaluate.bounds(loaded(tmp_path), binarised(x_test)[:100], [])
    assert subset["figures"]["nelbo"] == pytest.approx(of_hundred["nelbo"], rel=1e-3)
    summaries = sorted(path.name for path in (tmp_path / "logs").glob("*.json"))
    series = "model=vae_z=10_data=mine"
    assert summaries == [f"{series}_summary.json", f"{series}_test=all_summary.json"]


@pytest.mark.parametrize("model, y", [("vae", Y * 100), ("gmvae", None)])
def test_a_vae_takes_any_labels_or_none(model, y, own, tmp_path):
    """And one test image is enough."""
    y_given = None if y is None else y[:12]
    said = lines(own(model, "--iter_max", 2, content=packed(x=grey(12), y=y_given), plots=True))
    warned = sum("is not labels 0 to 9 and is not used" in line for line in said)
    assert warned == (0 if y is None else 1)
    assert (tmp_path / "logs" / OWN_NAMES[model] / "latent.png").stat().st_size > 1000


@pytest.mark.parametrize("y", [Y + 1, Y / 10, np.array([object()] * 60), Y[:59]], ids=range(4))
def test_labels_that_nothing_needs_are_unused(y, read, capsys):
    for split in ("train", "test"):
        assert set(read(split, x=X, y=y).labels.tolist()) == {-1}
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and warned[0].startswith("warning: y of ")
    assert warned[0].endswith("mine.npz is not labels 0 to 9 and is not used")


def test_arrays_of_many_kinds_are_the_same_images(read, tmp_path):
    wanted = torch.from_numpy(X.reshape(60, 784)[:54])
    given = [X, X.reshape(60, 784), X.astype(np.int64), X.astype(">u2"), np.asfortranarray(X)]
    given += [(X / 255).astype(kind) for kind in (np.float16, np.float32, np.float64, ">f4")]
    given += [X[..., None], X[:, None] / 255]
    for x in given:
        images = read("train", x=x, y=Y.astype(np.uint8)[:, None])
        assert torch.equal(images.pixels, wanted), (x.dtype, x.shape)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == Y[:54].tolist() and images.labels.dtype == torch.int64
    options.read_once.cache_clear()
    np.savez_compressed(tmp_path / "mine.npz", x=X)
    assert torch.equal(data.own(str(tmp_path / "mine.npz"), "train", False, False).pixels, wanted)
    switches = read("train", x=X > 127)
    assert torch.equal(switches.pixels, (wanted > 127) * torch.tensor(255, dtype=torch.uint8))
    assert set(switches.labels.tolist()) == {-1}


def test_names_of_keras_are_read(read):
    for test in ({}, {"x_test": grey(7, seed=1), "y_test": np.arange(7)}):
        for split in ("train", "test"):
            wanted = read(split, x=X, y=Y, **test)
            found = read(split, x_train=X, y_train=Y, **test)
            assert torch.equal(found.pixels, wanted.pixels)
            assert torch.equal(found.labels, wanted.labels)


def test_the_held_out_tenth_is_not_trained_on(read):
    train = read("train", x=X[:47], y=Y[:47])
    test = read("test", x=X[:47], y=Y[:47])
    both = torch.cat([train.pixels, test.pixels])
    assert torch.equal(both, torch.from_numpy(X[:47]).flatten(1)) and len(test) == 4
    assert torch.cat([train.labels, test.labels]).tolist() == Y[:47].tolist()


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


def test_a_changed_file_is_not_resumed(own, main, tmp_path):
    """In one process too. It is evaluated, and its metrics are not mixed with the other's."""
    lines(own("vae", "--iter_max", 2, content=right("vae")))
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 1))
    first = results(tmp_path, "vae")
    (tmp_path / "mine.npz").write_bytes(right("vae", x=grey(60, seed=3)))
    before = tree(tmp_path)
    for again in (main("vae", "--data", tmp_path / "mine.npz", "--iter_max", 4), own("vae")):
        line = refusal(again)
        assert "argument --data" in line and "SHA-256" in line and tree(tmp_path) == before
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 2))
    second = results(tmp_path, "vae")
    assert "niwae_1" in first["figures"] and "niwae_1" not in second["figures"]
    assert first["data"] != second["data"]
    lines(own("vae", "--iter_max", 4, "--overwrite", 1))


def test_the_same_file_elsewhere_is_resumed(own, main, tmp_path):
    lines(own("vae", "--iter_max", 2, content=right("vae")))
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "mine.npz").rename(tmp_path / "elsewhere" / "mine.npz")
    assert "resuming from step 2" in "\n".join(lines(main("vae", "--data", moved, "--iter_max", 3)))


def test_metrics_of_other_weights_are_not_kept(own, tmp_path):
    lines(own("vae", "--iter_max", 2, "--seed", 1, content=right("vae")))
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 10))
    assert "niwae_10" in results(tmp_path, "vae")["figures"]
    shutil.rmtree(tmp_path / "checkpoints")
    lines(own("vae", "--iter_max", 2, "--seed", 2))
    assert "niwae_10" not in results(tmp_path, "vae")["figures"]


@pytest.mark.parametrize("stem", ["fashion-mnist_v1.2", "Straße", "mnist", "x" * 100])
def test_the_stem_is_part_of_the_name(stem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(Path(f"{stem}.npz"))
    assert run_vae.parse(["--data", f"{stem}.npz"]).name == f"model=vae_z=10_data={stem}_run=0000"


def test_a_path_that_names_no_file(main, tmp_path):
    too_long = tmp_path / f"{'数' * 34}.npz"
    store(too_long)
    assert "takes up to 100 bytes of letters" in refusal(main("vae", "--data", too_long))
    (tmp_path / "folder.npz").mkdir()
    assert "there is no file" in refusal(main("vae", "--data", tmp_path / "folder.npz"))
    store(tmp_path / "mine.npz")
    before = tree(tmp_path)
    for end in ("/", "/."):
        assert "--data" in refusal(main("vae", "--data", f"{tmp_path}/mine.npz{end}"))
    assert tree(tmp_path) == before
    with pytest.raises(UsageError, match=r"gone\.npz cannot be read \(No such file"):
        data.own(str(tmp_path / "gone.npz"), "train", False, False)


def test_dark_test_images_beside_bright_ones_warn(own):
    dark = np.eye(28, dtype=np.uint8)[None]  # bytes of 0 and 1: nearly black where x goes to 255
    said = lines(own("vae", "--iter_max", 2, content=packed(x=X, x_test=dark)))
    warnings = [line for line in said if "store them as floats" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ")
    line = refusal(own("vae", content=packed(x=X / 255, x_test=dark)))  # for floats it is an error
    assert "x_test with more than black: 0 and 1 are levels of 255" in line


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    """One bit of a pixel is another one."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def with_text(name: str, content: bytes) -> bytes:
    """A file with one more member, which is no array."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, b"hello")
    return buffer.getvalue()


F = X / 255
OBJECTS = np.array([object()] * 60)
NEEDED = "the labels, which this model needs"
WRONG = {  # script, content, words of the line
    "no images": ("vae", packed(pixels=X, y=Y),
        "no images x or x_train; it holds pixels (60, 28, 28), y (60,)"),
    "no images but objects": ("vae", packed(pixels=OBJECTS), "it holds pixels (objects)"),
    "no arrays": ("vae", packed(), "no images x or x_train; it holds nothing"),
    "images twice": ("vae", packed(x=X, x_train=X),
        "has both x and x_train: keep the one that is meant"),
    "one image": ("vae", packed(x=X[:1]), "one image"),
    "32 pixels": ("vae", packed(x=np.zeros((60, 32, 32))),
        "of shape (n, 28, 28) or (n, 784), not ("),
    "a number": ("vae", packed(x=np.array(3)), "of shape"),
    "no image": ("vae", packed(x=X[:0]), "of shape"),
    "grey for an FSVAE": ("fsvae", packed(x=X, y=Y), "of shape (n, 32, 32, 3), not ("),
    "Keras's images": ("vae", packed(x_train=np.zeros((60, 9))), "should have x_train of shape"),
    "test images": ("vae", right("vae", x_test=np.zeros((5, 32, 32))), "should have x_test of"),
    "words": ("vae", packed(x=np.full((60, 784), "a")), "whole numbers or floats"),
    "pickled images": ("vae", packed(x=OBJECTS), "holds pickled objects, which are not read"),
    "pickled labels": ("ssvae", right("ssvae", y=OBJECTS), "holds pickled objects"),
    "floats to 255": ("vae", packed(x=X.astype(np.float32)),
        "from 0 to 1, not from 0 to 255; divide them by 255"),
    "floats from -1": ("vae", packed(x=2 * F - 1),
        "if they are scaled to -1 to 1, add 1 and divide by 2"),
    "whole numbers to 256": ("vae", packed(x=X.astype(int) + 1),
        "from 0 to 255, not from 1 to 256"),
    "whole numbers to one": ("vae", packed(x=(X > 127).astype(np.uint8)), "store them as floats"),
    "NaN": ("vae", packed(x=np.where(F > 0.99, np.nan, F)), "nan"),
    "no labels": ("ssvae", right("ssvae", y=None), NEEDED),
    "no test labels": ("fsvae", right("fsvae", x_test=colour(5)), f"y_test, {NEEDED}"),
    "labels alone": ("vae", right("vae", y_test=Y[:5]), "has y_test and no images x_test"),
    "label 10": ("ssvae", right("ssvae", y=Y + 1), "labels 0 to 9, not"),
    "float labels": ("ssvae", right("ssvae", y=Y + 0.0), "whole numbers"),
    "too few labels": ("ssvae", right("ssvae", y=Y[:59]), "of shape (60,)"),
    "a .npy renamed": ("vae", as_npy(X), "no .npz file"),
    "text": ("vae", b"no file of numpy's at all\n" * 100, "no .npz file"),
    "a bit flipped": ("vae", flipped(packed(x=X)), "cannot be read"),
    "no array": ("ssvae", with_text("y", packed(x=X)), "should have y of shape"),
}  # fmt: skip


def assert_refused(own, tmp_path, model: str, words: str, content: bytes) -> None:
    """In one line, before anything is stored: no more is left than the lock of the run."""
    line = refusal(own(model, "--iter_max", 2, content=content))
    assert line.startswith(f"run_{model}.py: error: argument --data: ")
    assert "mine.npz" in line and words in line
    assert [name for name in tree(tmp_path) if not name.endswith(".lock")] == ["mine.npz"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused(wrong, own, tmp_path):
    model, content, words = WRONG[wrong]
    assert_refused(own, tmp_path, model, words, content)


def test_a_truncated_file_is_refused_anywhere(own, tmp_path):
    content = right("vae")
    size = len(content)
    for end in [0, 1, 4, 100, size // 2, size - 22, size - 1]:
        assert_refused(own, tmp_path, "vae", "truncated", content[:end])


def test_floats_just_above_one_are_no_bytes(own):
    """As interpolation leaves them: divided by 255 they would be black."""
    line = refusal(own("vae", "--iter_max", 2, content=packed(x=F * 1.02)))
    assert "from 0 to 1, not from 0 to 1.02" in line and "255" not in line


def test_more_labels_than_there_are(own):
    line = refusal(own("ssvae", "--labels", 60, content=right("ssvae")))
    assert "argument --labels: takes 6 images of each digit, and of 4 there are 5" in line

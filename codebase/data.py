"""MNIST, SVHN, a user's own images and the drawn digits as tensors on the training device."""

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codebase import digits
from codebase.runtime import fetch
from codebase.runtime.files import UsageError, require, write
from codebase.runtime.options import Run, content

COURSE = json.loads(Path(__file__).with_name("course_subset.json").read_text())
COURSE_IMAGES = Path(__file__).with_name("course_images.npz")
OLD_RULE = {"2018": torch.float32, "torch-0.4": torch.float64}  # what torch.bernoulli draws: from 1.0 on, and before


@dataclass(frozen=True)
class Images:
    """A split: pixels (n, 784) or (n, 3072, channel-major) as bytes, labels (n,) as int64 (-1: none), on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def binary(self, index: Tensor) -> Tensor:
        """The images at index, binarised afresh, (batch, 784)."""
        return binarize(self.pixels.index_select(0, index))

    def scaled(self, index: Tensor) -> Tensor:
        """The images at index with values in [0, 1], (batch, 784) or (batch, 3072)."""
        return self.pixels.index_select(0, index) / 255

    def one_hot(self, index: Tensor) -> Tensor:
        """Labels at index as (batch, 10) floats."""
        return torch.nn.functional.one_hot(self.labels[index], 10).float()

    def has_course(self, split: str) -> bool:
        """Whether the course's images can be found here: in MNIST's split, and in the drawn digits in its place."""
        return torch.bincount(self.labels.clamp(min=0).cpu()).tolist() == COURSE["class_counts"][split]

    def positions(self, split: str, each: int = 10) -> Tensor:
        """Where that many images of each digit are, class after class: the course's ten, then more in a fixed order.

        Raises UsageError where there are too few of a digit.
        """
        labels, table, found = self.labels.cpu(), COURSE[split] if self.has_course(split) else [[]] * 10, []
        for digit, course in enumerate(table):
            members = torch.nonzero(labels == digit).flatten()
            few = f"argument --labels: takes {each} images of each digit, and of {digit} there are {len(members)}"
            require(len(members) >= each, few)
            more = np.random.RandomState(0).permutation(len(members)).tolist()
            found.append(members[[*course, *(at for at in more if at not in course)][:each]])
        return torch.cat(found).to(self.labels.device)


def binarize(pixels: Tensor) -> Tensor:
    """Draw x ~ Bernoulli(pixels / 255), exactly: of the 255 equally likely bytes 0 ... 254, `pixels` lie below it."""
    noise = torch.randint(0, 255, pixels.shape, dtype=torch.uint8, device=pixels.device)
    return (noise < pixels).float()


def binarize_once(pixels: Tensor) -> Tensor:
    """Binarise a split's images by the course's rule, the same at each call: (n, 784) in {0, 1}."""
    stream, x = np.random.RandomState(0), torch.empty(pixels.shape)
    for some, drawn in zip(pixels.cpu().split(1000), x.split(1000), strict=True):  # binomial takes 13 bytes a pixel
        drawn[:] = torch.from_numpy(stream.binomial(1, some.numpy().astype(np.float32) / np.float32(255)))
    return x.to(pixels.device)


def test_subset(test: Images, which: str = "subset") -> Tensor:
    """The test images that bounds are of, binarised once and for all: (n, 784) in {0, 1}.

    "subset": the course's 100, class after class, or the first 100 of a split that does not have them; "2018": the
    same, binarised as the course did until about 2020, "torch-0.4": with the random numbers of that day's torch, which
    compared float32 probabilities with doubles; "all": the split.
    """
    if which == "all":
        return binarize_once(test.pixels)
    pixels = test.pixels[test.positions("test")] if test.has_course("test") else test.pixels[:100]
    if which in OLD_RULE:
        p = (pixels.cpu() / 255).to(OLD_RULE[which])
        return torch.bernoulli(p, generator=torch.Generator().manual_seed(0)).float().to(pixels.device)
    return binarize_once(pixels)


def labelled_set(train: Images, count: int = 100) -> Images:
    """That many labelled training images, as many of each digit: the course's 100 first."""
    index = train.positions("train", count // 10)
    return Images(train.pixels[index], train.labels[index])


def load(run: Run, split: str) -> Images:
    """The "train" or "test" split of the run's data set, on its device. Raises UsageError where files are damaged.

    Where MNIST's test split is not there and no figure needs it, the course's 100 test images take its place.
    """
    if run.own_images:
        images = own(run.data, split, run.real_data == "svhn", run.needs_labels)
    elif run.data == "digits":
        images = drawn_digits(run.data_dir, split, colour=run.real_data == "svhn")
    elif run.data == "svhn":
        images = svhn(run.data_dir, run.split if split == "train" else "test", run.check_data)
    elif run.needs_files or all(path.exists() for path in fetch.files(run)[-2:]):  # of the test split
        images = mnist(run.data_dir, split, run.check_data)
    else:
        images = course(split)
    return Images(images.pixels.to(run.device), images.labels.to(run.device))


def course(split: str) -> Images:
    """The course's 100 images of MNIST's "train" (those that are labelled) or "test" split, class after class."""
    with np.load(COURSE_IMAGES) as file:
        pixels, labels = file[split].reshape(100, 784), file[f"{split}_labels"].astype(np.int64)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def own(path: str, split: str, colour: bool, labelled: bool) -> Images:
    """A user's "train" or "test" images from a .npz file with x and, where they are there, y, x_test and y_test.

    x: (n, 28, 28), (n, 784) or, in colour, (n, 32, 32, 3), as whole numbers 0 to 255 or floats in [0, 1], which are
    rounded to bytes; y: (n,), 0 to 9. Without x_test (and then y_test) the last tenth of x is held out. Raises
    UsageError otherwise.
    """
    stored = io.BytesIO(content(path)[0])
    try:
        with np.load(stored, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("x", "y", "x_test", "y_test") if name in file}
    except Exception as error:
        pickled = "Object arrays" in str(error)
        what = "holds pickled objects, which are not read" if pickled else "cannot be read: truncated or no .npz file"
        raise UsageError(f"argument --data: {path} {what}") from error
    require("x" in arrays, f"argument --data: {path} has no images x")
    held_out = "x_test" not in arrays
    require(not held_out or "y_test" not in arrays, f"argument --data: {path} has y_test and no images x_test")
    ending = "_test" if split == "test" and not held_out else ""
    pixels = _own_pixels(f"argument --data: {path} should have x{ending}", arrays[f"x{ending}"], colour)
    levels = [part.max(initial=0) for part in (arrays["x"], arrays[f"x{ending}"]) if part.dtype.kind in "iu"]
    dark = f"x{ending} with more than black: 0 and 1 are levels of 255; store them as floats"
    require(max(levels, default=255) > 1, f"argument --data: {path} should have {dark}")
    if levels and levels[-1] <= 1:
        print(f"warning: {path} should have {dark}, if that is what they mean")
    y, needs = arrays.get(f"y{ending}"), f"argument --data: {path} should have y{ending}"
    require(y is not None or not labelled, f"{needs}, the labels, which this model needs")
    y = np.full(len(pixels), -1) if y is None else y
    fits = y.shape == (len(pixels),) and y.dtype.kind in "iu"
    require(fits, f"{needs} of shape ({len(pixels)},) with whole numbers, not {y.shape} of {y.dtype}")
    right = (0 if labelled else -1) <= y.min() and y.max() <= 9
    require(bool(right), f"{needs} with labels 0 to 9, not {y.min()} to {y.max()}")
    if held_out:
        count = max(1, len(y) // 10)
        require(len(y) > 1, f"argument --data: {path} has one image in x: none is left to evaluate on")
        part = slice(-count, None) if split == "test" else slice(-count)
        pixels, y = pixels[part], y[part]
        if split == "test":
            print(f"{path} has no x_test: its last tenth, {count} images, is held out for evaluation")
    return Images(torch.from_numpy(pixels), torch.from_numpy(y.astype(np.int64)))


def _own_pixels(needs: str, x: np.ndarray, colour: bool) -> np.ndarray:
    """A user's images as bytes, (n, 784) or (n, 3072, channel-major); needs: how a line of error begins."""
    sizes, is_float = [(32, 32, 3)] if colour else [(28, 28), (784,)], x.dtype.kind in "fb"
    takes = " or ".join(f"(n, {', '.join(map(str, size))})" for size in sizes)
    require(x.size > 0 and x.shape[1:] in sizes, f"{needs} of shape {takes}, not {x.shape}")
    require(x.dtype.kind in "fbiu", f"{needs} of whole numbers or floats, not {x.dtype}")
    low, high, top = float(x.min()), float(x.max()), 1 if is_float else 255
    hint = "; divide them by 255" if is_float and low >= 0 and 2 < high <= 255 else ""
    require(low >= 0 and high <= top, f"{needs} from 0 to {top}, not from {low:.9g} to {high:.9g}{hint}")
    pixels = np.rint(x * 255.0).astype(np.uint8) if is_float else x.astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) if colour else pixels).reshape(len(x), -1)


def mnist(data_dir: str, split: str, check: int) -> Images:
    """MNIST's "train" or "test" split from <data_dir>/MNIST/raw; check: whether they must be the published files."""
    count, prefix = {"train": (60_000, "train"), "test": (10_000, "t10k")}[split]
    raw = Path(data_dir, "MNIST", "raw")
    pixels = read_idx(raw / f"{prefix}-images-idx3-ubyte", (2051, count, 28, 28), check)
    labels = read_idx(path := raw / f"{prefix}-labels-idx1-ubyte", (2049, count), check)
    intact(path, labels.max() <= 9, "has labels outside 0 to 9")
    return Images(pixels.reshape(count, 784), labels.long())


def read_idx(path: Path, header: tuple[int, ...], check: int) -> Tensor:
    """The bytes of an idx file, in its shape. Raises UsageError unless it has this header, its size and checksum."""
    with reading(path):
        content = path.read_bytes()
    begin, size = np.array(header, ">i4").tobytes(), len(content)
    intact(path, content.startswith(begin), f"does not begin as that file does (magic number, counts {header})")
    intact(path, size == len(begin) + math.prod(header[1:]), f"is truncated or too long ({size:,} bytes)")
    published = not check or hashlib.sha256(content).hexdigest() == COURSE["mnist_sha256"][path.name]
    intact(path, published, "is not the published file (its SHA-256 differs; --check_data 0 takes it all the same)")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(begin)).reshape(header[1:])


def intact(path: Path, condition: bool, wrong: str) -> None:
    """Raise UsageError, with the cure, unless the condition on the content of a data file holds."""
    cure = f"remove {path.name} and let it be downloaded, or put an intact copy in its place"
    require(condition, f"{path} {wrong}: {cure}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a data file is read into the UsageError of intact."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except OSError as error:
        intact(path, False, f"cannot be read ({error.strerror or error})")
    except Exception as error:
        intact(path, False, f"is truncated or damaged ({type(error).__name__})")


def svhn(data_dir: str, split: str, check: int) -> Images:
    """SVHN's "extra", "train" or "test" split from its .mat file in data_dir, as bytes; the label 10 is the digit 0."""
    from scipy.io import loadmat  # only here: MNIST needs neither
    from torchvision.datasets import SVHN

    path, digest = Path(data_dir, f"{split}_32x32.mat"), hashlib.md5(usedforsecurity=False)
    with reading(path), open(path, "rb") as file:
        while check and (block := file.read(1 << 22)):
            digest.update(block)
        published = not check or digest.hexdigest() == SVHN.split_list[split][2]
        intact(path, published, "is not the published file (its MD5 differs; --check_data 0 takes it all the same)")
        file.seek(0)
        content = loadmat(file)
        pixels, labels = content.pop("X").transpose(3, 2, 1, 0), content["y"].astype(np.int64).flatten()
        fits = pixels.shape == (len(labels), 3, 32, 32) and pixels.dtype == np.uint8
        fits = fits and 0 <= labels.min() <= labels.max() <= 10
        intact(path, fits, "holds no 32 x 32 x 3 byte images with labels 1 to 10")
    pixels = np.ascontiguousarray(pixels)  # no copy: the file keeps each image together, columns first
    for block in np.array_split(pixels, max(1, len(pixels) // 10000)):
        block[...] = block.transpose(0, 1, 3, 2).copy()  # rows first, in place: the extra split fits in memory once
    return Images(torch.from_numpy(pixels.reshape(-1, 3072)), torch.from_numpy(labels % 10))


def drawn_digits(data_dir: str, split: str, colour: bool) -> Images:
    """The drawn digits of a split, as many of each as MNIST has; from data_dir where they were stored before."""
    path = Path(data_dir, f"drawn-{'colour' if colour else 'grey'}-{split}-v{digits.VERSION}.npz")
    try:
        with np.load(path) as stored:
            pixels, labels = stored["pixels"], stored["labels"]
    except Exception:  # absent, damaged or unreadable: it can always be drawn again
        pixels, labels = digits.draw(COURSE["class_counts"][split], {"train": 1, "test": 2}[split], colour)
        buffer = io.BytesIO()
        np.savez(buffer, pixels=pixels, labels=labels)
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs the drawing each time, no more
            write(path, buffer.getvalue())
            for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))

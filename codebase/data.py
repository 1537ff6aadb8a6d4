"""MNIST, SVHN and the drawn digits as tensors on the training device."""

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
from codebase.runtime.files import UsageError, require, write
from codebase.runtime.options import Run

COURSE = json.loads(Path(__file__).with_name("course_subset.json").read_text())


@dataclass(frozen=True)
class Images:
    """A split: pixels (n, 784) or (n, 3072, channel-major) as bytes, labels (n,) as int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def binary(self, index: Tensor) -> Tensor:
        """The images at index, binarised afresh, (batch, 784)."""
        return binarize(self.pixels.index_select(0, index))

    def scaled(self, index: Tensor) -> Tensor:
        """The images at index with values in [0, 1], (batch, 784) or (batch, 3072)."""
        return self.pixels.index_select(0, index) / 255

    def one_hot(self, index: Tensor) -> Tensor:
        """Labels at index as (batch, 10) floats."""
        return torch.nn.functional.one_hot(self.labels[index], 10).float()

    def positions(self, table: list[list[int]]) -> Tensor:
        """Positions in the split of the images that a table of the course names, class after class."""
        labels = self.labels.cpu()
        rows = [torch.nonzero(labels == digit).flatten()[row] for digit, row in enumerate(table)]
        return torch.cat(rows).to(self.labels.device)


def binarize(pixels: Tensor) -> Tensor:
    """Draw x ~ Bernoulli(pixels / 255), exactly: of the 255 equally likely bytes 0 ... 254, `pixels` lie below it."""
    noise = torch.randint(0, 255, pixels.shape, dtype=torch.uint8, device=pixels.device)
    return (noise < pixels).float()


def test_subset(test: Images) -> Tensor:
    """The course's 100 test images, class after class, binarised once and for all: (100, 784) in {0, 1}."""
    grey = test.pixels[test.positions(COURSE["test"])].cpu().numpy().astype(np.float32) / np.float32(255)
    drawn = np.random.RandomState(0).binomial(1, grey)
    return torch.from_numpy(drawn.astype(np.float32)).to(test.pixels.device)


def labelled_set(train: Images) -> Images:
    """The course's 100 labelled training images, ten of each digit."""
    index = train.positions(COURSE["train"])
    return Images(train.pixels[index], train.labels[index])


def load(run: Run, split: str) -> Images:
    """The "train" or "test" split of the run's data set, on its device. Raises UsageError where files are damaged."""
    if run.data == "digits":
        images = drawn_digits(run.data_dir, split, colour=run.real_data == "svhn")
    elif run.data == "svhn":
        images = svhn(run.data_dir, run.split if split == "train" else "test", run.check_data)
    else:
        images = mnist(run.data_dir, split, run.check_data)
    return images.to(run.device)


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
    start, known = 4 * len(header), COURSE["mnist_sha256"]
    begins = np.frombuffer(content[:start], ">i4").tolist() == list(header) if len(content) >= start else False
    intact(path, begins, f"does not begin as that file does (magic number, counts {header})")
    intact(path, len(content) == start + math.prod(header[1:]), f"is truncated or too long ({len(content):,} bytes)")
    published = not check or hashlib.sha256(content).hexdigest() == known[path.name]
    intact(path, published, "is not the published file (its SHA-256 differs; --check_data 0 takes it all the same)")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(header[1:])


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
        there = pixels.shape == (len(labels), 3, 32, 32) and pixels.dtype == np.uint8
        intact(
            path,
            there and 0 <= labels.min() <= labels.max() <= 10,
            "holds no 32 x 32 x 3 byte images with labels 1 to 10",
        )
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

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
from codebase.runtime import download
from codebase.runtime.files import UsageError, is_there, write
from codebase.runtime.options import Run, read_once

COURSE = json.loads(Path(__file__).with_name("course_subset.json").read_text())
COURSE_IMAGES = Path(__file__).with_name("course_images.npz")
OWN_NAMES = ["x", "x_train", "x_test", "y", "y_train", "y_test"]  # in a user's own file
MNIST_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # prefix, images
NOT_PUBLISHED = "is not the published file (its {} differs; --check_data 0 takes it all the same)"
# The numbers that torch.bernoulli compared with probabilities: since torch 1.0, and before.
OLD_RULE = {"2018": torch.float32, "torch-0.4": torch.float64}


@dataclass(frozen=True)
class Images:
    """A split, on one device: pixels as bytes, labels as int64 where -1 says that there is none.

    pixels: (n, 784), or (n, 3072) with all of red first, then green, then blue; labels: (n,).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> "Images":
        """The same images on another device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int) -> "Images":
        """The first images, as many as that or all."""
        return Images(self.pixels[:count], self.labels[:count])

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
        """Whether the course's images can be found here, by their positions in MNIST's split.

        They can in MNIST itself and in the drawn digits that take its place.
        """
        counts = torch.bincount(self.labels.cpu() + 1).tolist()  # first the count of -1, no label
        return counts == [0, *COURSE["class_counts"][split]]

    def positions(self, split: str, each: int = 10) -> Tensor:
        """Where that many images of each digit are, class after class, (10 * each,).

        The course's ten come first, then more in a fixed order. Raises UsageError where there are
        too few of a digit.
        """
        labels = self.labels.cpu()
        has_course = self.has_course(split)
        positions = []
        for digit in range(10):
            members = torch.nonzero(labels == digit).flatten()
            if len(members) < each:
                wanted = f"takes {each} images of each digit"
                there = f"of {digit} there are {len(members)}"
                raise UsageError(f"argument --labels: {wanted}, and {there}")
            course = COURSE[split][digit] if has_course else []
            shuffled = np.random.RandomState(0).permutation(len(members)).tolist()
            rest = [position for position in shuffled if position not in course]
            chosen = (course + rest)[:each]
            positions.append(members[chosen])
        return torch.cat(positions).to(self.labels.device)


def binarize(pixels: Tensor) -> Tensor:
    """Draw x ~ Bernoulli(pixels / 255), exactly.

    Of the 255 equally likely bytes 0 ... 254, as many as the pixel says lie below it.
    """
    noise = torch.randint(0, 255, pixels.shape, dtype=torch.uint8, device=pixels.device)
    return (noise < pixels).float()


def binarize_once(pixels: Tensor) -> Tensor:
    """Binarise a split's images by the course's rule, the same at each call: (n, 784) in {0, 1}."""
    stream = np.random.RandomState(0)
    x = torch.empty(pixels.shape)
    for start in range(0, len(pixels), 1000):  # in blocks, for binomial takes 13 bytes a pixel
        block = pixels[start : start + 1000].cpu().numpy()
        probabilities = block.astype(np.float32) / np.float32(255)
        x[start : start + 1000] = torch.from_numpy(stream.binomial(1, probabilities))
    return x.to(pixels.device)


def test_subset(test: Images, which: str = "subset") -> Tensor:
    """The test images that bounds are of, binarised once and for all: (n, 784) in {0, 1}.

    "subset": the course's 100, class after class, or the first 100 of a split that does not have
    them; "2018": the same, binarised as the course did until about 2020; "torch-0.4": as with the
    random numbers of that day's torch, which compared float32 probabilities with doubles; "all":
    the split.
    """
    if which == "all":
        return binarize_once(test.pixels)
    pixels = test.pixels[:100]
    if test.has_course("test"):
        pixels = test.pixels[test.positions("test")]
    if which == "subset":
        return binarize_once(pixels)
    probabilities = (pixels.cpu() / 255).to(OLD_RULE[which])
    stream = torch.Generator().manual_seed(0)
    x = torch.bernoulli(probabilities, generator=stream)
    return x.float().to(pixels.device)


def labelled_set(train: Images, count: int = 100) -> Images:
    """That many labelled training images, as many of each digit: the course's 100 first."""
    index = train.positions("train", count // 10)
    return Images(train.pixels[index], train.labels[index])


def load(run: Run, split: str) -> Images:
    """The "train" or "test" split of the run's data set, on its device.

    The course's 100 images stand in for MNIST's test split where it is not there and no metric
    needs it. Raises UsageError where files are damaged.
    """
    in_colour = run.real_data == "svhn"
    if run.own_images:
        images = own(run.data, split, in_colour, run.needs_labels)
    elif run.data == "digits":
        images = drawn_digits(run.data_dir, split, in_colour)
    elif run.data == "svhn":
        name = run.split if split == "train" else "test"
        images = svhn(run.data_dir, name, run.check_data)
    elif run.needs_files or download.is_usable(run):
        images = mnist(run.data_dir, split, run.check_data)
    else:
        images = course(split)
    return images.to(run.device)


def has_test_set(run: Run) -> bool:
    """Whether there are images for an FSVAE's evaluation that it was not trained on."""
    if run.data != "svhn":
        return True
    return run.split != "test" and is_there(Path(run.data_dir, "test_32x32.mat"))


def course(split: str) -> Images:
    """The course's 100 images of MNIST's "train" or "test" split, class after class.

    Of the training split they are the labelled ones.
    """
    with np.load(COURSE_IMAGES) as file:
        pixels = file[split].reshape(100, 784)
        labels = file[f"{split}_labels"].astype(np.int64)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


# ---------------------------------------------------------------------------------------------
# A user's own images


def own(path: str, split: str, colour: bool, labelled: bool) -> Images:
    """A user's "train" or "test" images from a .npz file.

    It has images x (or x_train) and, where they are there, labels y (or y_train), x_test and
    y_test. Without x_test the last tenth of x is held out.

    Images: (n, 28, 28), (n, 784), (n, 28, 28, 1) or (n, 1, 28, 28), in colour (n, 32, 32, 3) or
    (n, 3, 32, 32), as whole numbers 0 to 255 or as floats in [0, 1], which are rounded to bytes.
    Labels: (n,) or (n, 1), whole numbers 0 to 9. A model that needs none (labelled False) takes
    others too, and they are not used.

    Raises UsageError where the file is not like that.
    """
    problem = f"argument --data: {path}"
    arrays = read_arrays(path, labelled)
    x_name = name_of(arrays, "x", problem)
    y_name = name_of(arrays, "y", problem)
    train_x = arrays[x_name]
    held_out = "x_test" not in arrays
    if held_out and "y_test" in arrays:
        raise UsageError(f"{problem} has y_test and no images x_test")
    if split == "test" and not held_out:
        x_name = "x_test"
        y_name = "y_test"

    x = arrays[x_name]
    y = arrays.get(y_name)
    pixels = own_pixels(x, colour, f"{problem} should have {x_name}")
    check_dark(path, x_name, x, train_x)
    wrong = wrong_labels(y, len(x), labelled)
    labels = np.full(len(x), -1)
    if not wrong:
        labels = y.reshape(-1).astype(np.int64)
    elif labelled:
        raise UsageError(f"{problem} should have {y_name}{wrong}")
    elif y is not None and split == "test":  # whose labels the latent map shows
        print(f"warning: {y_name} of {path} is not labels 0 to 9 and is not used")
    images = Images(torch.from_numpy(pixels), torch.from_numpy(labels))
    return hold_out(images, split, path) if held_out else images


def hold_out(images: Images, split: str, path: str) -> Images:
    """The last tenth of a file's images for "test", at least one of them, or the others."""
    if len(images) < 2:
        raise UsageError(f"argument --data: {path} has one image: none is left to evaluate on")
    count = max(1, len(images) // 10)
    if split == "train":
        return Images(images.pixels[:-count], images.labels[:-count])
    said = f"its last tenth, {count} images, is held out for evaluation"
    print(f"{path} has no x_test: {said}")
    return Images(images.pixels[-count:], images.labels[-count:])


def read_arrays(path: str, labelled: bool) -> dict[str, np.ndarray]:
    """The images and labels that a .npz file holds, by name. Raises UsageError where it cannot.

    labelled: whether the model needs labels.
    """
    problem = f"argument --data: {path}"
    stored = io.BytesIO(read_once(path)[0])
    try:
        with np.load(stored, allow_pickle=False) as file:
            names = [name for name in OWN_NAMES if name in file]
            if "x" not in names and "x_train" not in names:
                listed = [f"{name} {describe(file, name)}" for name in file]
                holds = ", ".join(listed[:10]) if listed else "nothing"
                raise UsageError(f"{problem} has no images x or x_train; it holds {holds}")
            arrays = {name: read_array(file, name) for name in names}
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{problem} cannot be read: truncated or no .npz file") from error
    for name, array in arrays.items():
        if array.dtype == object and (labelled or name.startswith("x")):
            raise UsageError(f"{problem} holds pickled objects, which are not read")
    return arrays


def read_array(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of a file, empty where it has pickled objects: reading these could run code."""
    try:
        return np.asarray(file[name])
    except ValueError as error:
        if "Object arrays" in str(error):
            return np.empty(0, object)
        raise


def describe(file: np.lib.npyio.NpzFile, name: str) -> str:
    """The shape of an array, for a line of error."""
    array = read_array(file, name)
    return "(objects)" if array.dtype == object else str(array.shape)


def name_of(arrays: dict[str, np.ndarray], short: str, problem: str) -> str:
    """The name of the training images x or labels y in this file: x, or Keras's x_train."""
    long = f"{short}_train"
    if short in arrays and long in arrays:
        raise UsageError(f"{problem} has both {short} and {long}: keep the one that is meant")
    return long if long in arrays else short


def own_pixels(x: np.ndarray, colour: bool, needs: str) -> np.ndarray:
    """A user's images as bytes, (n, 784), or (n, 3072) as Images has them.

    needs: how a line of error begins. Raises UsageError where they are of another shape, kind or
    range.
    """
    if colour:
        shapes = [(32, 32, 3), (3, 32, 32)]
        takes = "(n, 32, 32, 3)"
    else:
        shapes = [(28, 28), (784,), (28, 28, 1), (1, 28, 28)]
        takes = "(n, 28, 28) or (n, 784)"
    if x.size == 0 or x.shape[1:] not in shapes:
        raise UsageError(f"{needs} of shape {takes}, not {x.shape}")
    if x.dtype.kind not in "fbiu":
        raise UsageError(f"{needs} of whole numbers or floats, not {x.dtype}")

    is_float = x.dtype.kind in "fb"
    top = 1 if is_float else 255
    low = float(x.min())
    high = float(x.max())
    if not (low >= 0 and high <= top):  # nor is NaN
        hint = ""
        if is_float and low >= 0 and 2 < high <= 255:
            hint = "; divide them by 255"
        if -1 <= low < -0.5 and 0.5 < high <= 1:
            hint = "; if they are scaled to -1 to 1, add 1 and divide by 2"
        raise UsageError(f"{needs} from 0 to {top}, not from {low:.9g} to {high:.9g}{hint}")

    levels = np.rint(x * 255.0) if is_float else x
    pixels = levels.astype(np.uint8)
    if x.shape[1:] == (32, 32, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels).reshape(len(x), -1)


def check_dark(path: str, name: str, x: np.ndarray, train_x: np.ndarray) -> None:
    """Refuse images of whole numbers 0 and 1; where the training images are bright, warn only."""
    if not is_dark(x):
        return
    more = "with more than black: 0 and 1 are levels of 255; store them as floats"
    wanted = f"{path} should have {name} {more}"
    if is_dark(train_x) or train_x.dtype.kind not in "iu":
        raise UsageError(f"argument --data: {wanted}")
    print(f"warning: {wanted}, if that is what they mean")


def is_dark(x: np.ndarray) -> bool:
    return x.dtype.kind in "iu" and x.max(initial=0) <= 1


def wrong_labels(y: np.ndarray | None, count: int, labelled: bool) -> str:
    """What is wrong with y as the labels of that many images, for a line of error, or ""."""
    if y is None:
        return ", the labels, which this model needs"
    if y.shape not in ((count,), (count, 1)) or y.dtype.kind not in "iu":
        return f" of shape ({count},) with whole numbers, not {y.shape} of {y.dtype}"
    lowest = 0 if labelled else -1  # -1 says that an image has no label
    if y.min() < lowest or y.max() > 9:
        return f" with labels 0 to 9, not {y.min()} to {y.max()}"
    return ""


# ---------------------------------------------------------------------------------------------
# MNIST and SVHN


def mnist(data_dir: str, split: str, check: int) -> Images:
    """MNIST's "train" or "test" split from <data_dir>/MNIST/raw.

    check: whether they must be the published files. Raises UsageError where they are damaged.
    """
    prefix, count = MNIST_FILES[split]
    raw = Path(data_dir, "MNIST", "raw")
    images_path = raw / f"{prefix}-images-idx3-ubyte"
    labels_path = raw / f"{prefix}-labels-idx1-ubyte"
    pixels = read_idx(images_path, (2051, count, 28, 28), check)
    labels = read_idx(labels_path, (2049, count), check)
    if labels.max() > 9:
        raise damaged(labels_path, "has labels outside 0 to 9")
    return Images(pixels.reshape(count, 784), labels.long())


def read_idx(path: Path, header: tuple[int, ...], check: int) -> Tensor:
    """The bytes of an idx file, in its shape.

    Raises UsageError unless it has this header (magic number and counts), its size and, where check
    says so, the published checksum.
    """
    with reading(path):
        stored = path.read_bytes()
    begin = np.array(header, ">i4").tobytes()
    if not stored.startswith(begin):
        wrong = f"does not begin as that file does (magic number, counts {header})"
        raise damaged(path, wrong)
    if len(stored) != len(begin) + math.prod(header[1:]):
        raise damaged(path, f"is truncated or too long ({len(stored):,} bytes)")
    if check and hashlib.sha256(stored).hexdigest() != COURSE["mnist_sha256"][path.name]:
        raise damaged(path, NOT_PUBLISHED.format("SHA-256"))
    values = torch.frombuffer(bytearray(stored), dtype=torch.uint8, offset=len(begin))
    return values.reshape(header[1:])


def svhn(data_dir: str, split: str, check: int) -> Images:
    """SVHN's "extra", "train" or "test" split from its .mat file in data_dir, as bytes.

    In the file the digit 0 has the label 10. Raises UsageError where the file is damaged.
    """
    from scipy.io import loadmat  # only here: MNIST needs neither
    from torchvision.datasets import SVHN, utils

    path = Path(data_dir, f"{split}_32x32.mat")
    with reading(path), open(path, "rb") as file:
        if check and not utils.check_md5(path, SVHN.split_list[split][2]):
            raise damaged(path, NOT_PUBLISHED.format("MD5"))
        arrays = loadmat(file)
        pixels = arrays.pop("X").transpose(3, 2, 1, 0)
        labels = arrays["y"].astype(np.int64).flatten()
        fits = pixels.shape == (len(labels), 3, 32, 32) and pixels.dtype == np.uint8
        if not fits or labels.min() < 0 or labels.max() > 10:
            raise damaged(path, "holds no 32 x 32 x 3 byte images with labels 1 to 10")
    # The file keeps each image together, columns first: this makes no copy.
    pixels = np.ascontiguousarray(pixels)
    # Rows first, in blocks and in place, so that the large extra split is in memory once.
    for start in range(0, len(pixels), 10_000):
        block = pixels[start : start + 10_000]
        block[...] = block.transpose(0, 1, 3, 2).copy()
    return Images(torch.from_numpy(pixels.reshape(-1, 3072)), torch.from_numpy(labels % 10))


def damaged(path: Path, wrong: str) -> UsageError:
    """The error that says what is wrong with a data file, and the cure."""
    cure = f"remove {path.name} and let it be downloaded, or put an intact copy in its place"
    return UsageError(f"{path} {wrong}: {cure}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a data file is read into a line about a damaged file."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise damaged(path, f"is truncated or damaged ({type(error).__name__})") from error


# ---------------------------------------------------------------------------------------------
# Drawn digits


def drawn_digits(data_dir: str, split: str, colour: bool) -> Images:
    """The drawn digits of a split, as many of each as MNIST has.

    They are stored in data_dir when they are drawn, and read from there afterwards.
    """
    kind = "colour" if colour else "grey"
    path = Path(data_dir, f"drawn-{kind}-{split}-v{digits.VERSION}.npz")
    try:
        with np.load(path) as stored:
            pixels = stored["pixels"]
            labels = stored["labels"]
    except Exception:  # absent, damaged or unreadable: it can always be drawn again
        seed = {"train": 1, "test": 2}[split]
        pixels, labels = digits.draw(COURSE["class_counts"][split], seed, colour)
        store_drawn(path, pixels, labels)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def store_drawn(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Store them; a folder that cannot be written to costs the drawing each time, no more."""
    buffer = io.BytesIO()
    np.savez(buffer, pixels=pixels, labels=labels)
    with contextlib.suppress(OSError):
        write(path, buffer.getvalue())
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)

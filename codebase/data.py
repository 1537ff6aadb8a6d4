"""MNIST, SVHN and the drawn digits as tensors on the training device."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codebase.checkpoint import Refused

COURSE = json.loads(Path(__file__).with_name("course_subset.json").read_text())
PATIENCE = 15  # seconds without a byte after which a download is given up


@dataclass
class Images:
    """A split: pixels (n, 784) or (n, 3072, channel-major) as bytes, labels (n,) as int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "Images":
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


def load(args, split: str) -> Images:
    """The "train" or "test" split that args.data names, on args.device."""
    if args.data == "digits":
        from codebase import digits

        return digits.load(args.data_dir, split, "colour" if args.model == "fsvae" else "grey").to(args.device)
    images = svhn(args, split) if args.data == "svhn" else mnist(args, split)
    return images.to(args.device)


def mnist(args, split: str) -> Images:
    """MNIST as torchvision reads it from <data_dir>/MNIST/raw, after its files have been checked."""
    import torchvision

    prefix, count = ("train", 60000) if split == "train" else ("t10k", 10000)
    raw = Path(args.data_dir, "MNIST", "raw")
    images, labels = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
    check_idx(images, (2051, count, 28, 28), args.check_data)
    check_idx(labels, (2049, count), args.check_data)
    try:
        data = torchvision.datasets.MNIST(args.data_dir, train=split == "train")
    except RuntimeError as error:  # one of the other split's files
        raise Refused(
            f"{raw} holds not all four files of MNIST: put {', '.join(COURSE['mnist_sha256'])} there"
        ) from error
    found = torch.bincount(data.targets, minlength=10).tolist()
    if len(found) > 10 or (args.check_data and found != COURSE["class_counts"][split]):
        raise Refused(f"{labels} has labels outside 0 to 9: {cure(labels)}")
    return Images(data.data.reshape(count, 784), data.targets.long())


def check_idx(path: Path, header: tuple[int, ...], checksum: int) -> None:
    """Raise Refused unless path is an idx file with this header and as many bytes, and with the published checksum."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): {cure(path)}") from error
    if tuple(np.frombuffer(content[: 4 * len(header)], ">i4")) != header:
        raise Refused(f"{path} does not begin as that file does (magic number, counts {header}): {cure(path)}")
    if len(content) != 4 * len(header) + math.prod(header[1:]):
        raise Refused(f"{path} is truncated or too long ({len(content):,} bytes): {cure(path)}")
    if checksum and hashlib.sha256(content).hexdigest() != COURSE["mnist_sha256"][path.name]:
        raise Refused(f"{path} is not the published file (its SHA-256 differs): {cure(path)}, or use --check_data 0")


def cure(path: Path) -> str:
    return f"remove {path.name} and let it be downloaded, or put an intact copy in its place"


def svhn(args, split: str) -> Images:
    """SVHN as torchvision reads it from <data_dir>/<split>_32x32.mat, kept as bytes, labels 0 to 9."""
    import torchvision

    class Unchecked(torchvision.datasets.SVHN):  # checked here instead, with an error that says what to do
        def _check_integrity(self):
            return True

    name = args.split if split == "train" else "test"
    path = Path(args.data_dir, f"{name}_32x32.mat")
    try:
        with open(path, "rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while args.check_data and (block := file.read(1 << 22)):
                digest.update(block)
        if args.check_data and digest.hexdigest() != Unchecked.split_list[name][2]:
            raise Refused(f"{path} is not the published file (its MD5 differs): {cure(path)}, or use --check_data 0")
        data = Unchecked(args.data_dir, split=name)
        pixels, labels = data.data.transpose(0, 1, 3, 2), torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror or error}): {cure(path)}") from error
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{path} is truncated, or no .mat file with X and y: {cure(path)}") from error
    if pixels.shape != (len(labels), 3, 32, 32) or pixels.dtype != np.uint8 or labels.min() < 0 or labels.max() > 9:
        raise Refused(f"{path} holds no 32 x 32 x 3 byte images with labels 1 to 10: {cure(path)}")
    pixels = np.ascontiguousarray(pixels)  # no copy: the file keeps each image together, columns first
    for block in np.array_split(pixels, max(1, len(pixels) // 10000)):
        block[...] = block.transpose(0, 1, 3, 2).copy()  # rows first, in place: the extra split fits in memory once
    return Images(torch.from_numpy(pixels.reshape(-1, 3072)), labels)


def download(data: str, data_dir: str, paths: list[Path]) -> str | None:
    """Fetch the missing files through torchvision, in a process of its own that is ended after PATIENCE silent seconds.

    Files arrive whole or not at all. Returns None, or in a few words why they could not be had.
    """
    missing = [path for path in paths if not path.exists()]
    code = "import sys; from torchvision import datasets; "
    if data == "mnist":
        code += "datasets.MNIST(sys.argv[1], download=True)"
    else:
        splits = [path.name.split("_")[0] for path in missing]
        code += f"[datasets.SVHN(sys.argv[1], split=split, download=True) for split in {splits}]"
    Path(data_dir).mkdir(exist_ok=True)
    for left_over in Path(data_dir).glob(".download-*"):  # of a process that was killed long ago
        if time.time() - left_over.stat().st_mtime > 86400:
            shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            reason = _wait(process, folder)
        finally:
            process.kill()
            process.wait()
        if reason:
            return reason
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / path.relative_to(data_dir), path)
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen, folder: Path) -> str | None:
    """Wait while bytes arrive in the folder; return None at success, else what went wrong."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() > since + PATIENCE:
            return f"no answer for {PATIENCE} seconds"
    error = process.stderr.read().decode(errors="replace").strip().splitlines()
    return None if process.returncode == 0 else (error or ["it failed"])[-1]

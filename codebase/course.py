"""The course's own names for loading, data and evaluation, for its scripts and notebooks.

codebase.utils has all of them too. Signatures are those of autumn 2021.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codebase import data, evaluate
from codebase.checkpoint import load_model_by_name, save_model_by_name
from codebase.models.ssvae import SSVAE
from codebase.models.vae import BinaryVAE
from codebase.runtime import download
from codebase.runtime.files import UsageError, is_there
from codebase.runtime.options import Run

__all__ = [
    "evaluate_classifier",
    "evaluate_lower_bound",
    "get_mnist_data",
    "get_svhn_data",
    "load_model_by_name",
    "save_model_by_name",
]

DATA_DIR = "data"  # in the current folder, where the scripts look too

Pair = tuple[Tensor, Tensor]


def get_mnist_data(
    device: torch.device | str, use_test_subset: bool = True
) -> tuple[DataLoader, Pair, Pair]:
    """MNIST from data/, downloaded where it is missing: train_loader, (xl, yl), (x_test, y_test).

    train_loader: shuffled batches, on the CPU, of grey images (100, 1, 28, 28) in [0, 1] and their
    labels (100,). xl, yl: the course's 100 test images, binarised once, (100, 784), with one-hot
    labels (100, 10); without use_test_subset its 100 labelled training images, in grey.
    x_test, y_test: the whole test split in grey, (10000, 784), with labels (10000,).
    Both pairs are on the device. Raises UsageError where files cannot be had or are damaged.
    """
    run = Run(real_data="mnist", data_dir=DATA_DIR, train=1)
    have_files(run, download.files(run))
    train_set = data.mnist(DATA_DIR, "train", check=1)
    test_set = data.mnist(DATA_DIR, "test", check=1)
    if use_test_subset:
        chosen = data.course("test")
        xl = data.binarize_once(chosen.pixels)
    else:
        chosen = data.course("train")
        xl = chosen.pixels / 255
    yl = F.one_hot(chosen.labels, 10).float()
    x_test = test_set.pixels.to(device) / 255
    y_test = test_set.labels.to(device)
    return loader(train_set, (1, 28, 28)), (xl.to(device), yl.to(device)), (x_test, y_test)


def get_svhn_data(
    device: torch.device | str,
) -> tuple[DataLoader, tuple[None, None], tuple[None, None]]:
    """SVHN's extra split from data/, as train_loader, (None, None), (None, None).

    It is downloaded where it is missing, together with the test split. train_loader: shuffled
    batches of 100, on the CPU, the last one smaller: images (batch, 3, 32, 32) in [0, 1] and their
    labels (batch,); nothing is put on the device. Raises UsageError where the file cannot be had or
    is damaged.
    """
    run = Run(real_data="svhn", split="extra", data_dir=DATA_DIR, train=1)
    have_files(run, [Path(DATA_DIR, "extra_32x32.mat")])
    train_set = data.svhn(DATA_DIR, "extra", check=1)
    return loader(train_set, (3, 32, 32)), (None, None), (None, None)


def have_files(run: Run, needed: list[Path]) -> None:
    """Say where a data set is looked for, and download what is missing of it.

    Raises UsageError, which says what to do, where a file that is needed cannot be had.
    """
    name = run.real_data.upper()
    print(f"{name}: looking in {Path(DATA_DIR).resolve()}")
    if all(is_there(path) for path in needed):
        return
    reason = download.fetch(run)
    missing = [str(path) for path in needed if not is_there(path)]
    if missing:
        by_hand = f"put these files in place by hand: {', '.join(missing)}"
        raise UsageError(f"{name} cannot be downloaded to {DATA_DIR} ({reason}); {by_hand}")


class GreyOrColour(Dataset):
    """Images with pixels in [0, 1], in the shape of a picture, and their labels, one at a time.

    Pixels stay bytes until they are asked for: in floats SVHN's extra split would take 6.5 GB.
    """

    def __init__(self, images: data.Images, shape: tuple[int, int, int]):
        self.images = images
        self.shape = shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        x = self.images.pixels[index].reshape(self.shape) / 255
        return x, self.images.labels[index]


def loader(images: data.Images, shape: tuple[int, int, int]) -> DataLoader:
    return DataLoader(GreyOrColour(images, shape), batch_size=100, shuffle=True)


def evaluate_lower_bound(
    model: BinaryVAE, labeled_test_subset: tuple[Tensor, Tensor | None], run_iwae: bool = True
) -> None:
    """Print the NELBO line of a VAE or GMVAE and, with run_iwae, the four IWAE lines.

    labeled_test_subset: the pair (xl, yl) of get_mnist_data, of which only the images are used.
    """
    xl, _ = labeled_test_subset
    ms = [1, 10, 100, 1000] if run_iwae else []
    evaluate.print_bounds(evaluate.bounds(model, xl.flatten(1), ms))


def evaluate_classifier(model: SSVAE, test_set: Pair) -> None:
    """Print the share of the images that the classifier of an SSVAE is right about.

    test_set: the pair (x_test, y_test) of get_mnist_data. Raises ValueError unless y_test is (n,).
    """
    x_test, y_test = test_set
    if y_test.shape != (len(x_test),):
        raise ValueError(f"y_test must be digits of shape (n,), not {tuple(y_test.shape)}")
    with evaluate.eval_mode(model):
        predicted = [model.cls(x.flatten(1)).argmax(-1) for x in x_test.split(evaluate.ROWS)]
    right = (torch.cat(predicted) == y_test).sum().item()
    evaluate.print_accuracy(right / len(x_test))

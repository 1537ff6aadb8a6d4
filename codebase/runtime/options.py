"""From flags to a frozen Run. Standard library only: --help and a bad command line are answered before torch loads."""

import argparse
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from codebase.runtime.files import UsageError, require

PLAIN = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)  # of what int and float read


def number(kind: type, low: int, high: int) -> Callable[[str], int | float]:
    """A check for numbers of a kind, int or float, from low to high."""

    def check(text: str) -> int | float:
        with suppress(ValueError):
            if PLAIN.fullmatch(text) and low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"takes {what} from {low} to {high}, not {text[:40]!r}")

    return check


def folder(text: str) -> str:
    """A check for a folder, or a name for a new one in a folder that is there; nothing is made yet."""
    path = Path(text)
    there, name = os.path.exists(path), os.fsencode(path.name)
    if not text or not os.path.isdir(path if there else path.parent) or len(name) > 255 or b"\0" in name:
        wrong = "is a file" if there else "neither exists nor can be made"
        raise argparse.ArgumentTypeError(f"takes a folder, and {text[:200]!r} {wrong}")
    return text


SWITCH = number(int, 0, 1)


def flag(default: Any, check: Callable | list[str], text: str, *, weights: bool = False) -> Any:
    """A field of a Run that is a flag: its default, its check or its choices, and its line in --help.

    weights: whether it fixes the weights of a run, so that going on with another value is refused. A default that is
    a tuple makes a flag that takes several values.
    """
    return field(default=default, metadata={"check": check, "text": text, "weights": weights})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, with data set, device and seed settled. A script adds its flags and stem(), the start of its name."""

    model: ClassVar[str]
    real_data: ClassVar[str] = "mnist"
    needs_labels: ClassVar[bool] = False
    test: ClassVar[str] = "subset"  # the test images of the bounds

    iter_max: int = flag(20_000, number(int, 1, 10**9), "training steps; with --train 0, the checkpoint to load")
    iter_save: int = flag(10_000, number(int, 1, 10**9), "steps between checkpoints")
    batch_size: int = flag(100, number(int, 1, 60_000), "images per step, over all processes together", weights=True)
    run: int = flag(0, number(int, 0, 999_999), "number of the run, part of its name")
    seed: int | None = flag(None, number(int, 0, 2**31), "seed of all randomness, or the run's number", weights=True)
    train: int = flag(1, SWITCH, "1 trains (or goes on, or evaluates what is finished), 0 loads and evaluates")
    overwrite: int = flag(0, SWITCH, "1 starts over and deletes what the run has stored")
    lr: float = flag(0.001, number(float, 1e-9, 10), "learning rate of Adam", weights=True)
    device: str = flag("auto", ["auto", "cpu", "cuda", "gpu", "mps"], "where to compute")
    compile: str = flag("auto", ["auto", "0", "1"], "1 compiles the training step; auto: where that pays")
    data: str = flag("auto", str, "auto (the real data, or else drawn digits), mnist, svhn, digits, or a .npz file")
    data_dir: str = flag("data", folder, "folder of the data sets")
    check_data: int = flag(1, SWITCH, "0 accepts data files that are not the published ones")

    def __post_init__(self):
        trains = "argument --overwrite: 1 trains anew and --train 0 does not train; give one of them"
        require(self.train or not self.overwrite, trains)
        file, known = Path(self.data), ("auto", self.real_data, "digits")
        takes = f"argument --data: takes {', '.join(known)} or a file that ends in .npz, not {self.data[:40]!r}"
        require(self.data in known or self.own_images, takes)
        if self.own_images:
            names = "gives the run its name: takes up to 100 bytes of letters, digits, - _ . and not digits.npz"
            named = file.stem != "digits" and re.fullmatch(r"[\w.-]+", file.stem) and len(os.fsencode(file.stem)) <= 100
            require(bool(named), f"argument --data: {file.name[:40]} {names}")
            require(os.path.isfile(self.data), f"argument --data: there is no file {self.data[:100]}")

    @property
    def own_images(self) -> bool:
        """Whether the images are a user's, in the file --data."""
        return self.data.endswith(".npz")

    @property
    def needs_files(self) -> bool:
        """Whether the real data set must be there; the course's 100 test images come with the package."""
        return bool(self.train) or self.real_data != "mnist" or self.test == "all"

    @property
    def series(self) -> str:
        """The run's name without its number."""
        rate = f"_lr={self.lr:g}" if self.lr != 0.001 else ""
        return f"model={self.stem()}{rate}" + ("" if self.data == self.real_data else f"_data={Path(self.data).stem}")

    @property
    def name(self) -> str:
        return f"{self.series}_run={self.run:04d}"

    def settings(self) -> dict[str, Any]:
        """What fixes the weights, besides the number of steps."""
        made = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["weights"]}
        data = f"a file of SHA-256 {content(self.data)[1]}" if self.own_images else self.data
        return {"model": self.model} | made | {"data": data}


@functools.lru_cache(1)
def content(path: str) -> tuple[bytes, str]:
    """The bytes of a file of images and their SHA-256, read once: those that were checked are those that are used."""
    try:
        stored = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"argument --data: {path} cannot be read ({error.strerror})") from error
    return stored, hashlib.sha256(stored).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BinaryRun(Run):
    """The flags that VAE and GMVAE share."""

    z: int = flag(10, number(int, 1, 10_000), "dimensions of the latent z", weights=True)
    beta: float = flag(1.0, number(float, 0, 10**6), "weight of the KL term in the training loss", weights=True)
    train_iw: int = flag(1, number(int, 1, 1000), "samples m of the bound L_m that is trained on", weights=True)
    iw: tuple[int, ...] = flag((1, 10, 100, 1000), number(int, 1, 10**7), "samples m of --train 0's IWAE-m bounds")
    test: str = flag(
        "subset",
        ["subset", "2018", "torch-0.4", "all"],
        "test images of the bounds: the course's 100, by its present draw, its old one, or that of torch 0.4, or all",
    )

    def __post_init__(self):
        super().__post_init__()
        both = "argument --train_iw: the bound L_m has no weight of the KL term; give --train_iw or --beta"
        require(self.train_iw == 1 or self.beta == 1, both)

    def weighted(self) -> str:
        """What the training loss adds to the name."""
        beta = f"_beta={self.beta:g}" if self.beta != 1 else ""
        return beta + (f"_train_iw={self.train_iw}" if self.train_iw > 1 else "")


def parse(kind: type[Run], description: str, argv: list[str] | None) -> dict[str, Any]:
    """Parse and check a command line for runs of that kind; a wrong one ends the program with one line, exit code 2."""

    def error(message: str) -> None:
        speak = os.environ.get("RANK", "0") == "0"  # one line, by one process; torchrun ends it when another one ends
        time.sleep(0 if speak else 1)
        parser.exit(2, f"{parser.prog}: error: {message} (see {parser.prog} --help)\n" if speak else None)

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = error
    parser.epilog = "Writes checkpoints/ and logs/ here. Several processes: torchrun --nproc_per_node=2 -- %(prog)s"
    common = {item.name for item in fields(Run)}
    for item in sorted(fields(kind), key=lambda item: item.name in common):  # the script's own first
        check, several = item.metadata["check"], isinstance(item.default, tuple)
        words = {"choices": check} if isinstance(check, list) else {"type": check}
        words |= {"nargs": "+"} if several else {}
        shown = " ".join(map(str, item.default)) if several else item.default
        text = item.metadata["text"] + (f" (default: {shown})" if shown is not None else "")
        parser.add_argument(f"--{item.name}", default=item.default, help=text, **words)
    text = "number of runs, from --run on, and a summary of them (default: 1)"
    parser.add_argument("--runs", default=1, type=number(int, 1, 1_000), help=text)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    here = "this folder cannot be written to: checkpoints/ and logs/ are made here; change to another"
    try:
        require(os.access(os.getcwd(), os.W_OK), here)
        kind(**{name: value for name, value in values.items() if name != "runs"})
    except UsageError as contradiction:
        parser.error(str(contradiction))
    except OSError:  # the folder was removed
        parser.error(here)
    return values

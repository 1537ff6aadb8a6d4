"""From a command line to a frozen Run.

Standard library only, so that --help and a wrong command line are answered before torch is loaded.
"""

import argparse
import functools
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from codebase.runtime.files import UsageError, require

# What fixes the weights of every run: it is stored in config.json and checked when a run resumes.
# A script adds its own flags to this list.
FIX_WEIGHTS = ["batch_size", "seed", "lr"]


class Run(SimpleNamespace):
    """The flags of one run by name, and what follows from them.

    A script adds stem, the start of the run's name ("vae_z=10"); real_data, "mnist" or "svhn";
    needs_labels; fix_weights, the flags that fix the weights; and words, the command line.
    A run is never written to: `changed` makes another one.
    """

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"a run is never written to: use run.changed({name}=...)")

    def changed(self, **changes: Any) -> "Run":
        return Run(**{**vars(self), **changes})

    def numbered(self, number: int) -> "Run":
        """The run of that number in a series that begins with this one; runs: how many are left."""
        done = number - self.run
        return self.changed(run=number, seed=self.seed + done, runs=self.runs - done)

    def of_series(self) -> list["Run"]:
        """The runs of the series that begins with this one."""
        return [self.numbered(number) for number in range(self.run, self.run + self.runs)]

    @property
    def own_images(self) -> bool:
        """Whether the images are a user's, in the file --data."""
        return self.data.endswith(".npz")

    @property
    def needs_files(self) -> bool:
        """Whether the real data set must be there: 100 test images of MNIST come with the code."""
        return self.train == 1 or self.real_data != "mnist" or self.test == "all"

    @property
    def series(self) -> str:
        """The run's name without its number."""
        name = f"model={self.stem}"
        if self.lr != 0.001:
            name += f"_lr={self.lr:g}"
        if self.schedule != "constant":
            name += f"_schedule={self.schedule}"
        if self.data != self.real_data:
            name += f"_data={Path(self.data).stem}"
        return name

    @property
    def name(self) -> str:
        return f"{self.series}_run={self.run:04d}"

    def settings(self) -> dict[str, Any]:
        """What fixes the weights, besides the number of steps; on a schedule that number too."""
        settings = {"model": self.stem.partition("_")[0]}
        for flag in self.fix_weights:
            settings[flag] = getattr(self, flag)
        if self.schedule != "constant":
            settings["schedule"] = self.schedule
            settings["iter_max"] = self.iter_max
        settings["data"] = self.data
        if self.own_images:
            settings["data"] = f"a file of SHA-256 {read_once(self.data)[1]}"
        return settings

    def command(self, without: list[str], **flags: int) -> str:
        """The command line, as it can be pasted, without some flags and with others in the end.

        The options of torchrun are not known here: "..." stands for them.
        """
        words = list(self.words)
        for position in range(len(words) - 1, 0, -1):
            flag, equals, _ = words[position].partition("=")
            if flag in without:
                del words[position : position + (1 if equals else 2)]
        for flag, value in flags.items():
            words += [f"--{flag}", str(value)]
        program = ["torchrun", "...", "--"] if of_torchrun() else ["python"]
        return shlex.join([*program, *words])


@functools.lru_cache(1)
def read_once(path: str) -> tuple[bytes, str]:
    """The bytes of a file of images and their SHA-256: what was checked is what is used."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"argument --data: {path} cannot be read ({error.strerror})") from error
    return content, hashlib.sha256(content).hexdigest()


def of_torchrun() -> bool:
    """Whether torchrun has started several processes, of which this is one."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def speaks_for_all() -> bool:
    """Whether this process is the only one, or the first of those that torchrun started."""
    torchrun = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    if not all(os.environ.get(variable, "").strip() for variable in torchrun):
        return True
    rank = os.environ["RANK"]
    return not rank.isdecimal() or int(rank) == 0 or os.environ["WORLD_SIZE"] == "1"


# ---------------------------------------------------------------------------------------------
# Checks of a flag's value


def whole(low: int, high: int, *words: str) -> Callable[[str], int | str]:
    """A check for whole numbers from low to high, or one of some words."""
    takes = " or ".join([*words, f"a whole number from {low} to {high}"])

    def check(text: str) -> int | str:
        if text in words:
            return text
        if re.fullmatch(r"-?[0-9]{1,40}", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"takes {takes}, not {text[:40]!r}")

    return check


def real(low: float, high: float) -> Callable[[str], float]:
    """A check for numbers from low to high, as 0.001, 1e-3 or 1e+2."""

    def check(text: str) -> float:
        digits = r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
        if re.fullmatch(digits, text) and low <= float(text) <= high:
            return float(text)
        raise argparse.ArgumentTypeError(f"takes a number from {low} to {high}, not {text[:40]!r}")

    return check


def folder(text: str) -> str:
    """A check for a folder, or a name for a new one in a folder that is there; none is made yet."""
    path = Path(text)
    name = os.fsencode(path.name)
    wrong = ""
    if os.path.exists(path) and not os.path.isdir(path):
        wrong = "is a file"
    elif not text or b"\0" in name or len(name) > 255:
        wrong = "neither exists nor can be made"
    elif not os.path.isdir(path) and not os.path.isdir(path.parent):
        wrong = "neither exists nor can be made"
    if wrong:
        raise argparse.ArgumentTypeError(f"takes a folder, and {text[:200]!r} {wrong}")
    return text


def check_data(run: Run) -> None:
    """Raise UsageError unless --data names a data set of the model, or a file that can name one."""
    known = ["auto", run.real_data, "digits"]
    if not run.own_images:
        takes = f"takes {', '.join(known)} or a file that ends in .npz, not {run.data[:40]!r}"
        require(run.data in known, f"argument --data: {takes}")
        return
    stem = Path(run.data).stem
    named = re.fullmatch(r"[\w.-]+", stem) and stem != "digits" and len(os.fsencode(stem)) <= 100
    takes = "gives the run its name: takes up to 100 bytes of letters, digits, - _ . (not digits)"
    require(bool(named), f"argument --data: {Path(run.data).name[:40]} {takes}")
    require(os.path.isfile(run.data), f"argument --data: there is no file {run.data[:100]}")


# ---------------------------------------------------------------------------------------------
# The parser


class Parser(argparse.ArgumentParser):
    """An argparse parser with the flags that all scripts share; a script adds its own to a group.

    real_data: the data set that auto stands for; iter_max: the default number of training steps.
    """

    def __init__(self, description: str, real_data: str = "mnist", iter_max: int = 20_000):
        super().__init__(
            description=description,
            epilog="Writes to checkpoints/ and logs/ in this folder. "
            "Several processes: torchrun --nproc_per_node=2 -- %(prog)s",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.real_data = real_data
        self.model = self.add_argument_group("model")
        self.training = self.add_argument_group("training")
        self.data = self.add_argument_group("data")
        self.evaluation = self.add_argument_group("evaluation")
        self.add_training_flags(iter_max)
        self.add_data_flags()

    def add_training_flags(self, iter_max: int) -> None:
        add = self.training.add_argument
        text = "training steps; with --train 0, the checkpoint to load"
        add("--iter_max", type=whole(1, 10**9), default=iter_max, help=text)
        text = "1 trains, resumes, or evaluates a finished run; 0 loads and evaluates"
        add("--train", type=whole(0, 1), default=1, help=text)
        add("--run", type=whole(0, 999_999), default=0, help="number of the run, part of its name")
        text = "number of runs, from --run on, and a summary of them"
        add("--runs", type=whole(1, 1000), default=1, help=text)
        text = "runs at a time, each in a process of its own; auto: one per core, or 1 on a GPU"
        add("--jobs", type=whole(1, 1000, "auto"), default=1, help=text)
        text = "1 deletes what the run has stored and starts over"
        add("--overwrite", type=whole(0, 1), default=0, help=text)
        text = "seed of weights, order and noise; without it, the number of the run"
        add("--seed", type=whole(0, 2**31), default=argparse.SUPPRESS, help=text)
        text = "images per step, over all processes together"
        add("--batch_size", type=whole(1, 60_000), default=100, help=text)
        add("--lr", type=real(1e-9, 10), default=0.001, help="learning rate of Adam")
        text = "learning rate over the steps: constant, or along half a cosine to 0 at --iter_max"
        add("--schedule", choices=["constant", "cosine"], default="constant", help=text)
        text = "steps between checkpoints"
        add("--iter_save", type=whole(1, 10**9), default=10_000, help=text)
        devices = ["auto", "cpu", "cuda", "gpu", "mps"]
        add("--device", choices=devices, default="auto", help="where to compute")
        text = "1 compiles the training step (on cuda: records it); auto does where that pays"
        add("--compile", choices=["auto", "0", "1"], default="auto", help=text)

    def add_data_flags(self) -> None:
        add = self.data.add_argument
        real_data = self.real_data
        text = f"{real_data}, digits, your own .npz file, or auto: {real_data}, or else digits"
        add("--data", default="auto", help=text)
        add("--data_dir", type=folder, default="data", help="folder of the data sets")
        text = "0 takes data files that are not the published ones"
        add("--check_data", type=whole(0, 1), default=1, help=text)

    def error(self, message: str) -> NoReturn:
        """End the program with one line; of several processes the first one speaks."""
        if speaks_for_all():
            self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")
        time.sleep(1)  # torchrun ends the first process, before it spoke, where another one ends
        self.exit(2)

    def parse_args(self, argv: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """argparse's own, which keeps the words: a message may say what to type."""
        self.words = sys.argv[1:] if argv is None else list(argv)
        return super().parse_args(self.words, namespace)

    def make_run(
        self,
        args: argparse.Namespace,
        stem: str,
        fix_weights: list[str],
        needs_labels: bool = False,
    ) -> Run:
        """Check flags that concern each other and make the run of them.

        stem: the start of the run's name, "vae_z=10"; fix_weights: the script's flags that fix
        the weights. A wrong command line ends the program with one line and exit code 2.
        """
        if args.train == 0 and args.overwrite == 1:
            self.error("argument --overwrite: 1 trains anew and --train 0 does not; give one")
        if args.jobs not in (1, "auto") and of_torchrun():
            all_of_them = "the processes of torchrun do each run together"
            self.error(f"argument --jobs: {all_of_them}: leave it out, or unset WORLD_SIZE")
        # Defaults that --help gives in words, and of flags that only VAE and GMVAE have.
        flags = {"seed": args.run, "iw": [1, 10, 100, 1000], "test": "subset", **vars(args)}
        run = Run(
            **flags,
            stem=stem,
            real_data=self.real_data,
            needs_labels=needs_labels,
            fix_weights=FIX_WEIGHTS + fix_weights,
            words=[sys.argv[0], *self.words],
        )
        here = "this folder cannot be written to: checkpoints/ and logs/ are made here"
        try:
            check_data(run)
            require(os.access(os.getcwd(), os.W_OK), f"{here}; change to another")
        except UsageError as error:
            self.error(str(error))
        except OSError:  # the folder was removed
            self.error(f"{here}; change to another")
        return run


# ---------------------------------------------------------------------------------------------
# What VAE and GMVAE share


def add_vae_flags(parser: Parser) -> None:
    """Add the flags of a VAE on binary images: z, its training loss, and how it is evaluated."""
    add = parser.model.add_argument
    add("--z", type=whole(1, 10_000), default=10, help="dimensions of the latent z")
    text = "weight of the KL term in the training loss"
    add("--beta", type=real(0, 1e6), default=1.0, help=text)
    text = "samples m of the bound L_m that is trained on"
    add("--train_iw", type=whole(1, 1000), default=1, help=text)

    add = parser.evaluation.add_argument
    text = "samples m of the IWAE-m bounds of --train 0 (default: 1 10 100 1000)"
    add("--iw", type=whole(1, 100_000), nargs="+", default=argparse.SUPPRESS, help=text)
    text = "test images of the bounds: all, or the course's 100, drawn as it draws them now "
    text += "(subset), as it did until 2020 (2018), or as torch 0.4 did"
    add("--test", choices=["subset", "2018", "torch-0.4", "all"], default="subset", help=text)


def loss_name(parser: Parser, args: argparse.Namespace) -> str:
    """What the training loss of a VAE adds to the name of a run."""
    if args.beta != 1 and args.train_iw > 1:
        parser.error("argument --train_iw: the bound L_m has no weight of the KL; give one of both")
    if args.beta != 1:
        return f"_beta={args.beta:g}"
    if args.train_iw > 1:
        return f"_train_iw={args.train_iw}"
    return ""

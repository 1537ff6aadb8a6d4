"""The command line of the four scripts: flags, their checks, and what surrounds a run (locks, signals, exit codes)."""

import argparse
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path

from codebase import checkpoint
from codebase.checkpoint import Fault, Refused, Stopped


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, exit code 2."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def whole(low: int, high: int):
    """A check for whole numbers from low to high."""

    def check(text: str) -> int:
        if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdecimal() or len(text) > 20:
            raise argparse.ArgumentTypeError(f"takes a whole number from {low} to {high}, not {text[:40]!r}")
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"takes a whole number from {low} to {high}, not {text}")
        return int(text)

    return check


def weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 1000000, not {text[:40]!r}")
    return value


def folder(text: str) -> str:
    """A folder, or a name in an existing folder that can be written to."""
    path = Path(text)
    if not text or "\0" in text or len(text) > 1000:
        raise argparse.ArgumentTypeError("takes the path of a folder, not an empty or impossible one")
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"takes a folder, and {text} is a file")
    if not path.exists():
        try:  # whether it can be made is only known by making it; it is left to the download to do so for good
            path.mkdir()
            path.rmdir()
        except OSError:
            raise argparse.ArgumentTypeError(f"takes a folder, and {text} neither exists nor can be made") from None
    return text


MODELS = {  # name: flags of its own, default of --iter_max, data set
    "vae": ("z", "beta", "iw"),
    "gmvae": ("z", "k", "beta", "iw"),
    "ssvae": ("gw", "cw"),
    "fsvae": ("split",),
}
ITER_MAX = {"ssvae": 30_000, "fsvae": 1_000_000}
SWITCH = whole(0, 1)
FLAGS = {  # flag: (default, check, help)
    "z": (10, whole(1, 10_000), "dimensions of the latent z"),
    "k": (500, whole(1, 100_000), "components of the mixture prior"),
    "beta": (1.0, weight, "weight of the KL term in the training loss (beta-VAE)"),
    "gw": (1, whole(0, 999_999), "weight of the generative loss; 0 trains the classifier alone"),
    "cw": (100, whole(0, 999_999), "weight of the classification loss"),
    "split": ("extra", None, "training images: extra, train or test"),
    "iw": ([1, 10, 100, 1000], whole(1, 10_000_000), "samples m of the IWAE-m bounds that --train 0 reports"),
    "iter_max": (20_000, whole(1, 1_000_000_000), "training steps; with --train 0, the checkpoint to load"),
    "iter_save": (10_000, whole(1, 1_000_000_000), "steps between checkpoints"),
    "batch_size": (100, whole(1, 60_000), "images per step, over all processes together"),
    "run": (0, whole(0, 999_999), "number of the run, part of its name"),
    "runs": (1, whole(1, 1_000), "number of runs, from --run on, and a summary of them"),
    "seed": (None, whole(0, 2**31), "seed of everything random (default: the run's number)"),
    "train": (1, SWITCH, "1 trains (or goes on, or evaluates what is finished), 0 loads and evaluates"),
    "overwrite": (0, SWITCH, "1 starts over and deletes what the run has stored"),
    "device": ("auto", None, "auto, cpu, cuda (or gpu) or mps"),
    "data": ("auto", None, "auto takes the real data set where it can be had, else drawn digits"),
    "data_dir": ("data", folder, "folder of the data sets"),
    "check_data": (1, SWITCH, "0 accepts data files that are not the published ones"),
}


def parse(model: str, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line; a wrong one ends the program with one line and exit code 2."""
    real = "svhn" if model == "fsvae" else "mnist"
    choices = {"device": ["auto", "cpu", "cuda", "gpu", "mps"], "split": ["extra", "train", "test"]}
    choices["data"] = ["auto", real, "digits"]
    parser = _Parser(description=description, allow_abbrev=False, epilog="Files go to checkpoints/ and logs/ here.")
    own = [flag for flag in FLAGS if flag in MODELS[model]]
    for flag in own + [flag for flag in FLAGS if not any(flag in flags for flags in MODELS.values())]:
        default, check, text = FLAGS[flag]
        default = ITER_MAX.get(model, default) if flag == "iter_max" else default
        shown = " (default: %(default)s)" if default is not None and flag != "iw" else ""
        kind = {"choices": choices[flag]} if flag in choices else {"type": check}
        if flag == "iw":
            kind |= {"nargs": "+"}
        metavar = None if flag in choices else "M" if flag == "iw" else "DIR" if check is folder else "N"
        parser.add_argument(f"--{flag}", default=default, metavar=metavar, help=text + shown, **kind)
    args = parser.parse_args(argv)
    args.model, args.real = model, real
    if args.overwrite and not args.train:
        parser.error("argument --overwrite: 1 trains anew and --train 0 does not train; give one of them")
    if model == "ssvae" and not args.gw and not args.cw:
        parser.error("argument --cw: takes at least 1 with --gw 0, else there is nothing to train")
    if not os.access(".", os.W_OK):
        parser.error("this folder cannot be written to: checkpoints/ and logs/ are made here; change to another")
    return args


def stem(args) -> str:
    """The name of a run without its number."""
    parts = {
        "vae": lambda: f"vae_z={args.z:02d}",
        "gmvae": lambda: f"gmvae_z={args.z:02d}_k={args.k:03d}",
        "ssvae": lambda: f"ssvae_gw={args.gw:03d}_cw={args.cw:03d}",
        "fsvae": lambda: "fsvae" + (f"_split={args.split}" if args.split != "extra" else ""),
    }
    name = "model=" + parts[args.model]()
    if getattr(args, "beta", 1) != 1:
        name += f"_beta={args.beta:g}"
    return name + ("_data=digits" if args.data == "digits" else "")


def settle_data(args) -> None:
    """Turn --data auto into the data set there is; say so where that is the drawn digits. Raises Refused."""
    if args.data == "digits":
        return
    where = real_files(args)
    why = None
    if not all(path.exists() for path in where):
        from codebase import data

        why = data.download(args.real, args.data_dir, where)
    if why is None:
        args.data = args.real
    elif args.data == args.real:
        raise Refused(
            f"{args.real.upper()} cannot be downloaded ({why}); put these files in place by hand: "
            + ", ".join(str(path) for path in where)
            + "; or use --data digits"
        )
    else:
        args.data = "digits"
        print(
            f"{'*' * 100}\nNO {args.real.upper()} ({why}): training and evaluating on DRAWN DIGITS instead. "
            f"Figures are not {args.real.upper()}'s.\n{'*' * 100}",
            flush=True,
        )


def real_files(args) -> list[Path]:
    """The files of the real data set, as a user would put them in place by hand."""
    if args.real == "svhn":
        return [Path(args.data_dir, f"{args.split}_32x32.mat")]
    kinds = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return [Path(args.data_dir, "MNIST", "raw", name) for name in kinds]


def check_checkpoint(args) -> None:
    """Raise Missing, for --train 0, where there is no checkpoint at --iter_max."""
    path = checkpoint.model_path(args.name, args.iter_max)
    if not args.train and not path.is_file():
        steps = ", ".join(map(str, checkpoint.stored_steps(args.name))) or "none"
        raise checkpoint.Missing(
            f"there is no {path}; checkpoints of this run: {steps}; "
            f"to train one: {' '.join([Path(sys.argv[0]).name, *without_train(sys.argv[1:])])}"
        )


def without_train(argv: list[str]) -> list[str]:
    """The arguments less --train 0."""
    kept = [word for word in argv if not word.startswith("--train=")]
    while "--train" in kept:
        at = kept.index("--train")
        del kept[at : at + 2]
    return kept


def launch(args, one_run) -> int:
    """Do run --run, or one after another --runs of them and their summary; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.ranks, code, results = None, 0, {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
        from codebase import experiment

        experiment.join(args)
    first, seed = args.run, args.seed
    for run in range(first, first + args.runs):
        args.run, args.seed = run, run if seed is None else seed + run - first
        code = max(code, _attempt(args, one_run, results))
        if code > 128:  # a signal ends the series, a failure does not
            return code
    if args.runs > 1 and results:
        summarise(stem(args), results)
    return code


def first_rank(args, decide):
    """decide() done by this process, or by the first of several for all of them."""
    return args.ranks.first(decide) if args.ranks else decide()


def _attempt(args, one_run, results: dict) -> int:
    try:
        args.data = first_rank(args, lambda: settle_data(args) or args.data)
        args.name = f"{stem(args)}_run={args.run:04d}"
        check_checkpoint(args)
        from codebase import experiment

        experiment.settle_device(args)
        with experiment.hold(args):
            results[args.run] = one_run(args)
        return 0
    except Stopped as stop:
        return _say(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Refused as error:
        return _say(f"error: {error}", 2)
    except (Fault, MemoryError) as error:
        return _say(f"error: {error or 'out of memory: use a smaller --batch_size'}", 1)
    except OSError as error:
        return _say(f"error: {error.strerror or error}: {error.filename or 'while writing'}; checkpoints are intact", 1)
    except Exception as error:
        if isinstance(error, (RuntimeError, ValueError)) and "memory" in str(error):
            return _say("error: out of memory: use a smaller --batch_size", 1)
        traceback.print_exc()  # a bug: it must not take the other runs of a series down
        return 1


def _say(line: str, code: int) -> int:
    if checkpoint.writes:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return code


def summarise(name: str, results: dict[int, dict[str, float]]) -> None:
    """Print each figure's mean and standard error over the runs, and store them as logs/<name>_summary.json."""
    table = {}
    for key in next(iter(results.values())):
        values = [figures[key] for figures in results.values()]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
        error = spread / math.sqrt(len(values)) if len(values) > 1 else None
        table[key] = {"mean": mean, "standard_error": error}
    path = Path("logs", f"{name}_summary.json")
    content = {"name": name, "runs": list(results), "figures": table, "each": list(results.values())}
    checkpoint.write(path, json.dumps(content, indent=1) + "\n")
    print(f"\n{len(results)} runs ({', '.join(map(str, results))}), mean and standard error, in {path}:")
    for key, value in table.items():
        error = "" if value["standard_error"] is None else f" +- {value['standard_error']:.4f}"
        print(f"  {key:<12} {value['mean']:10.4f}{error}")

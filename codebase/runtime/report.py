"""What a run says and leaves beside its weights: its first lines, config.json, results.json, the figures printed."""

import json
import math
import os
import statistics
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from codebase.runtime.files import RunError, log_dir, model_path, write
from codebase.runtime.options import BinaryRun, Run

NOTHING_KNOWN = 784 * math.log(2)  # nats: the NELBO of a model that gives every pixel of 784 even odds


def begin(run: Run, model: torch.nn.Module) -> None:
    """Say what will be done."""
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{run.name}: {size:,} parameters on {run.device} ({torch.get_num_threads()} threads), seed {run.seed}")
    print(f"data: {run.data}; files: {model_path(run.name, 0).parent}/, {log_dir(run.name)}/")


def config(run: Run) -> None:
    """Store the settings of a training in config.json."""
    made = {"iter_max": run.iter_max, "device": run.device, "threads": torch.get_num_threads()}
    write(log_dir(run.name) / "config.json", run.settings() | made | {"torch": torch.__version__})


def described(run: Run) -> str:
    """The data set, with what must not be forgotten about it."""
    if run.data == "digits":
        return f"drawn digits, not {run.real_data.upper()}"
    split = f", {run.split} split" if run.data == "svhn" else ""
    if run.own_images:
        return f"{Path(run.data).name}, {run.settings()['data']}"
    return run.data + split + ("" if run.check_data else ", files not verified")


def progress_bar(start: int, stop: int, shown: bool, unit: str = "steps") -> tqdm:
    """A bar on a terminal; elsewhere a plain line every few seconds, after the first ones."""
    words = {"initial": start, "total": stop, "disable": not shown, "unit": f" {unit}", "delay": 5, "mininterval": 5}
    if sys.stderr.isatty():
        words |= {"dynamic_ncols": True, "mininterval": 0.5, "delay": 0 if unit == "steps" else 2}
    else:
        words["bar_format"] = unit.removesuffix("s") + " {n} of {total}{postfix}, {rate_fmt}\n"
    return tqdm(**words)


def tested_on(run: Run, count: int) -> str:
    """What the figures of a test split must not be quoted without, or nothing."""
    course = run.data == "mnist" and count == 100
    return " (on the course's 100 test images: MNIST's test split is not there)" if course else ""


def _part(run: Run) -> str:
    """What tells figures of other test images than the subset apart."""
    return "" if run.test == "subset" else f"_{run.test}"


def check(figures: dict[str, float]) -> None:
    """Raise RunError where a figure is not finite: such figures are neither printed nor stored."""
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    if broken:
        raise RunError(f"{' and '.join(broken)} not finite: no figures are stored")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def results(
    run: Run, figures: dict[str, float], pictures: list[str], tested: int, bounded: int = 0, **extra: Any
) -> None:
    """Store the figures in results.json, beside those of the same weights that are there, and print them and the files.

    tested: the number of test images at hand; bounded: of those that the bounds are of, where there are any. Bounds of
    other images than the subset are kept apart from those of it.
    """
    path, of = log_dir(run.name) / "results.json", _part(run)
    about = {"name": run.name, "data": described(run), "step": run.iter_max}
    weights = {"weights_crc32": f"{zlib.crc32(model_path(run.name, run.iter_max).read_bytes()):08x}"}
    content = about | weights | {f"figures{of}": figures}
    with suppress(OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged
        known = json.loads(path.read_text(), parse_constant=_refuse)
        if (about | weights).items() <= (weights | known).items():  # of an older revision's file they are not known
            content = known | weights | {f"figures{of}": known.get(f"figures{of}", {}) | figures}
    write(path, content | extra | {f"test_images{of}": tested})
    print(f"\n{extra.get('evaluated_on', 'test split').split()[0]} images: {tested:,}{tested_on(run, tested)}")
    if isinstance(run, BinaryRun) and figures["nelbo"] > NOTHING_KNOWN:
        known = "what a model reaches that knows nothing of the images"
        print(f"warning: NELBO {figures['nelbo']:.5g} is above 784 log 2 = {NOTHING_KNOWN:.1f}, {known}")
    if bounded:
        old = {"2018": ", binarised by the rule of 2018", "torch-0.4": ", binarised as torch 0.4 did in 2018"}
        print(f"bounds: of {bounded:,} images" + old.get(run.test, ""))
    print("\n".join(f"  {name:<12} {value:10.4f}" for name, value in figures.items()))
    print(f"\nfiles in {log_dir(run.name)}{os.sep}: results.json, {', '.join(pictures)}")


def bounds(figures: dict[str, float], remark: str = "") -> None:
    """Print the lines that scripts around the assignment look for."""
    print("NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**figures) + remark)
    for key, value in figures.items():
        if key.startswith("niwae_"):
            print(f"Negative IWAE-{key.removeprefix('niwae_')}: {value}")


def confusion(counts: list[list[int]]) -> None:
    """Print the confusion matrix as a table: rows are true digits, columns assigned ones."""
    print("\ntrue  " + "".join(f"{digit:>6}" for digit in range(10)) + "  accuracy")
    for digit, row in enumerate(counts):
        print(f"{digit:>4}  " + "".join(f"{count:>6}" for count in row) + f"  {row[digit] / max(1, sum(row)):8.4f}")


def summarise(run: Run, figures: dict[int, dict[str, float]]) -> None:
    """Print each figure's mean and standard error over runs like this, and store them as logs/<series>_summary.json."""
    of, table, each = _part(run), {}, list(figures.values())
    path = Path("logs", f"{run.series}{of.replace('_', '_test=')}_summary.json")
    known = json.loads((log_dir(run.name) / "results.json").read_text())
    about = {key: known[key] for key in ("data", "step", f"test_images{of}", "evaluated_on") if key in known}
    trained_on = known.get("evaluated_on") == "training images"  # an FSVAE without a test split
    remark = " (on training images)" if trained_on else tested_on(run, about[f"test_images{of}"])
    print(f"\n{len(each)} runs ({', '.join(map(str, figures))}){remark}, mean and standard error, in {path}:")
    for key in each[0]:
        values = [found[key] for found in each]
        mean = statistics.fmean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        table[key] = {"mean": mean, "standard_error": error}
        print(f"  {key:<12} {mean:10.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    write(path, {"name": run.series} | about | {"runs": list(figures), "figures": table, "each": each})

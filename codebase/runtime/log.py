"""What a run says and leaves beside its weights: first lines, progress, tables, results.json."""

import contextlib
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from codebase.runtime.files import RunError, checkpoint_dir, log_dir, write, write_json
from codebase.runtime.options import Run

UNTRAINED = 784 * math.log(2)  # nats: the NELBO of a model that gives every pixel one half
OLD_DRAWS = {"2018": ", binarised by the rule of 2018", "torch-0.4": ", binarised as by torch 0.4"}


def print_run(run: Run, model: torch.nn.Module) -> None:
    """Say what a run is of, and where its files lie."""
    size = sum(parameter.numel() for parameter in model.parameters())
    threads = torch.get_num_threads()
    print(f"{run.name}: {size:,} parameters on {run.device} ({threads} threads), seed {run.seed}")
    print(f"data: {run.data}; files: {checkpoint_dir(run.name)}/, {log_dir(run.name)}/")


def say(line: str) -> None:
    """Print a line at once, whether or not somebody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class UnbreakableStream:
    """A stream whose failing writes are ignored: a broken pipe ends no training."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self.silence()

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self) -> None:
        """Lead it nowhere, or Python fails once more in the end, on what it could not write."""
        failures = contextlib.suppress(OSError, ValueError, AttributeError)
        with failures, open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def progress_bar(start: int, stop: int, shown: bool, unit: str = "steps") -> tqdm:
    """A bar on a terminal; elsewhere a plain line every few seconds, after the first ones."""
    if sys.stderr is None:
        return tqdm(disable=True)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()  # what was printed before it stands above it in a file, too
    options = {"initial": start, "total": stop, "disable": not shown, "unit": f" {unit}"}
    options["file"] = UnbreakableStream(sys.stderr)
    if hasattr(sys.stderr, "isatty") and sys.stderr.isatty():
        delay = 0 if unit == "steps" else 2
        return tqdm(**options, dynamic_ncols=True, mininterval=0.5, delay=delay)
    line = unit.removesuffix("s") + " {n} of {total}{postfix}, {rate_fmt}\n"
    seconds = getattr(sys.stderr, "seconds", 5)  # of a run whose lines another process shows
    return tqdm(**options, mininterval=seconds, delay=seconds, bar_format=line)


def write_table(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows, the first of which has the columns' names, as a .csv file."""
    lines = []
    for row in rows:
        cells = [f"{cell:.10g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(",".join(cells) + "\n")
    write(path, "".join(lines).encode())


def store_config(run: Run, process_count: int) -> None:
    """Store the settings of a training in config.json."""
    config = {
        **run.settings(),
        "iter_max": run.iter_max,
        "device": run.device,
        "processes": process_count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(log_dir(run.name) / "config.json", config)


def describe_data(run: Run) -> str:
    """The data set, with what must not be forgotten about it."""
    if run.data == "digits":
        return f"drawn digits, not {run.real_data.upper()}"
    if run.own_images:
        return f"{Path(run.data).name}, {run.settings()['data']}"
    description = run.data
    if run.data == "svhn":
        description += f", {run.split} split"
    if not run.check_data:
        description += ", files not verified"
    return description


def remark_on(run: Run, test_images: int) -> str:
    """What metrics of few test images must not be quoted without, or nothing."""
    if run.data == "mnist" and test_images == 100:
        return " (on the course's 100 test images: MNIST's test split is not there)"
    return ""


def suffix_of_test(run: Run) -> str:
    """What tells the metrics of other test images apart from those of the subset."""
    return "" if run.test == "subset" else f"_{run.test}"


def store_results(
    run: Run,
    metrics: dict[str, float],
    test_images: int,
    bounded: int = 0,
    evaluated_on: str = "",
    tables: dict[str, Any] | None = None,
) -> None:
    """Store the metrics of a run in results.json, and print them.

    test_images: how many there are; bounded: of how many of them the bounds of a VAE or GMVAE
    are; evaluated_on: which images these are, where that is not always the test split; tables:
    what else is stored. Metrics of other test images than the subset are kept apart
    from those of it. Raises RunError, and stores nothing, where a metric is not finite.
    """
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        names = " and ".join(broken)
        raise RunError(f"{names} not finite: the weights of step {run.iter_max} diverged")
    part = suffix_of_test(run)
    path = log_dir(run.name) / "results.json"
    about = {"name": run.name, "data": describe_data(run), "step": run.iter_max}
    content = read_results(path, about)
    stored = content.get(f"figures{part}")
    content[f"figures{part}"] = {**stored, **metrics} if isinstance(stored, dict) else metrics
    content[f"test_images{part}"] = test_images
    if evaluated_on:
        content["evaluated_on"] = evaluated_on
    content.update(tables or {})
    write_json(path, content)
    print_metrics(run, metrics, test_images, bounded, evaluated_on or "test split")


def print_metrics(
    run: Run, metrics: dict[str, float], test_images: int, bounded: int, evaluated_on: str
) -> None:
    """Print the metrics of a run, and of how many images they are; see store_results."""
    kind = evaluated_on.split()[0]
    print(f"\n{kind} images: {test_images:,}{remark_on(run, test_images)}")
    if bounded:
        print(f"bounds: of {bounded:,} images{OLD_DRAWS.get(run.test, '')}")
    for name, value in metrics.items():
        print(f"  {name:<12} {value:10.4f}")
    if bounded and metrics["nelbo"] > UNTRAINED:
        guessing = f"warning: a NELBO above {UNTRAINED:.0f} is worse than guessing every pixel"
        print(f"{guessing}: training diverged, or has only begun (step {run.iter_max})")


def print_files(run: Run, plots: list[str]) -> None:
    """Say which files a run has left in its folder."""
    print(f"\nfiles in {log_dir(run.name)}{os.sep}: results.json, {', '.join(plots)}")


def read_results(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What results.json holds of the same run, data and step, or else `about` alone."""
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        stored = json.loads(path.read_text(), parse_constant=refuse_constant)
        if isinstance(stored, dict) and all(stored.get(key) == about[key] for key in about):
            return stored
    return dict(about)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON: earlier revisions wrote it")


def summarise(run: Run, metrics: dict[int, dict[str, float]]) -> None:
    """Print and store mean and standard error of each metric over the runs of a series.

    metrics: of each run, by its number; run: one of them. Stored as logs/<series>_summary.json.
    """
    part = suffix_of_test(run)
    path = Path("logs", f"{run.series}{part.replace('_', '_test=')}_summary.json")
    known = json.loads((log_dir(run.name) / "results.json").read_text())
    summary = {"name": run.series}
    for key in ("data", "step", f"test_images{part}", "evaluated_on"):
        if key in known:
            summary[key] = known[key]
    each = list(metrics.values())
    table = {}
    for name in each[0]:
        values = [of_run[name] for of_run in each]
        error = None
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        table[name] = {"mean": statistics.fmean(values), "standard_error": error}
    # Stored before it is printed: nobody may be there to read it.
    write_json(path, {**summary, "runs": list(metrics), "figures": table, "each": each})

    remark = remark_on(run, known[f"test_images{part}"])
    if known.get("evaluated_on") == "training images":
        remark = " (on training images)"
    numbers = ", ".join(str(number) for number in metrics)
    say(f"\n{len(metrics)} runs ({numbers}){remark}, mean and standard error, in {path}:")
    for name, of_all in table.items():
        line = f"  {name:<12} {of_all['mean']:10.4f}"
        if of_all["standard_error"] is not None:
            line += f" +- {of_all['standard_error']:.4f}"
        say(line)

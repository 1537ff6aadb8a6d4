"""What a run says and leaves beside its weights: its first lines, config.json, results.json, the figures printed."""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from codebase.runtime.files import log_dir, model_path, write
from codebase.runtime.options import Run


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
    return run.data + split + ("" if run.check_data else ", files not verified")


def results(run: Run, figures: dict[str, float], pictures: list[str], **extra: Any) -> None:
    """Store the figures in results.json, beside those of the same step that are there, and print them and the files."""
    path, about = log_dir(run.name) / "results.json", {"name": run.name, "data": described(run), "step": run.iter_max}
    try:
        known = json.loads(path.read_text())
        known = known if about.items() <= known.items() else {"figures": {}}
        content = known | extra | about | {"figures": known["figures"] | figures}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none yet, or damaged
        content = extra | about | {"figures": figures}
    write(path, content)
    print("\n" + "\n".join(f"  {key:<12} {value:10.4f}" for key, value in figures.items()))
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
        print(f"{digit:>4}  " + "".join(f"{count:>6}" for count in row) + f"  {row[digit] / sum(row):8.4f}")


def summarise(series: str, figures: dict[int, dict[str, float]]) -> None:
    """Print each figure's mean and standard error over the runs, and store them as logs/<series>_summary.json."""
    table = {}
    for key in next(iter(figures.values())):
        values = [found[key] for found in figures.values()]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        table[key] = {"mean": statistics.fmean(values), "standard_error": error}
    path = Path("logs", f"{series}_summary.json")
    write(path, {"name": series, "runs": list(figures), "figures": table, "each": list(figures.values())})
    print(f"\n{len(figures)} runs ({', '.join(map(str, figures))}), mean and standard error, in {path}:")
    for key, value in table.items():
        error = "" if value["standard_error"] is None else f" +- {value['standard_error']:.4f}"
        print(f"  {key:<12} {value['mean']:10.4f}{error}")

#!/usr/bin/env python3
"""Run everything that the pages quote, and make their tables.

python docs/reproduce.py --data_dir DIR trains and evaluates in the current folder, by the scripts'
own command lines. The same command resumes. All of it takes about 35 hours of one core.

What the runs leave in logs/ is collected in docs/figures.json. --write and --check make the tables
from that file, so they need no run. A table stands between <!-- table NAME --> and <!-- end -->.
Figures of drawn digits, of other files or of another number of steps do not count. The table fsvae
takes the sample of 10,366 SVHN digits in DIR; the table speed is of docs/speed.json, which
tests/benchmark.py --output writes.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from codebase.runtime import files, signals  # noqa: E402 (found by the line above)

FIGURES = ROOT / "docs" / "figures.json"
SPEED = ROOT / "docs" / "speed.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmark.md", ROOT / "docs" / "writeup.md"]


# ---------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Series:
    """Runs of one command line, with the seeds 0, 1, ...

    stem: how their names begin; step: their number of training steps; first: the number of the
    run with seed 0.
    """

    stem: str
    flags: str = ""
    step: int = 20_000
    seeds: int = 3
    first: int = 0

    @property
    def script(self) -> str:
        return f"run_{self.stem.partition('_')[0]}.py"

    @property
    def data(self) -> str:
        return "svhn" if self.script == "run_fsvae.py" else "mnist"

    def name(self, seed: int) -> str:
        return f"model={self.stem}_run={self.first + seed:04d}"

    def words(self, seed: int) -> list[str]:
        """The script and the flags of the run with this seed."""
        words = [self.script, *self.flags.split(), "--run", str(self.first + seed)]
        if self.first > 0:
            words += ["--seed", str(seed)]
        return words


class Stage(NamedTuple):
    flags: str  # besides those of the series
    part: str  # of results.json, to which it adds
    metric: str = ""  # one that is there after this stage alone; train may add any


STAGES = {
    "train": Stage("", "figures"),
    "subset": Stage("--train 0", "figures", "niwae_1000"),
    "2018": Stage("--train 0 --test 2018", "figures_2018", "niwae_1000"),
    "0.4": Stage("--train 0 --test torch-0.4", "figures_torch-0.4", "niwae_1000"),
    "whole": Stage("--train 0 --test all", "figures_all", "niwae_1000"),
    "deep": Stage("--train 0 --test all --iw 1 5000", "figures_all", "niwae_5000"),
}
DEEP_SEEDS = 3  # at most, for that stage takes a core a quarter of an hour
PARTS = ["figures", "figures_2018", "figures_torch-0.4", "figures_all"]
REAL = {  # what results.json says of data and test images
    "mnist": {"data": "mnist", "test_images": 10_000},
    "svhn": {"data": "svhn, train split, files not verified", "test_images": 486},
}

VAE = Series("vae_z=10", seeds=10)
GMVAE = Series("gmvae_z=10_k=500", seeds=10)
BINARY = {"VAE": VAE, "GMVAE": GMVAE}
BETA = {1: VAE}
for beta in [0.5, 2, 4, 8]:
    BETA[beta] = Series(f"vae_z=10_beta={beta}", f"--beta {beta}")
BETA = {beta: BETA[beta] for beta in sorted(BETA)}
TRAIN_IW = {1: VAE}
for k in [5, 50]:
    TRAIN_IW[k] = Series(f"vae_z=10_train_iw={k}", f"--train_iw {k}")
SSVAE = {}  # by gw
LABELS = {}  # by the number of labels and gw
for gw in [0, 1]:
    stem = f"ssvae_gw={gw:03d}_cw=100"
    SSVAE[gw] = Series(stem, f"--gw {gw}", 30_000, seeds=5)
    LABELS[100, gw] = SSVAE[gw]
    for n in [600, 1000, 3000]:
        LABELS[n, gw] = Series(f"{stem}_labels={n}", f"--gw {gw} --labels {n}", 30_000)
FSVAE = Series(
    "fsvae_split=train",
    "--split train --check_data 0 --iter_max 50000 --iter_save 2000",
    50_000,
    seeds=2,
)


def beside_literature(model: str, z: int, schedule: str, step: int, k: int, seeds: int) -> Series:
    """The series of one row of the table literature."""
    stem = f"vae_z={z}" if model == "VAE" else f"gmvae_z={z}_k=500"
    flags = f"--z {z} --iter_max {step}"
    first = 0
    if k > 1:
        stem += f"_train_iw={k}"
        flags += f" --train_iw {k}"
    if schedule == "cosine":
        stem += f"_schedule=cosine-{step}"
        flags += " --schedule cosine"
    elif step > 20_000:  # with a constant rate the name does not tell the length
        first = 100
    return Series(stem, flags, step, seeds, first)


LITERATURE = {("VAE", 10, "constant", 20_000, 1): VAE}  # by model, z, schedule, steps, k
for *setting, seeds in [
    ("VAE", 10, "constant", 120_000, 1, 1),
    ("VAE", 10, "cosine", 20_000, 1, 3),
    ("VAE", 10, "cosine", 120_000, 1, 1),
    ("VAE", 50, "constant", 20_000, 1, 3),
    ("VAE", 50, "constant", 120_000, 1, 1),
    ("VAE", 50, "cosine", 20_000, 1, 3),
    ("VAE", 50, "cosine", 60_000, 1, 1),
    ("VAE", 50, "cosine", 120_000, 1, 3),
    ("VAE", 50, "cosine", 480_000, 1, 1),
    ("VAE", 50, "cosine", 120_000, 5, 2),
    ("VAE", 50, "cosine", 120_000, 50, 1),
    ("GMVAE", 50, "cosine", 120_000, 1, 1),
]:
    LITERATURE[tuple(setting)] = beside_literature(*setting, seeds)


def seeds_of(series: Series, stage: str) -> range:
    return range(min(series.seeds, DEEP_SEEDS) if stage == "deep" else series.seeds)


def is_done(run: dict, stage: str) -> bool:
    """Whether a run's results.json, or its entry in figures.json, has the metrics of a stage."""
    metrics = run.get(STAGES[stage].part, {})
    if STAGES[stage].metric:
        return STAGES[stage].metric in metrics
    return len(metrics) > 0


def needed(names: Iterable[str]) -> dict[Series, list[str]]:
    """The series that these tables need, each with its stages in order."""
    runs = {}
    for name in names:
        for series, stages in TABLES[name][1]:
            known = runs.setdefault(series, [])
            known += [stage for stage in stages.split() if stage not in known]
    return runs


def to_do(series: Series, stage: str) -> list[int]:
    """The seeds that lack the metrics of a stage."""
    return [seed for seed in seeds_of(series, stage) if not is_done(results(series, seed), stage)]


def command(series: Series, stage: str, args: argparse.Namespace) -> list[str]:
    """The command line of a stage, from the first seed on that lacks it."""
    begin = to_do(series, stage)[0]
    script, *flags = series.words(begin)
    words = [sys.executable, str(ROOT / script), *flags, *STAGES[stage].flags.split()]
    words += ["--runs", str(len(seeds_of(series, stage)) - begin), "--jobs", args.jobs]
    words += ["--data", series.data]
    if args.data_dir is not None:
        words += ["--data_dir", args.data_dir]
    if args.device is not None:
        words += ["--device", args.device]
    return words


def run_all(args: argparse.Namespace) -> int:
    """Run each stage that a seed lacks; return the exit code, that of a signal where one came."""
    code = 0
    with signals.collected() as caught:
        for series, stages in needed(args.only).items():
            for stage in stages:
                if not to_do(series, stage):
                    continue
                ended = run_script(command(series, stage, args), caught)
                if ended in (129, 130, 143):
                    message = "stopped, the runs' states are saved: the same command resumes"
                    print(message, file=sys.stderr)
                    return ended
                left = to_do(series, stage)
                for seed in left:
                    print(f"{series.name(seed)}: {stage} FAILED, {why_not(series, seed, ended)}")
                if left or ended != 0:
                    code = 1
                if len(left) == len(seeds_of(series, stage)):
                    break  # the other stages need what this one did not give
    return code


def run_script(words: list[str], caught: list[int]) -> int:
    """Run a script to its end; return its exit code, or 128 + the number of a signal caught here.

    It is out of reach of the terminal's signals. It gets those that were caught, each once: at a
    second Ctrl-C it may end without a save.
    """
    if not caught:
        print(f"\n$ {shlex.join(words)}", flush=True)
        process = subprocess.Popen(words, start_new_session=True)
        handed_on = 0
        while process.poll() is None:
            time.sleep(0.1)
            if handed_on < len(caught):
                process.send_signal(caught[handed_on])
                handed_on += 1
    if caught:
        return 128 + caught[0]
    if process.returncode < 0:  # a signal ended it, before or after it could handle one
        return 128 - process.returncode
    return process.returncode


def why_not(series: Series, seed: int, code: int) -> str:
    """Why a run lacks metrics after its script ended with that exit code."""
    if code != 0:
        return f"exit code {code}"
    stored = read_json(Path("logs", series.name(seed), "results.json"))
    about = f"{stored.get('data')}, {stored.get('test_images')} test images"
    return f"its figures do not count: {about}, step {stored.get('step')}"


# ---------------------------------------------------------------------------------------------
# From logs/ to docs/figures.json


def fail(message: str) -> NoReturn:
    print(f"reproduce.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path: Path) -> dict:
    """What a JSON file holds, or nothing where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_csv(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = []
    for line in csv.DictReader(path.read_text().splitlines()):
        rows.append({key: float(value) for key, value in line.items()})
    return rows


def results(series: Series, seed: int) -> dict:
    """The results.json of a run where it counts, or nothing.

    It counts with real data, all its test images, the last step and default settings.
    """
    folder = Path("logs", series.name(seed))
    stored = read_json(folder / "results.json")
    settings = {"seed": seed, "batch_size": 100, "evaluated_on": "test split"}
    wanted = {**REAL[series.data], **settings, "step": series.step}
    found = {**settings, **read_json(folder / "config.json"), **stored}
    counts = all(found.get(key) == wanted[key] for key in wanted)
    intact = all(isinstance(stored.get(part, {}), dict) for part in PARTS)
    return stored if counts and intact else {}


def entry(series: Series, seed: int) -> dict:
    """What docs/figures.json holds of a run, but for the device; nothing where it does not count."""
    stored = results(series, seed)
    if not stored:
        return {}
    folder = Path("logs", series.name(seed))
    config = read_json(folder / "config.json")
    made = {"flags": shlex.join(series.words(seed)), "torch": config.get("torch")}
    for key in ["data", "step", "test_images", *PARTS, "per_digit_accuracy"]:
        if key in stored:
            made[key] = stored[key]
    metrics = {row["step"]: row for row in read_csv(folder / "metrics.csv")}
    if metrics:
        made["time"] = time_of(metrics, config)
    if series == FSVAE:
        made["tests"] = []
        for test in read_csv(folder / "test.csv"):
            if test["step"] in metrics:
                made["tests"].append({**test, "training": metrics[test["step"]]["nelbo"]})
    return made


def time_of(metrics: dict[float, dict], config: dict) -> dict[str, float]:
    """The median milliseconds of a step, and the minutes of the training, by cores or devices."""
    points = [(0, 0), *((step, row["seconds"]) for step, row in metrics.items())]
    steps = []
    for (step_before, before), (step, seconds) in pairwise(points):
        steps.append(1000 * (seconds - before) / (step - step_before))
    cores = config.get("threads", 1) if config.get("device", "cpu") == "cpu" else 1
    return {"ms": round(median(steps), 2), "minutes": round(points[-1][1] * cores / 60, 1)}


def device_name(series: Series, seed: int) -> str:
    """The kind of this machine's CPU, or the name of its GPU, where the run was trained on that."""
    import torch  # only here, for the tables need no torch

    config = read_json(Path("logs", series.name(seed), "config.json"))
    device = config.get("device", "cpu")
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return device


def stored_figures() -> dict[str, dict]:
    """What docs/figures.json holds: an entry a run, by name."""
    known = read_json(FIGURES)
    intact = len(known) > 0 and all(isinstance(run, dict) for run in known.values())
    if FIGURES.exists() and not intact:
        fail(f"{FIGURES} is damaged: put an intact copy in its place")
    return known


def merged(known: dict, made: dict) -> dict:
    """A new entry, with what was known of the same weights and logs/ does not hold any more."""
    before = known.get("figures", {})
    now = made.get("figures", {})
    both = [key for key in now if key in before]
    if not both or any(before[key] != now[key] for key in both):
        return made
    result = dict(known)
    for key, value in made.items():
        result[key] = {**known.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def collect(names: Iterable[str]) -> dict[str, dict]:
    """docs/figures.json, brought up to date with the runs of these tables in logs/."""
    known = stored_figures()
    total = 0
    present = 0
    changed = 0
    for series in needed(names):
        total += series.seeds
        for seed in range(series.seeds):
            made = entry(series, seed)
            if not made:
                continue
            present += 1
            name = series.name(seed)
            made = merged(known.get(name, {}), made)
            if made != known.get(name):
                changed += 1
                known[name] = {"device": device_name(series, seed), **made}
    if changed:
        lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
        files.write(FIGURES, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    print(f"{present} of {total} runs are in logs/, {changed} of them new in {FIGURES.name}")
    return known


# ---------------------------------------------------------------------------------------------
# Parts of tables: text made of the entries of docs/figures.json


class Column(NamedTuple):
    title: str
    metric: str
    digits: int = 2
    part: str = "figures"


BOUNDS = [Column("NELBO", "nelbo"), Column("KL", "kl"), Column("Rec", "rec")]
BOUNDS += [Column(f"IWAE-{m}", f"niwae_{m}") for m in (1, 10, 100, 1000)]
IWAE_5000 = Column("IWAE-5000, whole split", "niwae_5000", part="figures_all")
# Burda, Grosse, Salakhutdinov 2016, table 1, one stochastic layer: -L_5000 of the whole test split,
# by model and k; z = 50, 200 units, 3,280 passes, images binarised anew each time.
BURDA = {("VAE", 1): 86.76, ("VAE", 5): 86.47, ("VAE", 50): 86.35}
BURDA |= {("IWAE", 1): 86.76, ("IWAE", 5): 85.54, ("IWAE", 50): 84.78}


def found(known: dict, series: Series, stage: str) -> dict[int, dict]:
    """The entries of a series that have the metrics of a stage, by seed."""
    runs = {seed: known.get(series.name(seed), {}) for seed in seeds_of(series, stage)}
    return {seed: run for seed, run in runs.items() if is_done(run, stage)}


def values(runs: dict[int, dict], column: Column) -> list[float]:
    """A metric of those runs that have it; gap is the distance from NELBO to IWAE-1000."""
    numbers = []
    for run in runs.values():
        metrics = run.get(column.part, {})
        if column.metric in metrics:
            numbers.append(metrics[column.metric])
        elif column.metric == "gap" and "niwae_1000" in metrics:
            numbers.append(metrics["nelbo"] - metrics["niwae_1000"])
    return numbers


def mean(numbers: list[float], digits: int = 2, runs: int = 0) -> str:
    """Mean and standard error, and of how many runs where that is not all of them."""
    if not numbers:
        return ""
    text = f"{fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {stdev(numbers) / sqrt(len(numbers)):.{digits}f}"
    if len(numbers) < runs:
        text += f" ({len(numbers)})"
    return text


def deviation(numbers: list[float], digits: int = 2) -> str:
    return f"{stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""


def middle(numbers: list[float], digits: int) -> str:
    return f"{median(numbers):,.{digits}f}" if numbers else ""


def count(number: int, all_runs: int) -> str:
    return str(number) if number == all_runs else f"{number} of {all_runs}"


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*titles) -> list[str]:
    return [row(*titles), "|" + "---|" * len(titles)]


def cells_of(runs: dict[int, dict], columns: list[Column]) -> list[str]:
    return [mean(values(runs, column), column.digits, len(runs)) for column in columns]


def averages(
    known: dict,
    first: str,
    rows: dict,
    stage: str,
    columns: list[Column],
    spread: bool = False,
) -> list[str]:
    """A row a series with the means of columns; spread: and one with their standard deviations."""
    lines = head(first, *(column.title for column in columns), "seeds")
    for label, series in rows.items():
        runs = found(known, series, stage)
        lines.append(row(label, *cells_of(runs, columns), count(len(runs), series.seeds)))
        if spread:
            cells = [deviation(values(runs, column), column.digits) for column in columns]
            lines.append(row("s.d.", *cells, ""))
    return lines


def times_of_one_device(runs: dict, device: str | None) -> dict:
    """The runs without the times of those on another device: times of two are never averaged."""
    kept = {}
    for key, run in runs.items():
        kept[key] = run if run.get("device") == device else {**run, "time": {}}
    return kept


# ---------------------------------------------------------------------------------------------
# The tables


def summary(known: dict) -> list[str]:
    return averages(known, "", BINARY, "subset", BOUNDS, spread=True)


def per_seed(known: dict, model: str) -> list[str]:
    lines = averages(known, "seed", {"**mean**": BINARY[model]}, "subset", BOUNDS, spread=True)
    each = []
    for seed, run in found(known, BINARY[model], "subset").items():
        each.append(row(seed, *cells_of({seed: run}, BOUNDS), ""))
    return lines[:2] + each + lines[2:]


def iwae(known: dict) -> list[str]:
    columns = [*BOUNDS, Column("NELBO - IWAE-1000", "gap")]
    columns += [Column(f"ESS of {m}", f"ess_{m}", 1) for m in (10, 100, 1000)]
    vae = found(known, VAE, "subset")
    gmvae = found(known, GMVAE, "subset")
    cells = []
    for column in columns:
        difference = ""
        if vae and gmvae:
            number = fmean(values(gmvae, column)) - fmean(values(vae, column))
            difference = f"{number:+.{column.digits}f}"
        cells.append(difference)
    return [*averages(known, "", BINARY, "subset", columns), row("GMVAE - VAE", *cells, "")]


def whole(known: dict) -> list[str]:
    columns = [column._replace(part="figures_all") for column in BOUNDS]
    columns.append(IWAE_5000._replace(title="IWAE-5000"))
    lines = averages(known, "", BINARY, "whole", columns, spread=True)
    for (kind, k), figure in BURDA.items():
        lines.append(row(f"Burda et al. 2016, {kind}, k = {k}", *[""] * 7, figure, ""))
    return lines


def ssvae(known: dict) -> list[str]:
    accuracy = Column("accuracy", "accuracy", 4)
    lines = head("", "accuracy", "s.d.", *(f"seed {seed}" for seed in range(5)))
    for gw, series in SSVAE.items():
        runs = found(known, series, "train")
        numbers = values(runs, accuracy)
        cells = [mean(numbers, 4), deviation(numbers, 4)]
        for seed in range(series.seeds):
            cells.append(mean(values({seed: runs.get(seed, {})}, accuracy), 4))
        lines.append(row(f"gw = {gw}", *cells))
    return lines


def per_digit(known: dict) -> list[str]:
    lines = head("digit", *range(10), "seeds")
    for gw, series in SSVAE.items():
        runs = found(known, series, "train")
        if runs:
            digits = zip(*(run["per_digit_accuracy"] for run in runs.values()), strict=True)
            cells = [f"{fmean(digit):.3f}" for digit in digits]
            lines.append(row(f"gw = {gw}", *cells, count(len(runs), series.seeds)))
    return lines


def labels(known: dict) -> list[str]:
    m2_error = {100: (11.97, 1.71), 1000: (3.6, 0.56)}  # percent; Kingma et al. 2014, table 1
    # Accuracy of M2, by Pyro's tutorial on semi-supervised VAEs.
    pyro = {100: 0.9319, 600: 0.9437, 1000: 0.9487, 3000: 0.9582}
    titles = ["gw = 0 (seeds)", "gw = 1 (seeds)", "M2, Kingma et al. 2014", "M2, Pyro's tutorial"]
    lines = head("labels", *titles)
    for n, theirs in pyro.items():
        cells = []
        for series in (LABELS[n, 0], LABELS[n, 1]):
            numbers = values(found(known, series, "train"), Column("", "accuracy"))
            cells.append(f"{mean(numbers, 4)} ({count(len(numbers), series.seeds)})")
        m2 = ""
        if n in m2_error:
            error, spread = m2_error[n]
            m2 = f"{1 - error / 100:.4f} ± {spread / 100:.4f}"
        lines.append(row(n, *cells, m2, theirs))
    return lines


def betas(known: dict) -> list[str]:
    columns = [
        Column("KL", "kl"),
        Column("Rec", "rec"),
        Column("NELBO (beta = 1 on all)", "nelbo"),
        Column("IWAE-1000", "niwae_1000"),
        Column("active dimensions", "active", 1),
        Column("NELBO, whole split", "nelbo", part="figures_all"),
        Column("IWAE-1000, whole split", "niwae_1000", part="figures_all"),
    ]
    return averages(known, "beta", BETA, "subset", columns)


def train_iw(known: dict) -> list[str]:
    columns = [
        Column("NELBO, subset", "nelbo"),
        Column("IWAE-1000, subset", "niwae_1000"),
        Column("ESS of 1000", "ess_1000", 1),
        Column("ms per step", "ms", 0, "time"),
        IWAE_5000,
    ]
    timed = times_of_one_device(known, known.get(VAE.name(0), {}).get("device"))
    lines = averages(timed, "k", TRAIN_IW, "subset", columns)
    for k in TRAIN_IW:
        lines.append(row(f"Burda et al. 2016, {k}", *[""] * 4, BURDA["IWAE", k], ""))
    return lines


def literature(known: dict) -> list[str]:
    columns = [
        Column("NELBO, whole split", "nelbo", part="figures_all"),
        IWAE_5000,
        Column("ESS of 5000", "ess_5000", 1, "figures_all"),
    ]
    times = [
        Column("core-minutes (GPU: minutes)", "minutes", 0, "time"),
        Column("ms per step", "ms", 1, "time"),
    ]
    titles = [column.title for column in columns + times]
    titles.insert(len(columns), "seeds")
    lines = head("model", "z", "schedule", "passes", "k", *titles, "device")
    for (model, z, schedule, step, k), series in LITERATURE.items():
        runs = found(known, series, "deep")
        if runs:
            devices = sorted({run["device"] for run in runs.values()})
            cells = cells_of(runs, columns)
            cells.append(count(len(runs), len(seeds_of(series, "deep"))))
            cells += cells_of(times_of_one_device(runs, devices[0]), times)
            passes = step * 100 // 60_000
            lines.append(row(model, z, schedule, passes, k, *cells, ", ".join(devices)))
    for kind, k in [("VAE", 1), ("IWAE", 5), ("IWAE", 50)]:
        model = f"Burda et al. 2016, {kind}"
        cells = ["", BURDA[kind, k], *[""] * 5]
        lines.append(row(model, 50, "falling", 3280, k, *cells))
    return lines


def fsvae(known: dict) -> list[str]:
    titles = ["NELBO, training (100 steps)", "NELBO, test", "KL, test", "Rec, test"]
    lines = head("step", *titles, "seeds")
    by_step = {}
    for run in found(known, FSVAE, "train").values():
        for test in run["tests"]:
            by_step.setdefault(test["step"], []).append(test)
    for step in sorted(by_step):
        if step in (2000, 4000) or step % 10_000 == 0:
            cells = []
            for key in ("training", "nelbo", "kl", "rec"):
                cells.append(mean([test[key] for test in by_step[step]], 1))
            lines.append(row(f"{step:,.0f}", *cells, count(len(by_step[step]), FSVAE.seeds)))
    return lines


class Sheet(NamedTuple):
    """A figure of the course's own solution sheet of autumn 2021, and what stands beside it."""

    model: str
    metric: str
    mean: float  # over 100 runs
    deviation: float | None
    low: float  # of what its graders accept
    high: float
    published: str = ""  # of other people's checkpoints, evaluated anew on the same images


SHEET = [
    Sheet("VAE", "nelbo", 101.5, 0.55, 98, 102, "101.04 to 101.82"),
    Sheet("VAE", "kl", 19.29, 0.17, 17.5, 21.5),
    Sheet("VAE", "rec", 82.57, 0.56, 80, 84),
    Sheet("VAE", "niwae_1", 99.83, 0.55, 96.2, 101.8),
    Sheet("VAE", "niwae_10", 97.13, 0.48, 94.5, 99.5),
    Sheet("VAE", "niwae_100", 96.1, 0.42, 93.5, 98.5),
    Sheet("VAE", "niwae_1000", 95.62, 0.42, 92.2, 97.8, "96.79 to 97.25"),
    Sheet("GMVAE", "nelbo", 97.22, 0.54, 94, 100, "98.46 to 99.19"),
    Sheet("GMVAE", "kl", 17.65, 0.18, 16.5, 18.5),
    Sheet("GMVAE", "rec", 79.58, 0.6, 77.5, 82.5),
    Sheet("GMVAE", "niwae_1", 97.22, 0.54, 94, 100),
    Sheet("GMVAE", "niwae_10", 94.74, 0.48, 92.05, 97.95),
    Sheet("GMVAE", "niwae_100", 93.8, 0.47, 91.1, 96.9),
    Sheet("GMVAE", "niwae_1000", 93.38, 0.46, 90.3, 95.7, "94.11 to 95.54"),
    Sheet("SSVAE gw = 0", "accuracy", 0.735, None, 0.705, 0.765, "0.736 to 0.752"),
    Sheet("SSVAE gw = 1", "accuracy", 0.934, 0.0139, 0.885, 0.955, "0.942 to 0.949"),
]


def z_score(ours: list[float], sheet: Sheet) -> str:
    """The difference of the means over its standard error."""
    if sheet.deviation is None or len(ours) < 2:
        return ""
    error = sqrt(stdev(ours) ** 2 / len(ours) + sheet.deviation**2 / 100)
    return f"{(fmean(ours) - sheet.mean) / error:+.1f}"


def beside_sheet(known: dict) -> list[str]:
    draws = {"": "figures", ", 2018": "figures_2018", ", torch 0.4": "figures_torch-0.4"}
    ours = [f"ours{draw}" for draw in draws]
    scores = [f"z{draw}" for draw in draws]
    lines = head("", *ours, "sheet", "s.d.", *scores, "accepted", "seeds inside", "published")
    titles = {column.metric: column.title for column in BOUNDS}
    for sheet in SHEET:
        if sheet.model in BINARY:
            runs = found(known, BINARY[sheet.model], "subset")
            digits = 2
        else:
            runs = found(known, SSVAE[int(sheet.model[-1])], "train")
            digits = 4
        if not runs:
            continue
        means = []
        scores = []
        inside = []
        for part in draws.values():
            numbers = values(runs, Column("", sheet.metric, part=part))
            means.append(mean(numbers, digits, len(runs)))
            scores.append(z_score(numbers, sheet))
            if numbers:
                inside.append(str(sum(sheet.low <= number <= sheet.high for number in numbers)))
        label = f"{sheet.model} {titles.get(sheet.metric, sheet.metric)}"
        spread = "" if sheet.deviation is None else sheet.deviation
        accepted = [f"{sheet.low} to {sheet.high}", f"{', '.join(inside)} of {len(runs)}"]
        lines.append(row(label, *means, sheet.mean, spread, *scores, *accepted, sheet.published))
    return lines


def speed(known: dict) -> list[str]:
    measured = read_json(SPEED)
    ratios = [("textbook", "plain"), ("textbook", "compiled"), ("jax", "compiled")]
    titles = ["textbook", "plain", "compiled", "matrix products", "JAX"]
    titles += ["textbook / plain", "textbook / compiled", "JAX / compiled"]
    lines = head("ms per step", *titles, "evaluation, s", "textbook", "MB", "textbook")
    for model, times in measured.get("steps", {}).items():
        cells = []
        for version in ("textbook", "plain", "compiled", "products", "jax"):
            cells.append(middle(times.get(version, []), 1))
        for above, below in ratios:
            pairs = zip(times.get(above, []), times[below], strict=False)  # JAX may not be there
            cells.append(middle([a / b for a, b in pairs], 2))
        evaluation = measured["evaluation"].get(model, {})
        for key, digits in (("seconds", 1), ("megabytes", 0)):
            for whose in ("ours", "textbook"):
                numbers = [run[key] for run in evaluation.get(whose, [])]
                cells.append(middle(numbers, digits))
        lines.append(row(model.upper(), *cells))
    return [*lines, "", made_on([{**measured, "device": measured.get("capability")}])]


def every(series: dict, stages: str) -> list[tuple[Series, str]]:
    return [(each, stages) for each in series.values()]


TABLES = {  # what makes it; the series that it needs, and their stages
    "summary": (summary, every(BINARY, "train subset")),
    "vae": (partial(per_seed, model="VAE"), [(VAE, "train subset")]),
    "gmvae": (partial(per_seed, model="GMVAE"), [(GMVAE, "train subset")]),
    "iwae": (iwae, every(BINARY, "train subset")),
    "ssvae": (ssvae, every(SSVAE, "train")),
    "digits": (per_digit, every(SSVAE, "train")),
    "sheet": (beside_sheet, every(BINARY, "train subset 2018 0.4") + every(SSVAE, "train")),
    "beta": (betas, every(BETA, "train subset whole")),
    "whole": (whole, [(VAE, "train whole deep"), (GMVAE, "train whole")]),
    "literature": (literature, every(LITERATURE, "train deep")),
    "fsvae": (fsvae, [(FSVAE, "train")]),
    "labels": (labels, every(LABELS, "train")),
    "train_iw": (train_iw, every(TRAIN_IW, "train subset deep")),
    "speed": (speed, []),
}


def made_on(runs: list[dict]) -> str:
    """A line that names the kinds of device and the versions of torch of these entries."""
    devices = {run["device"] for run in runs if run.get("device")}
    versions = {run["torch"].partition("+")[0] for run in runs if run.get("torch")}
    return f"On {' and '.join(sorted(devices))}, torch {' and '.join(sorted(versions))}."


def table(name: str, known: dict) -> list[str]:
    """The lines of a table, or one that says that it has no runs."""
    make, needs = TABLES[name]
    if not needs:
        return make(known)
    runs = []
    for series, stages in needs:
        for stage in stages.split():
            runs += found(known, series, stage).values()
    if not runs:
        return [f"(no run of this table yet: `python docs/reproduce.py --only {name}`)"]
    return [*make(known), "", made_on(runs)]


# ---------------------------------------------------------------------------------------------
# The pages and their pictures

MARKED = re.compile(r"^<!-- table (.*) -->\n((?:(?!<!-- ).*\n)*)(<!-- end -->)?", flags=re.M)


def renewed(page: Path, names: list[str], known: dict) -> tuple[str, list[str]]:
    """A page with these tables made anew, and a line for each line of them that changed."""
    text = page.read_text(encoding="utf-8")
    differences = []

    def renew(match: re.Match) -> str:
        name, old, end = match.groups()
        number = text.count("\n", 0, match.start()) + 1
        if name not in TABLES:
            fail(f"{page.name}:{number}: there is no table {name}")
        if end is None:
            fail(f"{page.name}:{number}: table {name} has no <!-- end -->")
        if name not in names:
            return match[0]
        new = table(name, known)
        for before, after in zip_longest(old.splitlines(), new, fillvalue="nothing"):
            number += 1
            if before != after:
                place = f"{page.name}:{number}: table {name}"
                differences.append(f"{place}: is {before}, would be {after}")
        return "\n".join([f"<!-- table {name} -->", *new, "<!-- end -->"])

    return MARKED.sub(renew, text), differences


def write(names: list[str], known: dict) -> None:
    """Put the tables between their markers; no page is written where one of them is wrong."""
    texts = {page: renewed(page, names, known)[0] for page in PAGES}
    for page, text in texts.items():
        files.write(page, text.encode())


def check(names: list[str], known: dict) -> int:
    """Print each line that write would change; return their number."""
    differences = []
    for page in PAGES:
        differences += renewed(page, names, known)[1]
    print(
        "\n".join([*differences, f"{len(differences)} difference{'s' * (len(differences) != 1)}"])
    )
    return len(differences)


PICTURES = {  # in docs/: the series whose seed 0 drew it, and what it is called there
    "vae-samples": (VAE, "samples"),
    "gmvae-samples": (GMVAE, "samples"),
    "gmvae-latent": (GMVAE, "latent"),
    "ssvae-confusion": (SSVAE[1], "confusion"),
    "ssvae-styles": (SSVAE[1], "styles"),
    "fsvae-curves": (FSVAE, "curves"),
    "fsvae-2000": (FSVAE, "samples-0002000"),
    "fsvae-4000": (FSVAE, "samples-0004000"),
    "fsvae-10000": (FSVAE, "samples-0010000"),
    "fsvae-50000": (FSVAE, "samples-0050000"),
}


def drawn(series: Series, name: str) -> Path | None:
    """A picture of the seed 0 of a series, where that run counts and has drawn it."""
    path = Path("logs", series.name(0), f"{name}.png")
    return path if results(series, 0) and path.exists() else None


def take_pictures() -> None:
    """Put the pictures that the pages show into docs/.

    Street-view digits are halved; beta.png has the first 40 samples of each beta, one below the
    other.
    """
    import numpy as np  # only here, for the tables need neither
    from matplotlib import image

    taken = []
    for name, (series, there) in PICTURES.items():
        path = drawn(series, there)
        if path is None:
            continue
        taken.append(f"{name}.png")
        if there.startswith("samples-"):
            image.imsave(ROOT / "docs" / f"{name}.png", image.imread(path)[::2, ::2])
        else:
            files.write(ROOT / "docs" / f"{name}.png", path.read_bytes())
    paths = [drawn(series, "samples") for series in BETA.values()]
    if None not in paths:
        taken.append("beta.png")
        border = ((0, 8), (0, 0), (0, 0))
        rows = [np.pad(image.imread(path)[:112], border, constant_values=1) for path in paths]
        image.imsave(ROOT / "docs" / "beta.png", np.concatenate(rows))
    print(f"pictures in docs/: {', '.join(taken) or 'none, for no run that counts is in logs/'}")


def jobs(text: str) -> str:
    """A check for a number of runs at a time."""
    if text != "auto" and not re.fullmatch(r"0*[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"takes auto or a whole number from 1, not {text!r}")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="reproduce.py", description=summary, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    text = f"tables, of {', '.join(TABLES)} (default: all)"
    add("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME", help=text)
    add("--data_dir", metavar="DIR", help="folder of the data sets, for the scripts")
    add("--jobs", type=jobs, default="auto", metavar="J", help="runs at a time, for the scripts")
    devices = ["auto", "cpu", "cuda", "gpu", "mps"]
    add("--device", choices=devices, help="where to compute, for the scripts")
    nothing = "run nothing;"
    add("--collect", action="store_true", help=f"{nothing} read logs/ into docs/figures.json")
    add("--write", action="store_true", help=f"{nothing} put the tables into the pages")
    add("--check", action="store_true", help=f"{nothing} name where those tables differ")
    add("--pictures", action="store_true", help=f"{nothing} put the pictures into docs/")
    args = parser.parse_args(argv)
    if args.data_dir is not None and not os.path.isdir(args.data_dir):
        fail(f"argument --data_dir: there is no folder {args.data_dir!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    known = stored_figures()  # a damaged file is better known before the runs than after them
    pages = args.write or args.check or args.pictures
    code = 0
    if not (args.collect or pages):
        try:
            Path("logs").mkdir(exist_ok=True)
        except OSError as error:
            fail(f"logs: {error.strerror}")
        code = run_all(args)
        if code > 128:
            return code
    if args.collect or not pages:
        known = collect(args.only)
    if args.pictures:
        take_pictures()
    if args.write:
        write(args.only, known)
    if args.check and check(args.only, known):
        code = 1
    if not pages:
        for name in args.only:
            lines = table(name, known)
            print("\n".join(["", f"<!-- table {name} -->", *lines, "<!-- end -->"]))
    return code


if __name__ == "__main__":
    signals.interrupt_in_one_line()
    sys.exit(main())

#!/usr/bin/env python3
"""Run everything that the pages quote, and write their tables: README.md and those in docs/.

python docs/reproduce.py --data_dir DIR trains and evaluates by the scripts' own command lines in the current folder,
as many runs at a time as there are cores, one thread each, and goes on where it stopped. All of it takes about 17 hours
of one core. What it finds it stores in docs/figures.json, from which --write and --check make the tables, on a clone
without any run too; --pictures takes the pictures from logs/. A table stands between <!-- table NAME --> and
<!-- end -->. The table fsvae takes the sample of 10,366 SVHN digits in DIR; figures of other files, of drawn digits, or
of another number of steps do not count. The table speed is of docs/speed.json, by tests/benchmark.py --output.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures.json"
SPEED = ROOT / "docs" / "speed.json"  # by tests/benchmark.py, on an idle machine
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmark.md", ROOT / "docs" / "writeup.md"]
REAL = {
    "mnist": ("mnist", 10_000),
    "svhn": ("svhn, train split, files not verified", 486),
}  # data, test images
BOUNDS = {"nelbo": "NELBO", "kl": "KL", "rec": "Rec"} | {
    f"niwae_{m}": f"IWAE-{m}" for m in (1, 10, 100, 1000)
}

# Model, figure, the course's own solution sheet of autumn 2021 (mean, standard deviation over 100 runs), what its
# graders accept, and checkpoints that others published, evaluated anew on the same images.
OTHERS = [
    ("VAE", "nelbo", (101.5, 0.55), (98, 102), (101.04, 101.48, 101.32, 101.82, 101.45)),
    ("VAE", "kl", (19.29, 0.17), (17.5, 21.5), ()),
    ("VAE", "rec", (82.57, 0.56), (80, 84), ()),
    ("VAE", "niwae_1", (99.83, 0.55), (96.2, 101.8), ()),
    ("VAE", "niwae_10", (97.13, 0.48), (94.5, 99.5), ()),
    ("VAE", "niwae_100", (96.1, 0.42), (93.5, 98.5), ()),
    ("VAE", "niwae_1000", (95.62, 0.42), (92.2, 97.8), (96.79, 97.25, 97.21, 97.13, 97.03)),
    ("GMVAE", "nelbo", (97.22, 0.54), (94, 100), (99.03, 98.94, 98.46, 99.09, 99.02, 99.19)),
    ("GMVAE", "kl", (17.65, 0.18), (16.5, 18.5), ()),
    ("GMVAE", "rec", (79.58, 0.6), (77.5, 82.5), ()),
    ("GMVAE", "niwae_1", (97.22, 0.54), (94, 100), ()),
    ("GMVAE", "niwae_10", (94.74, 0.48), (92.05, 97.95), ()),
    ("GMVAE", "niwae_100", (93.8, 0.47), (91.1, 96.9), ()),
    (
        "GMVAE",
        "niwae_1000",
        (93.38, 0.46),
        (90.3, 95.7),
        (95.33, 94.11, 95.03, 95.16, 95.51, 95.54),
    ),
    ("SSVAE gw = 0", "accuracy", (0.735, None), (0.705, 0.765), (0.752, 0.736, 0.74)),
    ("SSVAE gw = 1", "accuracy", (0.934, 0.0139), (0.885, 0.955), (0.942, 0.949)),
]
# Burda, Grosse, Salakhutdinov 2016, table 1, one stochastic layer: -L_5000 on the whole test split after training with
# k samples; z = 50, 200 units, 3,280 passes, images binarised anew each time.
BURDA = {"VAE": {1: 86.76, 5: 86.47, 50: 86.35}, "IWAE": {1: 86.76, 5: 85.54, 50: 84.78}}
M2_ERROR = {100: (11.97, 1.71), 1000: (3.6, 0.56)}  # percent; Kingma et al. 2014, table 1
PYRO = {
    100: 0.9319,
    600: 0.9437,
    1000: 0.9487,
    3000: 0.9582,
}  # accuracy of M2; Pyro's tutorial on semi-supervised VAEs


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone; minutes: how long one takes a busy core (AMD EPYC, Zen 3)."""

    stem: str
    flags: str
    step: int
    minutes: float
    seeds: int

    @property
    def script(self) -> str:
        return f"run_{self.stem.split('_')[0]}.py"

    @property
    def data(self) -> str:
        return "svhn" if self.script == "run_fsvae.py" else "mnist"

    def name(self, seed: int) -> str:
        return f"model={self.stem}_run={seed:04d}"


VAE, GMVAE = Series("vae_z=10", "", 20_000, 3, 10), Series("gmvae_z=10_k=500", "", 20_000, 3.5, 10)
BETA = {b: Series(f"vae_z=10_beta={b}", f"--beta {b}", 20_000, 3, 3) for b in (0.5, 1, 2, 4, 8)} | {
    1: VAE
}
TRAIN_IW = {1: VAE, 5: Series("vae_z=10_train_iw=5", "--train_iw 5", 20_000, 8, 3)}
TRAIN_IW[50] = Series("vae_z=10_train_iw=50", "--train_iw 50", 20_000, 55, 3)
SSVAE = {
    gw: Series(f"ssvae_gw={gw:03d}_cw=100", f"--gw {gw}", 30_000, 1.5 + 26 * gw, 5) for gw in (0, 1)
}
LABELS = {(100, gw): series for gw, series in SSVAE.items()} | {
    (n, gw): Series(
        f"{series.stem}_labels={n}", f"{series.flags} --labels {n}", 30_000, series.minutes, 3
    )
    for n in (600, 1000, 3000)
    for gw, series in SSVAE.items()
}
FSVAE = Series(
    "fsvae_split=train",
    "--split train --check_data 0 --iter_max 50000 --iter_save 2000",
    50_000,
    35,
    2,
)
BINARY = {"VAE": VAE, "GMVAE": GMVAE}
# Of the models in OTHERS: the series, the stage that gives their figures, and to how many digits.
SHEET = {model: (series, "subset", 2) for model, series in BINARY.items()}
SHEET |= {f"SSVAE gw = {gw}": (series, "train", 4) for gw, series in SSVAE.items()}
PICTURES = {  # in docs/: of which series' seed 0, and which picture
    "vae-samples": (VAE, "samples"),
    "gmvae-samples": (GMVAE, "samples"),
    "gmvae-latent": (GMVAE, "latent"),
    "ssvae-confusion": (SSVAE[1], "confusion"),
    "ssvae-styles": (SSVAE[1], "styles"),
    "fsvae-curves": (FSVAE, "curves"),
} | {f"fsvae-{step}": (FSVAE, f"samples-{step:07d}") for step in (2000, 4000, 10_000, 50_000)}
STAGES = {  # of a run: more flags, the key in results.json and the figure that it adds there, minutes of a core
    "train": ("", "figures", "", None),
    "subset": ("--train 0", "figures", "niwae_1000", 0.2),
    "2018": ("--train 0 --test 2018", "figures_2018", "niwae_1000", 0.2),
    "0.4": ("--train 0 --test torch-0.4", "figures_torch-0.4", "niwae_1000", 0.2),
    "whole": ("--train 0 --test all", "figures_all", "niwae_1000", 4),
    "deep": ("--train 0 --test all --iw 1 5000", "figures_all", "niwae_5000", 15),
}
PARTS = list(
    dict.fromkeys(part for _, part, *_ in STAGES.values())
)  # of results.json: figures by name


# ---- what the runs left in logs/, and docs/figures.json


def fail(message: str):
    print(f"reproduce.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path: Path) -> dict:
    """What a JSON file holds, or nothing where it is not there or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def put(path: Path, text: str) -> None:
    """Write a file whole: a reader, and whoever is stopped while writing, has the old one or the new one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def read_csv(path: Path) -> list[dict[str, float]]:
    lines = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
    return [{key: float(value) for key, value in line.items()} for line in lines]


def done(results: dict, stage: str) -> bool:
    """Whether a run has the figures of a stage."""
    _, part, key, _ = STAGES[stage]
    return key in results.get(part, {}) if key else bool(results.get(part))


def results(series: Series, seed: int) -> dict:
    """The results.json of a run where it counts: real data, all its test images, the last step, default settings."""
    found, made = (
        read_json(Path("logs", series.name(seed), f"{file}.json")) for file in ("results", "config")
    )
    real = (found.get("data"), found.get("test_images")) == REAL[series.data]
    real = (
        real
        and found.get("evaluated_on", "test split") == "test split"
        and found.get("step") == series.step
    )
    real = real and all(isinstance(found.get(part, {}), dict) for part in PARTS)
    return (
        found
        if real and (made.get("seed", seed), made.get("batch_size", 100)) == (seed, 100)
        else {}
    )


def entry(series: Series, seed: int) -> dict:
    """What docs/figures.json holds of a run, but for the machine; nothing where the run does not count."""
    if not (found := results(series, seed)):
        return {}
    folder = Path("logs", series.name(seed))
    rows = {line["step"]: line for line in read_csv(folder / "metrics.csv")}
    kept = ("data", "step", "test_images", *PARTS, "per_digit_accuracy")
    made = {"flags": f"{series.script} {series.flags} --run {seed}".replace("  ", " ")}
    made |= {key: found[key] for key in kept if key in found}
    made |= {"torch": read_json(folder / "config.json").get("torch")}
    if rows:
        times = pairwise([(0, 0), *((step, line["seconds"]) for step, line in rows.items())])
        made["time"] = {
            "ms": round(1000 * median((t - s) / (n - m) for (m, s), (n, t) in times), 2)
        }
    if series is FSVAE:
        tests = read_csv(folder / "test.csv")
        made["tests"] = [
            test | {"training": rows[test["step"]]["nelbo"]}
            for test in tests
            if test["step"] in rows
        ]
    return made


def stored() -> dict:
    """What docs/figures.json holds: runs by name."""
    known = read_json(FIGURES)
    if FIGURES.exists() and not (known and all(isinstance(run, dict) for run in known.values())):
        fail(f"{FIGURES} is damaged: put an intact copy in its place")
    return known


def merged(known: dict, made: dict) -> dict:
    """A run's entry, and what was known of the same weights before and logs/ does not hold any more."""
    old, now = known.get("figures", {}), made.get("figures", {})
    if not any(key in old for key in now) or any(old.get(key, now[key]) != now[key] for key in now):
        return made
    return known | {
        key: known.get(key, {}) | new if isinstance(new, dict) else new for key, new in made.items()
    }


def collect(runs: dict) -> dict:
    """docs/figures.json, brought up to date with the runs in logs/; a new one is of this machine's kind of CPU."""
    known = stored()
    there = {series.name(seed): made for series, seed in runs if (made := entry(series, seed))}
    there = {name: merged(known.get(name, {}), made) for name, made in there.items()}
    new = {name: made for name, made in there.items() if made != known.get(name)}
    if new:
        import torch  # only here: the tables need no torch

        cpu = {"cpu": torch.backends.cpu.get_cpu_capability()}
        known |= {name: cpu | made for name, made in new.items()}
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)
        )
        put(FIGURES, f"{{\n{lines}\n}}\n")
    kept = (
        f"the others are those of {FIGURES.name}"
        if len(there) < len(runs)
        else "all of the tables'"
    )
    print(
        f"{len(there)} of {len(runs)} runs are in logs/, {len(new)} of them new or changed in {FIGURES.name}; {kept}"
    )
    return known


# ---- the runs


def needed(names: list[str]) -> dict[tuple[Series, int], list[str]]:
    """The runs that these tables need, by series and seed, each with its stages in order."""
    runs = {}
    for name in names:
        for series, stages in TABLES[name][1]:
            for seed in range(series.seeds):
                known = runs.setdefault((series, seed), [])
                known += [
                    stage
                    for stage in stages.split()
                    if stage not in known and (stage != "deep" or seed < 3)
                ]
    return runs


def minutes(series: Series, seed: int, stage: str) -> float:
    """How long a stage will take one core, less the steps that are trained already."""
    rows = read_csv(Path("logs", series.name(seed), "metrics.csv")) or [{"step": 0}]
    return STAGES[stage][3] or series.minutes * max(0, 1 - rows[-1]["step"] / series.step)


def command(series: Series, seed: int, stage: str, data_dir: str | None) -> list[str]:
    words = f"{series.flags} --run {seed} --data {series.data} {STAGES[stage][0]}".split()
    return [
        sys.executable,
        str(ROOT / series.script),
        *words,
        *(["--data_dir", data_dir] if data_dir else []),
    ]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """A process of its own, with one thread, out of reach of the terminal's Ctrl-C; what it says goes to log."""
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def problem(series: Series, seed: int, stage: str, code: int) -> str:
    """Why a process that ended with that exit code did not give the figures of its stage, or nothing."""
    if code:
        said = (
            Path("logs", f"{series.name(seed)}.txt").read_text(errors="replace").strip()
            or "it said nothing"
        )
        return f"exit code {code}: {said.splitlines()[-1]}"
    kept = read_json(Path("logs", series.name(seed), "results.json"))
    about = f"{kept.get('data')}, {kept.get('test_images')} test images, step {kept.get('step')}"
    return "" if done(results(series, seed), stage) else f"its figures do not count: {about}"


def run_all(runs: dict[tuple[Series, int], list[str]], jobs: int, data_dir: str | None) -> int:
    """Run what is not done yet, the stages of a run one after another; return the exit code.

    A signal ends it once the runs that are under way have saved their state.
    """
    left = {
        run: [stage for stage in stages if not done(results(*run), stage)]
        for run, stages in runs.items()
    }
    left = {run: stages for run, stages in left.items() if stages}
    waiting, running, code, caught = list(left), {}, 0, []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda *_: caught.append(True))

    def time_left() -> str:
        total = sum(minutes(*run, stage) for run, stages in left.items() for stage in stages)
        return (
            f"{total:.0f} core-minutes, about {total / 60 / max(1, min(jobs, len(left))):.1f} hours"
        )

    print(f"{len(left)} of {len(runs)} runs are to do, {jobs} at a time: {time_left()}", flush=True)
    try:
        while (waiting or running) and not caught:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(
                    command(*run, left[run][0], data_dir),
                    Path("logs", f"{run[0].name(run[1])}.txt"),
                )
            time.sleep(0.1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                ended, stage = running.pop(run).returncode, left[run].pop(0)
                if why := problem(*run, stage, ended):
                    code, left[run] = 1, []
                if left[run]:
                    waiting.insert(0, run)
                else:
                    del left[run]
                state = f"FAILED, {why}" if why else "done"
                print(f"{run[0].name(run[1])}: {stage} {state}; left: {time_left()}", flush=True)
    finally:  # nothing runs any more, but after a signal or an error
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if caught and left:
        print(
            "stopped, the runs' states are saved; the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return code


# ---- the tables: functions of docs/figures.json that return lines


def found(known: dict, series: Series, stage: str) -> dict[int, dict]:
    """The stored runs of a series that have the figures of a stage, by seed."""
    runs = {seed: known.get(series.name(seed), {}) for seed in range(series.seeds)}
    return {seed: run for seed, run in runs.items() if done(run, stage)}


def values(runs: dict[int, dict], key: str, part: str = "figures") -> list[float]:
    found = [run.get(part, {}) for run in runs.values()]
    if key == "gap":
        return [
            figures["nelbo"] - figures["niwae_1000"] for figures in found if "niwae_1000" in figures
        ]
    return [figures[key] for figures in found if key in figures]


def mean(numbers: list[float], digits: int = 2, runs: int = 0) -> str:
    """Mean and standard error, and of how many runs where that is not all of them."""
    error = f" ± {stdev(numbers) / sqrt(len(numbers)):.{digits}f}" if len(numbers) > 1 else ""
    some = f" ({len(numbers)})" if runs > len(numbers) else ""
    return f"{fmean(numbers):.{digits}f}{error}{some}" if numbers else ""


def deviation(numbers: list[float], digits: int = 2) -> str:
    return f"{stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""


def count(runs: dict | list, series: Series) -> str:
    return str(series.seeds) if len(runs) == series.seeds else f"{len(runs)} of {series.seeds}"


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def averages(known: dict, first: str, rows: dict, stage: str, columns: list, spread: bool = False):
    """A row per series: means of columns (title, key, digits, key in results.json); spread: and standard deviations."""
    lines = head(first, *(title for title, *_ in columns), "seeds")
    for label, series in rows.items():
        runs = found(known, series, stage)
        numbers = [(values(runs, key, *part), digits) for _, key, digits, *part in columns]
        lines.append(
            row(label, *(mean(*column, len(runs)) for column in numbers), count(runs, series))
        )
        lines += [row("s.d.", *(deviation(*column) for column in numbers), "")] if spread else []
    return lines


def summary(known: dict) -> list[str]:
    return averages(
        known, "", BINARY, "subset", [(title, key, 2) for key, title in BOUNDS.items()], spread=True
    )


def per_seed(known: dict, model: str) -> list[str]:
    columns = [(title, key, 2) for key, title in BOUNDS.items()]
    lines = averages(known, "seed", {"**mean**": BINARY[model]}, "subset", columns, spread=True)
    for seed, run in found(known, BINARY[model], "subset").items():
        lines.insert(-2, row(seed, *(f"{run['figures'][key]:.2f}" for key in BOUNDS), ""))
    return lines


def iwae(known: dict) -> list[str]:
    columns = [(title, key, 2) for key, title in BOUNDS.items()] + [("NELBO - IWAE-1000", "gap", 2)]
    columns += [(f"ESS of {m}", f"ess_{m}", 1) for m in (10, 100, 1000)]
    lines, less = averages(known, "", BINARY, "subset", columns), []
    for _, key, digits in columns:
        vae, gmvae = (values(found(known, series, "subset"), key) for series in BINARY.values())
        less.append(f"{fmean(gmvae) - fmean(vae):+.{digits}f}" if vae and gmvae else "")
    return [*lines, row("GMVAE - VAE", *less, "")]


def whole(known: dict) -> list[str]:
    columns = [(title, key, 2, "figures_all") for key, title in BOUNDS.items()]
    columns += [("IWAE-5000", "niwae_5000", 2, "figures_all")]
    lines = averages(known, "", BINARY, "whole", columns, spread=True)
    theirs = [(kind, k, figure) for kind, figures in BURDA.items() for k, figure in figures.items()]
    return lines + [
        row(f"Burda et al. 2016, {kind}, k = {k}", *[""] * 7, figure, "")
        for kind, k, figure in theirs
    ]


def z(ours: list[float], theirs: float, spread: float | None) -> str:
    """The difference of the means over its standard error; theirs is the mean of 100 runs."""
    error = sqrt(stdev(ours) ** 2 / len(ours) + spread**2 / 100) if spread and len(ours) > 1 else 0
    return f"{(fmean(ours) - theirs) / error:+.1f}" if error else ""


def sheet(known: dict) -> list[str]:
    draws = {"": "figures", ", 2018": "figures_2018", ", torch 0.4": "figures_torch-0.4"}
    titles = [*(f"ours{draw}" for draw in draws), "sheet", "s.d.", *(f"z{draw}" for draw in draws)]
    lines = head("", *titles, "accepted", "seeds inside", "published")
    for model, key, (theirs, spread), (low, high), published in OTHERS:
        series, stage, digits = SHEET[model]
        runs = found(known, series, stage)
        if ours := values(runs, key):
            numbers = [values(runs, key, part) for part in draws.values()]
            cells = [*(mean(some, digits, len(ours)) for some in numbers), theirs, spread or ""]
            cells += [*(z(some, theirs, spread) for some in numbers), f"{low} to {high}"]
            inside = [str(sum(low <= value <= high for value in some)) for some in numbers if some]
            cells += [f"{', '.join(inside)} of {len(ours)}"]
            cells += [f"{min(published)} to {max(published)}" if published else ""]
            lines.append(row(f"{model} {BOUNDS.get(key, key)}", *cells))
    return lines


def ssvae(known: dict) -> list[str]:
    lines = head("", "accuracy", "s.d.", *(f"seed {seed}" for seed in range(5)))
    for gw, series in SSVAE.items():
        runs = found(known, series, "train")
        each = [
            f"{runs[seed]['figures']['accuracy']:.4f}" if seed in runs else ""
            for seed in range(series.seeds)
        ]
        numbers = values(runs, "accuracy")
        lines.append(row(f"gw = {gw}", mean(numbers, 4), deviation(numbers, 4), *each))
    return lines


def per_digit(known: dict) -> list[str]:
    lines = head("digit", *range(10), "seeds")
    for gw, series in SSVAE.items():
        if runs := found(known, series, "train"):
            columns = zip(*(run["per_digit_accuracy"] for run in runs.values()), strict=True)
            lines.append(
                row(
                    f"gw = {gw}",
                    *(f"{fmean(column):.3f}" for column in columns),
                    count(runs, series),
                )
            )
    return lines


def labels(known: dict) -> list[str]:
    lines = head(
        "labels",
        "gw = 0 (seeds)",
        "gw = 1 (seeds)",
        "M2, Kingma et al. 2014",
        "M2, Pyro's tutorial",
    )
    for n, pyro in PYRO.items():
        runs = {series: found(known, series, "train") for series in (LABELS[n, 0], LABELS[n, 1])}
        cells = [
            f"{mean(values(some, 'accuracy'), 4)} ({count(some, series)})"
            for series, some in runs.items()
        ]
        m2 = f"{1 - M2_ERROR[n][0] / 100:.4f} ± {M2_ERROR[n][1] / 100:.4f}" if n in M2_ERROR else ""
        lines.append(row(n, *cells, m2, pyro))
    return lines


def beta(known: dict) -> list[str]:
    columns = [("KL", "kl", 2), ("Rec", "rec", 2), ("NELBO (beta = 1 on all)", "nelbo", 2)]
    columns += [("IWAE-1000", "niwae_1000", 2), ("active dimensions", "active", 1)]
    columns += [("NELBO, whole split", "nelbo", 2, "figures_all")]
    columns += [("IWAE-1000, whole split", "niwae_1000", 2, "figures_all")]
    return averages(known, "beta", BETA, "subset", columns)


def train_iw(known: dict) -> list[str]:
    columns = [
        ("NELBO, subset", "nelbo", 2),
        ("IWAE-1000, subset", "niwae_1000", 2),
        ("ESS of 1000", "ess_1000", 1),
    ]
    columns += [
        ("ms per step", "ms", 0, "time"),
        ("IWAE-5000, whole split", "niwae_5000", 2, "figures_all"),
    ]
    cpu = known.get(VAE.name(0), {}).get("cpu")  # times are of one kind of CPU
    known = {
        name: run if run.get("cpu") == cpu else run | {"time": {}} for name, run in known.items()
    }
    lines = averages(known, "k", TRAIN_IW, "subset", columns)
    return lines + [
        row(f"Burda et al. 2016, {k}", *[""] * 4, figure, "") for k, figure in BURDA["IWAE"].items()
    ]


def fsvae(known: dict) -> list[str]:
    runs = found(known, FSVAE, "train")
    lines = head(
        "step", "NELBO, training (100 steps)", "NELBO, test", "KL, test", "Rec, test", "seeds"
    )
    tests = [test for run in runs.values() for test in run["tests"]]
    for step in sorted(
        {
            test["step"]
            for test in tests
            if test["step"] in (2000, 4000) or test["step"] % 10_000 == 0
        }
    ):
        some = [test for test in tests if test["step"] == step]
        cells = [
            mean([test[key] for test in some], 1) for key in ("training", "nelbo", "kl", "rec")
        ]
        lines.append(row(f"{step:,.0f}", *cells, count(some, FSVAE)))
    return lines


def speed(known: dict) -> list[str]:
    found, ours = read_json(SPEED), ("textbook", "plain", "compiled", "products", "jax")
    ratios = [("textbook", "plain"), ("textbook", "compiled"), ("jax", "compiled")]
    titles = [
        *ours[:3],
        "matrix products",
        "JAX",
        *(" / ".join(pair).replace("jax", "JAX") for pair in ratios),
    ]
    lines = head("ms per step", *titles, "evaluation, s", "textbook", "MB", "textbook")
    for kind, times in found.get("steps", {}).items():
        cells = [f"{median(times[name]):.1f}" if name in times else "" for name in ours]
        pairs = [zip(times.get(above, []), times[below]) for above, below in ratios]  # noqa: B905 (JAX may not be there)
        cells += [
            f"{median(some):.2f}" if (some := [a / b for a, b in pair]) else "" for pair in pairs
        ]
        for key, digits in (("seconds", 1), ("megabytes", 0)):
            runs = found["evaluation"].get(kind, {})
            each = [[run[key] for run in runs.get(whose, [])] for whose in ("ours", "textbook")]
            cells += [f"{median(numbers):,.{digits}f}" if numbers else "" for numbers in each]
        lines.append(row(kind.upper(), *cells))
    return lines


BOTH = [(series, "train subset") for series in BINARY.values()]
CLASSIFIERS = [(series, "train") for series in SSVAE.values()]
TABLES = {  # what makes it, and the series and stages that it needs
    "summary": (summary, BOTH),
    "vae": (partial(per_seed, model="VAE"), BOTH[:1]),
    "gmvae": (partial(per_seed, model="GMVAE"), BOTH[1:]),
    "iwae": (iwae, BOTH),
    "ssvae": (ssvae, CLASSIFIERS),
    "digits": (per_digit, CLASSIFIERS),
    "sheet": (
        sheet,
        [(series, "train subset 2018 0.4") for series in BINARY.values()] + CLASSIFIERS,
    ),
    "beta": (beta, [(series, "train subset whole") for series in BETA.values()]),
    "whole": (whole, [(VAE, "train whole deep"), (GMVAE, "train whole")]),
    "fsvae": (fsvae, [(FSVAE, "train")]),
    "labels": (labels, [(series, "train") for series in LABELS.values()]),
    "train_iw": (train_iw, [(series, "train subset deep") for series in TRAIN_IW.values()]),
    "speed": (speed, []),
}


def table(name: str, known: dict) -> list[str]:
    """The lines of a table, or one that says that it has no runs."""
    make, needs = TABLES[name]
    if not needs or any(
        found(known, series, stage) for series, stages in needs for stage in stages.split()
    ):
        return make(known)
    return [f"(no run of this table yet: `python docs/reproduce.py --only {name}`)"]


# ---- the pages


def marked(page: Path, names: list[str]) -> tuple[list[str], list[tuple[str, int, int]]]:
    """A page's lines, and of each of these tables its name and where its lines begin and end."""
    lines, places = page.read_text().splitlines(), []
    for at, line in enumerate(lines):
        if mark := re.fullmatch(r"<!-- table (.*) -->", line):
            rest = [
                later for later in range(at + 1, len(lines)) if lines[later].startswith("<!-- ")
            ]
            if mark[1] not in TABLES:
                fail(f"{page.name}:{at + 1}: there is no table {mark[1]}")
            if not rest or lines[rest[0]] != "<!-- end -->":
                fail(f"{page.name}:{at + 1}: table {mark[1]} has no <!-- end -->")
            places += [(mark[1], at + 1, rest[0])] if mark[1] in names else []
    return lines, places


def write(names: list[str], known: dict) -> None:
    """Put the tables between their markers."""
    for page, (lines, places) in [
        (page, marked(page, names)) for page in PAGES
    ]:  # all are read before one is written
        for name, begin, end in reversed(places):
            lines[begin:end] = table(name, known)
        put(page, "\n".join(lines) + "\n")
        print(f"{page.name}: {', '.join(name for name, *_ in places) or 'no table'}")


def check(names: list[str], known: dict) -> int:
    """Name each line of a table that write would change; return their number."""
    count = 0
    for page in PAGES:
        lines, places = marked(page, names)
        for name, begin, end in places:
            for at, (old, new) in enumerate(
                zip_longest(lines[begin:end], table(name, known), fillvalue="nothing")
            ):
                if old != new:
                    count += 1
                    print(f"{page.name}:{begin + at + 1}: table {name}: is {old}, would be {new}")
    print(f"{count} difference{'s' * (count != 1)}")
    return count


# ---- the pictures


def pictures() -> None:
    """Take the pictures that the pages show from the runs that count: street-view digits at half their size, and as
    beta.png the first 40 samples of each beta, one below the other.
    """
    import numpy as np  # only here: the tables need neither
    from matplotlib import image

    def find(series: Series, name: str) -> Path | None:
        path = Path("logs", series.name(0), f"{name}.png")
        return path if results(series, 0) and path.exists() else None

    if not any(find(*place) for place in PICTURES.values()):
        print("no picture: no run that counts is in logs/")
    for name, place in PICTURES.items():
        if path := find(*place):
            to = ROOT / "docs" / f"{name}.png"
            if place[1].startswith("samples-"):
                image.imsave(to, image.imread(path)[::2, ::2])
            else:
                to.write_bytes(path.read_bytes())
            print(f"{to.name}: {path}")
    if all(paths := [find(series, "samples") for series in BETA.values()]):
        rows = [
            np.pad(image.imread(path)[:112], ((0, 8), (0, 0), (0, 0)), constant_values=1)
            for path in paths
        ]
        image.imsave(ROOT / "docs" / "beta.png", np.concatenate(rows))
        print(f"beta.png: samples.png of {', '.join(series.name(0) for series in BETA.values())}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.error = fail
    text = f"tables, of {', '.join(TABLES)} (default: all)"
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME", help=text
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="folder of the data sets, handed to the scripts"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="runs at a time (default: cores)",
    )
    parser.add_argument(
        "--collect", action="store_true", help="run nothing; read logs/ into docs/figures.json"
    )
    parser.add_argument(
        "--write", action="store_true", help="run nothing; put the tables into the pages"
    )
    parser.add_argument(
        "--check", action="store_true", help="run nothing; name where those tables differ"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="run nothing; put the pages' pictures into docs/"
    )
    flags = parser.parse_args(argv)
    if flags.jobs < 1:
        fail(f"argument --jobs: takes a whole number from 1, not {flags.jobs}")
    if flags.data_dir is not None and not os.path.isdir(flags.data_dir):
        fail(f"argument --data_dir: there is no folder {flags.data_dir!r}")
    runs, code = needed(flags.only), 0
    stored()  # a damaged one is better known before the runs than after them
    only_pages = (flags.write or flags.check or flags.pictures) and not flags.collect
    if not (flags.collect or only_pages):
        try:
            Path("logs").mkdir(exist_ok=True)
            code = run_all(runs, flags.jobs, flags.data_dir)
        except OSError as error:  # logs is a file, the disk is full, or the like
            fail(f"{error.filename}: {error.strerror}")
    known = stored() if only_pages else collect(runs)
    if flags.pictures:
        pictures()
    if flags.write:
        write(flags.only, known)
    if flags.check:
        code = 1 if check(flags.only, known) else code
    for name in [] if flags.write or flags.check or flags.pictures else flags.only:
        print("\n".join(["", f"<!-- table {name} -->", *table(name, known), "<!-- end -->"]))
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The tables that the pages quote: the runs that each needs, and its lines.

A table is a function of docs/figures.json: a dictionary of runs by name, each as reproduce.py
collected it. It needs no run, no data set and no torch.
"""

import json
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

SPEED = Path(__file__).with_name("speed.json")  # by tests/benchmark.py --output

# ---------------------------------------------------------------------------------------------
# The runs


@dataclass(frozen=True)
class Series:
    """Runs of one command line with the seeds 0, 1, ...; the last step is the one that counts.

    stem: how their names begin; first: the number of the run with seed 0.
    """

    stem: str
    flags: str = ""
    step: int = 20_000
    seeds: int = 3
    first: int = 0

    @property
    def model(self) -> str:
        return self.stem.partition("_")[0]

    def name(self, seed: int) -> str:
        return f"model={self.stem}_run={self.first + seed:04d}"

    def words(self, seed: int) -> list[str]:
        """The script and the flags of the run with this seed."""
        words = [f"run_{self.model}.py", *self.flags.split(), "--run", str(self.first + seed)]
        if self.first > 0:
            words += ["--seed", str(seed)]
        return words

    def seeds_of(self, stage: str) -> range:
        """The seeds that a stage is for: deep takes 18 minutes or more a run, so it is for few."""
        return range(min(self.seeds, 3) if stage == "deep" else self.seeds)


class Stage(NamedTuple):
    flags: str  # besides those of the series
    part: str  # of results.json, where its metrics are
    metric: str = ""  # one that no earlier stage leaves there


STAGES = {
    "train": Stage("", "figures"),
    "subset": Stage("--train 0", "figures", "niwae_1000"),
    "2018": Stage("--train 0 --test 2018", "figures_2018", "niwae_1000"),
    "0.4": Stage("--train 0 --test torch-0.4", "figures_torch-0.4", "niwae_1000"),
    "whole": Stage("--train 0 --test all", "figures_all", "niwae_1000"),
    "deep": Stage("--train 0 --test all --iw 1 5000", "figures_all", "niwae_5000"),
}

VAE = Series("vae_z=10", seeds=10)
GMVAE = Series("gmvae_z=10_k=500", seeds=10)
BINARY = {"VAE": VAE, "GMVAE": GMVAE}
BETA = {beta: Series(f"vae_z=10_beta={beta}", f"--beta {beta}") for beta in (0.5, 1, 2, 4, 8)}
BETA[1] = VAE
TRAIN_IW = {k: Series(f"vae_z=10_train_iw={k}", f"--train_iw {k}") for k in (1, 5, 50)}
TRAIN_IW[1] = VAE
SSVAE = {}  # by gw
LABELS = {}  # by the number of labels and gw
for gw in [0, 1]:
    stem = f"ssvae_gw={gw:03d}_cw=100"
    SSVAE[gw] = Series(stem, f"--gw {gw}", 30_000, seeds=10)
    LABELS[100, gw] = SSVAE[gw]
    for n in [600, 1000, 3000]:
        LABELS[n, gw] = Series(f"{stem}_labels={n}", f"--gw {gw} --labels {n}", 30_000)
FSVAE_FLAGS = "--split train --check_data 0 --iter_max 50000 --iter_save 2000"
FSVAE = Series("fsvae_split=train", FSVAE_FLAGS, 50_000, seeds=2)


def passes(step: int) -> int:
    """How often training has gone through MNIST's 60,000 images, 100 a step."""
    return step * 100 // 60_000


# By model, z, learning rate, schedule, steps and k.
LITERATURE = {("VAE", 10, 0.001, "constant", 20_000, 1): VAE}
for model, z, rate, schedule, step, k, seeds in [
    ("VAE", 10, 0.001, "constant", 120_000, 1, 1),
    ("VAE", 10, 0.001, "cosine", 20_000, 1, 1),
    ("VAE", 10, 0.001, "cosine", 120_000, 1, 1),
    ("VAE", 50, 0.001, "constant", 20_000, 1, 1),
    ("VAE", 50, 0.001, "constant", 120_000, 1, 1),
    ("VAE", 50, 0.001, "cosine", 20_000, 1, 1),
    ("VAE", 50, 0.001, "cosine", 60_000, 1, 1),
    ("VAE", 50, 0.001, "cosine", 120_000, 1, 1),
    ("VAE", 50, 0.001, "cosine", 480_000, 1, 1),
    ("VAE", 50, 0.002, "cosine", 120_000, 1, 3),
    ("VAE", 50, 0.002, "cosine", 210_000, 1, 3),
    ("VAE", 50, 0.001, "cosine", 120_000, 5, 2),
    ("VAE", 50, 0.002, "cosine", 210_000, 5, 2),
    ("VAE", 50, 0.001, "cosine", 120_000, 50, 1),
    ("VAE", 50, 0.002, "cosine", 210_000, 50, 3),
    ("GMVAE", 50, 0.001, "cosine", 120_000, 1, 3),
]:
    stem = {"VAE": f"vae_z={z}", "GMVAE": f"gmvae_z={z}_k=500"}[model]
    flags = f"--z {z} --iter_max {step}"
    if k > 1:
        stem += f"_train_iw={k}"
        flags += f" --train_iw {k}"
    if rate != 0.001:
        stem += f"_lr={rate}"
        flags += f" --lr {rate}"
    if schedule == "cosine":
        stem += "_schedule=cosine"
        flags += " --schedule cosine"
    # Names do not tell the number of steps: these runs are numbered by their passes over MNIST.
    first = 10 * passes(step)
    LITERATURE[model, z, rate, schedule, step, k] = Series(stem, flags, step, seeds, first)


def is_done(run: dict, stage: str) -> bool:
    """Whether a run's results.json, or its entry in figures.json, has the metrics of a stage."""
    metrics = run.get(STAGES[stage].part, {})
    if STAGES[stage].metric:
        return STAGES[stage].metric in metrics
    return len(metrics) > 0


def find(known: dict, series: Series, stage: str) -> dict[int, dict]:
    """The runs of a series that have the metrics of a stage, by seed."""
    runs = {seed: known.get(series.name(seed), {}) for seed in series.seeds_of(stage)}
    return {seed: run for seed, run in runs.items() if is_done(run, stage)}


# ---------------------------------------------------------------------------------------------
# Rows and cells


class Column(NamedTuple):
    title: str
    metric: str
    digits: int = 2
    part: str = "figures"

    def values(self, runs: dict[int, dict]) -> list[float]:
        """The metric of those runs that have it; gap is the distance from NELBO to IWAE-1000."""
        numbers = []
        for run in runs.values():
            metrics = run.get(self.part, {})
            if self.metric in metrics:
                numbers.append(metrics[self.metric])
            elif self.metric == "gap" and "niwae_1000" in metrics:
                numbers.append(metrics["nelbo"] - metrics["niwae_1000"])
        return numbers

    def mean(self, runs: dict[int, dict]) -> str:
        return mean(self.values(runs), self.digits, len(runs))

    def deviation(self, runs: dict[int, dict]) -> str:
        numbers = self.values(runs)
        return f"{stdev(numbers):.{self.digits}f}" if len(numbers) > 1 else ""


BOUNDS = [Column("NELBO", "nelbo"), Column("KL", "kl"), Column("Rec", "rec")]
BOUNDS += [Column(f"IWAE-{m}", f"niwae_{m}") for m in (1, 10, 100, 1000)]
NELBO_ALL = Column("NELBO, whole split", "nelbo", part="figures_all")
IWAE_5000_ALL = Column("IWAE-5000, whole split", "niwae_5000", part="figures_all")


def mean(numbers: list[float], digits: int, runs: int = 0) -> str:
    """Mean and standard error, and of how many runs where that is not all of them."""
    if not numbers:
        return ""
    text = f"{fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {stdev(numbers) / sqrt(len(numbers)):.{digits}f}"
    if len(numbers) < runs:
        text += f" ({len(numbers)})"
    return text


def difference(ours: list[float], theirs: list[float], digits: int) -> str:
    """The difference of two means, and its standard error where both have one."""
    text = f"{fmean(ours) - fmean(theirs):+.{digits}f}"
    if len(ours) > 1 and len(theirs) > 1:
        error = error_of_difference(stdev(ours), len(ours), stdev(theirs), len(theirs))
        text += f" ± {error:.{digits}f}"
    return text


def error_of_difference(spread: float, count: int, other_spread: float, other_count: int) -> float:
    """The standard error of the difference of two independent means, from standard deviations."""
    return sqrt(spread**2 / count + other_spread**2 / other_count)


def middle(numbers: list[float], digits: int) -> str:
    return f"{median(numbers):,.{digits}f}" if numbers else ""


def count(number: int, expected: int) -> str:
    return str(number) if number == expected else f"{number} of {expected}"


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*titles) -> list[str]:
    return [row(*titles), "|" + "---|" * len(titles)]


def averages(known: dict, first: str, rows: dict, stage: str, columns: list, spread=False):
    """The lines of a table with a row a series: the means of columns.

    rows: series by label; spread: below each row stands one of standard deviations.
    """
    lines = head(first, *(column.title for column in columns), "seeds")
    for label, series in rows.items():
        runs = find(known, series, stage)
        cells = [column.mean(runs) for column in columns]
        lines.append(row(label, *cells, count(len(runs), series.seeds)))
        if spread:
            lines.append(row("s.d.", *(column.deviation(runs) for column in columns), ""))
    return lines


def times_of_one_device(runs: dict, device: str | None) -> dict:
    """The runs, without the times of those on another device: they are not averaged."""
    kept = {}
    for key, run in runs.items():
        kept[key] = run if run.get("device") == device else {**run, "time": {}}
    return kept


# ---------------------------------------------------------------------------------------------
# The tables

# Burda, Grosse, Salakhutdinov 2016, table 1, one stochastic layer: -L_5000 of the whole test split,
# by model and k; z = 50, 200 units, 3,280 passes, images binarised anew each time.
BURDA = {
    ("VAE", 1): 86.76,
    ("VAE", 5): 86.47,
    ("VAE", 50): 86.35,
    ("IWAE", 1): 86.76,
    ("IWAE", 5): 85.54,
    ("IWAE", 50): 84.78,
}
# Percent of errors of M2 and their spread, by the number of labels: Kingma et al. 2014, table 1.
M2_ERROR = {100: (11.97, 1.71), 600: (4.94, 0.13), 1000: (3.6, 0.56), 3000: (3.92, 0.63)}
# Accuracy of M2 by the number of labels: Pyro's tutorial on semi-supervised VAEs.
PYRO = {100: 0.9319, 600: 0.9437, 1000: 0.9487, 3000: 0.9582}
# The course's own solution sheet of autumn 2021: model, metric, mean and standard deviation over
# 100 runs; what its graders accept; what checkpoints of other people give on the same images.
SHEET = [
    ("VAE", "nelbo", 101.5, 0.55, 98, 102, "101.04 to 101.82"),
    ("VAE", "kl", 19.29, 0.17, 17.5, 21.5, ""),
    ("VAE", "rec", 82.57, 0.56, 80, 84, ""),
    ("VAE", "niwae_1", 99.83, 0.55, 96.2, 101.8, ""),
    ("VAE", "niwae_10", 97.13, 0.48, 94.5, 99.5, ""),
    ("VAE", "niwae_100", 96.1, 0.42, 93.5, 98.5, ""),
    ("VAE", "niwae_1000", 95.62, 0.42, 92.2, 97.8, "96.79 to 97.25"),
    ("GMVAE", "nelbo", 97.22, 0.54, 94, 100, "98.46 to 99.19"),
    ("GMVAE", "kl", 17.65, 0.18, 16.5, 18.5, ""),
    ("GMVAE", "rec", 79.58, 0.6, 77.5, 82.5, ""),
    ("GMVAE", "niwae_1", 97.22, 0.54, 94, 100, ""),
    ("GMVAE", "niwae_10", 94.74, 0.48, 92.05, 97.95, ""),
    ("GMVAE", "niwae_100", 93.8, 0.47, 91.1, 96.9, ""),
    ("GMVAE", "niwae_1000", 93.38, 0.46, 90.3, 95.7, "94.11 to 95.54"),
    ("SSVAE gw = 0", "accuracy", 0.735, "", 0.705, 0.765, "0.736 to 0.752"),
    ("SSVAE gw = 1", "accuracy", 0.934, 0.0139, 0.885, 0.955, "0.942 to 0.949"),
]


def summary(known: dict) -> list[str]:
    return averages(known, "", BINARY, "subset", BOUNDS, spread=True)


def per_seed(known: dict, model: str) -> list[str]:
    lines = averages(known, "seed", {"**mean**": BINARY[model]}, "subset", BOUNDS, spread=True)
    for seed, run in find(known, BINARY[model], "subset").items():
        lines.insert(-2, row(seed, *(column.mean({seed: run}) for column in BOUNDS), ""))
    return lines


def iwae(known: dict) -> list[str]:
    columns = [*BOUNDS, Column("NELBO - IWAE-1000", "gap")]
    columns += [Column(f"ESS of {m}", f"ess_{m}", 1) for m in (10, 100, 1000)]
    vae = find(known, VAE, "subset")
    gmvae = find(known, GMVAE, "subset")
    differences = [""] * len(columns)
    if vae and gmvae:
        for place, column in enumerate(columns):
            differences[place] = difference(column.values(gmvae), column.values(vae), column.digits)
    lines = averages(known, "", BINARY, "subset", columns)
    return [*lines, row("GMVAE - VAE", *differences, "")]


def whole(known: dict) -> list[str]:
    columns = [column._replace(part="figures_all") for column in BOUNDS]
    columns.append(IWAE_5000_ALL._replace(title="IWAE-5000"))
    lines = averages(known, "", BINARY, "whole", columns, spread=True)
    for (model, k), figure in BURDA.items():
        lines.append(row(f"Burda et al. 2016, {model}, k = {k}", *[""] * 7, figure, ""))
    return lines


def beta(known: dict) -> list[str]:
    columns = [
        Column("KL", "kl"),
        Column("Rec", "rec"),
        Column("NELBO (beta = 1 on all)", "nelbo"),
        Column("IWAE-1000", "niwae_1000"),
        Column("active dimensions", "active", 1),
        NELBO_ALL,
        Column("IWAE-1000, whole split", "niwae_1000", part="figures_all"),
    ]
    return averages(known, "beta", BETA, "subset", columns)


def train_iw(known: dict) -> list[str]:
    columns = [
        Column("NELBO, subset", "nelbo"),
        Column("IWAE-1000, subset", "niwae_1000"),
        Column("ESS of 1000", "ess_1000", 1),
        Column("ms per step", "ms", 0, "time"),
        IWAE_5000_ALL,
    ]
    timed = times_of_one_device(known, known.get(VAE.name(0), {}).get("device"))
    lines = averages(timed, "k", TRAIN_IW, "subset", columns)
    for k in TRAIN_IW:
        lines.append(row(f"Burda et al. 2016, {k}", *[""] * 4, BURDA["IWAE", k], ""))
    return lines


def literature(known: dict) -> list[str]:
    columns = [
        NELBO_ALL,
        IWAE_5000_ALL,
        Column("ESS of 5000", "ess_5000", 1, "figures_all"),
        Column("CPU: minutes × threads; GPU: minutes", "minutes", 1, "time"),
        Column("ms per step", "ms", 2, "time"),  # of a GPU less than one
    ]
    titles = [column.title for column in columns]
    lines = head(
        "model", "z", "learning rate", "schedule", "passes", "k", *titles, "seeds", "device"
    )
    for (model, z, rate, schedule, step, k), series in LITERATURE.items():
        runs = find(known, series, "deep")
        if runs:
            devices = sorted({run["device"] for run in runs.values()})
            timed = times_of_one_device(runs, devices[0])
            cells = [column.mean(timed) for column in columns]
            seeds = count(len(runs), len(series.seeds_of("deep")))
            settings = [model, z, rate, schedule, passes(step), k]
            lines.append(row(*settings, *cells, seeds, ", ".join(devices)))
    for model, k in [("VAE", 1), ("IWAE", 5), ("IWAE", 50)]:
        cells = [f"Burda et al. 2016, {model}", 50, "", "falling", 3280, k, "", BURDA[model, k]]
        lines.append(row(*cells, *[""] * 5))
    return lines


def ssvae(known: dict) -> list[str]:
    accuracy = Column("accuracy", "accuracy", 4)
    seeds = range(max(series.seeds for series in SSVAE.values()))
    lines = head("", "accuracy", "s.d.", *(f"seed {seed}" for seed in seeds))
    for gw, series in SSVAE.items():
        runs = find(known, series, "train")
        each = [accuracy.mean({seed: runs.get(seed, {})}) for seed in seeds]
        lines.append(row(f"gw = {gw}", accuracy.mean(runs), accuracy.deviation(runs), *each))
    return lines


def per_digit(known: dict) -> list[str]:
    lines = head("digit", *range(10), "seeds")
    for gw, series in SSVAE.items():
        runs = find(known, series, "train")
        if runs:
            digits = zip(*(run["per_digit_accuracy"] for run in runs.values()), strict=True)
            cells = [f"{fmean(digit):.3f}" for digit in digits]
            lines.append(row(f"gw = {gw}", *cells, count(len(runs), series.seeds)))
    return lines


def labels(known: dict) -> list[str]:
    titles = ["gw = 0 (seeds)", "gw = 1 (seeds)", "M2, Kingma et al. 2014", "M2, Pyro's tutorial"]
    lines = head("labels", *titles)
    for n, pyro in PYRO.items():
        cells = []
        for series in (LABELS[n, 0], LABELS[n, 1]):
            runs = find(known, series, "train")
            seeds = count(len(runs), series.seeds)
            cells.append(f"{Column('', 'accuracy', 4).mean(runs)} ({seeds})")
        m2 = ""
        if n in M2_ERROR:
            error, spread = M2_ERROR[n]
            m2 = f"{1 - error / 100:.4f} ± {spread / 100:.4f}"
        lines.append(row(n, *cells, m2, pyro))
    return lines


def fsvae(known: dict) -> list[str]:
    titles = ["NELBO, training (100 steps)", "NELBO, test", "KL, test", "Rec, test"]
    lines = head("step", *titles, "seeds")
    by_step = {}
    for run in find(known, FSVAE, "train").values():
        for test in run["tests"]:
            by_step.setdefault(test["step"], []).append(test)
    for step in sorted(by_step):
        if step in (2000, 4000) or step % 10_000 == 0:
            tests = by_step[step]
            cells = []
            for metric in ("training", "nelbo", "kl", "rec"):
                cells.append(mean([test[metric] for test in tests], 1))
            lines.append(row(f"{step:,.0f}", *cells, count(len(tests), FSVAE.seeds)))
    return lines


def sheet(known: dict) -> list[str]:
    draws = {"": "figures", ", 2018": "figures_2018", ", torch 0.4": "figures_torch-0.4"}
    titles = [f"ours{draw}" for draw in draws] + ["sheet", "s.d."] + [f"z{draw}" for draw in draws]
    lines = head("", *titles, "accepted", "seeds inside", "published")
    names = {column.metric: column.title for column in BOUNDS}
    for model, metric, theirs, spread, low, high, published in SHEET:
        if model in BINARY:
            runs = find(known, BINARY[model], "subset")
            digits = 2
        else:
            runs = find(known, SSVAE[int(model[-1])], "train")
            digits = 4
        if not runs:
            continue
        means = []
        scores = []
        inside = []
        for part in draws.values():
            column = Column("", metric, digits, part)
            numbers = column.values(runs)
            means.append(column.mean(runs))
            score = ""
            if spread and len(numbers) > 1:
                error = error_of_difference(stdev(numbers), len(numbers), spread, 100)
                score = f"{(fmean(numbers) - theirs) / error:+.1f}"
            scores.append(score)
            if numbers:
                inside.append(str(sum(low <= number <= high for number in numbers)))
        accepted = [f"{low} to {high}", f"{', '.join(inside)} of {len(runs)}"]
        label = f"{model} {names.get(metric, metric)}"
        lines.append(row(label, *means, theirs, spread, *scores, *accepted, published))
    return lines


def speed(known: dict) -> list[str]:
    measured = json.loads(SPEED.read_text())
    titles = ["textbook", "plain", "compiled", "matrix products", "JAX"]
    titles += ["textbook / plain", "textbook / compiled", "JAX / compiled"]
    lines = head("ms per step", *titles, "evaluation, s", "textbook", "MB", "textbook")
    for model, times in measured["steps"].items():
        cells = []
        for version in ("textbook", "plain", "compiled", "products", "jax"):
            cells.append(middle(times.get(version, []), 1))
        for above, below in [("textbook", "plain"), ("textbook", "compiled"), ("jax", "compiled")]:
            pairs = zip(times.get(above, []), times[below], strict=False)  # JAX may not be there
            cells.append(middle([a / b for a, b in pairs], 2))
        evaluation = measured["evaluation"].get(model, {})
        for quantity, digits in (("seconds", 1), ("megabytes", 0)):
            for whose in ("ours", "textbook"):
                numbers = [run[quantity] for run in evaluation.get(whose, [])]
                cells.append(middle(numbers, digits))
        lines.append(row(model.upper(), *cells))
    return [*lines, "", made_on([{**measured, "device": measured["capability"]}])]


def every(series: dict, stages: str) -> list[tuple[Series, str]]:
    return [(each, stages) for each in series.values()]


TABLES = {  # what makes it; the series that it needs, and their stages
    "summary": (summary, every(BINARY, "train subset")),
    "vae": (partial(per_seed, model="VAE"), [(VAE, "train subset")]),
    "gmvae": (partial(per_seed, model="GMVAE"), [(GMVAE, "train subset")]),
    "iwae": (iwae, every(BINARY, "train subset")),
    "ssvae": (ssvae, every(SSVAE, "train")),
    "digits": (per_digit, every(SSVAE, "train")),
    "sheet": (sheet, every(BINARY, "train subset 2018 0.4") + every(SSVAE, "train")),
    "beta": (beta, every(BETA, "train subset whole")),
    "whole": (whole, [(VAE, "train whole deep"), (GMVAE, "train whole")]),
    "fsvae": (fsvae, [(FSVAE, "train")]),
    "labels": (labels, every(LABELS, "train")),
    "train_iw": (train_iw, every(TRAIN_IW, "train subset deep")),
    "literature": (literature, every(LITERATURE, "train deep")),
    "speed": (speed, []),
}


def needed(names: list[str]) -> dict[Series, list[str]]:
    """The series that these tables need, each with its stages in order."""
    runs = {}
    for name in names:
        for series, stages in TABLES[name][1]:
            known = runs.setdefault(series, [])
            known += [stage for stage in stages.split() if stage not in known]
    return runs


def made_on(runs: list[dict]) -> str:
    """A line that names the kinds of device and the versions of torch of these runs."""
    devices = {run["device"] for run in runs}
    versions = {run["torch"].partition("+")[0] for run in runs if run.get("torch")}
    line = f"On {' and '.join(sorted(devices))}"
    if versions:
        line += f", torch {' and '.join(sorted(versions))}"
    return f"{line}."


def table(name: str, known: dict) -> list[str]:
    """The lines of a table, or one that says that it has no runs."""
    make, needs = TABLES[name]
    if not needs:
        return make(known)
    runs = []
    for series, stages in needs:
        for stage in stages.split():
            runs += find(known, series, stage).values()
    if not runs:
        return [f"(no run of this table yet: `python docs/reproduce.py --only {name}`)"]
    return [*make(known), "", made_on(runs)]

#!/usr/bin/env python3
"""Run everything that the pages quote, and put its tables and pictures into them.

python docs/reproduce.py --data_dir DIR trains and evaluates in the current folder, by the scripts'
own command lines. The same command resumes. All of it takes days of one core: how many hours, and
for what, is in docs/writeup.md, section 7.

What the runs leave in logs/ is collected in docs/figures.json. --write and --check make the tables
from that file, so they need no run. A table stands between <!-- table NAME --> and <!-- end -->.
The table fsvae takes the sample of 10,366 SVHN digits in DIR. The table speed is of
docs/speed.json, which tests/benchmark.py --output writes.
"""

# ruff: noqa: E402  (the folders of this file and above it are put on the path first)
import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import median
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from tables import BETA, FSVAE, GMVAE, SSVAE, STAGES, TABLES, VAE, Series, is_done, needed, table

from codebase.runtime import files, options, signals

FIGURES = ROOT / "docs" / "figures.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmark.md", ROOT / "docs" / "writeup.md"]
PICTURES = {  # in docs/, of the seed 0 of a series, and what it is called in logs/
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


def fail(message: str) -> NoReturn:
    print(f"reproduce.py: error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------
# What the runs left in logs/


def read_json(path: Path) -> dict:
    """What a JSON file holds, or nothing where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_csv(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text().splitlines())
    return [dict(zip(row, map(float, row.values()), strict=True)) for row in rows]


def folder_of(series: Series, seed: int) -> Path:
    return Path("logs", series.name(seed))


def results(series: Series, seed: int) -> dict:
    """The results.json of a run where it counts, or nothing.

    It counts with real data, all its test images, the last step and default settings.
    """
    settings = {"seed": seed, "batch_size": 100, "evaluated_on": "test split"}
    wanted = {**settings, "step": series.step, "data": "mnist", "test_images": 10_000}
    if series.model == "fsvae":
        wanted["data"] = "svhn, train split, files not verified"
        wanted["test_images"] = 486
    stored = read_json(folder_of(series, seed) / "results.json")
    config = read_json(folder_of(series, seed) / "config.json")
    run = {**settings, **config, **stored}
    counts = all(run.get(key) == wanted[key] for key in wanted)
    intact = all(isinstance(stored.get(stage.part, {}), dict) for stage in STAGES.values())
    return stored if counts and intact else {}


def lacking(series: Series, stage: str) -> list[int]:
    """The seeds that lack the metrics of a stage."""
    seeds = series.seeds_of(stage)
    return [seed for seed in seeds if not is_done(results(series, seed), stage)]


# ---------------------------------------------------------------------------------------------
# The runs


def run_all(args: argparse.Namespace) -> int:
    """Run each stage that some seed lacks; return the exit code, that of a signal if one came."""
    code = 0
    with signals.collected() as caught:
        for series, stages in needed(args.only).items():
            for stage in stages:
                if not lacking(series, stage):
                    continue
                ended = run_script(command(series, stage, args), caught)
                if ended in (129, 130, 143):
                    message = "stopped, the runs' states are saved: the same command resumes"
                    print(message, file=sys.stderr)
                    return ended
                left = lacking(series, stage)
                if left or ended != 0:
                    code = 1
                    report(series, stage, left, ended)
                if len(left) == len(series.seeds_of(stage)):
                    break  # the stages after it need what it did not give
    return code


def command(series: Series, stage: str, args: argparse.Namespace) -> list[str]:
    """The command line of a stage, from the first seed on that lacks it."""
    begin = lacking(series, stage)[0]
    script, *flags = series.words(begin)
    words = [sys.executable, str(ROOT / script), *flags, *STAGES[stage].flags.split()]
    words += ["--runs", str(len(series.seeds_of(stage)) - begin)]
    words += ["--jobs", str(args.jobs)]
    words += ["--data", "svhn" if series.model == "fsvae" else "mnist"]
    if args.data_dir is not None:
        words += ["--data_dir", args.data_dir]
    if args.device is not None:
        words += ["--device", args.device]
    return words


def run_script(words: list[str], caught: list[int]) -> int:
    """Run a script to its end; return its exit code, or 128 + the number of a signal caught here.

    It is out of reach of the terminal, and gets each signal that was caught here once. At the
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
    if process.returncode < 0:  # a signal ended it that it did not handle
        return 128 - process.returncode
    return process.returncode


def report(series: Series, stage: str, seeds: list[int], code: int) -> None:
    """Say which seeds lack a stage after its command, and why."""
    print(f"{series.stem}: {stage} FAILED, exit code {code}; not done: seeds {seeds}")
    for seed in seeds:
        stored = read_json(folder_of(series, seed) / "results.json")
        if stored:
            about = f"{stored.get('data')}, {stored.get('test_images')} test images"
            why = f"its figures do not count: {about}, step {stored.get('step')}"
            print(f"{series.name(seed)}: {why}")


# ---------------------------------------------------------------------------------------------
# docs/figures.json


def entry(series: Series, seed: int) -> dict:
    """What figures.json holds of a run, but for the device; nothing where it does not count."""
    stored = results(series, seed)
    if not stored:
        return {}
    config = read_json(folder_of(series, seed) / "config.json")
    made = {"flags": shlex.join(series.words(seed)), "torch": config.get("torch")}
    parts = [stage.part for stage in STAGES.values()]
    for key in ["data", "step", "test_images", *parts, "per_digit_accuracy"]:
        if key in stored:
            made[key] = stored[key]
    metrics = {row["step"]: row for row in read_csv(folder_of(series, seed) / "metrics.csv")}
    if metrics:
        made["time"] = time_of(metrics, config)
    if series == FSVAE:
        made["tests"] = []
        for test in read_csv(folder_of(series, seed) / "test.csv"):
            if test["step"] in metrics:
                made["tests"].append({**test, "training": metrics[test["step"]]["nelbo"]})
    return made


def time_of(metrics: dict[float, dict], config: dict) -> dict[str, float]:
    """The median milliseconds of a step, and the minutes of the training, those of all cores."""
    points = [(0, 0), *((step, row["seconds"]) for step, row in metrics.items())]
    steps = []
    for (step_before, before), (step, seconds) in pairwise(points):
        steps.append(1000 * (seconds - before) / (step - step_before))
    cores = config.get("threads", 1) if config.get("device") == "cpu" else 1
    return {"ms": round(median(steps), 2), "minutes": round(points[-1][1] * cores / 60, 1)}


def device_name(series: Series, seed: int) -> str:
    """The kind of this machine's CPU, or the name of its GPU where the run was trained on that."""
    import torch  # only here, for the tables need no torch

    device = read_json(folder_of(series, seed) / "config.json").get("device", "cpu")
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return device


def read_figures() -> dict[str, dict]:
    """What figures.json holds: runs by name. A damaged file ends the program."""
    known = read_json(FIGURES)
    intact = len(known) > 0 and all(isinstance(run, dict) for run in known.values())
    if FIGURES.exists() and not intact:
        fail(f"{FIGURES} is damaged: put an intact copy in its place")
    return known


def merged(known: dict, made: dict) -> dict:
    """A new entry, with what was known of the same weights and logs/ does not hold any more."""
    before = known.get("figures", {})
    now = made.get("figures", {})
    if any(before[key] != now[key] for key in now if key in before):
        return made
    result = dict(known)
    for key, value in made.items():
        result[key] = value
        if isinstance(value, dict):
            result[key] = {**known.get(key, {}), **value}
    return result


def collect(names: list[str]) -> dict[str, dict]:
    """figures.json, brought up to date with those runs in logs/ that these tables need."""
    known = read_figures()
    new = []
    for series in needed(names):
        for seed in range(series.seeds):
            name = series.name(seed)
            made = merged(known.get(name, {}), entry(series, seed))
            if made and made != known.get(name):
                new.append(name)
                known[name] = {"device": device_name(series, seed), **made}
    if new:
        lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
        files.write(FIGURES, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    print(f"{len(new)} runs in logs/ are new or have changed; {FIGURES.name} holds {len(known)}")
    return known


# ---------------------------------------------------------------------------------------------
# The pages and their pictures

MARKED = re.compile(r"^<!-- table (.*) -->\n((?:(?!<!-- ).*\n)*)(<!-- end -->)?", flags=re.M)


def renewed(page: Path, names: list[str], known: dict) -> tuple[str, list[str]]:
    """A page with these tables made anew, and a message for each line of them that changed."""
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
    """Put the tables between their markers; no page is written where a marker is wrong."""
    texts = {page: renewed(page, names, known)[0] for page in PAGES}
    for page, text in texts.items():
        files.write(page, text.encode())


def check(names: list[str], known: dict) -> int:
    """Print each line that write would change; return their number."""
    differences = []
    for page in PAGES:
        differences += renewed(page, names, known)[1]
    plural = "" if len(differences) == 1 else "s"
    print("\n".join([*differences, f"{len(differences)} difference{plural}"]))
    return len(differences)


def drawn(series: Series, name: str) -> Path | None:
    """A picture of the seed 0 of a series, where that run counts and has drawn it."""
    path = folder_of(series, 0) / f"{name}.png"
    return path if results(series, 0) and path.exists() else None


def take_pictures() -> None:
    """Put the pictures that the pages show into docs/.

    Street-view digits are halved. beta.png has the first 40 samples of each beta, one below the
    other.
    """
    import numpy as np  # only here, for the tables need neither
    from matplotlib import image

    for name, (series, name_in_logs) in PICTURES.items():
        path = drawn(series, name_in_logs)
        if path is not None:
            pixels = image.imread(path)
            if name_in_logs.startswith("samples-"):
                pixels = pixels[::2, ::2]
            image.imsave(ROOT / "docs" / f"{name}.png", pixels)
            print(f"{name}.png: {path}")
    paths = [drawn(series, "samples") for series in BETA.values()]
    if None not in paths:
        border = ((0, 8), (0, 0), (0, 0))
        rows = [np.pad(image.imread(path)[:112], border, constant_values=1) for path in paths]
        image.imsave(ROOT / "docs" / "beta.png", np.concatenate(rows))
        print(f"beta.png: {', '.join(map(str, paths))}")


# ---------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("reproduce.py", description=summary, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    text = f"tables, of {', '.join(TABLES)} (default: all)"
    add("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME", help=text)
    add("--data_dir", metavar="DIR", help="folder of the data sets")
    add(
        "--jobs",
        type=options.whole(1, 1000, "auto"),
        default="auto",
        metavar="J",
        help="runs at a time (default: auto)",
    )
    devices = ["auto", "cpu", "cuda", "gpu", "mps"]
    add("--device", choices=devices, help="where to compute (default: as the scripts choose)")
    for flag, text in {
        "--collect": "read logs/ into docs/figures.json",
        "--write": "put the tables into the pages",
        "--check": "name the lines of the pages that --write would change",
        "--pictures": "put the pictures into docs/",
    }.items():
        add(flag, action="store_true", help=f"run nothing; {text}")
    args = parser.parse_args(argv)
    if args.data_dir is not None and not os.path.isdir(args.data_dir):
        fail(f"argument --data_dir: there is no folder {args.data_dir!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    code = 0
    known = read_figures()  # a damaged file is better known before the runs than after them
    of_pages = args.write or args.check or args.pictures
    if not (args.collect or of_pages):
        try:
            Path("logs").mkdir(exist_ok=True)
        except OSError as error:
            fail(f"logs: {error.strerror}")
        code = run_all(args)
        if code > 128:
            return code
    if args.collect or not of_pages:
        known = collect(args.only)
    if args.pictures:
        take_pictures()
    if args.write:
        write(args.only, known)
    if args.check and check(args.only, known):
        code = 1
    if not of_pages:
        for name in args.only:
            lines = table(name, known)
            print("\n".join(["", f"<!-- table {name} -->", *lines, "<!-- end -->"]))
    return code


if __name__ == "__main__":
    signals.interrupt_in_one_line()
    sys.exit(main())

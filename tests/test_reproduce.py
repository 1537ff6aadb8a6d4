"""docs/reproduce.py runs what is not done, stores what counts and keeps the pages' tables.

The scripts that it starts here pretend.
"""

import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, tree, wait_for
from matplotlib import image

from codebase.runtime.log import describe_data, suffix_of_test

FIGURES = {"kl": 19.25, "rec": 82.5, "nelbo": 101.75, "active": 10, "components": 500}
for samples in (1, 10, 100, 1000):
    FIGURES[f"niwae_{samples}"] = 100.0 - samples / 1000
    FIGURES[f"ess_{samples}"] = 100.0 - samples / 1000
PRETEND = """
import json, pathlib, sys
name, stage, seed, mode = sys.argv[1:]
with open("calls", "a") as file:
    file.write(name + " " + stage + "\\n")
if mode == "fail" and seed == "1":
    sys.exit("run_vae.py: error: the disk is full")
folder = pathlib.Path("logs", name)
folder.mkdir(parents=True, exist_ok=True)
path = folder / "results.json"
known = {}
if path.exists():
    known = json.loads(path.read_text())
known["data"] = "drawn digits, not MNIST" if mode == "digits" else "mnist"
known["test_images"] = 10000
known["step"] = 20000
found = {"nelbo": 101 + int(seed) / 10, "kl": 19.0, "rec": 82.0, "active": 10}
if stage != "train":
    for m in (1, 10, 100, 1000):
        found[f"niwae_{m}"] = 98.0
        found[f"ess_{m}"] = 98.0
part = {"2018": "figures_2018", "0.4": "figures_torch-0.4"}.get(stage, "figures")
known[part] = found
path.write_text(json.dumps(known))
"""


STOPPED = "stopped, the runs' states are saved; the same command goes on from there\n"


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The module, in an empty folder with pages and figures.json; no script is really started."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("reproduce")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "FIGURES", tmp_path / "figures.json")
    pages = [tmp_path / "README.md", tmp_path / "writeup.md"]
    for page in pages:
        page.write_text("# Title\n\n<!-- table vae -->\nold\n<!-- end -->\nlast line\n")
    monkeypatch.setattr(module, "PAGES", pages)
    monkeypatch.setattr(module, "command", lambda *_: pytest.fail("a script was started"))
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


def pretend(module, monkeypatch, mode=""):
    def command(series, seed, stage, data_dir):
        return [sys.executable, "-c", PRETEND, series.name(seed), stage, str(seed), mode]

    monkeypatch.setattr(module, "command", command)


def log(module, series, seed, folder, **changes):
    """A run's results.json as a script leaves it."""
    data, test_images = module.REAL[series.data]
    found = {
        "data": data,
        "test_images": test_images,
        "step": series.step,
        "figures": dict(FIGURES),
    }
    path = folder / "logs" / series.name(seed) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | changes))
    return path.parent


def test_every_series_is_what_its_script_calls_it_and_its_flags_are_taken(reproduce, monkeypatch):
    monkeypatch.undo()  # the command lines in earnest
    for series, seed in reproduce.needed(list(reproduce.TABLES)):
        script = importlib.import_module(series.script.removesuffix(".py"))
        stages = ["train"]
        if series.script in ("run_vae.py", "run_gmvae.py"):
            stages = list(reproduce.STAGES)
        for stage in stages:
            run = script.parse(reproduce.command(series, seed, stage, "data")[2:])
            assert (run.name, run.iter_max) == (series.name(seed), series.step)
            assert describe_data(run) == reproduce.REAL[series.data][0]
            part = reproduce.STAGES[stage][1]
            assert part == f"figures{suffix_of_test(run)}"


def test_it_goes_on_where_it_stopped(reproduce, tmp_path, monkeypatch, capsys):
    pretend(reproduce, monkeypatch)
    log(reproduce, reproduce.VAE, 0, tmp_path)  # trained and evaluated
    log(reproduce, reproduce.VAE, 1, tmp_path, figures={"nelbo": 101.0})  # trained
    assert reproduce.main(["--only", "vae", "--jobs", "3"]) == 0
    said = capsys.readouterr().out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert said.startswith("9 of 10 runs are to do, 3 at a time: 2")
    assert len(calls) == len(set(calls)) == 1 + 2 * 8
    assert f"{reproduce.VAE.name(1)} train" not in calls
    assert not any(line.startswith(reproduce.VAE.name(0)) for line in calls)
    assert reproduce.main(["--only", "vae"]) == 0 and "0 of 10 runs" in capsys.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == len(calls)
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert len(kept) == 10 and kept[reproduce.VAE.name(3)]["flags"] == "run_vae.py --run 3"


def test_a_failed_run_is_reported_and_the_others_go_on(reproduce, tmp_path, monkeypatch, capsys):
    pretend(reproduce, monkeypatch, "fail")
    assert reproduce.main(["--only", "vae", "--jobs", "3"]) == 1
    said = capsys.readouterr().out
    failed = "train FAILED, exit code 1: run_vae.py: error: the disk is full"
    assert f"{reproduce.VAE.name(1)}: {failed}" in said
    assert "**mean** | 101.49 ± 0.10 |" in said and "| 9 of 10 |" in said


def test_a_run_on_drawn_digits_is_reported(reproduce, monkeypatch, capsys):
    pretend(reproduce, monkeypatch, "digits")
    assert reproduce.main(["--only", "vae"]) == 1
    why = "its figures do not count: drawn digits, not MNIST, 10000 test images, step 20000"
    assert capsys.readouterr().out.count(why) == 10
    assert not reproduce.FIGURES.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "drawn digits, not MNIST"},
        {"data": "mnist, files not verified"},
        {"data": "own.npz"},
        {"step": 500},
        {"test_images": 100},
        {"evaluated_on": "training images"},
        {"figures": {}},
        {"seed": 9},
        {"batch_size": 1000},
    ],
    ids=str,
)
def test_what_is_not_real_does_not_count(changes, reproduce, tmp_path):
    settings = {name: changes[name] for name in ("seed", "batch_size") if name in changes}
    if settings:
        changes = {}
    folder = log(reproduce, reproduce.VAE, 0, tmp_path, **changes)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "batch_size": 100} | settings))
    assert not reproduce.done(reproduce.results(reproduce.VAE, 0), "subset")
    known = reproduce.collect({(reproduce.VAE, 0): []})
    none = "(no run of this table yet: `python docs/reproduce.py --only vae`)"
    assert reproduce.table("vae", known) == [none]


def test_damaged_results_do_not_count(reproduce, tmp_path):
    (log(reproduce, reproduce.VAE, 0, tmp_path) / "results.json").write_text('{"data": ')
    assert reproduce.results(reproduce.VAE, 0) == {}


def test_seeds_that_are_there_are_counted(reproduce, tmp_path, capsys):
    for seed in (0, 4):
        log(reproduce, reproduce.VAE, seed, tmp_path, figures=FIGURES | {"nelbo": 101.0 + seed})
    assert reproduce.main(["--only", "vae", "beta", "--collect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| 0 | 101.00 |", "| 4 | 105.00 |")) for line in lines) == 2
    mean = next(line for line in lines if "**mean**" in line)
    assert mean.startswith("| **mean** | 103.00 ± 2.00 |") and mean.endswith("| 2 of 10 |")
    bounds = "| 1 | 19.25 ± 0.00 | 82.50 ± 0.00 | 103.00 ± 2.00 | 99.00 ± 0.00 |"
    assert f"{bounds} 10.0 ± 0.0 |  |  | 2 of 10 |" in lines


def test_every_table_can_be_made(reproduce, tmp_path, capsys):
    runs = reproduce.needed(list(reproduce.TABLES))
    for series, seed in runs:
        stored = {
            "figures": FIGURES | {"accuracy": 0.94 + seed / 1000},
            "figures_all": FIGURES | {"niwae_5000": 93.8},
            "figures_2018": FIGURES | {"nelbo": 99.75},
            "figures_torch-0.4": FIGURES | {"nelbo": 98.75},
            "per_digit_accuracy": [0.9] * 10,
        }
        folder = log(reproduce, series, seed, tmp_path, **stored)
        rows = f"10000,-590.5,50\n{series.step},-596.25,110\n"
        (folder / "metrics.csv").write_text(f"step,nelbo,seconds\n{rows}")
        (folder / "test.csv").write_text("step,nelbo,kl,rec\n10000,-565.5,20,-585.5\n")
        (folder / "config.json").write_text('{"torch": "2.15"}')
    assert reproduce.main(["--collect"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(runs)} of {len(runs)} runs are in logs/, {len(runs)} of them new")
    nelbo = "| VAE NELBO | 101.75 ± 0.00 | 99.75 ± 0.00 | 98.75 ± 0.00 | 101.5 | 0.55 |"
    assert (
        f"{nelbo} +4.5 | -31.8 | -50.0 | 98 to 102 | 10, 10, 10 of 10 | 101.04 to 101.82 |" in said
    )
    accuracy = "| SSVAE gw = 1 accuracy | 0.9420 ± 0.0007 |  |  | 0.934 | 0.0139 | +5.1 |"
    assert f"{accuracy}  |  | 0.885 to 0.955 | 5 of 5 | 0.942 to 0.949 |" in said
    each = "0.9400 | 0.9410 | 0.9420 | 0.9430 | 0.9440"
    assert f"| gw = 1 | 0.9420 ± 0.0007 | 0.0016 | {each} |" in said
    ess = "100.0 ± 0.0 | 99.9 ± 0.0 | 99.0 ± 0.0"
    assert f"| 99.00 ± 0.00 | 2.75 ± 0.00 | {ess} | 10 |" in said  # after the gap
    assert "| GMVAE - VAE | +0.00 | +0.00 |" in said
    assert "| 1000 | 0.9410 ± 0.0006 (3) | 0.9410 ± 0.0006 (3) | 0.9640 ± 0.0056 | 0.9487 |" in said
    time = "6 ± 0"  # ms: 110 s in 20,000 steps
    assert f"| 5 | 101.75 ± 0.00 | 99.00 ± 0.00 | 99.0 ± 0.0 | {time} | 93.80 ± 0.00 | 3 |" in said
    assert "| 10,000 | -590.5 ± 0.0 | -565.5 ± 0.0 | 20.0 ± 0.0 | -585.5 ± 0.0 | 2 |" in said
    known = json.loads((tmp_path / "figures.json").read_text())
    assert known[reproduce.FSVAE.name(1)]["torch"] == "2.15"
    assert all(run["cpu"] for run in known.values())
    for name in reproduce.TABLES:
        lines = reproduce.table(name, known)
        assert len({line.count("|") for line in lines}) == 1, name  # as many cells in each row
    assert reproduce.main(["--collect"]) == 0 and " 0 of them new" in capsys.readouterr().out


def test_a_column_of_fewer_runs_says_of_how_many(reproduce, tmp_path, capsys):
    for seed in range(3):
        more = {}
        if seed < 2:
            more = {"figures_all": {"niwae_5000": 93.8}, "figures_2018": FIGURES}
        log(reproduce, reproduce.VAE, seed, tmp_path, **more)
    assert reproduce.main(["--only", "train_iw", "sheet", "--collect"]) == 0
    said = capsys.readouterr().out
    assert "| 93.80 ± 0.00 (2) | 3 of 10 |" in said
    assert "| VAE KL | 19.25 ± 0.00 | 19.25 ± 0.00 (2) |  |" in said


def test_times_of_two_kinds_of_cpu_are_not_averaged(reproduce):
    runs = {0: ("A", 6.0), 1: ("A", 8.0), 2: ("B", 90.0)}
    known = {
        reproduce.VAE.name(seed): {"figures": FIGURES, "cpu": cpu, "time": {"ms": ms}}
        for seed, (cpu, ms) in runs.items()
    }
    assert "| 7 ± 1 (2) |" in "\n".join(reproduce.table("train_iw", known))


def test_pictures_come_from_the_runs_that_count(reproduce, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for beta, series in reproduce.BETA.items():
        folder = log(reproduce, series, 0, tmp_path, figures=FIGURES | {"kl": 20 / beta})
        image.imsave(folder / "samples.png", np.full((560, 1120, 3), 0.5))
    log(reproduce, reproduce.GMVAE, 0, tmp_path, data="drawn digits, not MNIST")
    (tmp_path / "logs" / reproduce.GMVAE.name(0) / "latent.png").write_bytes(b"")
    folder = log(reproduce, reproduce.FSVAE, 0, tmp_path)
    large = np.random.default_rng(0).integers(0, 256, (320, 640, 3), np.uint8)
    image.imsave(folder / "samples-0002000.png", large.repeat(2, 0).repeat(2, 1))
    assert reproduce.main(["--collect", "--pictures"]) == 0
    drawn = {path.name: image.imread(path) for path in (tmp_path / "docs").iterdir()}
    assert set(drawn) == {"vae-samples.png", "fsvae-2000.png", "beta.png"}
    before = (tmp_path / "docs" / "beta.png").read_bytes()
    log(reproduce, reproduce.BETA[8], 0, tmp_path, step=500)  # which does not count
    samples = tmp_path / "logs" / reproduce.VAE.name(0) / "samples.png"
    image.imsave(samples, np.zeros((560, 1120, 3)))
    assert reproduce.main(["--pictures"]) == 0
    assert (tmp_path / "docs" / "beta.png").read_bytes() == before
    assert np.array_equal((255 * drawn["fsvae-2000.png"][..., :3]).round(), large)
    assert drawn["beta.png"].shape[:2] == (5 * 120, 1120)


def test_figures_of_runs_elsewhere_stay(reproduce, tmp_path):
    elsewhere = {"figures": {"nelbo": 1}, "cpu": "A"}
    (tmp_path / "figures.json").write_text(json.dumps({reproduce.VAE.name(3): elsewhere}))
    log(reproduce, reproduce.VAE, 0, tmp_path)
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    known = json.loads((tmp_path / "figures.json").read_text())
    assert sorted(known) == [reproduce.VAE.name(0), reproduce.VAE.name(3)]
    assert known[reproduce.VAE.name(3)] == elsewhere


@pytest.mark.parametrize("nelbo, kept", [(101.75, True), (101.5, False)])
def test_what_is_stored_of_the_same_weights_stays_though_logs_has_less_of_it(
    nelbo, kept, reproduce, tmp_path, capsys
):
    name = reproduce.VAE.name(0)
    whole = {"nelbo": 99.5, "niwae_5000": 95.5}
    more = {"figures_all": whole, "figures_torch-0.4": FIGURES}
    folder = log(reproduce, reproduce.VAE, 0, tmp_path, **more)
    assert reproduce.main(["--collect"]) == 0
    stored = json.loads((tmp_path / "figures.json").read_text())
    stored[name]["cpu"] = "A"
    (tmp_path / "figures.json").write_text(json.dumps(stored))
    fewer = {"figures": {"nelbo": nelbo, "kl": 19.25}, "figures_all": {"niwae_1000": 96.0}}
    found = json.loads((folder / "results.json").read_text()) | fewer
    del found["figures_torch-0.4"]
    (folder / "results.json").write_text(json.dumps(found))
    assert reproduce.main(["--collect"]) == 0
    known = json.loads((tmp_path / "figures.json").read_text())[name]
    if kept:
        assert known == stored[name] | {"figures_all": whole | {"niwae_1000": 96.0}}
    else:  # of other weights: nothing of the old ones may stand beside it
        assert known["figures_all"] == {"niwae_1000": 96.0} and "figures_torch-0.4" not in known
        assert known["figures"] == fewer["figures"] and known["cpu"] != "A"
    capsys.readouterr()
    assert reproduce.main(["--collect"]) == 0 and " 0 of them new" in capsys.readouterr().out


def test_check_passes_after_write_and_names_a_changed_digit(reproduce, tmp_path, capsys):
    log(reproduce, reproduce.VAE, 0, tmp_path)
    assert reproduce.main(["--collect", "--write"]) == 0 and reproduce.main(["--check"]) == 0
    page = tmp_path / "README.md"
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- table vae -->\n| seed |")
    assert text.endswith("|\n<!-- end -->\nlast line\n")
    page.write_text(text.replace("| 0 | 101.75 |", "| 0 | 101.76 |"))
    capsys.readouterr()
    assert reproduce.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "README.md:6: table vae: is | 0 | 101.76 |" in said and "would be | 0 | 101.75 |" in said
    assert said.endswith("1 difference\n")
    assert reproduce.main(["--check", "--only", "beta"]) == 0  # which stands in no page
    page.write_text(text.replace("<!-- end -->", "| 1 | 2 |\n<!-- end -->"))
    assert reproduce.main(["--check"]) == 1
    assert "is | 1 | 2 |, would be nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- table vea -->\n<!-- end -->\n", "writeup.md:1: there is no table vea"),
        ("\n<!-- table vae -->\n| 1 |\n", "writeup.md:2: table vae has no <!-- end -->"),
        (
            "<!-- table vae -->\n<!-- table beta -->\n<!-- end -->\n",
            "writeup.md:1: table vae has no <!-- end -->",
        ),
    ],
)
def test_wrong_markers_get_one_line_and_change_nothing(page, message, reproduce, tmp_path, capsys):
    (tmp_path / "writeup.md").write_text(page)
    for flag in ("--write", "--check"):
        with pytest.raises(SystemExit) as stopped:
            reproduce.main([flag])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"reproduce.py: error: {message}\n"
    assert (tmp_path / "writeup.md").read_text() == page
    assert "old" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "words, stored",
    [
        (["--only", "vea"], None),
        (["--jobs", "0"], None),
        (["--jobs", "x"], None),
        (["--data_dir", "nowhere"], None),
        (["--data_dir", ""], None),
        (["--chek"], None),
        (["--check"], "{"),
        (["--only", "vae"], '{"model=vae_z=10_run=0000": 3}'),
        (["--only", "vae"], None),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_changes_nothing(
    words, stored, reproduce, tmp_path, monkeypatch, capsys
):
    pretend(reproduce, monkeypatch)
    if stored:
        (tmp_path / "figures.json").write_text(stored)
    (tmp_path / "logs").write_text("a file")
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(words)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_figures_of_a_wrong_shape_do_not_count(reproduce, tmp_path):
    log(reproduce, reproduce.VAE, 0, tmp_path, figures=[1])
    assert reproduce.collect({(reproduce.VAE, 0): []}) == {}


CHILD = """
import pathlib, signal, sys, time

def end(number, frame):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1] + "began").touch()
time.sleep(60)
"""
PARENT = """
import pathlib, sys

sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import reproduce

def command(series, seed, *_):
    return [sys.executable, "child.py", str(seed)]

reproduce.FIGURES = pathlib.Path("figures.json")
reproduce.command = command
sys.exit(reproduce.main(["--only", "vae", "--jobs", "2"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_runs_and_says_how_to_go_on(number, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    words = [sys.executable, "parent.py", str(ROOT / "docs")]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for seed in (0, 1):
        wait_for(tmp_path / f"{seed}began", process)
    time.sleep(0.1)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == STOPPED, said + error
    made = {path.name for path in tmp_path.iterdir()} - {"child.py", "parent.py"}
    assert made == {"0", "1", "0began", "1began", "logs"}

"""docs/reproduce.py runs what is not done, stores what counts and keeps the pages' tables.

The script that it starts here is stand_in.py.
"""

import importlib
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tree, wait_for
from matplotlib import image

from codebase.runtime.log import describe_data, suffix_of_test

FIGURES = {"kl": 19.25, "rec": 82.5, "nelbo": 101.75, "active": 10, "components": 500}
for m in (1, 10, 100, 1000):
    FIGURES[f"niwae_{m}"] = 100.0 - m / 1000
    FIGURES[f"ess_{m}"] = 100.0 - m / 1000
DEEP = {**FIGURES, "niwae_5000": 93.75, "ess_5000": 47.5}
PAGE = "# Title\n\n<!-- table vae -->\nold\n<!-- end -->\nlast line\n"


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The module, in a folder with pages, docs/ and a stand-in for the scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("reproduce")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "tests" / "stand_in.py", tmp_path / "run_vae.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(module, "PAGES", [tmp_path / "README.md", tmp_path / "writeup.md"])
    for page in module.PAGES:
        page.write_text(PAGE)
    return module


def log(series, seed, **changes):
    """A folder of a run with its results.json as a script leaves it."""
    module = sys.modules["reproduce"]
    found = {"data": "mnist", "test_images": 10_000, "step": series.step, "figures": FIGURES}
    if series.model == "fsvae":
        found.update({"data": "svhn, train split, files not verified", "test_images": 486})
    folder = module.folder_of(series, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**found, **changes}))
    return folder


def calls(folder):
    """The command lines that the stand-in got."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def known(folder):
    return json.loads((folder / "figures.json").read_text())


# ---------------------------------------------------------------------------------------------
# The runs


OPTIONS = (ROOT / "codebase" / "runtime" / "options.py").read_text()


@pytest.mark.skipif(
    not ('"--jobs"' in OPTIONS and '"--schedule"' in OPTIONS), reason="a flag is not there yet"
)
def test_scripts_take_the_flags_and_give_the_names(reproduce):
    args = reproduce.parse([])
    for series, stages in reproduce.needed(list(reproduce.TABLES)).items():
        script = importlib.import_module(f"run_{series.model}")
        for stage in stages:
            run = script.parse(reproduce.command(series, stage, args)[2:])
            assert (run.name, run.seed, run.iter_max) == (series.name(0), 0, series.step)
            if series.model == "fsvae":
                assert describe_data(run) == "svhn, train split, files not verified"
            else:
                assert describe_data(run) == "mnist"
            assert reproduce.STAGES[stage].part == f"figures{suffix_of_test(run)}"


def test_the_names_of_longer_and_cosine_runs(reproduce):
    series = importlib.import_module("tables").LITERATURE
    constant = series["VAE", 50, "constant", 120_000, 1]
    words = "run_vae.py --z 50 --iter_max 120000 --run 2000 --seed 0"
    assert constant.name(0) == "model=vae_z=50_run=2000"
    assert constant.words(0) == words.split()
    cosine = series["VAE", 50, "cosine", 120_000, 5]
    assert cosine.name(1) == "model=vae_z=50_train_iw=5_schedule=cosine_run=2001"
    words = "run_vae.py --z 50 --iter_max 120000 --train_iw 5 --schedule cosine --run 2001 --seed 1"
    assert cosine.words(1) == words.split()
    gmvae = series["GMVAE", 50, "cosine", 120_000, 1]
    assert gmvae.stem == "gmvae_z=50_k=500_schedule=cosine"
    names = {each.name(0) for each in series.values()}
    assert len(names) == len(series)


def test_it_resumes_where_it_stopped(reproduce, tmp_path):
    log(reproduce.VAE, 0)  # trained and evaluated
    log(reproduce.VAE, 1, figures={"nelbo": 101.0})  # trained
    words = ["--only", "vae", "--jobs", "3", "--device", "cpu", "--data_dir", str(tmp_path)]
    assert reproduce.main(words) == 0
    rest = f"--jobs 3 --data mnist --data_dir {tmp_path} --device cpu"
    train = f"--run 2 --runs 8 {rest}"
    assert calls(tmp_path) == [train, f"--run 1 --train 0 --runs 9 {rest}"]
    assert reproduce.main(["--only", "vae"]) == 0 and len(calls(tmp_path)) == 2
    assert len(known(tmp_path)) == 10
    assert known(tmp_path)[reproduce.VAE.name(3)]["flags"] == "run_vae.py --run 3"


def test_a_failed_run_is_reported_and_the_others_go_on(reproduce, tmp_path, capsys):
    (tmp_path / "mode").write_text("fail")
    assert reproduce.main(["--only", "vae"]) == 1
    said = capsys.readouterr().out
    assert "vae_z=10: train FAILED, exit code 1; not done: seeds [1]" in said
    assert "**mean** | 101.49 ± 0.10 |" in said and "| 9 of 10 |" in said


def test_a_run_on_drawn_digits_is_reported(reproduce, tmp_path, capsys):
    (tmp_path / "mode").write_text("digits")
    assert reproduce.main(["--only", "vae"]) == 1
    why = "its figures do not count: drawn digits, not MNIST, 10000 test images, step 20000"
    assert capsys.readouterr().out.count(why) == 10
    assert not reproduce.FIGURES.exists()


STOPPED = "stopped, the runs' states are saved: the same command resumes\n"


@pytest.mark.parametrize(
    "code, result, commands",
    [(2, 1, 3), (130, 130, 1), (143, 143, 1), (129, 129, 1)],
)
def test_after_a_failure_comes_the_next_series_and_after_a_signal_none(
    code, result, commands, reproduce, tmp_path, capsys
):
    (tmp_path / "mode").write_text(str(code))
    assert reproduce.main(["--only", "train_iw"]) == result
    assert len(calls(tmp_path)) == commands
    assert capsys.readouterr().err == (STOPPED if commands == 1 else "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_runs_and_says_how_to_resume(number, reproduce, tmp_path):
    (tmp_path / "mode").write_text("wait")
    for name in ("reproduce.py", "tables.py"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    (tmp_path / "codebase").symlink_to(ROOT / "codebase")
    words = [sys.executable, "-B", "docs/reproduce.py", "--only", "vae", "beta"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "began", process)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and error == STOPPED, said + error
    assert (tmp_path / "saved").exists() and len(calls(tmp_path)) == 1
    assert "<!-- table" not in said
    assert (tmp_path / "began").read_text() == "out of reach of the terminal"
    assert not (tmp_path / "figures.json").exists()


# ---------------------------------------------------------------------------------------------
# What counts, and what is stored


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
        {"figures": [1]},
        {"seed": 9},
        {"batch_size": 1000},
    ],
    ids=str,
)
def test_what_is_not_real_does_not_count(changes, reproduce, capsys):
    settings = {name: changes.pop(name) for name in ("seed", "batch_size") if name in changes}
    folder = log(reproduce.VAE, 0, **changes)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "batch_size": 100, **settings}))
    assert 0 in reproduce.lacking(reproduce.VAE, "subset")
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    none = "(no run of this table yet: `python docs/reproduce.py --only vae`)"
    assert none in capsys.readouterr().out


def test_damaged_results_do_not_count(reproduce):
    (log(reproduce.VAE, 0) / "results.json").write_text('{"data": ')
    assert reproduce.results(reproduce.VAE, 0) == {}


def test_a_seed_is_that_of_its_number(reproduce):
    longer = importlib.import_module("tables").LITERATURE["VAE", 10, "constant", 120_000, 1]
    folder = log(longer, 0, figures_all=DEEP)
    (folder / "config.json").write_text('{"seed": 100}')  # --run 100 without --seed 0
    assert reproduce.lacking(longer, "deep") == [0]
    (folder / "config.json").write_text('{"seed": 0}')
    assert reproduce.lacking(longer, "deep") == []


def test_figures_of_runs_elsewhere_stay(reproduce, tmp_path):
    elsewhere = {"figures": {"nelbo": 1}, "device": "A"}
    reproduce.FIGURES.write_text(json.dumps({reproduce.VAE.name(3): elsewhere}))
    log(reproduce.VAE, 0)
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    assert sorted(known(tmp_path)) == [reproduce.VAE.name(0), reproduce.VAE.name(3)]
    assert known(tmp_path)[reproduce.VAE.name(3)] == elsewhere


@pytest.mark.parametrize("nelbo, kept", [(101.75, True), (101.5, False)])
def test_stored_figures_of_the_same_weights_stay(nelbo, kept, reproduce, tmp_path, capsys):
    name = reproduce.VAE.name(0)
    deep = {"nelbo": 99.5, "niwae_5000": 95.5}
    log(reproduce.VAE, 0, **{"figures_all": deep, "figures_torch-0.4": FIGURES})
    assert reproduce.main(["--collect"]) == 0
    stored = known(tmp_path)
    stored[name]["device"] = "A"
    reproduce.FIGURES.write_text(json.dumps(stored))
    fewer = {"nelbo": nelbo, "kl": 19.25}
    log(reproduce.VAE, 0, figures=fewer, figures_all={"niwae_1000": 96.0})
    assert reproduce.main(["--collect"]) == 0
    run = known(tmp_path)[name]
    if kept:
        assert run == {**stored[name], "figures_all": {**deep, "niwae_1000": 96.0}}
    else:  # of other weights: nothing of the old ones may stand beside it
        assert run["figures_all"] == {"niwae_1000": 96.0} and "figures_torch-0.4" not in run
        assert run["figures"] == fewer and run["device"] != "A"
    capsys.readouterr()
    assert (
        reproduce.main(["--collect"]) == 0 and "0 runs in logs/ are new" in capsys.readouterr().out
    )


@pytest.mark.parametrize("device, minutes", [("cpu", 4.0), ("cuda", 2.0)])
def test_device_and_minutes_of_a_run(device, minutes, reproduce, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    folder = log(reproduce.VAE, 0)
    (folder / "config.json").write_text(json.dumps({"device": device, "threads": 2}))
    (folder / "metrics.csv").write_text("step,seconds\n100,1\n200,3\n20000,120\n")
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    run = known(tmp_path)[reproduce.VAE.name(0)]
    assert run["device"] == {"cpu": "AVX9", "cuda": "A GPU"}[device]
    assert run["time"] == {"ms": 10.0, "minutes": minutes}


# ---------------------------------------------------------------------------------------------
# Tables, pages and pictures


def test_every_table_can_be_made(reproduce, tmp_path, capsys):
    total = 0
    for series in reproduce.needed(list(reproduce.TABLES)):
        for seed in range(series.seeds):
            total += 1
            stored = {
                "figures": {**FIGURES, "accuracy": 0.94 + seed / 1000},
                "figures_all": DEEP,
                "figures_2018": {**FIGURES, "nelbo": 99.75},
                "figures_torch-0.4": {**FIGURES, "nelbo": 98.75},
                "per_digit_accuracy": [0.9] * 10,
            }
            folder = log(series, seed, **stored)
            rows = f"10000,-590.5,50\n{series.step},-596.25,110\n"
            (folder / "metrics.csv").write_text(f"step,nelbo,seconds\n{rows}")
            (folder / "test.csv").write_text("step,nelbo,kl,rec\n10000,-565.5,20,-585.5\n")
            config = {"torch": "2.15+cpu", "device": "cpu", "threads": 3}
            (folder / "config.json").write_text(json.dumps(config))
    assert reproduce.main(["--collect"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{total} runs in logs/ are new")
    each = "0.9400 | 0.9410 | 0.9420 | 0.9430 | 0.9440"
    for line in [
        "| VAE NELBO | 101.75 ± 0.00 | 99.75 ± 0.00 | 98.75 ± 0.00 | 101.5 | 0.55 | +4.5 | -31.8 "
        "| -50.0 | 98 to 102 | 10, 10, 10 of 10 | 101.04 to 101.82 |",
        "| SSVAE gw = 1 accuracy | 0.9420 ± 0.0007 |  |  | 0.934 | 0.0139 | +5.1 |  |  "
        "| 0.885 to 0.955 | 5 of 5 | 0.942 to 0.949 |",
        f"| gw = 1 | 0.9420 ± 0.0007 | 0.0016 | {each} |",
        # After the gap:
        "| 99.00 ± 0.00 | 2.75 ± 0.00 | 100.0 ± 0.0 | 99.9 ± 0.0 | 99.0 ± 0.0 | 10 |",
        "| GMVAE - VAE | +0.00 | +0.00 |",
        "| 1000 | 0.9410 ± 0.0006 (3) | 0.9410 ± 0.0006 (3) | 0.9640 ± 0.0056 | 0.9487 |",
        # 6 ms: 110 s in 20,000 steps.
        "| 5 | 101.75 ± 0.00 | 99.00 ± 0.00 | 99.0 ± 0.0 | 6 ± 0 | 93.75 ± 0.00 | 3 |",
        "| 10,000 | -590.5 ± 0.0 | -565.5 ± 0.0 | 20.0 ± 0.0 | -585.5 ± 0.0 | 2 |",
        "| VAE | 10 | constant | 33 | 1 | 101.75 ± 0.00 | 93.75 ± 0.00 | 47.5 ± 0.0 | 5.5 ± 0.0 "
        "| 5.50 ± 0.00 | 3 |",
        "| VAE | 50 | cosine | 800 | 1 | 101.75 | 93.75 | 47.5 | 5.5 | 2.56 | 1 |",
        "| Burda et al. 2016, IWAE | 50 | falling | 3280 | 50 |  | 84.78 |",
    ]:
        assert line in said
    device = torch.backends.cpu.get_cpu_capability()
    assert said.count(f"\n\nOn {device}, torch 2.15.\n") == len(reproduce.TABLES) - 1  # not speed's
    for name in reproduce.TABLES:
        lines = reproduce.table(name, known(tmp_path))[:-2]
        assert len({line.count("|") for line in lines}) == 1, name  # as many cells in each row


def test_seeds_that_are_there_are_counted(reproduce, capsys):
    for seed in (0, 4):
        log(reproduce.VAE, seed, figures={**FIGURES, "nelbo": 101.0 + seed})
    assert reproduce.main(["--only", "vae", "beta", "--collect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| 0 | 101.00 |", "| 4 | 105.00 |")) for line in lines) == 2
    mean = next(line for line in lines if "**mean**" in line)
    assert mean.startswith("| **mean** | 103.00 ± 2.00 |") and mean.endswith("| 2 of 10 |")
    bounds = "| 1 | 19.25 ± 0.00 | 82.50 ± 0.00 | 103.00 ± 2.00 | 99.00 ± 0.00 |"
    assert f"{bounds} 10.0 ± 0.0 |  |  | 2 of 10 |" in lines


def test_a_column_of_fewer_runs_says_of_how_many(reproduce, capsys):
    log(reproduce.VAE, 2)
    for seed in range(2):
        log(reproduce.VAE, seed, figures_all=DEEP, figures_2018=FIGURES)
    assert reproduce.main(["--only", "train_iw", "sheet", "--collect"]) == 0
    said = capsys.readouterr().out
    assert "| 93.75 ± 0.00 (2) | 3 of 10 |" in said
    assert "| VAE KL | 19.25 ± 0.00 | 19.25 ± 0.00 (2) |  |" in said


def test_times_of_two_devices_are_not_averaged(reproduce):
    runs = {}
    for seed, (device, ms) in enumerate([("A", 6.0), ("A", 8.0), ("B", 90.0)]):
        times = {"device": device, "torch": "2.15", "time": {"ms": ms}}
        runs[reproduce.VAE.name(seed)] = {"figures": FIGURES, "figures_all": DEEP, **times}
    assert "| 7 ± 1 (2) |" in "\n".join(reproduce.table("train_iw", runs))
    lines = reproduce.table("literature", runs)
    assert (
        lines[2].endswith("| 7.00 ± 1.00 (2) | 3 | A, B |")
        and lines[-1] == "On A and B, torch 2.15."
    )


def test_check_passes_after_write_and_names_a_changed_digit(reproduce, tmp_path, capsys):
    log(reproduce.VAE, 0)
    assert reproduce.main(["--collect", "--write"]) == 0 and reproduce.main(["--check"]) == 0
    page = tmp_path / "README.md"
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- table vae -->\n| seed |")
    assert text.endswith(".\n<!-- end -->\nlast line\n")
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
        (f"<!-- table vae -->\n{PAGE}", "writeup.md:1: table vae has no <!-- end -->"),
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
    assert (tmp_path / "README.md").read_text() == PAGE


@pytest.mark.parametrize(
    "words, stored",
    [
        (["--only", "vea"], None),
        (["--jobs", "0"], None),
        (["--jobs", "x"], None),
        (["--device", "x"], None),
        (["--data_dir", "nowhere"], None),
        (["--data_dir", ""], None),
        (["--chek"], None),
        (["--check"], "{"),
        (["--only", "vae"], '{"model=vae_z=10_run=0000": 3}'),
        (["--only", "vae"], None),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_changes_nothing(words, stored, reproduce, tmp_path, capsys):
    if stored:
        reproduce.FIGURES.write_text(stored)
    (tmp_path / "logs").write_text("a file")
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(words)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_pictures_come_from_the_runs_that_count(reproduce, tmp_path):
    tables = importlib.import_module("tables")
    for series in tables.BETA.values():
        image.imsave(log(series, 0) / "samples.png", np.full((560, 1120, 3), 0.5))
    digits = log(reproduce.GMVAE, 0, data="drawn digits, not MNIST")
    (digits / "latent.png").write_bytes(b"")
    large = np.random.default_rng(0).integers(0, 256, (320, 640, 3), np.uint8)
    path = log(reproduce.FSVAE, 0) / "samples-0002000.png"
    image.imsave(path, large.repeat(2, 0).repeat(2, 1))
    assert reproduce.main(["--collect", "--pictures"]) == 0
    drawn = {path.name: image.imread(path) for path in (tmp_path / "docs").iterdir()}
    assert set(drawn) == {"vae-samples.png", "fsvae-2000.png", "beta.png"}
    assert np.array_equal((255 * drawn["fsvae-2000.png"][..., :3]).round(), large)
    assert drawn["beta.png"].shape[:2] == (5 * 120, 1120)
    before = (tmp_path / "docs" / "beta.png").read_bytes()
    log(tables.BETA[8], 0, step=500)  # which does not count
    samples = reproduce.folder_of(reproduce.VAE, 0) / "samples.png"
    image.imsave(samples, np.zeros((560, 1120, 3)))
    assert reproduce.main(["--pictures"]) == 0
    assert (tmp_path / "docs" / "beta.png").read_bytes() == before

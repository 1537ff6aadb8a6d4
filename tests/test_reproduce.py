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


STOPPED = "stopped, the runs' states are saved: the same command resumes\n"


def test_a_signal_stops_all_runs_and_says_how_to_resume(reproduce, tmp_path):
    (tmp_path / "mode").write_text("wait")
    for name in ("reproduce.py", "tables.py"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    (tmp_path / "codebase").symlink_to(ROOT / "codebase")
    words = [sys.executable, "-B", "docs/reproduce.py", "--only", "vae", "beta"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "began", process)
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error == STOPPED, said + error
    assert (tmp_path / "saved").exists() and len(calls(tmp_path)) == 1
    assert "<!-- table" not in said
    assert (tmp_path / "began").read_text() == "True"  # out of reach of the terminal
    assert not (tmp_path / "figures.json").exists()


CHANGES = [
    {"data": "drawn digits, not MNIST"},
    {"data": "mnist, files not verified"},
    {"step": 500},
    {"test_images": 100},
    {"figures": {}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_is_not_real_does_not_count(changes, reproduce, capsys):
    log(reproduce.VAE, 0, **changes)
    assert 0 in reproduce.lacking(reproduce.VAE, "subset")
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    none = "(no run of this table yet: `python docs/reproduce.py --only vae`)"
    assert none in capsys.readouterr().out


def test_figures_of_runs_elsewhere_stay(reproduce, tmp_path):
    elsewhere = {"figures": {"nelbo": 1}, "device": "A"}
    reproduce.FIGURES.write_text(json.dumps({reproduce.VAE.name(3): elsewhere}))
    log(reproduce.VAE, 0)
    assert reproduce.main(["--only", "vae", "--collect"]) == 0
    assert sorted(known(tmp_path)) == [reproduce.VAE.name(0), reproduce.VAE.name(3)]
    assert known(tmp_path)[reproduce.VAE.name(3)] == elsewhere


def test_a_difference_has_the_standard_error_of_independent_means(reproduce):
    tables = importlib.import_module("tables")
    assert tables.difference([1.0, 3.0], [0.0, 4.0], 2) == "+0.00 ± 2.24"
    assert tables.difference([1.0], [0.0, 4.0], 1) == "-1.0"


def test_every_table_can_be_made(reproduce, tmp_path, capsys):
    total = 0
    for series in reproduce.needed(list(reproduce.TABLES)):
        for seed in range(series.seeds):
            total += 1
            figures = {**FIGURES, "accuracy": 0.94 + seed / 1000}
            older = {"figures_2018": FIGURES, "figures_torch-0.4": FIGURES}
            digits = [0.9] * 10
            log(series, seed, figures=figures, figures_all=DEEP, per_digit_accuracy=digits, **older)
    assert reproduce.main(["--collect"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{total} runs in logs/ are new")
    for line in [
        "| gw = 1 | 0.9445 ± 0.0010 | 0.0030 | 0.9400 | 0.9410 | 0.9420 | 0.9430 | 0.9440 "
        "| 0.9450 | 0.9460 | 0.9470 | 0.9480 | 0.9490 |\n",
        "| GMVAE - VAE | +0.00 ± 0.00 | +0.00 ± 0.00 |",
    ]:
        assert line in said
    for name in reproduce.TABLES:
        lines = [line for line in reproduce.table(name, known(tmp_path)) if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1, name  # as many cells in each row


def test_check_passes_after_write_and_names_a_changed_digit(reproduce, tmp_path, capsys):
    log(reproduce.VAE, 0)
    assert reproduce.main(["--collect", "--write"]) == 0
    assert reproduce.main(["--check"]) == 0
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


BAD = [  # flags, and what figures.json has
    (["--only", "vea"], "{}"),
    (["--jobs", "0"], "{}"),
    (["--data_dir", "nowhere"], "{}"),
    (["--check"], "{"),
    (["--only", "vae"], '{"model=vae_z=10_run=0000": 3}'),
]


@pytest.mark.parametrize("words, stored", BAD, ids=str)
def test_bad_input_gets_one_line_and_changes_nothing(words, stored, reproduce, tmp_path, capsys):
    reproduce.FIGURES.write_text(stored)
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(words)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_a_wrong_marker_gets_one_line_and_changes_nothing(reproduce, tmp_path, capsys):
    (tmp_path / "writeup.md").write_text("<!-- table vea -->\n<!-- end -->\n")
    before = tree(tmp_path)
    with pytest.raises(SystemExit):
        reproduce.main(["--write"])
    message = "writeup.md:1: there is no table vea"
    assert capsys.readouterr().err == f"reproduce.py: error: {message}\n"
    assert tree(tmp_path) == before


def test_pictures_come_from_the_runs_that_count(reproduce, tmp_path):
    digits = log(reproduce.GMVAE, 0, data="drawn digits, not MNIST")
    (digits / "latent.png").write_bytes(b"")
    large = np.random.default_rng(0).integers(0, 256, (320, 640, 3), np.uint8)
    path = log(reproduce.FSVAE, 0) / "samples-0002000.png"
    image.imsave(path, large.repeat(2, 0).repeat(2, 1))
    assert reproduce.main(["--collect", "--pictures"]) == 0
    (drawn,) = (tmp_path / "docs").glob("*.png")
    assert drawn.name == "fsvae-2000.png"
    assert np.array_equal((255 * image.imread(drawn)[..., :3]).round(), large)

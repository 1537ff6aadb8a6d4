"""The four scripts through their command lines: what they print, store, draw and refuse."""

import csv
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import count
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    ROOT,
    checkpoint_steps,
    command,
    of_all_workers,
    same,
    table,
    tree,
    weights,
)
from scipy.io import savemat

from codebase import checkpoint, data, digits, evaluate, train
from codebase.models.fsvae import FSVAE
from codebase.models.vae import VAE
from codebase.runtime import download, log, options
from codebase.runtime.launch import launch
from codebase.runtime.parallel import Processes

NUMBER = r"-?\d+\.\d+(e-?\d+)?"
BOUND = rf"NELBO: {NUMBER}\. KL: {NUMBER}\. Rec: {NUMBER}"
ACCURACY = r"Test set classification accuracy: 0\.\d+"
PICTURES = {
    "vae": {"samples.png", "reconstructions.png", "interpolations.png", "latent.png", "curves.png"},
    "gmvae": {
        "samples.png",
        "reconstructions.png",
        "interpolations.png",
        "latent.png",
        "curves.png",
    },
    "ssvae": {"confusion.png", "styles.png", "curves.png"},
    "fsvae": {"samples.png", "samples-0000060.png", "samples-0000100.png", "curves.png"},
}


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def refusal(result) -> str:
    """The one line that a refused command says."""
    assert result.returncode == 2, result
    (line,) = result.stderr.splitlines()
    return line


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / "logs" / name / "results.json").read_text())


def watched(folder: Path, name: str) -> list[dict[str, str]]:
    """test.csv: what was found at each checkpoint on images that are not trained on."""
    with (folder / "logs" / name / "test.csv").open() as file:
        return list(csv.DictReader(file))


def state(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name / "state.pt", weights_only=True)


def folders(place: Path, *names: str) -> list[Path]:
    """New folders of these names."""
    made = [place / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


def pictures(folder: Path, name: str) -> set[str]:
    return {path.name for path in (folder / "logs" / name).glob("*.png")}


def steps(rows: list[dict[str, str]]) -> list[str]:
    return [row["step"] for row in rows]


def parse_of(model: str) -> Callable[[list[str]], options.Run]:
    """The function of a script that makes a run of a command line."""
    return importlib.import_module(f"run_{model}").parse


def parse(model: str, *flags) -> options.Run:
    return parse_of(model)([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_dir):
    """trained("vae"): where a process made a run of 100 steps, once for all, and what it said."""

    def run(model: str) -> tuple[Path, subprocess.CompletedProcess]:
        folder = of_all_workers(tmp_path_factory) / f"trained-{model}"
        said = folder.with_suffix(".pickle")
        with filelock.FileLock(folder.with_suffix(".lock")):
            if not said.exists():
                folder.mkdir()
                words = command(model, "--data", "digits", "--data_dir", digits_dir)
                words += ["--iter_max", "100", "--iter_save", "60"]
                result = subprocess.run(
                    words, cwd=folder, capture_output=True, text=True, timeout=600
                )
                said.write_bytes(pickle.dumps(result))
        return folder, pickle.loads(said.read_bytes())

    return run


@pytest.fixture
def finished(trained, tmp_path):
    """finished("vae"): copy that run to the test's folder; returns the lines that were printed."""

    def copy(model: str) -> list[str]:
        folder, result = trained(model)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return lines(result)

    return copy


# What a run prints and leaves


@pytest.mark.parametrize("model", NAMES)
def test_a_model_trains_then_loads_and_leaves_what_the_contract_names(
    model, finished, script, tmp_path
):
    trained = finished(model)
    loaded = lines(script(model, "--iter_max", 100, "--train", 0))
    assert re.fullmatch(ACCURACY if model == "ssvae" else BOUND, trained[-1]), trained[-1]
    if model in ("vae", "gmvae"):
        assert loaded[-5] == trained[-1]
        for m, line in zip((1, 10, 100, 1000), loaded[-4:], strict=True):
            assert re.fullmatch(rf"Negative IWAE-{m}: {NUMBER}", line), line
    else:
        assert loaded[-1] == trained[-1]
    logs = tmp_path / "logs" / NAMES[model]
    stored = {path.name for path in (tmp_path / "checkpoints" / NAMES[model]).iterdir()}
    assert stored == {"model-00060.pt", "model-00100.pt", "state.pt"}
    assert pictures(tmp_path, NAMES[model]) == PICTURES[model]
    assert "drawn digits" in results(tmp_path, NAMES[model])["data"]
    assert json.loads((logs / "config.json").read_text())["batch_size"] == 100
    rows = list(csv.DictReader((logs / "metrics.csv").open()))
    assert steps(rows) == ["100"]
    assert {"loss", "nelbo", "kl", "rec", "seconds"} <= set(rows[0])


def test_the_results_of_evaluation_join_those_of_training(finished, script, tmp_path):
    def stored() -> set[str]:
        return set(results(tmp_path, NAMES["vae"])["figures"])

    finished("vae")
    trained = results(tmp_path, NAMES["vae"])
    assert stored() == {"nelbo", "kl", "rec", "active"}
    lines(script("vae", "--iter_max", 100, "--train", 0, "--iw", 1, 10))
    joined = {*trained["figures"], "niwae_1", "niwae_10", "ess_1", "ess_10"}
    assert stored() == joined
    lines(script("vae", "--iter_max", 100, "--train", 0, "--iw", 5))
    both = results(tmp_path, NAMES["vae"])
    assert stored() == {*joined, "niwae_5", "ess_5"}
    assert both["figures"].items() >= trained["figures"].items()
    assert both["step"] == 100
    assert both["data"] == "drawn digits, not MNIST"
    assert both["name"] == NAMES["vae"]
    lines(script("vae", "--iter_max", 110))
    assert stored() == set(trained["figures"]) and results(tmp_path, NAMES["vae"])["step"] == 110


def test_figures_of_another_step_data_set_or_run_are_not_kept(finished, script, tmp_path):
    finished("vae")
    path = tmp_path / "logs" / NAMES["vae"] / "results.json"
    found = json.loads(path.read_text())
    stale = found | {"figures": found["figures"] | {"niwae_7": 1.0}, "remark": "of the other"}
    others = ["{ half a file"]
    others.append(json.dumps({key: found[key] for key in ("name", "data", "step")}))
    for other in ({"step": 60}, {"data": "mnist"}, {"name": "another run"}):
        others.append(json.dumps(stale | other))
    for other in others:
        path.write_text(other)
        lines(script("vae", "--iter_max", 100, "--train", 0, "--iw", 1))
        now = results(tmp_path, NAMES["vae"])
        assert set(now["figures"]) == {*found["figures"], "niwae_1", "ess_1"}
        assert "remark" not in now


def test_the_confusion_matrix_and_the_accuracies_are_stored_and_fit_together(finished, tmp_path):
    printed = finished("ssvae")
    found = results(tmp_path, NAMES["ssvae"])
    counts = torch.tensor(found["confusion"])
    assert set(found["figures"]) == {"accuracy"} and counts.shape == (10, 10)
    assert counts.sum(1).tolist() == data.COURSE["class_counts"]["test"] and counts.sum() == 10_000
    assert found["per_digit_accuracy"] == pytest.approx((counts.diag() / counts.sum(1)).tolist())
    assert found["figures"]["accuracy"] == counts.diag().sum().item() / 10_000
    assert printed[-1] == f"Test set classification accuracy: {found['figures']['accuracy']}"


def test_four_hundred_steps_on_the_drawn_digits_teach_a_vae_and_a_classifier(script, tmp_path):
    lines(script("vae", "--iter_max", 400))
    lines(script("ssvae", "--gw", 0, "--iter_max", 400))
    nelbo = results(tmp_path, NAMES["vae"])["figures"]["nelbo"]
    assert nelbo < 180  # the seeds 0 to 2 bring 150 to 152
    found = results(tmp_path, NAMES["ssvae"].replace("gw=001", "gw=000"))
    assert found["figures"]["accuracy"] > 0.55  # and 0.60 to 0.61


def test_beta_weighs_the_kl_term_and_is_part_of_the_name(script, tmp_path):
    script("vae", "--iter_max", 100, "--beta", 4)
    rows = table(tmp_path, NAMES["vae"].replace("_data", "_beta=4_data"))
    row = {name: float(value) for name, value in rows[0].items()}
    assert row["loss"] == pytest.approx(row["rec"] + 4 * row["kl"], rel=1e-5)
    assert row["nelbo"] == pytest.approx(row["rec"] + row["kl"], rel=1e-5)


@pytest.mark.long
def test_iwae_with_more_samples_needs_no_more_memory(finished, tmp_path, digits_dir):
    finished("vae")
    code = (
        "import resource, sys, run_vae; assert run_vae.main(sys.argv[1:]) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for m in ("200", "1200"):  # the logits of a thousand samples more of 100 images take 300 MB
        words = [sys.executable, "-c", code, "--data", "digits", "--data_dir", str(digits_dir)]
        words += ["--iter_max", "100", "--train", "0", "--iw", m]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert f"Negative IWAE-{m}:" in found.stdout
        peaks.append(int(found.stdout.split()[-1]))
    assert peaks[1] < peaks[0] * 1.1


def test_replicates_are_summarised_and_a_failed_run_is_reported(script, tmp_path):
    broken = tmp_path / "checkpoints" / NAMES["vae"].replace("run=0000", "run=0001")
    broken.mkdir(parents=True)
    (broken / "state.pt").write_bytes(b"nothing that can be read")
    result = script("vae", "--iter_max", 20, "--runs", 3)
    assert "run=0001" in refusal(result)
    summary = json.loads((tmp_path / "logs/model=vae_z=10_data=digits_summary.json").read_text())
    assert summary["runs"] == [0, 2] and len(summary["each"]) == 2
    about = {"data": "drawn digits, not MNIST", "step": 20, "test_images": 10_000}
    assert {key: summary[key] for key in about} == about
    values = [found["nelbo"] for found in summary["each"]]
    assert summary["figures"]["nelbo"]["mean"] == pytest.approx(sum(values) / 2)
    assert summary["figures"]["nelbo"]["standard_error"] == pytest.approx(
        abs(values[0] - values[1]) / 2
    )


# What is watched on images that are not trained on


@pytest.fixture
def few(monkeypatch):
    """Have the scripts load the first 1,500 images of a split alone."""
    load = data.load

    def first(run, split):
        images = load(run, split)
        return data.Images(images.pixels[:1500], images.labels[:1500])

    monkeypatch.setattr(data, "load", first)


BOUNDS = ["nelbo", "kl", "rec"]
FIGURES = {"vae": BOUNDS, "gmvae": BOUNDS, "ssvae": ["accuracy"], "fsvae": BOUNDS}


@pytest.mark.parametrize("model", ["vae", "gmvae", "ssvae"])
def test_the_figures_of_a_checkpoint_are_those_of_its_weights_on_the_test_images(
    model, finished, script, tmp_path
):
    finished(model)
    rows = watched(tmp_path, NAMES[model])
    names = FIGURES[model]
    assert steps(rows) == ["60", "100"] and list(rows[0]) == ["step", *names]
    flags = ["--train", 0]
    if model != "ssvae":
        flags += ["--iw", 1]
    for row in rows:
        lines(script(model, "--iter_max", row["step"], *flags))
        found = results(tmp_path, NAMES[model])["figures"]
        for name in names:
            assert float(row[name]) == pytest.approx(found[name], rel=1e-8)
    assert rows[0][names[0]] != rows[1][names[0]]


@pytest.mark.long
def test_the_figures_of_an_fsvaes_checkpoint_are_those_of_a_thousand_test_images(
    finished, tmp_path, digits_dir
):
    finished("fsvae")
    images = data.drawn_digits(str(digits_dir), "test", colour=True)
    first = data.Images(images.pixels[:1000], images.labels[:1000])
    rows = watched(tmp_path, NAMES["fsvae"])
    assert [row["step"] for row in rows] == ["60", "100"]
    for row in rows:
        torch.manual_seed(0)
        model = FSVAE()
        model.load_state_dict(weights(tmp_path, NAMES["fsvae"], int(row["step"])))
        found = evaluate.conditional_bound(model, first)
        assert {name: float(row[name]) for name in BOUNDS} == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("model", NAMES)
def test_no_bit_of_the_training_changes_with_how_often_it_is_watched(model, few, script, tmp_path):
    seldom, often = folders(tmp_path, "seldom", "often")
    lines(script(model, "--iter_max", 9, "--iter_save", 1000, cwd=seldom))
    lines(script(model, "--iter_max", 9, "--iter_save", 3, cwd=often))
    assert_same_training(seldom, often, model, 9)
    thrice = watched(often, NAMES[model])
    assert steps(thrice) == ["3", "6", "9"]
    assert watched(seldom, NAMES[model]) == thrice[-1:]


def test_the_table_of_checkpoints_is_the_same_in_one_piece_and_in_parts(few, script, tmp_path):
    whole, parts = folders(tmp_path, "whole", "parts")
    lines(script("vae", "--iter_max", 9, "--iter_save", 3, cwd=whole))
    lines(script("vae", "--iter_max", 6, "--iter_save", 3, cwd=parts))
    (parts / "logs" / NAMES["vae"] / "test.csv").unlink()  # it is completed from the state
    lines(script("vae", "--iter_max", 9, "--iter_save", 3, cwd=parts))
    assert watched(whole, NAMES["vae"]) == watched(parts, NAMES["vae"])


@pytest.mark.parametrize("model, shown", [("vae", "test_nelbo"), ("ssvae", "test_accuracy")])
def test_the_progress_line_shows_what_was_found_at_the_last_checkpoint(
    model, shown, few, script, tmp_path, monkeypatch
):
    said = []
    bar = log.tqdm

    def remembering(**words):
        made = bar(**words)
        monkeypatch.setattr(made, "set_postfix", lambda values, **_: said.append(values))
        return made

    monkeypatch.setattr(log, "tqdm", remembering)
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    lines(script(model, "--iter_max", 9, "--iter_save", 3))
    name = shown.removeprefix("test_")
    found = [float(row[name]) for row in watched(tmp_path, NAMES[model])]
    assert [values.get(shown) for values in said] == [f"{value:.5g}" for value in found[:2]]


# Resuming, starting over, loading


def test_one_piece_equals_parts_bit_for_bit_wherever_it_is_parted(few, script, tmp_path):
    """At a row of the table, between two, beyond a pass over the images, with a rest at the end."""
    whole, parts = folders(tmp_path, "whole", "parts")
    odd = ("--batch_size", 70)  # a pass of 1,500 images ends within every 22nd batch or so
    lines(script("vae", "--iter_max", 230, *odd, cwd=whole))
    for stop in (100, 150, 200, 230):
        lines(script("vae", "--iter_max", stop, "--iter_save", 1000 - stop, *odd, cwd=parts))
        rows = list(range(100, stop + 1, 100))
        if stop % 100:
            rows.append(stop)
        assert steps(table(parts, NAMES["vae"])) == [str(row) for row in rows]
    assert checkpoint_steps(whole, "vae") == [230]
    assert checkpoint_steps(parts, "vae") == [100, 150, 200, 230]
    assert_same_training(whole, parts, "vae", 230)


@pytest.mark.parametrize("model", NAMES)
def test_going_on_equals_never_having_stopped_bit_for_bit(model, finished, script, tmp_path):
    (parts,) = folders(tmp_path, "parts")
    finished(model)
    for stop in (40, 100):
        lines(script(model, "--iter_max", stop, cwd=parts))
    assert_same_training(tmp_path, parts, model, 100)


def assert_same_training(one: Path, two: Path, model: str, step: int) -> None:
    """Weights, tables and moments are equal bit for bit, those of the open row too."""
    assert same(weights(one, NAMES[model], step), weights(two, NAMES[model], step))
    assert table(one, NAMES[model]) == table(two, NAMES[model])
    first = state(one, NAMES[model])
    second = state(two, NAMES[model])
    assert first["step"] == second["step"] == step
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for number, moments in first["optimizer"].items():
        assert same(moments, second["optimizer"][number])
    for key in ("names", "steps", "sums"):
        assert first["metrics"][key] == second["metrics"][key]


def test_the_last_row_is_the_mean_of_the_steps_since_the_one_before(script, tmp_path, monkeypatch):
    hundreds, tens = folders(tmp_path, "hundreds", "tens")
    lines(script("vae", "--iter_max", 130, cwd=hundreds))
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    lines(script("vae", "--iter_max", 130, cwd=tens))
    *_, rest = table(hundreds, NAMES["vae"])
    fine = [row for row in table(tens, NAMES["vae"]) if int(row["step"]) > 100]
    assert rest["step"] == "130" and steps(fine) == ["110", "120", "130"]
    for column in rest.keys() - {"step"}:
        mean = sum(float(row[column]) for row in fine) / 3
        assert float(rest[column]) == pytest.approx(mean, rel=1e-5)


def test_the_table_is_brought_up_to_date_between_saves_without_changing_a_bit(
    script, tmp_path, monkeypatch
):
    seldom, often = folders(tmp_path, "seldom", "often")
    lines(script("vae", "--iter_max", 130, cwd=seldom))
    seen = {}

    def look(step: int) -> None:
        seen[step] = steps(table(often, NAMES["vae"]))

    monkeypatch.setattr(train, "WRITE_EVERY", 0)
    at_steps(monkeypatch, look)
    lines(script("vae", "--iter_max", 130, cwd=often))
    assert (seen[1], seen[2]) == ([], ["1"])  # within a row, too
    assert (seen[100], seen[101]) == (["99"], ["100"])
    assert seen[130] == ["100", "129"]
    assert_same_training(seldom, often, "vae", 130)


def at_steps(monkeypatch, act) -> None:
    """Call act(step) within every step of a VAE's training, numbered from 1 from here on."""
    binarize = data.binarize
    numbers = count(1)

    def acting(pixels):
        if len(pixels) == 100:  # a batch, not a block of the test split
            act(next(numbers))
        return binarize(pixels)

    monkeypatch.setattr(data, "binarize", acting)


def signal_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal within that step of a VAE's training."""

    def act(at: int) -> None:
        if at == step:
            os.kill(os.getpid(), number)

    at_steps(monkeypatch, act)


def test_going_on_to_exactly_the_step_of_an_interruption_finishes_the_run(
    script, tmp_path, monkeypatch
):
    """The checkpoint, the table and the pictures are there, and --train 0 finds them."""
    stopped, whole = folders(tmp_path, "stopped", "whole")
    begin = 0
    for step, number in ((37, signal.SIGINT), (100, signal.SIGTERM), (125, signal.SIGINT)):
        with monkeypatch.context() as patch:
            signal_at(patch, step - begin, number)
            result = script("vae", "--iter_max", 300, cwd=stopped)
        assert result.returncode == 128 + number
        said = f"stopped at step {step}, state saved; the same command resumes from there"
        assert said in result.stderr
        assert step not in checkpoint_steps(stopped, "vae")
        trained = lines(script("vae", "--iter_max", step, cwd=stopped))
        assert step in checkpoint_steps(stopped, "vae")
        assert pictures(stopped, NAMES["vae"]) == PICTURES["vae"]
        assert table(stopped, NAMES["vae"])[-1]["step"] == str(step)
        loaded = lines(script("vae", "--iter_max", step, "--train", 0, "--iw", 1, cwd=stopped))
        assert any(f"model-{step:05d}.pt" in line for line in loaded) and trained[-1] in loaded
        begin = step
    lines(script("vae", "--iter_max", 125, cwd=whole))
    assert_same_training(whole, stopped, "vae", 125)


def test_a_finished_run_is_evaluated_and_not_trained_again(finished, script, tmp_path):
    first = finished("vae")
    before = tree(tmp_path / "checkpoints")
    again = lines(script("vae", "--iter_max", 100))
    assert again[-1] == first[-1] and any("trained before" in line for line in again)
    assert tree(tmp_path / "checkpoints") == before


def test_overwrite_starts_over_and_deletes_what_the_run_writes_and_nothing_else(
    finished, script, tmp_path
):
    logs = tmp_path / "logs" / NAMES["fsvae"]
    checkpoints = tmp_path / "checkpoints" / NAMES["fsvae"]
    finished("fsvae")
    remembered = results(tmp_path, NAMES["fsvae"]) | {"remark": "of the first run"}
    (logs / "results.json").write_text(json.dumps(remembered))
    names = ["my.png", "notes.csv", "mine.json", "samples-mine.png", "metrics.csv.old"]
    own = [logs / name for name in names]
    own += [checkpoints / name for name in ("model-best.pt", "best.pt", "notes.txt")]
    for path in own:
        path.write_text(f"a user's own {path.name}")
    lines(script("fsvae", "--iter_max", 6, "--overwrite", 1))
    assert [path.read_text() for path in own] == [f"a user's own {path.name}" for path in own]
    written = {path.name for path in checkpoints.iterdir()} - {path.name for path in own}
    assert written == {"model-00006.pt", "state.pt"}
    assert state(tmp_path, NAMES["fsvae"])["step"] == 6
    samples = {path.name for path in logs.glob("samples*")}
    assert samples == {"samples.png", "samples-0000006.png", "samples-mine.png"}
    assert "remark" not in results(tmp_path, NAMES["fsvae"])
    assert steps(table(tmp_path, NAMES["fsvae"])) == ["6"]


def test_settings_that_contradict_the_stored_run_are_refused(finished, script, tmp_path):
    finished("vae")
    before = tree(tmp_path)
    line = refusal(script("vae", "--iter_max", 130, "--batch_size", 50))
    assert "--batch_size" in line and "100, not 50" in line
    line = refusal(script("vae", "--iter_max", 10))
    assert "--iter_max" in line and "[60, 100]" in line
    assert tree(tmp_path) == before


def test_an_interrupted_run_says_how_far_it_is(script, tmp_path, monkeypatch):
    """It has no checkpoint yet that could be given."""
    with monkeypatch.context() as patch:
        signal_at(patch, 7, signal.SIGINT)
        assert script("vae", "--iter_max", 20).returncode == 130
    before = tree(tmp_path)
    line = refusal(script("vae", "--iter_max", 5))
    assert "is at step 7" in line and "give 7 or more" in line and "[]" not in line
    assert tree(tmp_path) == before
    lines(script("vae", "--iter_max", 7))


OTHER = {"batch_size": 50, "seed": 3, "lr": 0.01}
FIX_WEIGHTS = {  # every flag that fixes the weights, with another value than the default
    "vae": OTHER | {"z": 5, "beta": 2.0, "train_iw": 5},
    "gmvae": OTHER | {"z": 5, "beta": 2.0, "train_iw": 5, "k": 20},
    "ssvae": OTHER | {"gw": 2, "cw": 50, "labels": 200},
    "fsvae": OTHER | {"split": "train"},
}


@pytest.mark.parametrize("model", NAMES)
def test_whatever_fixes_the_weights_is_part_of_the_name_or_is_refused_when_changed(
    model, finished, script, tmp_path
):
    asked = parse(model, "--data", "digits")
    assert asked.name == NAMES[model]
    assert set(asked.settings()) == {"model", "data", *FIX_WEIGHTS[model]}
    real = parse(model, "--data", asked.real_data)
    assert real.name == NAMES[model].replace("_data=digits", "")
    finished(model)
    assert state(tmp_path, NAMES[model])["settings"] == asked.settings()
    before = tree(tmp_path)
    for flag, value in FIX_WEIGHTS[model].items():
        if parse(model, "--data", "digits", f"--{flag}", value).name == NAMES[model]:
            line = refusal(script(model, "--iter_max", 110, f"--{flag}", value))
            assert f"argument --{flag}:" in line and f"not {value}" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["1e+2", "1E+02", "1e2", "100", "100."])
def test_a_number_may_be_written_with_an_exponent(text):
    assert parse("vae", "--beta", text).beta == 100


@pytest.mark.parametrize(
    "flag, rounded, value", [("beta", "2.00000001", 2), ("lr", "0.0200000001", 0.02)]
)
def test_what_the_name_rounds_away_is_refused_when_changed(flag, rounded, value, script):
    lines(script("vae", "--iter_max", 5, f"--{flag}", rounded))
    assert f"argument --{flag}" in refusal(script("vae", "--iter_max", 10, f"--{flag}", value))


def test_a_state_from_before_a_flag_was_there_goes_on_or_is_refused_with_what_can_be_done(
    finished, script, tmp_path
):
    finished("vae")
    before = state(tmp_path, NAMES["vae"])
    for name in ("lr", "train_iw"):
        del before["settings"][name]
    torch.save(before, tmp_path / "checkpoints" / NAMES["vae"] / "state.pt")
    result = script("vae", "--iter_max", 110)
    assert result.returncode == 0 or ("revision" in refusal(result) and "None" not in result.stderr)


@pytest.mark.parametrize(
    "model, flags, part",
    [
        ("vae", ["--lr", "0.01"], "vae_z=10_lr=0.01"),
        ("fsvae", ["--lr", "1e-4"], "fsvae_lr=0.0001"),
        ("vae", ["--train_iw", 5], "vae_z=10_train_iw=5"),
        ("gmvae", ["--train_iw", 50, "--lr", "0.0005"], "gmvae_z=10_k=500_train_iw=50_lr=0.0005"),
        ("ssvae", ["--labels", 1000], "ssvae_gw=001_cw=100_labels=1000"),
        ("ssvae", ["--labels", 100, "--lr", "0.001"], "ssvae_gw=001_cw=100"),
    ],
)
def test_the_name_says_what_is_trained(model, flags, part):
    run = parse(model, *flags, "--data", "digits")
    assert run.name == f"model={part}_data=digits_run=0000"


@pytest.mark.parametrize("rate", [0.001, 0.05])
def test_the_learning_rate_reaches_the_optimizer_in_one_piece_and_in_parts(
    rate, few, script, tmp_path
):
    """Adam's first step is as long as the rate, in every weight that has a gradient."""
    flags = ("--lr", rate)
    name = NAMES["vae"]
    if rate != 0.001:
        name = name.replace("_data", f"_lr={rate}_data")
    torch.manual_seed(0)
    before = VAE().state_dict()
    lines(script("vae", "--iter_max", 1, *flags))
    first = weights(tmp_path, name, 1)
    networks = [key for key in first if ".net." in key]
    moved = torch.cat([(first[key] - before[key]).abs().flatten() for key in networks])
    assert moved.max().item() == pytest.approx(rate, rel=1e-2) and moved.median() > 0.5 * rate
    lines(script("vae", "--iter_max", 3, *flags))
    (whole,) = folders(tmp_path, "whole")
    lines(script("vae", "--iter_max", 3, *flags, cwd=whole))
    assert same(weights(whole, name, 3), weights(tmp_path, name, 3))


@pytest.mark.parametrize(
    "model, flags, part",
    [
        ("vae", ["--train_iw", 3], "_train_iw=3"),
        ("gmvae", ["--train_iw", 3], "_train_iw=3"),
        ("ssvae", ["--labels", 200], "_labels=200"),
    ],
)
def test_with_the_newer_flags_too_going_on_equals_never_having_stopped_bit_for_bit(
    model, flags, part, few, script, tmp_path
):
    whole, parts, other = folders(tmp_path, "whole", "parts", "other")
    name = NAMES[model].replace("_data", f"{part}_data")
    lines(script(model, *flags, "--iter_max", 7, cwd=whole))
    for stop in (3, 7):
        lines(script(model, *flags, "--iter_max", stop, cwd=parts))
    assert same(weights(whole, name, 7), weights(parts, name, 7))
    assert table(whole, name) == table(parts, name)
    lines(script(model, "--iter_max", 7, cwd=other))
    assert not same(weights(other, NAMES[model], 7), weights(whole, name, 7))


def test_training_on_the_iwae_bound_is_told_apart_from_the_elbo_in_the_table(few, script, tmp_path):
    lines(script("vae", "--train_iw", 5, "--iter_max", 3))
    (row,) = table(tmp_path, NAMES["vae"].replace("_data", "_train_iw=5_data"))
    assert float(row["loss"]) < float(row["nelbo"])
    assert float(row["nelbo"]) == pytest.approx(float(row["kl"]) + float(row["rec"]), rel=1e-5)


@pytest.mark.parametrize("count, batch", [(50, 50), (100, 100), (200, 100), (1000, 100)])
def test_a_step_takes_all_labelled_images_or_a_hundred_of_them_at_random(
    count, batch, few, script, monkeypatch
):
    taken = []
    one_hot = data.Images.one_hot

    def remembering(self, index):
        taken.append((len(self), index))
        return one_hot(self, index)

    monkeypatch.setattr(data.Images, "one_hot", remembering)
    lines(script("ssvae", "--labels", count, "--iter_max", 5, "--gw", 0))
    assert [(of, len(index)) for of, index in taken] == [(count, batch)] * 5
    if count <= 100:
        assert all(torch.equal(index, torch.arange(count)) for _, index in taken)
    else:
        assert not torch.equal(taken[0][1], taken[1][1])
        assert max(index.max().item() for _, index in taken) > 0.9 * count


def test_what_does_not_fix_the_weights_may_change(finished, script, tmp_path):
    finished("vae")
    flags = ("--iter_save", 7, "--device", "cpu", "--check_data", 0, "--iw", 3, "--seed", 0)
    lines(script("vae", "--iter_max", 114, *flags))
    assert checkpoint_steps(tmp_path, "vae") == [60, 100, 105, 112, 114]
    config = json.loads((tmp_path / "logs" / NAMES["vae"] / "config.json").read_text())
    assert config["iter_max"] == 114


def test_runs_and_seeds_give_different_weights_and_the_same_seed_the_same(script, tmp_path):
    found = []
    for number, flags in enumerate(([], [], ["--seed", 0])):
        lines(script("vae", "--iter_max", 10, "--run", number, *flags))
        found.append(weights(tmp_path, NAMES["vae"].replace("0000", f"000{number}"), 10))
    assert same(found[0], found[2]) and not same(found[0], found[1])


def test_a_state_of_the_older_revision_is_refused_in_one_line_and_its_weights_load(
    finished, script, tmp_path
):
    trained = finished("vae")
    path = tmp_path / "checkpoints" / NAMES["vae"] / "state.pt"
    older = state(tmp_path, NAMES["vae"])
    assert older.pop("format")
    torch.save(older, path)
    before = tree(tmp_path)
    stored = tree(path.parent)
    for step in (100, 110):
        line = refusal(script("vae", "--iter_max", step))
        for word in ("state.pt", "revision", "--train 0", "--overwrite 1"):
            assert word in line
        assert tree(tmp_path) == before
    assert trained[-1] in lines(script("vae", "--iter_max", 100, "--train", 0, "--iw", 1))
    assert tree(path.parent) == stored
    lines(script("vae", "--iter_max", 10, "--overwrite", 1))


# Which data set, and what there is to load


def test_loading_without_a_checkpoint_names_it_what_there_is_and_what_to_type(
    finished, script, tmp_path
):
    finished("vae")
    before = tree(tmp_path)
    line = refusal(script("vae", "--iter_max", 30, "--train", 0))
    for word in (
        "model-00030.pt",
        "checkpoints of this run: 60, 100",
        "to train one: python run_vae.py",
        "--iter_max 30",
    ):
        assert word in line
    assert "--train" not in line and tree(tmp_path) == before


def test_shipped_weights_are_named_from_elsewhere(main, tmp_path):
    line = refusal(main("vae", "--run", 2021, "--train", 0))
    assert str(ROOT / "checkpoints") in line and "to train one" not in line
    line = refusal(main("vae", "--run", 2021, "--train", 0, "--iter_max", 7))
    assert "to train one" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_download(monkeypatch):
    def fetch(run):
        missing = [path for path in download.files(run) if not path.exists()]
        assert not missing, "nothing should be downloaded here"

    monkeypatch.setattr(download, "fetch", fetch)


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("asked", ["auto", "real"])
def test_a_missing_checkpoint_is_told_before_anything_is_downloaded(
    model, asked, main, no_download, tmp_path
):
    real = NAMES[model].replace("_data=digits", "")
    flags = []
    if asked == "real":
        flags = ["--data", parse(model).real_data]
    line = refusal(main(model, *flags, "--train", 0, "--iter_max", 7))
    assert f"{real}/model-00007.pt" in line and "checkpoints of this run: none" in line
    assert list(tmp_path.iterdir()) == []


def store_vae(name: str, step: int) -> None:
    torch.manual_seed(0)
    checkpoint.save_model_by_name(VAE(name=name), step)


def test_a_checkpoint_of_the_drawn_digits_is_loaded_without_a_download(
    main, no_download, digits_dir, tmp_path, monkeypatch
):
    only_digits = link_digits(digits_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    store_vae(NAMES["vae"], 7)
    result = main("vae", "--train", 0, "--iter_max", 7, "--iw", 1, "--data_dir", only_digits)
    assert re.fullmatch(BOUND, lines(result)[-2]) and "DRAWN DIGITS" in result.stdout
    line = refusal(
        main("vae", "--data", "mnist", "--train", 0, "--iter_max", 7, "--data_dir", only_digits)
    )
    assert "model=vae_z=10_run=0000/model-00007.pt" in line


def test_a_checkpoint_of_the_real_data_is_never_evaluated_on_drawn_digits(
    main, no_network, digits_dir, tmp_path, monkeypatch
):
    """But on the course's images, which are there; the whole test split needs its files."""
    only_digits = link_digits(digits_dir, tmp_path / "data")
    name = "model=vae_z=10_run=0000"
    monkeypatch.chdir(tmp_path)
    store_vae(name, 7)
    torch.manual_seed(0)
    wanted = evaluate.bounds(VAE(), data.test_subset(data.course("test")), (1,))
    result = main("vae", "--train", 0, "--iter_max", 7, "--iw", 1, "--data_dir", only_digits)
    assert lines(result)[-2] == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**wanted)
    assert "DRAWN" not in result.stdout and "download" not in result.stdout
    found = results(tmp_path, name)
    assert found["data"] == "mnist" and found["test_images"] == 100
    assert "(on the course's 100 test images: MNIST's test split is not there)" in result.stdout
    assert not list(only_digits.glob("MNIST*"))
    result = main("vae", "--train", 0, "--iter_max", 7, "--data_dir", only_digits, "--test", "all")
    assert "t10k-images-idx3-ubyte" in result.stderr.splitlines()[-1] and "by hand" in result.stderr
    assert result.returncode == 2 and "DRAWN" not in result.stdout and "NELBO" not in result.stdout


def link_digits(digits_dir: Path, place: Path) -> Path:
    """A data folder with the drawn digits alone: drawing them is not what is tested here."""
    place.mkdir()
    for stored in digits_dir.glob("drawn-grey-*.npz"):
        (place / stored.name).symlink_to(stored)
    return place


def test_auto_takes_drawn_digits_where_there_is_no_mnist_and_says_so(
    main, no_network, digits_dir, tmp_path
):
    place = link_digits(digits_dir, tmp_path / "no mnist")
    result = main("vae", "--iter_max", 5, "--data_dir", place)
    assert result.returncode == 0, result.stderr
    assert "NO MNIST" in result.stdout and "DRAWN DIGITS" in result.stdout
    assert (tmp_path / "logs" / NAMES["vae"]).is_dir() and not list(place.glob(".download*"))
    line = refusal(main("vae", "--iter_max", 5, "--data", "mnist", "--data_dir", place))
    assert "train-images-idx3-ubyte" in line and "by hand" in line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write to")
def test_a_data_folder_that_cannot_be_written_to_costs_the_real_data_alone(
    main, no_network, digits_dir, tmp_path, monkeypatch
):
    def drawn_before(counts, *_):
        split = "train" if sum(counts) > 10_000 else "test"
        images = data.drawn_digits(str(digits_dir), split, False)
        return images.pixels.numpy(), images.labels.numpy()

    monkeypatch.setattr(digits, "draw", drawn_before)
    result = main("vae", "--iter_max", 5, "--data_dir", "/proc")
    assert "NO MNIST" in result.stdout and re.fullmatch(BOUND, lines(result)[-1])
    line = refusal(main("vae", "--iter_max", 5, "--data", "mnist", "--data_dir", "/proc"))
    assert "by hand" in line and "/proc/MNIST/raw/train-images-idx3-ubyte" in line
    before = tree(tmp_path)
    assert "--data_dir" in refusal(main("vae", "--iter_max", 5, "--data_dir", "/proc/nothing"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("model", NAMES)
def test_a_command_line_is_parsed_without_touching_the_data_folder(model, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("parsing makes and removes nothing")

    monkeypatch.chdir(tmp_path)
    for name in ("mkdir", "makedirs", "rmdir", "unlink", "open"):
        monkeypatch.setattr(os, name, forbidden)
    assert parse(model).data_dir == "data"
    assert parse(model, "--data_dir", "new").data_dir == "new"
    assert list(tmp_path.iterdir()) == []


# SVHN: files as they are published, but of drawn colour digits


def store_svhn(folder: Path, split: str, each: int, seed: int) -> data.Images:
    """Write <split>_32x32.mat and return what is in it.

    There it is rows x columns x channels x images, and 10 stands for the digit 0.
    """
    pixels, labels = digits.draw([each] * 10, seed, True)
    images = pixels.reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0)
    stored = np.where(labels == 0, 10, labels)[:, None].astype("u1")
    savemat(folder / f"{split}_32x32.mat", {"X": images, "y": stored})
    return data.Images(torch.from_numpy(pixels), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def svhn_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("svhn")


@pytest.fixture(scope="module")
def svhn(svhn_dir) -> dict[str, data.Images]:
    """A few hundred images in SVHN's files, and the same images by split."""
    return {
        "train": store_svhn(svhn_dir, "train", 30, seed=5),
        "test": store_svhn(svhn_dir, "test", 15, seed=6),
    }


@pytest.fixture
def svhn_place(svhn, svhn_dir, tmp_path):
    """svhn_place(["train"]): a data folder in which these splits, and no others, are now."""
    (place,) = folders(tmp_path, "data")

    def put(splits: list[str]) -> Path:
        for path in place.glob("*.mat"):
            path.unlink()
        for split in splits:
            name = f"{split}_32x32.mat"
            (place / name).symlink_to(svhn_dir / name)
        return place

    return put


def svhn_bound(folder: Path, split: str, images: data.Images, step: int) -> dict[str, float]:
    """What evaluation should find of the run's weights on these images."""
    torch.manual_seed(0)
    model = FSVAE()
    model.load_state_dict(weights(folder, f"model=fsvae_split={split}_run=0000", step))
    return evaluate.conditional_bound(model, images)


def test_fsvae_trains_on_svhns_files_and_is_evaluated_on_the_test_split(
    main, no_download, svhn, svhn_place, tmp_path
):
    flags = ["--data", "svhn", "--check_data", 0, "--split", "train", "--iter_max", 20]
    flags += ["--data_dir", svhn_place(["train", "test"])]
    printed = lines(main("fsvae", *flags))
    assert re.fullmatch(BOUND, printed[-1])
    found = results(tmp_path, "model=fsvae_split=train_run=0000")
    assert found["evaluated_on"] == "test split"
    assert found["data"] == "svhn, train split, files not verified"
    wanted = svhn_bound(tmp_path, "train", svhn["test"], 20)
    assert found["figures"] == pytest.approx(wanted, rel=1e-5)
    svhn_place(["test"])
    assert lines(main("fsvae", *flags, "--train", 0))[-1] == printed[-1]


def test_without_a_test_split_fsvaes_figure_says_that_it_is_of_training_images(
    main, no_network, svhn, svhn_place, tmp_path
):
    place = svhn_place(["train"])
    flags = ("--check_data", 0, "--split", "train", "--data_dir", place, "--iter_max", 20)
    printed = lines(main("fsvae", *flags))
    assert re.match(BOUND, printed[-1]) and "training images" in printed[-1]
    found = results(tmp_path, "model=fsvae_split=train_run=0000")
    assert found["evaluated_on"] == "training images"
    wanted = svhn_bound(tmp_path, "train", svhn["train"], 20)
    assert found["figures"] == pytest.approx(wanted, rel=1e-5)
    assert f"training images: {found['test_images']}" in printed
    assert lines(main("fsvae", *flags, "--train", 0))[-1] == printed[-1]
    said = lines(main("fsvae", *flags, "--runs", 2))
    summarised = "2 runs (0, 1) (on training images), mean and standard error"
    assert any(line.startswith(summarised) for line in said)
    summary = json.loads((tmp_path / "logs" / "model=fsvae_split=train_summary.json").read_text())
    assert summary["evaluated_on"] == "training images"


def test_a_test_split_that_came_later_is_told(main, no_network, svhn_place, tmp_path):
    flags = ["--check_data", 0, "--split", "train", "--iter_max", 2]
    flags += ["--data_dir", svhn_place(["train"])]
    lines(main("fsvae", *flags))
    svhn_place(["train", "test"])
    printed = lines(main("fsvae", *flags))
    assert re.fullmatch(BOUND, printed[-1])
    found = results(tmp_path, "model=fsvae_split=train_run=0000")
    assert (found["evaluated_on"], found["test_images"]) == ("test split", 150)


def test_fsvae_trained_on_the_test_split_says_that_it_is_evaluated_on_training_images(
    main, no_download, svhn, svhn_dir, tmp_path
):
    flags = ["--data", "svhn", "--check_data", 0, "--split", "test", "--iter_max", 10]
    flags += ["--data_dir", svhn_dir]
    printed = lines(main("fsvae", *flags))
    assert re.match(BOUND, printed[-1]) and "training images" in printed[-1]
    assert results(tmp_path, "model=fsvae_split=test_run=0000")["evaluated_on"] == "training images"
    assert lines(main("fsvae", *flags, "--train", 0))[-1] == printed[-1]


@pytest.mark.parametrize(
    "first, then", [(["train"], ["train", "test"]), (["train", "test"], ["train"])]
)
def test_a_run_goes_on_whether_the_test_split_was_there_before_or_is_still_there(
    first, then, main, no_network, svhn, svhn_place, tmp_path
):
    """What is watched at its checkpoints is there for those at which it could be had."""
    flags = ("--data", "svhn", "--check_data", 0, "--split", "train")
    for there, stop in ((first, 2), (then, 4)):
        place = svhn_place(there)
        lines(main("fsvae", *flags, "--data_dir", place, "--iter_max", stop, plots=True))
    rows = watched(tmp_path, "model=fsvae_split=train_run=0000")
    had = {row["step"] for row in rows if row.get("nelbo")}
    assert had == ({"2"} if "test" in first else {"4"})
    (found,) = [row for row in rows if row["step"] in had]
    wanted = svhn_bound(tmp_path, "train", svhn["test"], int(found["step"]))
    assert float(found["nelbo"]) == pytest.approx(wanted["nelbo"], rel=1e-5)


# Command lines: a frozen Run, help, and what is refused

# The flags of every script with their defaults, as --help shows them; None: in words.
SHARED_FLAGS = {
    "iter_max": "20000",
    "train": "1",
    "run": "0",
    "runs": "1",
    "jobs": "1",
    "overwrite": "0",
    "seed": None,
    "batch_size": "100",
    "lr": "0.001",
    "iter_save": "10000",
    "device": "auto",
    "compile": "auto",
    "data": "auto",
    "data_dir": "data",
    "check_data": "1",
}
VAE_FLAGS = {"z": "10", "beta": "1.0", "train_iw": "1", "iw": "1 10 100 1000", "test": "subset"}
FLAGS = {
    "vae": {**SHARED_FLAGS, **VAE_FLAGS},
    "gmvae": {**SHARED_FLAGS, **VAE_FLAGS, "k": "500"},
    "ssvae": {**SHARED_FLAGS, "iter_max": "30000", "gw": "1", "cw": "100", "labels": "100"},
    "fsvae": {**SHARED_FLAGS, "iter_max": "1000000", "split": "extra"},
}


def test_importing_the_scripts_does_nothing_and_loads_neither_torch_nor_numpy(tmp_path):
    code = "import sys, {}; sys.exit(str({{'torch', 'numpy'}} & set(sys.modules) or ''))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for model in NAMES:
        words = [sys.executable, "-c", code.format(f"run_{model}")]
        found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (found.stdout, found.stderr.strip()) == ("", ""), model
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", NAMES)
def test_help_loads_neither_torch_nor_numpy_and_shows_every_flag_and_how_to_use_torchrun(
    model, tmp_path
):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, *command(model, "--help")[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and not found.stderr, found.stderr
    assert set(re.findall(r"^ +--(\w+)", found.stdout, re.MULTILINE)) == {*FLAGS[model]}
    shown = " ".join(found.stdout.split())
    for flag, default in FLAGS[model].items():
        assert f"--{flag} " in shown
        assert default is None or f"(default: {default})" in shown  # as it can be typed
    assert f"torchrun --nproc_per_node=2 -- run_{model}.py" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", NAMES)
def test_a_run_cannot_be_changed(model):
    run = parse(model)
    for name in [*FLAGS[model], "name"]:
        with pytest.raises(FrozenInstanceError):
            setattr(run, name, getattr(run, name))
    with pytest.raises(FrozenInstanceError):
        run.group = None


def test_a_script_gets_one_settled_run_after_another(tmp_path, monkeypatch, digits_dir):
    """Frozen ones, with data set, device and seed as they are; and the processes."""
    monkeypatch.chdir(tmp_path)
    runs = []

    def one_run(run, processes):
        assert isinstance(processes, Processes)
        runs.append(run)
        return {"nelbo": 1.0}

    flags = "--runs 3 --run 5 --seed 8 --z 4 --data digits --iw 3 1".split()
    launch(parse_of("vae"), one_run, flags)
    assert [(run.run, run.seed) for run in runs] == [(5, 8), (6, 9), (7, 10)]
    for run in runs:
        assert type(run) is options.Run
        assert (run.z, run.iw, run.data) == (4, [3, 1], "digits")
        assert run.device in ("cpu", "cuda", "mps")
    assert [run.name for run in runs] == [
        f"model=vae_z=04_data=digits_run=000{number}" for number in (5, 6, 7)
    ]


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.set_flush_denormal(False),
    reason="no such setting of threads",
)
def test_scripts_compute_without_denormal_numbers(tmp_path):
    """In every thread, and without numpy's warning of it; the caller's own setting is put back.

    Else some CPUs train an SSVAE at a fraction of their speed.
    """
    program = """if True:
        import torch, warnings
        from codebase.runtime.launch import launch
        from run_vae import parse
        tiny = lambda: (torch.full((1_000_000,), 1e-30) * 1e-10).view(torch.int32)
        def one_run(run, processes):
            torch.set_num_threads(2)
            print(tiny().count_nonzero().item())
            kind = "<class 'numpy.float32'>"
            warnings.warn(f"The value of the smallest subnormal for {kind} type is zero.")
            torch.set_num_threads(1)
            return {"nelbo": 0.0}
        for own in (False, True):
            torch.set_flush_denormal(own)
            launch(parse, one_run, ["--data", "digits", "--device", "cpu"])
            print(tiny().count_nonzero().item())
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program]
    found = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (found.stdout.split(), found.stderr) == (["0", "1000000", "0", "0"], "")


SCRIPTS = tuple(NAMES)
NO_INTEGER = ("-1", "x", "1.5", "nan", "", "99999999999999999999")
NO_BETA = ["-1", "nan", "inf", "-inf", "x", "", "1e7"]
NO_BETA += ["+1", "1_0", " 1", "1\n", "1e+", "1e+-2", "٣"]
FROM_ONE = ("iter_max", "iter_save", "batch_size", "runs", "jobs")
# Every flag with what it does not take: (script, flags, a word of the line)


def by_script(values, scripts=SCRIPTS):
    """Each value for the first script, and one for the others: they declare the flag together."""
    yield from ((scripts[0], value) for value in values)
    yield from ((script, values[0]) for script in scripts[1:])


BINARY = ("vae", "gmvae")
BAD = [
    (script, [f"--{flag}", value], f"--{flag}")
    for flag in (*FROM_ONE, "run", "seed", "train", "overwrite", "check_data")
    for script, value in by_script(NO_INTEGER)
]
BAD += [(script, [f"--{flag}", "0"], f"--{flag}") for flag in FROM_ONE for script in SCRIPTS]
BAD += [
    (script, ["--z", value], "--z")
    for script, value in by_script((*NO_INTEGER, "0", "10001"), BINARY)
]
BAD += [(script, ["--beta", value], "--beta") for script, value in by_script(NO_BETA, BINARY)]
BAD += [
    (script, ["--iw", *values], "--iw")
    for script, values in by_script(
        (["0"], [], ["-1"], ["1.5"], ["x"], [""], ["10", "x"], ["10", "0"], ["100001"]), BINARY
    )
]
BAD += [
    ("gmvae", ["--k", value], "--k") for value in ("0", "-5", "x", "2.5", "nan", "", "1000000000")
]
BAD += [
    ("ssvae", [f"--{flag}", value], f"--{flag}")
    for flag in ("gw", "cw")
    for value in ("1000000", *NO_INTEGER)
]
BAD += [
    (script, ["--compile", value], "--compile") for script, value in by_script(("2", "", "yes"))
]
BAD += [
    (script, ["--lr", value], "--lr")
    for script, value in by_script(("0", "-1", "nan", "inf", "x", "", "11"))
]
BAD += [
    (script, ["--train_iw", value], "--train_iw")
    for script, value in by_script((*NO_INTEGER, "0", "1001"), BINARY)
]
BAD += [(script, ["--train_iw", "5", "--beta", "2"], "--train_iw") for script in ("vae", "gmvae")]
BAD += [
    (script, ["--test", value], "--test")
    for script, value in by_script(("", "0", "All", "train"), BINARY)
]
BAD += [
    ("ssvae", ["--labels", value], "--labels")
    for value in (*NO_INTEGER, "0", "5", "105", "50010", "60000")
]
BAD += [
    (script, ["--data", value], "--data")
    for script, value in by_script(
        (
            "missing.npz",
            "nowhere/at/all.npz",
            "a_file",
            "a_file/x.npz",
            "a_file.npy",
            "/proc.npz",
            "x" * 300 + ".npz",
        )
    )
]
BAD += [
    ("vae", ["--data", value], "--data")
    for value in ("digits.npz", ".npz", "a=b.npz", "a b.npz", "x.NPZ", "npz")
]
BAD += [("fsvae", ["--split", value], "--split") for value in ("all", "", "0", "Test")]
BAD += [
    (script, ["--device", value], "--device")
    for script, value in by_script(("tpu", "", "cuda:99", "CPU", "meta"))
]
BAD += [
    (script, ["--data", value], "--data")
    for script in SCRIPTS
    for value in ("", "imagenet", "MNIST")
]
BAD += [(script, ["--data", "svhn"], "--data") for script in ("vae", "gmvae", "ssvae")]
BAD += [
    (script, ["--data_dir", value], "--data_dir")
    for script in SCRIPTS
    for value in (
        "",
        "a_file",
        "nowhere/at/all",
        "a_file/data",
        "/proc/none",
        "x" * 300,
        "x" * 2000,
    )
]
BAD += [
    ("fsvae", ["--data", "mnist"], "--data"),
    ("vae", ["--data_dir", "a_file"], "a file"),
    ("vae", ["--data_dir", "a_file/"], "a file"),
    ("vae", ["--data_dir", "/dev/null"], "a file"),
    ("vae", ["--data_dir", "a\0b"], "--data_dir"),
    ("vae", ["--z"], "--z"),
    ("vae", ["--train", "2"], "--train"),
    ("vae", ["--train", "0", "--overwrite", "1"], "--overwrite"),
    ("ssvae", ["--gw", "0", "--cw", "0"], "--cw"),
    ("ssvae", ["--gw", "0", "--cw", "0", "--train", "0"], "--cw"),
    ("vae", ["--k", "5"], "--k"),
    ("vae", ["--gw", "1"], "--gw"),
    ("ssvae", ["--z", "5"], "--z"),
    ("ssvae", ["--test", "all"], "--test"),
    ("ssvae", ["--train_iw", "5"], "--train_iw"),
    ("fsvae", ["--labels", "100"], "--labels"),
    ("ssvae", ["--iw", "5"], "--iw"),
    ("fsvae", ["--beta", "1"], "--beta"),
    ("gmvae", ["--no_such_flag", "1"], "--no_such_flag"),
    ("vae", ["--it", "5"], "--it"),
    ("vae", ["-z", "5"], "-z"),
    ("vae", ["surplus"], "surplus"),
    ("vae", ["--data", "digits", "--train", "0", "--iter_max", "7"], "model-00007.pt"),
    ("vae", ["--train", "0", "--iter_max", "7"], "model-00007.pt"),
]  # fmt: skip
IN_A_PROCESS = [  # of them, a few through an interpreter of their own
    ("vae", ["--z", "0"]),
    ("gmvae", ["--k", "x"]),
    ("ssvae", ["--cw", "-1"]),
    ("fsvae", ["--split", "all"]),
    ("vae", ["--beta", "nan"]),
    ("vae", ["--iw", "10", "x"]),
    ("vae", ["--device", "tpu"]),
    ("fsvae", ["--data", "mnist"]),
    ("ssvae", ["--data_dir", "a_file"]),
    ("gmvae", ["--no_such_flag", "1"]),
    ("vae", ["surplus"]),
    ("ssvae", ["--gw", "0", "--cw", "0"]),
    ("vae", ["--data", "digits", "--train", "0", "--iter_max", "7"]),
]


def shown(flags: list[str]) -> str:
    return " ".join(flag[:40] for flag in flags)


@pytest.mark.parametrize(
    "model, flags, word", BAD, ids=[f"{model} {shown(flags)}" for model, flags, _ in BAD]
)
def test_a_bad_command_line_gets_one_line_and_changes_nothing(
    model, flags, word, main, no_network, tmp_path
):
    (tmp_path / "a_file").write_text("not a folder")
    result = main(model, *flags)
    assert word in refusal(result) and not result.stdout
    assert tree(tmp_path) == {"a_file": b"not a folder"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "model, flags", IN_A_PROCESS, ids=[f"{model} {shown(flags)}" for model, flags in IN_A_PROCESS]
)
def test_a_process_with_a_bad_command_line_ends_as_its_main_does(
    model, flags, no_network, tmp_path
):
    (word,) = (word for other, listed, word in BAD if (other, listed) == (model, flags))
    (tmp_path / "a_file").write_text("not a folder")
    result = subprocess.run(
        command(model, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert word in refusal(result) and not result.stdout
    assert tree(tmp_path) == {"a_file": b"not a folder"} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_gone_or_cannot_be_written_to_is_told_in_one_line(
    main, tmp_path, monkeypatch
):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = ["sh", "-c", 'rmdir "$PWD" && exec "$0" "$@"', *command("vae", "--data", "digits")]
    refusal(subprocess.run(words, cwd=gone, capture_output=True, text=True))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "cannot be written to" in refusal(main("vae", "--data", "digits"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", NAMES)
def test_every_flag_of_every_script_has_a_bad_value_in_the_list(model):
    tried = {
        flags[0].removeprefix("--")
        for script, flags, _ in BAD
        if script == model and len(flags) > 1
    }
    assert set(FLAGS[model]) <= tried


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_refused_before_anything_is_downloaded(
    main, no_download, tmp_path
):
    for device in ("cuda", "gpu"):
        for flags in ([], ["--data", "digits"], ["--data", "mnist"]):
            assert "--device" in refusal(main("vae", "--device", device, *flags))
    assert list(tmp_path.iterdir()) == []


# Failures are reported for what they are


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def test_running_out_of_memory_is_one_line_that_says_what_to_do(finished, script, monkeypatch):
    finished("vae")
    cuda = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    for allocate in (cuda, lambda *_, **__: torch.empty(2**58), raising(MemoryError())):
        monkeypatch.setattr(evaluate, "bounds", allocate)
        result = script("vae", "--iter_max", 100)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 1 and "out of memory" in line and "--batch_size" in line


@pytest.mark.parametrize(
    "model, flags, named, not_named",
    [
        ("vae", ["--train", 1], ["--batch_size", "--z"], ["--k", "--iw"]),
        ("gmvae", ["--train", 1], ["--batch_size", "--z", "--k"], ["--iw"]),
        ("ssvae", ["--train", 1], ["--batch_size"], ["--k", "--z"]),
        ("vae", ["--train", 0], ["--z", "--device"], ["--batch_size", "--k"]),
        ("gmvae", ["--train", 0], ["--z", "--k", "--device"], ["--batch_size"]),
        ("ssvae", ["--train", 0], ["--device"], ["--batch_size", "--k", "--z"]),
    ],
)
def test_advice_on_memory_fits_the_command(
    model, flags, named, not_named, script, monkeypatch, tmp_path
):
    monkeypatch.setattr(data, "load", raising(MemoryError()))
    path = tmp_path / "checkpoints" / NAMES[model] / "model-00100.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    result = script(model, "--iter_max", 100, *flags)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "out of memory" in line
    words = line.replace(",", " ").split()
    assert set(named) <= set(words) and not set(not_named) & set(words)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA errors might be reported later",
        "Connection closed by peer",
        "view size is not compatible with input tensor's size; memory format",
    ],
)
def test_any_other_failure_is_reported_in_torchs_words_below_a_traceback(
    words, finished, script, monkeypatch
):
    finished("vae")
    monkeypatch.setattr(evaluate, "bounds", raising(RuntimeError(words)))
    result = script("vae", "--iter_max", 100)
    assert result.returncode == 1 and "Traceback" in result.stderr and "raise_it" in result.stderr
    assert result.stderr.splitlines()[-1] == f"run_vae.py: error: {words.splitlines()[0]}"
    assert "out of memory" not in result.stderr and "died" not in result.stderr

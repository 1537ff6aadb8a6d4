"""The four scripts through their command lines: what they print, store, load, name and refuse."""

import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    ROOT,
    SHIPPED,
    command,
    lines,
    only_error,
    raising,
    results,
    same,
    state,
    table,
    tree,
    weights,
)
from scipy.io import savemat
from untrained import KINDS, noise

from codebase import checkpoint, data, evaluate
from codebase.models.vae import VAE, BinaryVAE
from codebase.runtime import launch, options

NUMBER = r"-?\d+\.\d+(e-?\d+)?"
BOUND = rf"NELBO: {NUMBER}\. KL: {NUMBER}\. Rec: {NUMBER}"
ACCURACY = r"Test set classification accuracy: 0\.\d+"
COURSE = "(on the course's 100 test images: MNIST's test split is not there)"
OF_VAE = {"samples.png", "reconstructions.png", "interpolations.png", "latent.png"}
PICTURES = {
    "vae": {*OF_VAE, "curves.png"},
    "gmvae": {*OF_VAE, "curves.png"},
    "ssvae": {"confusion.png", "styles.png", "curves.png"},
    "fsvae": {"samples.png", "samples-0000006.png", "samples-0000010.png", "curves.png"},
}


def pictures(folder: Path, name: str) -> set[str]:
    return {path.name for path in (folder / "logs" / name).glob("*.png")}


def steps(rows: list[dict[str, str]]) -> list[str]:
    return [row["step"] for row in rows]


def parse(model: str, *flags) -> options.Run:
    return importlib.import_module(f"run_{model}").parse([str(flag) for flag in flags])


@pytest.fixture
def finished(few, script):
    """finished("vae"): make a run with checkpoints at 6 and 10; returns what it printed."""

    def run(model: str) -> list[str]:
        return lines(script(model, "--iter_max", 10, "--iter_save", 6))

    return run


# ---------------------------------------------------------------------------------------------
# What a run prints and leaves


@pytest.mark.parametrize("model", NAMES)
def test_a_model_trains_loads_and_leaves_its_files(model, finished, script, tmp_path):
    name = NAMES[model]
    trained = finished(model)
    loaded = lines(script(model, "--iter_max", 10, "--train", 0))
    assert re.fullmatch(ACCURACY if model == "ssvae" else BOUND, trained[-1]), trained[-1]
    if issubclass(KINDS[model], BinaryVAE):
        assert loaded[-5] == trained[-1]
        for m, line in zip((1, 10, 100, 1000), loaded[-4:], strict=True):
            assert re.fullmatch(rf"Negative IWAE-{m}: {NUMBER}", line), line
    else:
        assert loaded[-1] == trained[-1]
    stored = {path.name for path in (tmp_path / "checkpoints" / name).iterdir()}
    assert stored == {"model-00006.pt", "model-00010.pt", "state.pt"}
    assert pictures(tmp_path, name) == PICTURES[model]
    assert "drawn digits" in results(tmp_path, name)["data"]
    config = json.loads((tmp_path / "logs" / name / "config.json").read_text())
    assert config["batch_size"] == 100
    rows = table(tmp_path, name)
    assert steps(rows) == ["10"]
    assert {"loss", "nelbo", "kl", "rec"} <= set(rows[0])


def test_results_of_evaluation_join_those_of_training(finished, script, tmp_path):
    finished("vae")
    trained = results(tmp_path)
    assert set(trained["figures"]) == {"nelbo", "kl", "rec", "active"}
    lines(script("vae", "--iter_max", 10, "--train", 0, "--iw", 1, 10))
    lines(script("vae", "--iter_max", 10, "--train", 0, "--iw", 5))
    both = results(tmp_path)
    joined = {"niwae_1", "niwae_10", "niwae_5", "ess_1", "ess_10", "ess_5"}
    assert set(both["figures"]) == {*trained["figures"], *joined}
    assert both["figures"].items() >= trained["figures"].items()
    about = {"step": 10, "data": "drawn digits, not MNIST", "name": NAMES["vae"]}
    assert both.items() >= about.items()
    lines(script("vae", "--iter_max", 12))
    assert set(results(tmp_path)["figures"]) == set(trained["figures"])
    assert results(tmp_path)["step"] == 12


def test_results_of_something_else_are_not_kept(finished, script, tmp_path):
    """Of another step, data set or run, or of half a file."""
    finished("vae")
    path = tmp_path / "logs" / NAMES["vae"] / "results.json"
    found = results(tmp_path)
    stale = found | {"figures": {"niwae_7": 1.0}}
    others = ["{ half a file"]
    others += [json.dumps(stale | other) for other in ({"step": 6}, {"data": "mnist"})]
    for other in others:
        path.write_text(other)
        lines(script("vae", "--iter_max", 10, "--train", 0, "--iw", 1))
        assert set(results(tmp_path)["figures"]) == {*found["figures"], "niwae_1", "ess_1"}


def test_short_training_teaches_vae_and_classifier(script, tmp_path):
    lines(script("vae", "--iter_max", 120))
    lines(script("ssvae", "--gw", 0, "--iter_max", 200))
    assert results(tmp_path)["figures"]["nelbo"] < 220  # the seeds 0 and 1 bring 209 and 210
    found = results(tmp_path, NAMES["ssvae"].replace("gw=001", "gw=000"))
    assert found["figures"]["accuracy"] > 0.55  # and 0.60


def test_a_series_is_summarised_without_failed_runs(few, script, tmp_path):
    broken = tmp_path / "checkpoints" / NAMES["vae"].replace("run=0000", "run=0001")
    broken.mkdir(parents=True)
    (broken / "state.pt").write_bytes(b"nothing that can be read")
    result = script("vae", "--iter_max", 2, "--runs", 3)
    assert "run=0001" in only_error(result)
    summary = json.loads((tmp_path / "logs/model=vae_z=10_data=digits_summary.json").read_text())
    assert summary["runs"] == [0, 2]
    assert len(summary["each"]) == 2
    about = {"data": "drawn digits, not MNIST", "step": 2, "test_images": 1200}
    assert summary.items() >= about.items()
    first, second = [found["nelbo"] for found in summary["each"]]
    figure = summary["figures"]["nelbo"]
    assert figure["mean"] == pytest.approx((first + second) / 2)
    assert figure["standard_error"] == pytest.approx(abs(first - second) / 2)


@pytest.mark.parametrize("model, names", [("vae", ["nelbo", "kl", "rec"]), ("ssvae", ["accuracy"])])
def test_metrics_of_a_checkpoint_are_of_its_weights(model, names, finished, script, tmp_path):
    finished(model)
    rows = table(tmp_path, NAMES[model], "test.csv")
    assert steps(rows) == ["6", "10"]
    assert list(rows[0]) == ["step", *names]
    flags = ["--train", 0]
    if model == "vae":
        flags += ["--iw", 1]
    for row in rows:
        lines(script(model, "--iter_max", row["step"], *flags))
        found = results(tmp_path, NAMES[model])["figures"]
        for name in names:
            assert float(row[name]) == pytest.approx(found[name], rel=1e-8)
    assert rows[0][names[0]] != rows[1][names[0]]


def test_a_checkpoint_has_the_name_that_a_run_gives_it(finished, script, tmp_path):
    """Another file beside it is none of the run's."""
    finished("vae")
    folder = tmp_path / "checkpoints" / NAMES["vae"]
    other = folder / "model-6.pt"
    (folder / "model-00006.pt").rename(other)
    line = only_error(script("vae", "--iter_max", 6, "--train", 0))
    assert "checkpoints of this run: 10;" in line
    lines(script("vae", "--iter_max", 2, "--overwrite", 1))
    assert other.exists()


def test_a_table_that_a_spreadsheet_stored_costs_the_curves_alone(finished, script, tmp_path):
    finished("vae")
    path = tmp_path / "logs" / NAMES["vae"] / "metrics.csv"
    path.write_text(path.read_text().replace(",", ";"))
    loaded = lines(script("vae", "--iter_max", 10, "--train", 0))
    assert loaded[-4].startswith("Negative IWAE-1: ")
    assert not any("curves.png" in line for line in loaded)


# ---------------------------------------------------------------------------------------------
# What flags do


def test_beta_weighs_kl_in_the_loss(few, script, tmp_path):
    lines(script("vae", "--iter_max", 3, "--beta", 4))
    (row,) = table(tmp_path, NAMES["vae"].replace("_data", "_beta=4_data"))
    row = {name: float(value) for name, value in row.items()}
    assert row["loss"] == pytest.approx(row["rec"] + 4 * row["kl"], rel=1e-5)
    assert row["nelbo"] == pytest.approx(row["rec"] + row["kl"], rel=1e-5)


def test_training_on_iwae_has_a_tighter_loss(few, script, tmp_path):
    lines(script("vae", "--train_iw", 5, "--iter_max", 3))
    (row,) = table(tmp_path, NAMES["vae"].replace("_data", "_train_iw=5_data"))
    assert float(row["loss"]) < float(row["nelbo"])
    assert float(row["nelbo"]) == pytest.approx(float(row["kl"]) + float(row["rec"]), rel=1e-5)


@pytest.mark.parametrize("model", NAMES)
def test_a_step_takes_fresh_pixels(model, few, script, monkeypatch):
    """Binary ones are drawn anew for every batch, labelled ones too; colours stay as they are."""
    batches = []
    loss = KINDS[model].loss

    def remembering(self, *batch):
        batches.append(batch)
        return loss(self, *batch)

    monkeypatch.setattr(KINDS[model], "loss", remembering)
    lines(script(model, "--iter_max", 2, "--batch_size", 1500))  # all images, in another order
    (x, *labelled), (next_x, *next_labelled) = batches
    if model == "fsvae":
        assert x.min() >= 0 and x.max() == 1 and ((x > 0) & (x < 1)).any()
        torch.testing.assert_close(next_x.sum(), x.sum())
        return
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert next_x.sum() != x.sum()
    if model == "ssvae":
        assert set(labelled[0].unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(next_labelled[0], labelled[0])
        assert torch.equal(next_labelled[1], labelled[1])


def test_a_step_takes_a_hundred_labelled_images(few, script, monkeypatch):
    """Of more than a hundred so many at random."""
    taken = []
    one_hot = data.Images.one_hot

    def remembering(self, index):
        taken.append(index)
        return one_hot(self, index)

    monkeypatch.setattr(data.Images, "one_hot", remembering)
    lines(script("ssvae", "--labels", 200, "--iter_max", 5, "--gw", 0))
    assert [len(index) for index in taken] == [100] * 5
    assert 180 < torch.cat(taken).max() < 200


def test_the_seed_is_the_runs_number(few, script, tmp_path):
    """Other seeds give other weights, the same seed the same."""
    found = []
    for number, flags in enumerate(([], [], ["--seed", 0])):
        lines(script("vae", "--iter_max", 3, "--run", number, *flags))
        found.append(weights(tmp_path, NAMES["vae"].replace("0000", f"000{number}"), 3))
    assert same(found[0], found[2])
    assert not same(found[0], found[1])


def test_overwrite_deletes_what_the_run_wrote_alone(finished, script, tmp_path):
    name = NAMES["fsvae"]
    logs = tmp_path / "logs" / name
    checkpoints = tmp_path / "checkpoints" / name
    finished("fsvae")
    (logs / "results.json").write_text(json.dumps(results(tmp_path, name) | {"remark": "old"}))
    own = [logs / "my.png", logs / "notes.csv", logs / "mine.json", logs / "samples-mine.png"]
    own += [logs / "metrics.csv.old", checkpoints / "model-best.pt", checkpoints / "notes.txt"]
    for path in own:
        path.write_text(f"a user's own {path.name}")
    lines(script("fsvae", "--iter_max", 4, "--overwrite", 1))
    assert [path.read_text() for path in own] == [f"a user's own {path.name}" for path in own]
    written = {path.name for path in checkpoints.iterdir()} - {path.name for path in own}
    assert written == {"model-00004.pt", "state.pt"}
    assert state(tmp_path, name)["step"] == 4
    samples = {path.name for path in logs.glob("samples*")}
    assert samples == {"samples.png", "samples-0000004.png", "samples-mine.png"}
    assert "remark" not in results(tmp_path, name)
    assert steps(table(tmp_path, name)) == ["4"]


# ---------------------------------------------------------------------------------------------
# Names, and the settings that fix the weights

STEMS = [
    ("vae", "--beta 4 --z 5", "vae_z=05_beta=4"),
    ("vae", "--schedule cosine --lr 0.01", "vae_z=10_lr=0.01_schedule=cosine"),
    ("gmvae", "--train_iw 50 --lr 0.0005", "gmvae_z=10_k=500_train_iw=50_lr=0.0005"),
    ("ssvae", "--labels 600 --lr 0.01", "ssvae_gw=001_cw=100_labels=600_lr=0.01"),
    ("ssvae", "--labels 100 --lr 0.001", "ssvae_gw=001_cw=100"),
    ("fsvae", "--split train --lr 1e-4", "fsvae_split=train_lr=0.0001"),
]


@pytest.mark.parametrize("model, flags, stem", STEMS)
def test_the_name_says_what_is_trained(model, flags, stem):
    run = parse(model, *flags.split(), "--data", "digits", "--run", 7)
    assert run.name == f"model={stem}_data=digits_run=0007"


OTHER = {"batch_size": 50, "seed": 3, "lr": 0.01}
FIX_WEIGHTS = {  # every flag that fixes the weights, with another value than the default
    "vae": OTHER | {"z": 5, "beta": 2.0, "train_iw": 5},
    "gmvae": OTHER | {"z": 5, "beta": 2.0, "train_iw": 5, "k": 20},
    "ssvae": OTHER | {"gw": 2, "cw": 50, "labels": 200},
    "fsvae": OTHER | {"split": "train"},
}


@pytest.mark.parametrize("model", NAMES)
def test_what_fixes_the_weights_is_stored(model):
    """And all of it but the batch size and the seed is in the name."""
    asked = parse(model, "--data", "digits")
    assert asked.name == NAMES[model]
    real = parse(model, "--data", asked.real_data)
    assert real.name == NAMES[model].replace("_data=digits", "")
    assert asked.settings().keys() == {"model", "data", *FIX_WEIGHTS[model]}
    for flag, value in FIX_WEIGHTS[model].items():
        other = parse(model, "--data", "digits", f"--{flag}", value)
        assert other.settings()[flag] == value
        assert (other.name == asked.name) == (flag in ("batch_size", "seed"))


def test_other_settings_than_the_stored_are_refused(finished, script, tmp_path):
    finished("vae")
    before = tree(tmp_path)
    stored = state(tmp_path)["settings"]
    assert stored == parse("vae", "--data", "digits").settings()
    for flag, value in (("batch_size", 50), ("seed", 3)):
        line = only_error(script("vae", "--iter_max", 13, f"--{flag}", value))
        assert f"argument --{flag}:" in line
        assert f"{stored[flag]}, not {value}" in line
    line = only_error(script("vae", "--iter_max", 3))
    assert "--iter_max" in line
    assert "[6, 10]" in line
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# Which data set, and what there is to load


@pytest.fixture
def only_digits(digits_dir, tmp_path) -> Path:
    """A data folder with the drawn digits alone: drawing them is not what is tested here."""
    place = tmp_path / "data"
    place.mkdir()
    for stored in digits_dir.glob("drawn-grey-*.npz"):
        (place / stored.name).symlink_to(stored)
    return place


def test_a_missing_checkpoint_says_what_to_type(finished, script, tmp_path):
    finished("vae")
    before = tree(tmp_path)
    line = only_error(script("vae", "--iter_max", 30, "--train", 0))
    assert "model-00030.pt; checkpoints of this run: 6, 10" in line
    assert "to train one: python run_vae.py" in line
    assert "--iter_max 30" in line
    assert "--train" not in line
    line = only_error(script("vae", "--iter_max", 8, "--train", 0))
    assert "checkpoints of this run: 6, 10; it was trained further: give one of these" in line
    assert tree(tmp_path) == before


def store_vae(name: str, step: int) -> VAE:
    torch.manual_seed(0)
    model = VAE(name=name)
    checkpoint.save_model_by_name(model, step)
    return model


def test_an_fsvae_says_that_it_is_evaluated_on_training_images(main, no_network, tmp_path):
    """Where SVHN's test split is not there; its digits 0 are labelled 10."""
    (tmp_path / "data").mkdir()
    pixels = noise(300, 3072).pixels.numpy().reshape(32, 32, 3, 300)
    labels = np.arange(300)[:, None] % 10 + 1
    savemat(tmp_path / "data" / "train_32x32.mat", {"X": pixels, "y": labels})
    flags = ["--check_data", 0, "--split", "train", "--iter_max", 2, "--runs", 2]
    printed = lines(main("fsvae", *flags))
    assert any(re.fullmatch(rf"{BOUND} \(on training images\)", line) for line in printed)
    assert any("2 runs (0, 1) (on training images)" in line for line in printed)
    found = results(tmp_path, "model=fsvae_split=train_run=0000")
    assert (found["evaluated_on"], found["test_images"]) == ("training images", 300)
    assert found["data"] == "svhn, train split, files not verified"


# ---------------------------------------------------------------------------------------------
# The weights that come with the code


@pytest.fixture
def fresh(tmp_path, no_network):
    """Copy a model's shipped weights to the test's folder, where nothing can be downloaded."""

    def copy(model: str) -> str:
        place = tmp_path / "checkpoints" / SHIPPED[model]
        place.parent.mkdir(parents=True)
        shutil.copy(ROOT / "checkpoints" / SHIPPED[model], place)
        shutil.copy(ROOT / "checkpoints" / ".gitignore", tmp_path / "checkpoints")
        return place.parent.name

    return copy


def metrics(printed: list[str]) -> dict[str, float]:
    """NELBO, KL and Rec, and IWAE-m by m."""
    pairs = re.findall(r"(NELBO|KL|Rec|IWAE-\d+): (\d+\.\d+)", "\n".join(printed))
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_shipped_weights_evaluate_on_a_fresh_machine(model, fresh, main, tmp_path):
    name = fresh(model)
    printed = lines(main(model, "--run", 2021, "--train", 0))
    now = metrics(printed)
    assert 94 < now["IWAE-1000"] < now["IWAE-100"] < now["IWAE-10"] < now["IWAE-1"] < 102
    assert 98 < now["NELBO"] < 102
    assert now["NELBO"] == pytest.approx(now["KL"] + now["Rec"], abs=1e-3)
    assert any(COURSE in line for line in printed)
    assert not any("DRAWN" in line or "download" in line for line in printed)
    assert "bounds: of 100 images" in printed
    about = {"test_images": 100, "data": "mnist", "step": 20_000}
    assert results(tmp_path, name).items() >= about.items()


def test_real_weights_are_never_evaluated_on_digits(fresh, main, only_digits):
    """The whole test split needs its files."""
    fresh("vae")
    result = main("vae", "--run", 2021, "--train", 0, "--test", "all")
    assert result.returncode == 2
    assert "t10k-images-idx3-ubyte" in result.stderr.splitlines()[-1]
    assert "DRAWN" not in result.stdout
    assert "NELBO" not in result.stdout


def test_the_shipped_classifier_evaluates_without_mnist(fresh, main, tmp_path):
    name = fresh("ssvae")
    last = lines(main("ssvae", "--run", 2021, "--train", 0))[-1]
    pattern = r"Test set classification accuracy: (0\.\d+|1\.0) " + re.escape(COURSE)
    accuracy = float(re.fullmatch(pattern, last)[1])
    assert accuracy >= 0.85
    stored = results(tmp_path, name)
    assert stored["figures"]["accuracy"] == accuracy
    assert sum(map(sum, stored["confusion"])) == 100


def test_a_series_never_averages_over_two_data_sets(
    fresh, main, only_digits, tmp_path, monkeypatch
):
    """Under auto run 2021 is there for MNIST and run 2022 for the drawn digits alone."""
    name = fresh("vae")
    monkeypatch.chdir(tmp_path)
    store_vae("model=vae_z=10_data=digits_run=2022", 20_000)
    result = main("vae", "--run", 2021, "--runs", 2, "--train", 0, "--iw", 1)
    assert result.returncode == 0, result.stderr
    for series in [name.removesuffix("_run=2021"), "model=vae_z=10_data=digits"]:
        summary = json.loads((tmp_path / "logs" / f"{series}_summary.json").read_text())
        assert len(summary["each"]) == 1
        assert summary["name"] == series


def test_shipped_weights_are_named_from_elsewhere(main, tmp_path):
    line = only_error(main("vae", "--run", 2021, "--train", 0))
    assert str(ROOT / "checkpoints") in line
    assert "to train one" not in line
    line = only_error(main("vae", "--run", 2021, "--train", 0, "--iter_max", 7))
    assert "to train one" in line
    assert list(tmp_path.iterdir()) == []


def test_shipped_weights_are_small_and_in_git():
    ignored = (ROOT / "checkpoints" / ".gitignore").read_text()
    named = re.findall(r"^!(model=.*\.pt)$", ignored, flags=re.M)
    assert sorted(named) == sorted(SHIPPED.values())
    assert sum((ROOT / "checkpoints" / name).stat().st_size for name in named) < 12_000_000


def test_deleting_shipped_weights_is_warned_of_before(fresh, tmp_path, monkeypatch, capsys):
    name = fresh("vae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "unlink", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.delete_run(name)
    assert f"warning: --overwrite 1 deletes checkpoints/{name}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Start-up, --help, and the settings that a script gets

SHARED = {"iter_save": 10_000, "run": 0, "train": 1, "overwrite": 0, "batch_size": 100, "lr": 0.001}
DEFAULTS = {  # those of the course
    "vae": {"z": 10, "iter_max": 20_000},
    "gmvae": {"z": 10, "k": 500, "iter_max": 20_000},
    "ssvae": {"gw": 1, "cw": 100, "iter_max": 30_000},
    "fsvae": {"iter_max": 1_000_000},
}


@pytest.mark.parametrize("model", NAMES)
def test_defaults_are_those_of_the_course(model):
    run = parse(model)
    wanted = {**SHARED, **DEFAULTS[model]}
    assert {flag: getattr(run, flag) for flag in wanted} == wanted


def test_help_comes_at_once(tmp_path):
    """A script that is imported and asked for help loads neither torch nor numpy, writes nothing."""
    python, *words = command("vae", "--help")
    words = [python, "-X", "importtime", *words]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "codebase.runtime.options" in imported
    assert not {"torch", "numpy"} & imported
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# What is refused: of each kind of value what it does not take, and of each flag one

BAD = [("vae", ["--iter_max", value], "--iter_max") for value in ("0", "1.5", "", "٣", "9" * 20)]
BAD += [("vae", ["--beta", value], "--beta") for value in ("-1", "nan", "1e7", "1_0", " 1")]
BAD += [("vae", ["--data_dir", value], "--data_dir") for value in ("", "a_file/data", "a\0b")]
BAD += [("vae", ["--data", value], "--data") for value in ("svhn", "missing.npz", "digits.npz")]
BAD += [("vae", ["--device", value], "--device") for value in ("tpu", "cuda:99")]
BAD += [("vae", ["--iw", *values], "--iw") for values in ([], ["10", "x"])]
ONE_EACH = {  # a wrong value of every other flag
    "vae": "--train 2, --run -1, --runs 0, --jobs 0, --schedule linear, --overwrite 2, --seed -1, --batch_size 0, --lr 11, "
    "--iter_save 0, --compile 2, --check_data 2, --z 10001, --train_iw 1001, --test All",
    "gmvae": "--k 0",
    "ssvae": "--gw 1000000, --cw -1, --labels 60000, --labels 105",
    "fsvae": "--split all, --data mnist",
}
for script, listed in ONE_EACH.items():
    BAD += [(script, flags.split(), flags.split()[0]) for flags in listed.split(", ")]
BAD += [
    ("vae", ["--train_iw", "5", "--beta", "2"], "--train_iw"),
    ("vae", ["--train", "0", "--overwrite", "1"], "argument --overwrite"),
    ("ssvae", ["--gw", "0", "--cw", "0"], "--cw"),
    ("vae", ["--data_dir", "a_file"], "a file"),
    ("vae", ["--k", "5"], "--k"),
    ("vae", ["--it", "5"], "unrecognized"),
    ("vae", ["surplus"], "surplus"),
    ("vae", ["--train", "0", "--iter_max", "7"], "model-00007.pt"),
]


@pytest.mark.parametrize("model, flags, word", BAD)
def test_a_bad_command_line_changes_nothing(model, flags, word, main, no_network, tmp_path):
    """It gets one line, and exit code 2."""
    (tmp_path / "a_file").write_text("not a folder")
    result = main(model, *flags)
    assert word in only_error(result)
    assert not result.stdout
    assert tree(tmp_path) == {"a_file": b"not a folder"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("flags", ["--z 0", "--data digits --train 0 --iter_max 7"])
def test_a_bad_process_ends_as_main_does(flags, tmp_path):
    """Before torch is loaded, and after."""
    words = command("vae", *flags.split())
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "run_vae.py: error: " in only_error(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", NAMES)
def test_every_flag_has_a_bad_value_above(model, main):
    tried = {flags[0].removeprefix("--") for _, flags, _ in BAD if len(flags) > 1}
    shown = re.findall(r"^ +--(\w+)", main(model, "--help").stdout, re.MULTILINE)
    assert "iter_max" in shown
    assert set(shown) <= tried


def test_an_unusable_current_folder_is_told(main, tmp_path, monkeypatch):
    """One that is gone, or cannot be written to."""
    gone = tmp_path / "gone"
    gone.mkdir()
    words = ["sh", "-c", 'rmdir "$PWD" && exec "$0" "$@"', *command("vae", "--data", "digits")]
    only_error(subprocess.run(words, cwd=gone, capture_output=True, text=True))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "cannot be written to" in only_error(main("vae", "--data", "digits"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Failures are reported for what they are


def test_running_out_of_memory_is_one_line(script, monkeypatch):
    """With advice that fits the command."""
    monkeypatch.setattr(data, "load", lambda *_: torch.empty(2**58))
    line = only_error(script("gmvae", "--iter_max", 100), 1)
    assert "out of memory" in line
    words = line.replace(",", " ").split()
    assert {"--batch_size", "--z", "--k"} <= set(words)
    assert "--iw" not in words
    large = parse("fsvae").changed(data="svhn")
    assert "--split train" in launch.how_to_need_less_memory(large)
    assert "--train_iw" in launch.how_to_need_less_memory(parse("vae", "--train_iw", 50))
    loaded = parse("vae", "--train", 0, "--train_iw", 50, "--runs", 2, "--jobs", 2)
    advice = launch.how_to_need_less_memory(loaded)
    assert "--jobs" in advice and "--train_iw" not in advice


def test_other_failures_come_below_a_traceback(few, script, monkeypatch):
    words = "CUDA error: an illegal memory access was encountered\nor closed by a peer"
    monkeypatch.setattr(evaluate, "bounds", raising(RuntimeError(words)))
    result = script("vae", "--iter_max", 1)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "raise_it" in result.stderr
    assert result.stderr.splitlines()[-1] == f"run_vae.py: error: {words.splitlines()[0]}"
    assert "out of memory" not in result.stderr
    assert "died" not in result.stderr

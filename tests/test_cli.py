"""The four scripts through their command lines: what they print, store, load, name and refuse."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MNIST,
    NAMES,
    ROOT,
    checkpoint_steps,
    command,
    lines,
    needs_mnist,
    only_error,
    random_images,
    results,
    same,
    skip_if,
    state,
    table,
    tree,
    weights,
)
from PIL import Image
from scipy.io import savemat

from codebase import checkpoint, data, evaluate, train
from codebase.models.fsvae import FSVAE
from codebase.models.vae import VAE
from codebase.runtime import download, options
from codebase.runtime.launch import launch

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
BINARY = ["vae", "gmvae"]


def pictures(folder: Path, name: str) -> set[str]:
    return {path.name for path in (folder / "logs" / name).glob("*.png")}


def steps(rows: list[dict[str, str]]) -> list[str]:
    return [row["step"] for row in rows]


def parse(model: str, *flags) -> options.Run:
    return importlib.import_module(f"run_{model}").parse([str(flag) for flag in flags])


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


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
    if model in BINARY:
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


def test_a_process_does_what_its_main_does(script, digits_dir, tmp_path):
    """And draws its pictures, as a user sees them."""
    flags = ["--data", "digits", "--data_dir", digits_dir, "--iter_max", 20]
    made = tmp_path / "process"
    made.mkdir()
    result = subprocess.run(command("vae", *flags), cwd=made, capture_output=True, text=True)
    assert re.fullmatch(BOUND, lines(result)[-1])
    assert lines(result)[-1] == lines(script("vae", "--iter_max", 20))[-1]
    assert same(weights(made, NAMES["vae"], 20), weights(tmp_path, NAMES["vae"], 20))
    assert table(made, NAMES["vae"]) == table(tmp_path, NAMES["vae"])
    assert pictures(made, NAMES["vae"]) == PICTURES["vae"]
    for name in PICTURES["vae"]:
        Image.open(made / "logs" / NAMES["vae"] / name).verify()


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
    stale = found | {"figures": found["figures"] | {"niwae_7": 1.0}, "remark": "of the other"}
    others = ["{ half a file"]
    others.append(json.dumps({key: found[key] for key in ("name", "data", "step")}))
    for other in ({"step": 6}, {"data": "mnist"}, {"name": "another run"}):
        others.append(json.dumps(stale | other))
    for other in others:
        path.write_text(other)
        lines(script("vae", "--iter_max", 10, "--train", 0, "--iw", 1))
        now = results(tmp_path)
        assert set(now["figures"]) == {*found["figures"], "niwae_1", "ess_1"}
        assert "remark" not in now


def test_short_training_teaches_vae_and_classifier(script, tmp_path):
    lines(script("vae", "--iter_max", 400))
    lines(script("ssvae", "--gw", 0, "--iter_max", 400))
    assert results(tmp_path)["figures"]["nelbo"] < 180  # the seeds 0 to 2 bring 150 to 152
    found = results(tmp_path, NAMES["ssvae"].replace("gw=001", "gw=000"))
    assert found["figures"]["accuracy"] > 0.55  # and 0.60 to 0.61


def test_a_series_is_summarised_without_failed_runs(few, script, tmp_path):
    broken = tmp_path / "checkpoints" / NAMES["vae"].replace("run=0000", "run=0001")
    broken.mkdir(parents=True)
    (broken / "state.pt").write_bytes(b"nothing that can be read")
    result = script("vae", "--iter_max", 2, "--runs", 3)
    assert "run=0001" in only_error(result)
    summary = json.loads((tmp_path / "logs/model=vae_z=10_data=digits_summary.json").read_text())
    assert summary["runs"] == [0, 2]
    assert len(summary["each"]) == 2
    about = {"data": "drawn digits, not MNIST", "step": 2, "test_images": 1500}
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


def test_a_row_is_the_mean_of_its_steps(few, script, tmp_path, monkeypatch):
    """The last one too, of the steps since the one before."""
    rows = {}
    for every in (10, 1):
        folder = tmp_path / str(every)
        folder.mkdir()
        monkeypatch.setattr(train, "LOG_EVERY", every)
        lines(script("vae", "--iter_max", 13, cwd=folder))
        rows[every] = table(folder, NAMES["vae"])
    assert steps(rows[10]) == ["10", "13"]
    for row, fine in ((rows[10][0], rows[1][:10]), (rows[10][1], rows[1][10:])):
        for column in row.keys() - {"step"}:
            mean = sum(float(of_step[column]) for of_step in fine) / len(fine)
            assert float(row[column]) == pytest.approx(mean, rel=1e-5)


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


@pytest.mark.parametrize("labels, batch", [(50, 50), (200, 100)])
def test_a_step_takes_a_hundred_labelled_images(labels, batch, few, script, monkeypatch):
    """All where there are no more, or so many of them at random."""
    taken = []
    one_hot = data.Images.one_hot

    def remembering(self, index):
        taken.append((len(self), index))
        return one_hot(self, index)

    monkeypatch.setattr(data.Images, "one_hot", remembering)
    lines(script("ssvae", "--labels", labels, "--iter_max", 5, "--gw", 0))
    assert [(of, len(index)) for of, index in taken] == [(labels, batch)] * 5
    if labels <= 100:
        assert all(torch.equal(index, torch.arange(labels)) for _, index in taken)
    else:
        assert not torch.equal(taken[0][1], taken[1][1])
        assert max(index.max().item() for _, index in taken) > 0.9 * labels


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
    ("vae", "--lr 0.01", "vae_z=10_lr=0.01"),
    ("vae", "--beta 4 --z 5", "vae_z=05_beta=4"),
    ("vae", "--schedule cosine --lr 0.01", "vae_z=10_lr=0.01_schedule=cosine"),
    ("vae", "--beta 1E+02", "vae_z=10_beta=100"),
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


def test_what_a_name_rounds_away_is_refused(few, script):
    first = {"--beta": "2.00000001", "--lr": "0.0200000001"}
    flags = [word for pair in first.items() for word in pair]
    lines(script("vae", "--iter_max", 2, *flags))
    for flag, value in (("--beta", 2), ("--lr", 0.02)):
        line = only_error(script("vae", "--iter_max", 4, *flags, flag, value))
        assert f"argument {flag}" in line


def test_what_does_not_fix_weights_may_change(finished, script, tmp_path):
    finished("vae")
    flags = ("--iter_save", 7, "--device", "cpu", "--check_data", 0, "--iw", 3, "--seed", 0)
    lines(script("vae", "--iter_max", 15, *flags))
    assert checkpoint_steps(tmp_path, "vae") == [6, 10, 14, 15]
    config = json.loads((tmp_path / "logs" / NAMES["vae"] / "config.json").read_text())
    assert config["iter_max"] == 15


# ---------------------------------------------------------------------------------------------
# Which data set, and what there is to load


@pytest.fixture
def no_download(monkeypatch):
    """Nothing is missing that would be downloaded."""

    def fetch(run):
        missing = [path for path in download.files(run) if not path.exists()]
        assert not missing, "nothing should be downloaded here"

    monkeypatch.setattr(download, "fetch", fetch)


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
    assert tree(tmp_path) == before


def store_vae(name: str, step: int) -> VAE:
    torch.manual_seed(0)
    model = VAE(name=name)
    checkpoint.save_model_by_name(model, step)
    return model


def test_digits_checkpoints_load_without_a_download(
    main, no_download, only_digits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store_vae(NAMES["vae"], 7)
    flags = ["--train", 0, "--iter_max", 7, "--iw", 1]
    result = main("vae", *flags)
    assert re.fullmatch(BOUND, lines(result)[-2])
    assert "DRAWN DIGITS" in result.stdout
    line = only_error(main("vae", "--data", "mnist", *flags))
    assert "model=vae_z=10_run=0000/model-00007.pt" in line


def test_real_weights_are_never_evaluated_on_digits(
    main, no_network, only_digits, tmp_path, monkeypatch
):
    """But on the course's images, which are there; the whole test split needs its files."""
    name = "model=vae_z=10_run=0000"
    monkeypatch.chdir(tmp_path)
    model = store_vae(name, 7)
    wanted = evaluate.bounds(model, data.test_subset(data.course("test")), (1,))
    result = main("vae", "--train", 0, "--iter_max", 7, "--iw", 1)
    assert lines(result)[-2] == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**wanted)
    assert "DRAWN" not in result.stdout
    assert "download" not in result.stdout
    assert COURSE in result.stdout
    assert results(tmp_path, name).items() >= {"data": "mnist", "test_images": 100}.items()
    assert not list(only_digits.glob("MNIST*"))
    result = main("vae", "--train", 0, "--iter_max", 7, "--test", "all")
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2
    assert "t10k-images-idx3-ubyte" in line
    assert "by hand" in line
    assert "DRAWN" not in result.stdout
    assert "NELBO" not in result.stdout


def test_auto_takes_digits_where_mnist_is_not(main, no_network, only_digits, tmp_path):
    """And says so."""
    result = main("vae", "--iter_max", 2)
    assert result.returncode == 0, result.stderr
    assert "NO MNIST" in result.stdout
    assert "DRAWN DIGITS" in result.stdout
    assert (tmp_path / "logs" / NAMES["vae"]).is_dir()
    assert not list(only_digits.glob(".download*"))
    line = only_error(main("vae", "--iter_max", 2, "--data", "mnist"))
    assert "train-images-idx3-ubyte" in line
    assert "by hand" in line


# ---------------------------------------------------------------------------------------------
# SVHN: files as they are published, but of noise


def store_svhn(folder: Path, split: str, count: int) -> data.Images:
    """Write <split>_32x32.mat with images of noise, and return what is in it.

    There it is rows x columns x channels x images, and 10 stands for the digit 0.
    """
    images = random_images(count, 3072)
    pixels = images.pixels.numpy().reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0)
    labels = np.where(images.labels == 0, 10, images.labels)[:, None].astype("u1")
    savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    return images


def test_an_fsvae_says_what_it_is_evaluated_on(main, no_network, tmp_path):
    """On training images, until there is a test split."""
    name = "model=fsvae_split=train_run=0000"
    place = tmp_path / "data"
    place.mkdir()

    def run(*flags) -> str:
        flags = ["--check_data", 0, "--split", "train", "--iter_max", 20, *flags]
        return "\n".join(lines(main("fsvae", *flags)))

    def assert_evaluated_on(which: str, images: data.Images) -> None:
        model = FSVAE()
        model.load_state_dict(weights(tmp_path, name, 20))
        found = results(tmp_path, name)
        assert found["figures"] == pytest.approx(
            evaluate.conditional_bound(model, images), rel=1e-5
        )
        about = {"evaluated_on": which, "test_images": len(images)}
        assert found.items() >= about.items()
        assert found["data"] == "svhn, train split, files not verified"

    train_images = store_svhn(place, "train", 300)
    first = run().splitlines()
    assert re.fullmatch(rf"{BOUND} \(on training images\)", first[-1])
    assert "training images: 300" in first
    assert_evaluated_on("training images", train_images)
    assert run("--train", 0).splitlines()[-1] == first[-1]
    assert "2 runs (0, 1) (on training images), mean and standard error" in run("--runs", 2)
    summary = json.loads((tmp_path / "logs" / "model=fsvae_split=train_summary.json").read_text())
    assert summary["evaluated_on"] == "training images"

    test_images = store_svhn(place, "test", 150)
    assert re.fullmatch(BOUND, run().splitlines()[-1])
    assert_evaluated_on("test split", test_images)
    assert run("--iter_max", 22).splitlines()[-1].startswith("NELBO")
    assert [row["step"] for row in table(tmp_path, name, "test.csv")] == ["22"]


# ---------------------------------------------------------------------------------------------
# The weights that come with the code

SHIPPED = {
    "vae": "model=vae_z=10_run=2021/model-20000.pt",
    "gmvae": "model=gmvae_z=10_k=500_run=2021/model-20000.pt",
    "ssvae": "model=ssvae_gw=001_cw=100_run=2021/model-30000.pt",
}
OLD_DRAWS = {"2018": "by the rule of 2018", "torch-0.4": "as by torch 0.4"}
LESS = {  # nats, by which the older binarisations lie below the present one
    "vae": {"2018": 0.84, "torch-0.4": 1.81},
    "gmvae": {"2018": 1.84, "torch-0.4": 2.2},
}


@pytest.fixture
def fresh(tmp_path, no_network, no_download):
    """Copy a model's shipped weights to the test's folder, where nothing is downloaded."""

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


@pytest.mark.parametrize("model", BINARY)
def test_shipped_weights_evaluate_on_a_fresh_machine(model, fresh, main, tmp_path):
    name = fresh(model)
    before = tree(tmp_path)
    printed = lines(main(model, "--run", 2021, "--train", 0))
    now = metrics(printed)
    assert 94 < now["IWAE-1000"] < now["IWAE-100"] < now["IWAE-10"] < now["IWAE-1"] < 102
    assert 98 < now["NELBO"] < 102
    assert now["NELBO"] == pytest.approx(now["KL"] + now["Rec"], abs=1e-3)
    assert any(COURSE in line for line in printed)
    assert not any("DRAWN" in line for line in printed)
    assert "bounds: of 100 images" in printed
    assert pictures(tmp_path, name) == OF_VAE
    about = {"test_images": 100, "data": "mnist", "step": 20_000}
    assert results(tmp_path, name).items() >= about.items()
    after = {path: content for path, content in tree(tmp_path).items() if path[:4] != "logs"}
    assert after == before  # nothing is fetched, trained or drawn anew

    # Metrics of the course's older binarisations are kept apart.
    for which, rule in OLD_DRAWS.items():
        printed = lines(main(model, "--run", 2021, "--train", 0, "--iw", 1, "--test", which))
        then = metrics(printed)
        assert now["NELBO"] - then["NELBO"] == pytest.approx(LESS[model][which], abs=0.05)
        assert f"bounds: of 100 images, binarised {rule}" in printed
        stored = results(tmp_path, name)
        for key, found in [("figures", now), (f"figures_{which}", then)]:
            assert stored[key]["nelbo"] == found["NELBO"]
            assert stored[key]["niwae_1"] == found["IWAE-1"]


def test_the_shipped_classifier_evaluates_without_mnist(fresh, main, tmp_path):
    name = fresh("ssvae")
    last = lines(main("ssvae", "--run", 2021, "--train", 0))[-1]
    pattern = r"Test set classification accuracy: (0\.\d+|1\.0) " + re.escape(COURSE)
    accuracy = float(re.fullmatch(pattern, last)[1])
    assert accuracy >= 0.85
    stored = results(tmp_path, name)
    assert stored["figures"]["accuracy"] == accuracy
    assert sum(map(sum, stored["confusion"])) == 100


@needs_mnist
@pytest.mark.parametrize("model", ["vae", "ssvae"])
def test_with_mnist_the_bounds_stay_the_same(model, fresh, main, tmp_path):
    """And what is of all test images is of MNIST's 10,000."""
    name = fresh(model)
    flags = ["--run", 2021, "--train", 0]
    if model == "vae":
        flags += ["--iw", 1]
    without = lines(main(model, *flags))
    there = lines(main(model, *flags, "--data_dir", MNIST))
    assert metrics(there) == metrics(without)
    assert "test images: 10,000" in there
    assert not any("course" in line for line in there)
    if model == "ssvae":
        assert float(re.fullmatch(ACCURACY, there[-1])[0].split(": ")[1]) > 0.9
    assert results(tmp_path, name)["test_images"] == 10_000


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


def test_shipped_weights_are_small_finite_and_in_git():
    ignored = (ROOT / "checkpoints" / ".gitignore").read_text()
    named = re.findall(r"^!(model=.*\.pt)$", ignored, flags=re.M)
    assert sorted(named) == sorted(SHIPPED.values())
    paths = [ROOT / "checkpoints" / name for name in named]
    assert sum(path.stat().st_size for path in paths) < 12_000_000
    for path in paths:
        for value in torch.load(path, weights_only=True).values():
            assert torch.isfinite(value).all()


def test_deleting_shipped_weights_is_warned_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / ".gitignore", "checkpoints")
    warning = "warning: --overwrite 1 deletes checkpoints/model=vae_z=10_run=2021"
    for number, warned in (("2022", False), ("0202", False), ("2021", True)):
        name = f"model=vae_z=10_run={number}"
        store_vae(name, 20_000)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                checkpoint.delete_run(name)
        assert (warning in capsys.readouterr().out) == warned
        checkpoint.delete_run(name)
        assert list(Path("checkpoints", name).iterdir()) == []
    capsys.readouterr()
    checkpoint.delete_run("model=vae_z=10_run=2021")
    assert capsys.readouterr().out == ""  # there is nothing to lose any more


# ---------------------------------------------------------------------------------------------
# Start-up, --help, and the settings that a script gets

# The flags of every script with their defaults, as --help shows them; None: in words.
SHARED_FLAGS = {
    "iter_max": "20000",
    "train": "1",
    "run": "0",
    "runs": "1",
    "jobs": "1",
    "schedule": "constant",
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


@pytest.mark.parametrize("model", NAMES)
def test_help_shows_every_flag_and_loads_little(model, tmp_path):
    """Neither torch nor numpy, so that it comes at once."""
    python, *words = command(model, "--help")
    words = [python, "-X", "importtime", *words]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "codebase.runtime.options" in imported
    assert not {"torch", "numpy"} & imported
    assert set(re.findall(r"^ +--(\w+)", found.stdout, re.MULTILINE)) == {*FLAGS[model]}
    shown = " ".join(found.stdout.split())
    for flag, default in FLAGS[model].items():
        assert f"--{flag} " in shown
        assert default is None or f"(default: {default})" in shown  # as it can be typed
    assert f"torchrun --nproc_per_node=2 -- run_{model}.py" in shown
    assert list(tmp_path.iterdir()) == []


@skip_if(not torch.set_flush_denormal(False), reason="no such setting on this CPU")
def test_scripts_compute_without_denormal_numbers(tmp_path, monkeypatch):
    """In every thread; else some CPUs train an SSVAE at a fraction of their speed.

    The caller's own setting is put back.
    """

    def denormals() -> int:
        tiny = torch.full((1_000_000,), 1e-30) * 1e-10
        return tiny.view(torch.int32).count_nonzero().item()

    def one_run(run, processes):
        torch.set_num_threads(2)
        counted.append(denormals())
        torch.set_num_threads(1)
        return {"nelbo": 0.0}

    monkeypatch.chdir(tmp_path)
    counted = []
    for own in (False, True):
        torch.set_flush_denormal(own)
        launch(importlib.import_module("run_vae").parse, one_run, ["--data", "digits"])
        counted.append(denormals())
    torch.set_flush_denormal(False)
    assert counted == [0, 1_000_000, 0, 0]


# ---------------------------------------------------------------------------------------------
# What is refused: of each kind of value what it does not take, and of each flag one

NO_WHOLE = ["-1", "0", "x", "1.5", "nan", "", "1_0", "٣", "99999999999999999999"]
NO_REAL = ["-1", "nan", "inf", "-inf", "x", "", "1e7", "+1", "1_0", " 1", "1\n", "1e+", "1e+-2"]
NO_FOLDER = ["", "a_file", "a_file/", "a_file/data", "nowhere/at/all", "/proc/none", "/dev/null"]
NO_FOLDER += ["x" * 300, "x" * 2000, "a\0b"]
NO_DATA = ["", "MNIST", "imagenet", "svhn", "a_file", "npz", "x.NPZ", "missing.npz", "a b.npz"]
NO_DATA += ["nowhere/at/all.npz", "a_file/x.npz", "a_file.npy", "/proc.npz", "digits.npz", ".npz"]
NO_DATA += ["a=b.npz", "x" * 300 + ".npz"]
BAD = [("vae", ["--iter_max", value], "--iter_max") for value in NO_WHOLE]
BAD += [("vae", ["--beta", value], "--beta") for value in [*NO_REAL, "٣"]]
BAD += [("vae", ["--data_dir", value], "--data_dir") for value in NO_FOLDER]
BAD += [("vae", ["--data", value], "--data") for value in NO_DATA]
BAD += [("vae", ["--device", value], "--device") for value in ("", "tpu", "CPU", "cuda:99")]
BAD += [("vae", ["--iw", *values], "--iw") for values in ([], ["10", "x"], ["100001"])]
ONE_EACH = {  # a wrong value of every other flag
    "vae": "--train 2, --run -1, --runs 0, --jobs 0, --schedule linear, --overwrite 2, --seed -1, --batch_size 0, --lr 11, "
    "--iter_save 0, --compile 2, --check_data 2, --z 10001, --train_iw 1001, --test All",
    "gmvae": "--k 0, --z 0, --beta -1, --train_iw 0, --iw 0, --test train",
    "ssvae": "--gw 1000000, --cw -1, --labels 60000, --labels 105",
    "fsvae": "--split all, --data mnist",
}
for script, listed in ONE_EACH.items():
    BAD += [(script, flags.split(), flags.split()[0]) for flags in listed.split(", ")]
BAD += [
    ("vae", ["--train_iw", "5", "--beta", "2"], "--train_iw"),
    ("vae", ["--train", "0", "--overwrite", "1"], "--overwrite"),
    ("ssvae", ["--gw", "0", "--cw", "0"], "--cw"),
    ("vae", ["--data_dir", "a_file"], "a file"),
    ("vae", ["--z"], "--z"),
    ("vae", ["--k", "5"], "--k"),
    ("ssvae", ["--iw", "5"], "--iw"),
    ("fsvae", ["--labels", "100"], "--labels"),
    ("gmvae", ["--no_such_flag", "1"], "--no_such_flag"),
    ("vae", ["--it", "5"], "--it"),
    ("vae", ["-z", "5"], "-z"),
    ("vae", ["surplus"], "surplus"),
    ("vae", ["--train", "0", "--iter_max", "7"], "model-00007.pt"),
    ("vae", ["--data", "digits", "--train", "0", "--iter_max", "7"], "model-00007.pt"),
]


def shown(flags: list[str]) -> str:
    return " ".join(flag[:40] for flag in flags)


@pytest.mark.parametrize(
    "model, flags, word", BAD, ids=[f"{model} {shown(flags)}" for model, flags, _ in BAD]
)
def test_a_bad_command_line_changes_nothing(model, flags, word, main, no_network, tmp_path):
    """It gets one line, and exit code 2."""
    (tmp_path / "a_file").write_text("not a folder")
    result = main(model, *flags)
    assert word in only_error(result)
    assert not result.stdout
    assert tree(tmp_path) == {"a_file": b"not a folder"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("flags", ["--z 0", "--data digits --train 0 --iter_max 7"])
def test_a_bad_process_ends_as_main_does(flags, no_network, tmp_path):
    """Before torch is loaded, and after."""
    (word,) = [word for model, words, word in BAD if words == flags.split()][:1] or ["--z"]
    words = command("vae", *flags.split())
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert word in only_error(result)
    assert not result.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_a_bad_value_above():
    tried = {flags[0].removeprefix("--") for _, flags, _ in BAD if len(flags) > 1}
    for model in NAMES:
        assert set(FLAGS[model]) <= tried


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


CUDA_FULL = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
ADVICE = [  # how memory runs out, of which command, and what is named then and what is not
    (CUDA_FULL, "vae", 1, "--batch_size --z", "--k --iw"),
    (lambda *_: torch.empty(2**58), "gmvae", 1, "--batch_size --z --k", "--iw"),
    (raising(MemoryError()), "ssvae", 1, "--batch_size", "--k --z"),
    (CUDA_FULL, "gmvae", 0, "--z --k --device", "--batch_size"),
    (raising(MemoryError()), "ssvae", 0, "--device", "--batch_size --k --z"),
]


@pytest.mark.parametrize("allocate, model, train, named, not_named", ADVICE)
def test_running_out_of_memory_is_one_line(
    allocate, model, train, named, not_named, script, monkeypatch, tmp_path
):
    """With advice that fits the command."""
    monkeypatch.setattr(data, "load", allocate)
    path = tmp_path / "checkpoints" / NAMES[model] / "model-00100.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    line = only_error(script(model, "--iter_max", 100, "--train", train), 1)
    assert "out of memory" in line
    words = set(line.replace(",", " ").split())
    assert set(named.split()) <= words
    assert not set(not_named.split()) & words


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

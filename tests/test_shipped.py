"""What comes with the package: weights and the course's images, for metrics without a network."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MNIST, ROOT, needs_mnist, same, tree

from codebase import checkpoint
from codebase.models.vae import VAE
from codebase.runtime import download

FILES = {
    "vae": "model=vae_z=10_run=2021/model-20000.pt",
    "gmvae": "model=gmvae_z=10_k=500_run=2021/model-20000.pt",
    "ssvae": "model=ssvae_gw=001_cw=100_run=2021/model-30000.pt",
}
COURSE = "(on the course's 100 test images: MNIST's test split is not there)"


@pytest.fixture
def fresh(tmp_path, no_network, monkeypatch):
    """Copy a model's shipped weights to the test's folder, where nothing is downloaded."""

    def copy(model: str) -> str:
        source = ROOT / "checkpoints" / FILES[model]
        place = tmp_path / "checkpoints" / FILES[model]
        place.parent.mkdir(parents=True)
        shutil.copy(source, place)
        shutil.copy(ROOT / "checkpoints" / ".gitignore", tmp_path / "checkpoints")
        return place.parent.name

    def fetch(run) -> None:
        assert all(path.exists() for path in download.files(run)), "a download was tried"

    monkeypatch.setattr(download, "fetch", fetch)
    return copy


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    assert "DRAWN" not in result.stdout + result.stderr
    return result.stdout.strip().splitlines()


def metrics(printed: list[str]) -> dict[str, float]:
    """NELBO, KL and Rec, and IWAE-m by m."""
    pairs = re.findall(r"(NELBO|KL|Rec|IWAE-\d+): (\d+\.\d+)", "\n".join(printed))
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_shipped_weights_evaluate_on_a_fresh_machine(model, fresh, main, tmp_path):
    name = fresh(model)
    before = tree(tmp_path)
    printed = lines(main(model, "--run", 2021, "--train", 0, plots=True))
    found = metrics(printed)
    assert 94 < found["IWAE-1000"] < found["IWAE-100"] < found["IWAE-10"] < found["IWAE-1"] < 102
    assert 98 < found["NELBO"] < 102
    assert found["NELBO"] == pytest.approx(found["KL"] + found["Rec"], abs=1e-3)
    assert any(COURSE in line for line in printed)
    logs = tmp_path / "logs" / name
    pictures = {path.name for path in logs.glob("*.png")}
    assert pictures == {"samples.png", "reconstructions.png", "interpolations.png", "latent.png"}
    stored = json.loads((logs / "results.json").read_text())
    assert stored["test_images"] == 100
    assert stored["data"] == "mnist"
    assert stored["step"] == 20_000
    after = tree(tmp_path)
    for path in list(after):
        if path.startswith("logs"):
            del after[path]
    assert after == before  # nothing is fetched, trained or drawn anew


@pytest.mark.parametrize(
    "model, which, nats",
    [
        ("vae", "2018", 0.84),
        ("gmvae", "2018", 1.84),
        ("vae", "torch-0.4", 1.81),
        ("gmvae", "torch-0.4", 2.2),
    ],
)
def test_metrics_of_old_binarisations_are_kept_apart(model, which, nats, fresh, main, tmp_path):
    name = fresh(model)
    flags = ["--run", 2021, "--train", 0, "--iw", 1]
    now = lines(main(model, *flags))
    then = lines(main(model, *flags, "--test", which))
    assert metrics(now)["NELBO"] - metrics(then)["NELBO"] == pytest.approx(nats, abs=0.05)
    rule = {"2018": "by the rule of 2018", "torch-0.4": "as by torch 0.4"}[which]
    assert "bounds: of 100 images" in now
    assert f"bounds: of 100 images, binarised {rule}" in then
    stored = json.loads((tmp_path / "logs" / name / "results.json").read_text())
    for key, printed in [("figures", now), (f"figures_{which}", then)]:
        found = metrics(printed)
        assert stored[key]["nelbo"] == found["NELBO"]
        assert stored[key]["niwae_1"] == found["IWAE-1"]


def test_the_shipped_classifier_evaluates_on_a_fresh_machine(fresh, main, tmp_path):
    name = fresh("ssvae")
    last = lines(main("ssvae", "--run", 2021, "--train", 0))[-1]
    pattern = r"Test set classification accuracy: (0\.\d+|1\.0) " + re.escape(COURSE)
    accuracy = float(re.fullmatch(pattern, last)[1])
    assert accuracy >= 0.85
    stored = json.loads((tmp_path / "logs" / name / "results.json").read_text())
    assert stored["figures"]["accuracy"] == accuracy
    assert sum(map(sum, stored["confusion"])) == 100


@needs_mnist
@pytest.mark.parametrize("model", FILES)
def test_with_mnist_the_bounds_stay_the_same(model, fresh, main, tmp_path):
    name = fresh(model)
    flags = ["--run", 2021, "--train", 0]
    if model != "ssvae":
        flags += ["--iw", 1]
    without = lines(main(model, *flags))
    there = lines(main(model, *flags, "--data_dir", MNIST))
    assert metrics(there) == metrics(without)
    assert "test images: 10,000" in there
    assert not any("course" in line for line in there)
    if model == "ssvae":
        accuracy = re.fullmatch(r"Test set classification accuracy: (0\.\d+)", there[-1])
        assert float(accuracy[1]) > 0.9
    stored = json.loads((tmp_path / "logs" / name / "results.json").read_text())
    assert stored["test_images"] == 10_000


def test_half_of_mnists_test_split_counts_as_none(fresh, main, tmp_path):
    fresh("vae")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"half")
    printed = lines(main("vae", "--run", 2021, "--train", 0, "--iw", 1))
    assert any(COURSE in line for line in printed)


def test_a_series_never_averages_over_two_data_sets(fresh, main, digits_dir, tmp_path, monkeypatch):
    """Under auto run 2021 is there for MNIST and run 2022 for the drawn digits alone."""
    name = fresh("vae")
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model_by_name(VAE(name="model=vae_z=10_data=digits_run=2022"), 20_000)
    place = tmp_path / "data"
    place.mkdir()
    for stored in digits_dir.glob("drawn-grey-*.npz"):
        (place / stored.name).symlink_to(stored)
    result = main("vae", "--run", 2021, "--runs", 2, "--train", 0, "--iw", 1)
    assert result.returncode == 0, result.stderr
    for series in [name.removesuffix("_run=2021"), "model=vae_z=10_data=digits"]:
        summary = json.loads((tmp_path / "logs" / f"{series}_summary.json").read_text())
        assert len(summary["each"]) == 1
        assert summary["name"] == series


def test_shipped_weights_are_small_and_known_to_git():
    ignored = (ROOT / "checkpoints" / ".gitignore").read_text()
    named = re.findall(r"^!(model=.*\.pt)$", ignored, flags=re.M)
    assert sorted(named) == sorted(FILES.values())
    paths = [ROOT / "checkpoints" / name for name in named]
    there = [path for path in paths if path.exists()]
    assert len(there) >= 2
    assert sum(path.stat().st_size for path in there) < 12_000_000
    for path in there:
        for value in torch.load(path, weights_only=True).values():
            assert torch.isfinite(value).all()


def test_deleting_shipped_weights_is_warned_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / ".gitignore", "checkpoints")
    said = []  # what was printed before each file was deleted
    unlink = Path.unlink

    def watched(path: Path, **options) -> None:
        said.append(capsys.readouterr().out)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    shipped = "model=vae_z=10_run=2021"
    for name in ["model=vae_z=10_run=2022", "model=vae_z=10_run=0202", shipped]:
        path = checkpoint.save_model_by_name(VAE(name=name), 20_000)
        said.clear()
        checkpoint.delete_run(name)
        warned = f"warning: --overwrite 1 deletes checkpoints/{name}" in said[0]
        assert warned == (name == shipped)
        assert not any(said[1:])
        assert not path.exists()
    checkpoint.delete_run(shipped)
    assert capsys.readouterr().out == ""  # there is nothing to lose any more


@needs_mnist
def test_overwriting_a_shipped_run_warns_and_trains_anew(fresh, main, tmp_path):
    name = fresh("vae")
    before = torch.load(tmp_path / "checkpoints" / FILES["vae"], weights_only=True)
    other = ["--iter_max", 1, "--iter_save", 1, "--data_dir", MNIST, "--overwrite", 1]
    printed = lines(main("vae", "--run", 2021, *other))
    assert any(line.startswith("warning: ") for line in printed)
    paths = list((tmp_path / "checkpoints" / name).glob("model-*.pt"))
    assert [path.name for path in paths] == ["model-00001.pt"]
    assert not same(before, torch.load(paths[0], weights_only=True))
    printed = lines(main("vae", *other))
    assert not any(line.startswith("warning: ") for line in printed)

"""What comes with the package: weights and the course's images, for real figures without a data set or a network."""

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
    """fresh("vae"): have the shipped weights of a model in the test's folder, where nothing may be downloaded."""

    def copy(model: str) -> str:
        source = ROOT / "checkpoints" / FILES[model]
        place = tmp_path / "checkpoints" / FILES[model]
        place.parent.mkdir(parents=True)
        shutil.copy(source, place)
        shutil.copy(ROOT / "checkpoints" / ".gitignore", tmp_path / "checkpoints")
        return place.parent.name

    def fetch(run):
        assert all(path.exists() for path in download.files(run)), "a download was tried"

    monkeypatch.setattr(download, "fetch", fetch)
    return copy


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    assert "DRAWN" not in result.stdout + result.stderr
    return result.stdout.strip().splitlines()


def figures(printed: list[str]) -> dict[str, float]:
    """NELBO, KL and Rec, and IWAE-m by m."""
    found = dict(re.findall(r"(NELBO|KL|Rec|IWAE-\d+): (\d+\.\d+)", "\n".join(printed)))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_on_a_fresh_machine_the_shipped_weights_give_the_figures_of_the_courses_images(model, fresh, main, tmp_path):
    name = fresh(model)
    before = tree(tmp_path)
    printed = lines(main(model, "--run", 2021, "--train", 0, plots=True))
    found = figures(printed)
    assert 94 < found["IWAE-1000"] < found["IWAE-100"] < found["IWAE-10"] < found["IWAE-1"] < 102
    assert 98 < found["NELBO"] < 102 and found["NELBO"] == pytest.approx(found["KL"] + found["Rec"], abs=1e-3)
    assert any(COURSE in line for line in printed)
    logs = tmp_path / "logs" / name
    pictures = {path.name for path in logs.glob("*.png")}
    assert pictures == {"samples.png", "reconstructions.png", "interpolations.png", "latent.png"}
    stored = json.loads((logs / "results.json").read_text())
    assert stored["test_images"] == 100 and stored["data"] == "mnist" and stored["step"] == 20_000
    after = {path: content for path, content in tree(tmp_path).items() if not path.startswith("logs")}
    assert after == before  # nothing is fetched, trained or drawn anew


@pytest.mark.parametrize(
    "model, which, nats",
    [("vae", "2018", 0.84), ("gmvae", "2018", 1.84), ("vae", "torch-0.4", 1.81), ("gmvae", "torch-0.4", 2.2)],
)
def test_the_old_binarisation_of_the_same_images_gives_other_figures_which_are_kept_apart(
    model, which, nats, fresh, main, tmp_path
):
    name = fresh(model)
    said = [lines(main(model, "--run", 2021, "--train", 0, "--iw", 1, *more)) for more in ([], ["--test", which])]
    present, old = map(figures, said)
    stored = json.loads((tmp_path / "logs" / name / "results.json").read_text())
    assert present["NELBO"] - old["NELBO"] == pytest.approx(nats, abs=0.05)
    rule = {"2018": "by the rule of 2018", "torch-0.4": "as torch 0.4 did in 2018"}[which]
    assert f"bounds: of 100 images, binarised {rule}" in said[1] and "bounds: of 100 images" in said[0]
    for part, printed in (("figures", present), (f"figures_{which}", old)):
        assert [stored[part][key] for key in ("nelbo", "niwae_1")] == [printed["NELBO"], printed["IWAE-1"]]


def test_on_a_fresh_machine_the_shipped_classifier_is_tested_on_the_courses_images(fresh, main, tmp_path):
    name = fresh("ssvae")
    last = lines(main("ssvae", "--run", 2021, "--train", 0))[-1]
    accuracy = re.fullmatch(r"Test set classification accuracy: (0\.\d+|1\.0) " + re.escape(COURSE), last)
    assert accuracy and float(accuracy[1]) >= 0.85
    stored = json.loads((tmp_path / "logs" / name / "results.json").read_text())
    assert stored["figures"]["accuracy"] == float(accuracy[1]) and sum(map(sum, stored["confusion"])) == 100


@needs_mnist
@pytest.mark.parametrize("model", FILES)
def test_with_mnist_there_the_figures_are_those_without_it_and_the_whole_split_is_used(model, fresh, main, tmp_path):
    name = fresh(model)
    words = ["--run", 2021, "--train", 0, *([] if model == "ssvae" else ["--iw", 1])]
    without, there = lines(main(model, *words)), lines(main(model, *words, "--data_dir", MNIST))
    assert figures(there) == figures(without)
    assert "test images: 10,000" in there and not any("course" in line for line in there)
    if model == "ssvae":
        assert float(re.fullmatch(r"Test set classification accuracy: (0\.\d+)", there[-1])[1]) > 0.9
    assert json.loads((tmp_path / "logs" / name / "results.json").read_text())["test_images"] == 10_000


def test_half_of_mnists_test_split_is_as_good_as_none(fresh, main, tmp_path):
    fresh("vae")
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"half")
    printed = lines(main("vae", "--run", 2021, "--train", 0, "--iw", 1))
    assert any(COURSE in line for line in printed)


def test_a_series_never_takes_the_mean_over_two_data_sets(fresh, main, no_network, digits_dir, tmp_path, monkeypatch):
    """Under auto run 2021 is there for MNIST and run 2022 for the drawn digits alone."""
    name = fresh("vae")
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model_by_name(VAE(name="model=vae_z=10_data=digits_run=2022"), 20_000)
    place = tmp_path / "data"
    place.mkdir()
    for stored in digits_dir.glob("drawn-grey-*.npz"):
        (place / stored.name).symlink_to(stored)
    assert main("vae", "--run", 2021, "--runs", 2, "--train", 0, "--iw", 1).returncode == 0
    for series in (name.removesuffix("_run=2021"), "model=vae_z=10_data=digits"):
        summary = json.loads((tmp_path / "logs" / f"{series}_summary.json").read_text())
        assert len(summary["each"]) == 1 and summary["name"] == series


def test_the_shipped_weights_are_small_and_named_where_git_is_told_of_them():
    named = re.findall(r"^!(model=.*\.pt)$", (ROOT / "checkpoints" / ".gitignore").read_text(), flags=re.M)
    assert sorted(named) == sorted(FILES.values())
    there = [path for path in (ROOT / "checkpoints" / name for name in named) if path.exists()]
    assert len(there) >= 2 and sum(path.stat().st_size for path in there) < 12_000_000
    for path in there:
        assert all(torch.isfinite(value).all() for value in torch.load(path, weights_only=True).values())


def test_a_warning_comes_before_shipped_weights_are_deleted_and_before_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / ".gitignore", "checkpoints")
    unlink, said = Path.unlink, []
    monkeypatch.setattr(
        Path, "unlink", lambda path, **words: said.append(capsys.readouterr().out) or unlink(path, **words)
    )
    for name in ("model=vae_z=10_run=2022", "model=vae_z=10_run=0202", "model=vae_z=10_run=2021"):
        path = checkpoint.save_model_by_name(VAE(name=name), 20_000)
        said.clear()
        checkpoint.discard(name)
        warned = f"warning: --overwrite 1 deletes checkpoints/{name}" in said[0]
        assert warned == (name == "model=vae_z=10_run=2021") and not any(said[1:]) and not path.exists()
    checkpoint.discard(name)
    assert capsys.readouterr().out == ""  # there is nothing to lose any more


@needs_mnist
def test_overwrite_of_a_shipped_run_warns_and_trains_anew(fresh, main, tmp_path):
    name = fresh("vae")
    before = torch.load(tmp_path / "checkpoints" / FILES["vae"], weights_only=True)
    flags = ("--run", 2021, "--iter_max", 1, "--iter_save", 1, "--data_dir", MNIST)
    assert any(line.startswith("warning: ") for line in lines(main("vae", *flags, "--overwrite", 1)))
    steps = [path.name for path in (tmp_path / "checkpoints" / name).glob("model-*.pt")]
    assert steps == ["model-00001.pt"] and not same(before, torch.load(tmp_path / "checkpoints" / name / steps[0]))
    assert not any(line.startswith("warning: ") for line in lines(main("vae", *flags[2:], "--overwrite", 1)))

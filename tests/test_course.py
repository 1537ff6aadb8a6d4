"""Scripts and notebooks that were written against the course's package run as they are."""

import inspect
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MNIST, REFERENCE, needs_mnist, needs_reference, same, tree
from untrained import binary, made, noise, one_hot

import codebase.utils as ut
from codebase import course, data, evaluate
from codebase.runtime import download
from codebase.runtime.files import UsageError
from codebase.train import train


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def noisy(in_folder, monkeypatch):
    """MNIST and SVHN are noise, and their files are there by name."""
    raw = in_folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.COURSE["mnist_sha256"]:
        (raw / name).touch()
    (in_folder / "data" / "extra_32x32.mat").touch()
    grey = {"train": noise(230), "test": noise(120)}
    colour = {"extra": noise(230, 3072)}
    monkeypatch.setattr(data, "mnist", lambda folder, split, check: grey[split])
    monkeypatch.setattr(data, "svhn", lambda folder, split, check: colour[split])


@pytest.mark.parametrize("name", ut.COURSE_NAMES)
def test_utils_has_the_courses_other_names(name):
    assert getattr(ut, name) is getattr(course, name)
    assert getattr(ut, name).__doc__
    exec(f"from codebase.utils import {name}", {})
    assert inspect.isfunction(train)  # which some scripts import and never call


@pytest.mark.parametrize("kind, step", [("vae", 7), ("fsvae", 1_000_000)])
def test_a_script_loads_by_name(kind, step, in_folder):
    name = f"model={kind:s}_run={0:04d}"
    stored = made(kind, seed=1, name=name)
    ut.save_model_by_name(stored, step)
    assert list(tree(in_folder)) == [f"checkpoints/{name}/model-{step:05d}.pt"]
    for device in (None, "cpu", torch.device("cpu")):
        model = made(kind, seed=2, name=name, nn="v1")
        ut.load_model_by_name(model, step, device)
        assert same(model.state_dict(), stored.state_dict())


def test_networks_have_the_courses_names():
    vae = made("vae")
    ssvae = made("ssvae")
    x = binary(6)
    z = torch.ones(6, 64)
    y = one_hot(6)
    torch.testing.assert_close(vae.enc.encode(x), vae.enc(x))
    torch.testing.assert_close(vae.dec.decode(z[:, :10]), vae.dec(z[:, :10]))
    torch.testing.assert_close(ssvae.enc.encode(x, y), ssvae.enc(x, y))
    torch.testing.assert_close(ssvae.dec.decode(z, y=y), ssvae.dec(z, y))
    torch.testing.assert_close(ssvae.cls.classify(x), ssvae.cls(x))


@pytest.mark.parametrize("kind, size", [("ssvae", 784), ("fsvae", 3072)])
def test_a_style_script_decodes_every_label(kind, size):
    model = made(kind)
    z = ut.duplicate(model.sample_z(6), 10)
    y = torch.eye(10).repeat_interleave(6, 0)
    if kind == "ssvae":
        p = model.dec(z, y).sigmoid()
        assert torch.equal(model.compute_sigmoid_given(z, y), p)
        torch.manual_seed(1)
        x = model.sample_x_given(z, y)
        torch.manual_seed(1)
        assert torch.equal(x, torch.bernoulli(p))
    else:
        x = model.compute_mean_given(z, y)
        assert torch.equal(x, model.dec(z, y))
    assert x.shape == (60, size)


def test_mnist_arrives_in_the_courses_shapes(noisy, in_folder, capsys):
    loader, (xl, yl), (x_test, y_test) = ut.get_mnist_data(torch.device("cpu"))
    assert str(in_folder / "data") in capsys.readouterr().out
    assert torch.equal(xl, data.binarize_once(data.course("test").pixels))
    assert torch.equal(yl, torch.eye(10).repeat_interleave(10, 0))
    assert torch.equal(x_test, noise(120).pixels / 255)
    assert torch.equal(y_test, noise(120).labels)
    assert isinstance(loader, torch.utils.data.DataLoader)
    _, (xl, yl), _ = ut.get_mnist_data("cpu", use_test_subset=False)
    assert torch.equal(xl, data.course("train").pixels / 255)  # the labelled ones, in grey
    assert torch.equal(yl.argmax(1), data.course("train").labels)


@pytest.mark.parametrize(
    "load, shape", [(ut.get_mnist_data, (1, 28, 28)), (ut.get_svhn_data, (3, 32, 32))]
)
def test_a_loader_shuffles_images_with_labels(load, shape, noisy):
    loader, *others = load("cpu")
    if load is ut.get_svhn_data:
        assert others == [(None, None), (None, None)]
    kept = noise(230, 784 if shape[0] == 1 else 3072)
    place = {tuple(row[:20]): at for at, row in enumerate(kept.pixels.tolist())}
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [100, 100, 30]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x.shape == (230, *shape) and x.dtype == torch.float32 and y.dtype == torch.int64
    rows = (x * 255).flatten(1)
    order = [place[tuple(row[:20])] for row in rows.round().int().tolist()]
    torch.testing.assert_close(rows, kept.pixels[order].float())
    assert torch.equal(y, kept.labels[order])
    assert sorted(order) == list(range(230)) != order


LOADERS = pytest.mark.parametrize("load", [ut.get_mnist_data, ut.get_svhn_data])


@LOADERS
def test_a_loader_downloads_what_is_missing(load, noisy, in_folder, monkeypatch):
    removed = [path for path in (in_folder / "data").rglob("*") if path.is_file()]
    for path in removed:
        path.unlink()

    def fetch(run) -> None:
        for path in removed:
            path.touch()

    monkeypatch.setattr(download, "fetch", fetch)
    loader, *_ = load("cpu")
    assert len(loader.dataset) == 230


@LOADERS
def test_a_loader_without_files_says_what_to_do(load, noisy, in_folder, monkeypatch):
    shutil.rmtree(in_folder / "data")
    monkeypatch.setattr(download, "fetch", lambda run: "no network")
    with pytest.raises(UsageError, match=r"\(no network\); put these files in place by hand: data"):
        load("cpu")


def test_mnist_is_put_on_the_device(noisy):
    _, labelled, test = ut.get_mnist_data("meta")
    assert [value.device.type for value in (*labelled, *test)] == ["meta"] * 4


def test_the_lower_bound_is_printed(capsys):
    subset = (binary(5), one_hot(5))
    vae = made("vae", z_dim=2)
    ut.evaluate_lower_bound(vae, subset, run_iwae=False)
    alone = capsys.readouterr().out.strip()
    ut.evaluate_lower_bound(vae, subset)
    nelbo, *rest = capsys.readouterr().out.splitlines()
    found = evaluate.bounds(vae, subset[0])
    assert alone == nelbo == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**found)
    assert rest == [f"Negative IWAE-{m}: {found[f'niwae_{m}']}" for m in (1, 10, 100, 1000)]


def test_the_classifiers_accuracy_is_printed(capsys):
    ssvae = made("ssvae")
    x = torch.rand(25, 784)
    y = ssvae.cls(x).argmax(1)
    y[:5] = (y[:5] + 1) % 10
    ut.evaluate_classifier(ssvae, (x, y))
    assert capsys.readouterr().out == "Test set classification accuracy: 0.8\n"


@needs_mnist
@needs_reference
def test_a_notebook_evaluates_the_original_models(in_folder, capsys):
    (in_folder / "data").symlink_to(MNIST)
    (in_folder / "checkpoints").symlink_to(REFERENCE / "checkpoints")
    runpy.run_path(str(Path(__file__).with_name("notebook.py")))
    *_, nelbo, accuracy = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"NELBO: [\d.]+\. KL: [\d.]+\. Rec: [\d.]+", nelbo)
    assert float(nelbo.split()[1].rstrip(".")) == pytest.approx(101.818, abs=0.25)
    assert accuracy == "Test set classification accuracy: 0.9489"

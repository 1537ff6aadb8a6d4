"""Scripts and notebooks that were written against the course's package run as they are."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from conftest import MNIST, REFERENCE, ROOT, needs_mnist, needs_reference, same, tree

import codebase.utils as ut
from codebase import checkpoint, course, data, evaluate
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime.files import UsageError

NUMBER = r"-?\d+\.\d+(e-?\d+)?"
NELBO = rf"NELBO: {NUMBER}\. KL: {NUMBER}\. Rec: {NUMBER}"
SPLITS = {"train": 230, "test": 120}


def images(split: str, size: int = 784) -> data.Images:
    """Noise in the place of a data set, the same at each call."""
    stream = torch.Generator().manual_seed(len(split))
    count = SPLITS[split]
    pixels = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=stream)
    return data.Images(pixels, torch.arange(count) % 10)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def noise(in_folder, monkeypatch):
    """MNIST and SVHN are noise, and their files are there by name."""
    raw = in_folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").touch()
    (in_folder / "data" / "extra_32x32.mat").touch()
    monkeypatch.setattr(data, "mnist", lambda folder, split, check: images(split))
    monkeypatch.setattr(data, "svhn", lambda folder, split, check: images("train", 3072))


def trained(model: torch.nn.Module, step: int) -> torch.nn.Module:
    """A model of other weights than a new one, stored as a checkpoint."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    checkpoint.save_model_by_name(model, step)
    return model


@pytest.mark.parametrize("name", ut.COURSE_NAMES)
def test_utils_has_the_courses_names_of_course(name):
    assert getattr(ut, name) is getattr(course, name)
    assert getattr(ut, name).__doc__
    exec(f"from codebase.utils import {name}", {})


@pytest.mark.parametrize("given", [{}, {"device": "cpu"}, {"device": torch.device("cpu")}])
def test_a_plotting_script_loads_and_samples(given, in_folder):
    name = f"model={'vae':s}_z={10:02d}_run={0:04d}"
    stored = trained(VAE(z_dim=10, name=name), 20000)
    vae = VAE(nn="v1", z_dim=10, name=name)
    ut.load_model_by_name(vae, global_step=20000, **given)
    assert same(vae.state_dict(), stored.state_dict())
    with torch.no_grad():
        picture = vae.sample_x(200).reshape(10, 20, 28, 28)
    assert picture.permute(0, 2, 1, 3).reshape(280, 560).shape == (280, 560)
    assert set(picture.unique().tolist()) <= {0.0, 1.0}


def test_arguments_of_the_course_may_be_positional(in_folder):
    stored = trained(GMVAE(z_dim=2, k=5, name="mine"), 7)
    gmvae = GMVAE(z_dim=2, k=5, name="mine")
    ut.load_model_by_name(gmvae, 7, torch.device("cpu"))
    assert same(gmvae.state_dict(), stored.state_dict())
    ut.save_model_by_name(gmvae, 8)
    assert sorted(tree(in_folder)) == [
        "checkpoints/mine/model-00007.pt",
        "checkpoints/mine/model-00008.pt",
    ]


def test_a_style_script_decodes_every_label(in_folder):
    trained(FSVAE(name="model=fsvae_run=0000"), 1_000_000)
    fsvae = FSVAE(name="model=fsvae_run=0000")
    ut.load_model_by_name(fsvae, global_step=1_000_000)
    z = fsvae.sample_z(20)
    y = torch.eye(10).repeat_interleave(20, 0)
    x = fsvae.compute_mean_given(ut.duplicate(z, 10), y)
    picture = torch.clamp(x, 0, 1).reshape(10, 20, 3, 32, 32)
    assert picture.shape == (10, 20, 3, 32, 32)


def test_a_semi_supervised_script_decodes_every_label():
    ssvae = SSVAE(gen_weight=1, class_weight=100, nn="v1")
    z = ut.duplicate(ssvae.sample_z(6), 10)
    y = torch.eye(10).repeat_interleave(6, 0)
    logits = ssvae.dec(z, y)
    torch.testing.assert_close(ssvae.dec.decode(z, y), logits)
    torch.testing.assert_close(ssvae.compute_sigmoid_given(z, y), logits.sigmoid())
    assert ssvae.sample_x_given(z, y).shape == (60, 784)


def test_an_encoding_script_reconstructs_images():
    vae = VAE(z_dim=2)
    x = torch.bernoulli(torch.rand(5, 784))
    m, v = vae.enc.encode(x)
    z = ut.sample_gaussian(m, v)
    assert torch.sigmoid(vae.dec.decode(z)).shape == (5, 784)


def test_train_can_be_imported():
    from codebase.train import train

    assert inspect.isfunction(train)


def test_mnist_arrives_in_the_shapes_of_the_course(noise, in_folder, capsys):
    train_loader, labeled_subset, test_set = ut.get_mnist_data(
        torch.device("cpu"), use_test_subset=True
    )
    assert str(in_folder / "data") in capsys.readouterr().out
    xl, yl = labeled_subset
    x_test, y_test = test_set
    assert xl.shape == (100, 784) and set(xl.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(xl, data.binarize_once(data.course("test").pixels))
    assert torch.equal(yl, torch.eye(10).repeat_interleave(10, 0))
    assert torch.equal(x_test, images("test").pixels / 255)
    assert torch.equal(y_test, images("test").labels)
    assert isinstance(train_loader, torch.utils.data.DataLoader)
    batches = list(train_loader)
    assert [len(x) for x, _ in batches] == [100, 100, 30]
    assert batches[0][0].shape == (100, 1, 28, 28)
    assert {x.dtype for x, _ in batches} == {torch.float32}
    assert {y.dtype for _, y in batches} == {torch.int64}


@pytest.mark.parametrize(
    "load, size", [(ut.get_mnist_data, (1, 28, 28)), (ut.get_svhn_data, (3, 32, 32))]
)
def test_a_loader_shuffles_every_image_with_its_label(load, size, noise):
    train_loader, *_ = load("cpu")
    kept = images("train", 784 if size[0] == 1 else 3072)
    orders = []
    for _ in range(2):
        batches = list(train_loader)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert x.shape == (230, *size) and x.min() >= 0 and x.max() <= 1
        by_pixels = {tuple(row[:20]): at for at, row in enumerate(kept.pixels.tolist())}
        orders.append(
            [by_pixels[tuple(row[:20])] for row in (x * 255).round().flatten(1).int().tolist()]
        )
        assert sorted(orders[-1]) == list(range(230))
        assert torch.equal(y, kept.labels[orders[-1]])
    assert orders[0] != orders[1]


def test_the_labelled_training_images_are_grey(noise):
    _, (xl, yl), _ = ut.get_mnist_data("cpu", use_test_subset=False)
    assert torch.equal(xl, data.course("train").pixels / 255)
    assert len(xl.unique()) > 200
    assert torch.equal(yl.argmax(1), data.course("train").labels)


def test_svhn_comes_without_labelled_and_test_sets(noise):
    train_loader, labeled_subset, test_set = ut.get_svhn_data(torch.device("cpu"))
    assert labeled_subset == test_set == (None, None)
    x, y = next(iter(train_loader))
    assert x.shape == (100, 3, 32, 32) and y.shape == (100,)


def test_the_lower_bound_is_printed_line_by_line(noise, capsys):
    _, (xl, yl), _ = ut.get_mnist_data("cpu")
    labeled_subset = (xl[:5], yl[:5])
    vae = VAE(z_dim=2)
    capsys.readouterr()
    ut.evaluate_lower_bound(vae, labeled_subset, run_iwae=False)
    alone = capsys.readouterr().out.splitlines()
    ut.evaluate_lower_bound(vae, labeled_subset)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(NELBO, lines[0]) and alone == lines[:1]
    assert [line.split(": ")[0] for line in lines[1:]] == [
        f"Negative IWAE-{m}" for m in (1, 10, 100, 1000)
    ]
    found = evaluate.bounds(vae, labeled_subset[0])
    assert lines[4] == f"Negative IWAE-1000: {found['niwae_1000']}"
    assert lines[0] == f"NELBO: {found['nelbo']}. KL: {found['kl']}. Rec: {found['rec']}"
    assert all(re.fullmatch(rf"Negative IWAE-\d+: {NUMBER}", line) for line in lines[1:])


@pytest.mark.parametrize("shape", [(784,), (1, 28, 28)])
def test_the_classifiers_accuracy_is_printed(shape, capsys):
    ssvae = SSVAE()
    x = torch.rand(25, *shape)
    y = ssvae.cls(x.flatten(1)).argmax(1)
    y[:5] = (y[:5] + 1) % 10
    ut.evaluate_classifier(ssvae, (x, y))
    assert capsys.readouterr().out == "Test set classification accuracy: 0.8\n"


def test_one_hot_test_labels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"y_test.*\(n,\).*\(25, 10\)"):
        ut.evaluate_classifier(SSVAE(), (torch.rand(25, 784), torch.eye(10)[torch.arange(25) % 10]))


def test_evaluation_leaves_the_model_as_it_was(capsys):
    ssvae = SSVAE().train()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    ut.evaluate_classifier(
        ssvae, (torch.rand(25, 784, generator=torch.Generator()), torch.zeros(25).long())
    )
    assert torch.equal(torch.rand(2), wanted) and ssvae.training


@pytest.mark.parametrize(
    "load, name, file",
    [
        (ut.get_mnist_data, "MNIST", "data/MNIST/raw/train-images-idx3-ubyte"),
        (ut.get_svhn_data, "SVHN", "data/extra_32x32.mat"),
    ],
)
def test_without_files_and_network_one_line_helps(load, name, file, in_folder, no_network):
    with pytest.raises(UsageError) as caught:
        load("cpu")
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be downloaded to data (") and "\n" not in message
    assert "by hand" in message and file in message
    assert tree(in_folder) == {}


@needs_mnist
@needs_reference
def test_a_notebook_evaluates_the_original_models(in_folder):
    """In a process of its own, that knows the course's names alone."""
    (in_folder / "data").symlink_to(MNIST)
    (in_folder / "checkpoints").symlink_to(REFERENCE / "checkpoints")
    program = """
import torch
from codebase import utils as ut
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.train import train
device = torch.device("cpu")
train_loader, labeled_subset, test_set = ut.get_mnist_data(device, use_test_subset=True)
vae = VAE(z_dim=10, name="model=vae_z=10_run=0000").to(device)
ut.load_model_by_name(vae, global_step=20000, device=device)
ut.evaluate_lower_bound(vae, labeled_subset, run_iwae=False)
ssvae = SSVAE(gen_weight=1, class_weight=100, name="model=ssvae_gw=001_cw=100_run=0000").to(device)
ut.load_model_by_name(ssvae, global_step=30000, device=device)
ut.evaluate_classifier(ssvae, test_set)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = found.stdout.splitlines()
    assert re.fullmatch(NELBO, lines[-2]), found.stderr
    assert float(lines[-2].split()[1].rstrip(".")) == pytest.approx(101.818, abs=0.25)
    assert lines[-1] == "Test set classification accuracy: 0.9489"

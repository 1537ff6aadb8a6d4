"""--data FILE.npz: own images train, resume and are evaluated; a wrong file is one line."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same, table, tree, weights

import run_vae
from codebase import data, evaluate
from codebase.models.vae import VAE
from codebase.runtime import options
from codebase.runtime.files import UsageError

NAMES = {
    "vae": "model=vae_z=10_data=mine_run=0000",
    "gmvae": "model=gmvae_z=10_k=500_data=mine_run=0000",
    "ssvae": "model=ssvae_gw=001_cw=100_labels=50_data=mine_run=0000",
    "fsvae": "model=fsvae_data=mine_run=0000",
}
FLAGS = {"ssvae": ["--labels", 50]}  # of each digit five, as many as there are


def grey(n: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, 28, 28)).astype(np.uint8)


def colour(n: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def labels(n: int) -> np.ndarray:
    return np.arange(n) % 10


def packed(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def right(model: str = "vae", n: int = 60) -> dict[str, np.ndarray]:
    """What a file for that model may hold: the last tenth, six images, is held out."""
    return {"x": colour(n) if model == "fsvae" else grey(n), "y": labels(n)}


@pytest.fixture
def own(main, tmp_path):
    """Run a script on mine.npz, of this content if given: own("vae", content=packed(x=x))."""

    def run(
        model: str, *flags, content: bytes | None = None, **kwargs
    ) -> subprocess.CompletedProcess:
        if content is not None:
            (tmp_path / "mine.npz").write_bytes(content)
        options.read_once.cache_clear()  # as in a process of its own
        return main(model, "--data", tmp_path / "mine.npz", *FLAGS.get(model, []), *flags, **kwargs)

    return run


@pytest.fixture
def read(tmp_path):
    """A split as a script reads it from a file of these arrays: read("train", x=x, y=y)."""

    def images(split: str, in_colour=False, labelled=False, **arrays) -> data.Images:
        (tmp_path / "mine.npz").write_bytes(packed(**arrays))
        options.read_once.cache_clear()
        return data.own(str(tmp_path / "mine.npz"), split, in_colour, labelled)

    return images


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def refusal(result) -> str:
    """The one line that a refused command says."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / "logs" / name / "results.json").read_text())


@pytest.mark.parametrize("model", NAMES)
def test_a_model_trains_and_resumes_on_own_images(model, own, tmp_path):
    """Fifty-four of them, fewer than a batch; the last tenth is held out, and the line says so."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    name = NAMES[model]
    whole.mkdir()
    parts.mkdir()
    trained = lines(own(model, "--iter_max", 5, content=packed(**right(model)), cwd=whole))
    assert sum("last tenth, 6 images, is held out" in line for line in trained) == 1
    assert [path.name for path in (whole / "checkpoints").iterdir()] == [name]
    for stop in [2, 5]:
        lines(own(model, "--iter_max", stop, cwd=parts))
    assert same(weights(whole, name, 5), weights(parts, name, 5))
    assert table(whole, name) == table(parts, name)
    loaded = lines(own(model, "--iter_max", 5, "--train", 0, cwd=whole))
    assert trained[-1] in loaded and "DRAWN" not in "".join(trained + loaded)
    found = results(whole, name)
    digest = hashlib.sha256((tmp_path / "mine.npz").read_bytes()).hexdigest()
    assert found["data"] == f"mine.npz, a file of SHA-256 {digest}" and found["test_images"] == 6
    assert "test images: 6" in "\n".join(loaded) and "course" not in "\n".join(loaded)


def test_test_images_of_a_file_are_evaluated(own, tmp_path):
    """Seven of them, all of one digit."""
    mine = right("vae") | {"x_test": grey(7, seed=1), "y_test": np.full(7, 3)}
    printed = lines(own("vae", "--iter_max", 2, content=packed(**mine)))
    assert not any("held out" in line for line in printed)
    model = VAE()
    model.load_state_dict(weights(tmp_path, NAMES["vae"], 2))
    x = data.binarize_once(torch.from_numpy(grey(7, seed=1)).flatten(1))
    wanted = evaluate.bounds(model, x, ms=[])
    assert printed[-1] == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**wanted)
    lines(own("ssvae", "--iter_max", 2))
    found = results(tmp_path, NAMES["ssvae"])
    assert [sum(row) for row in found["confusion"]] == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    accuracy = found["confusion"][3][3] / 7
    assert found["figures"]["accuracy"] == accuracy
    assert found["per_digit_accuracy"] == [0, 0, 0, accuracy, 0, 0, 0, 0, 0, 0]


def test_a_vae_needs_no_labels(own, tmp_path):
    lines(own("vae", "--iter_max", 2, content=packed(x=grey(60)), plots=True))
    assert (tmp_path / "logs" / NAMES["vae"] / "latent.png").stat().st_size > 1000


def test_one_test_image_is_enough(own):
    lines(own("gmvae", "--iter_max", 2, content=packed(x=grey(12)), plots=True))


def test_metrics_of_all_test_images_are_kept_apart(own, tmp_path):
    x_test = grey(230, seed=1)
    flags = ["--iter_max", 2, "--runs", 2]
    content = packed(x=grey(60), y=labels(60), x_test=x_test, y_test=labels(230))
    lines(own("vae", *flags, content=content))
    subset = results(tmp_path, NAMES["vae"])
    printed = lines(own("vae", *flags, "--train", 0, "--test", "all", "--iw", 1, 5))
    both = results(tmp_path, NAMES["vae"])
    assert both["figures"] == subset["figures"] and "figures_all" not in subset
    model = VAE()
    model.load_state_dict(weights(tmp_path, NAMES["vae"], 2))
    x = data.binarize_once(torch.from_numpy(x_test).flatten(1))
    wanted = evaluate.bounds(model, x, (1, 5))
    assert {name: both["figures_all"][name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**wanted) in printed
    assert f"Negative IWAE-5: {wanted['niwae_5']}" in printed
    first_hundred = evaluate.bounds(model, x[:100], ms=[])
    assert subset["figures"]["nelbo"] == pytest.approx(first_hundred["nelbo"], rel=1e-3)
    series = "model=vae_z=10_data=mine"
    summaries = {path.name for path in (tmp_path / "logs").glob("*.json")}
    assert summaries == {f"{series}_summary.json", f"{series}_test=all_summary.json"}


def test_bytes_floats_and_rows_give_the_same_images(read):
    x = grey(60)
    wanted = torch.from_numpy(x.reshape(60, 784)[:54])
    in_words = [x, x.reshape(60, 784), x.astype(np.int64), x.astype(">u2"), np.asfortranarray(x)]
    in_words += [(x / 255).astype(kind) for kind in (np.float16, np.float32, np.float64, ">f4")]
    for given in in_words:
        images = read("train", x=given, y=labels(60).astype(np.uint8))
        assert torch.equal(images.pixels, wanted), given.dtype
        assert images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == labels(54).tolist() and images.labels.dtype == torch.int64
    binary = read("train", x=x > 127)
    assert torch.equal(binary.pixels, (wanted > 127) * torch.tensor(255, dtype=torch.uint8))
    assert set(binary.labels.tolist()) == {-1}


def test_a_compressed_file_is_read(own):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **right("vae"))
    lines(own("vae", "--iter_max", 1, content=buffer.getvalue()))


def test_grey_images_may_have_a_channel_axis(read):
    x = grey(60)
    wanted = read("train", x=x)
    for given in (x[..., None], x[:, None], x[:, None] / 255):
        assert torch.equal(read("train", x=given).pixels, wanted.pixels), given.shape


def test_colour_images_may_have_their_channels_first(read):
    x = colour(60)
    wanted = read("train", in_colour=True, x=x)
    first = read("train", in_colour=True, x=x.transpose(0, 3, 1, 2))
    assert torch.equal(first.pixels, wanted.pixels)


def test_labels_may_be_a_column(read):
    wanted = read("train", labelled=True, x=grey(60), y=labels(60))
    column = read("train", labelled=True, x=grey(60), y=labels(60)[:, None])
    assert torch.equal(column.labels, wanted.labels) and column.labels.shape == (54,)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("held_out", [True, False])
def test_names_of_keras_are_read(split, held_out, read):
    test = {} if held_out else {"x_test": grey(7, seed=1), "y_test": np.arange(7)}
    wanted = read(split, x=grey(60), y=labels(60), **test)
    found = read(split, x_train=grey(60), y_train=labels(60), **test)
    assert torch.equal(found.pixels, wanted.pixels) and torch.equal(found.labels, wanted.labels)


UNUSED = {
    "label 10": labels(60) + 1,
    "label -5": labels(60) - 5,
    "floats": labels(60) / 10,
    "one-hot": np.eye(10, dtype=int)[labels(60)],
    "words": np.array(["shirt"] * 60),
    "objects": np.array([object()] * 60),
    "too few": labels(59),
    "a number": np.array(3),
    "none of them": np.zeros(0, int),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_labels_that_nothing_needs_are_not_refused(kind, read, capsys):
    arrays = {"x": grey(60), "y": UNUSED[kind]}
    for split in ("train", "test"):
        assert set(read(split, **arrays).labels.tolist()) == {-1}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert said[0].startswith("warning: y of ")
    assert said[0].endswith("mine.npz is not labels 0 to 9 and is not used")


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_a_model_without_labels_trains_beside_any(model, own, tmp_path):
    content = packed(x=grey(60), y=labels(60) * 100)
    said = lines(own(model, "--iter_max", 2, content=content, plots=True))
    assert sum("is not labels 0 to 9 and is not used" in line for line in said) == 1
    assert (tmp_path / "logs" / NAMES[model] / "latent.png").stat().st_size > 1000


def test_the_held_out_tenth_is_never_trained_on(read):
    x = grey(47)
    y = labels(47)
    train = read("train", x=x, y=y)
    test = read("test", x=x, y=y)
    assert torch.equal(torch.cat([train.pixels, test.pixels]), torch.from_numpy(x).flatten(1))
    assert torch.cat([train.labels, test.labels]).tolist() == y.tolist() and len(test) == 4


def test_a_red_image_is_red_and_upright(read):
    """Channel after channel, as the model and the pictures have them."""
    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[3, 5, 7, 0] = 200  # row 5, column 7, red
    x[4, 5, 7, 2] = 100  # blue
    for given in (x, x / 255):
        images = read("train", in_colour=True, labelled=True, x=given, y=labels(20))
        assert images.pixels.shape == (18, 3072)
        assert images.pixels.nonzero().tolist() == [[3, 5 * 32 + 7], [4, 2 * 1024 + 5 * 32 + 7]]
        assert images.pixels[images.pixels > 0].tolist() == [200, 100]


def test_a_changed_file_is_evaluated_but_not_resumed(own, tmp_path):
    lines(own("vae", "--iter_max", 2, content=packed(**right("vae"))))
    other = packed(x=grey(60, seed=3), y=labels(60))
    (tmp_path / "mine.npz").write_bytes(other)
    before = tree(tmp_path)
    line = refusal(own("vae", "--iter_max", 4))
    assert "argument --data" in line and "SHA-256" in line and tree(tmp_path) == before
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 1))
    lines(own("vae", "--iter_max", 4, "--overwrite", 1))


def test_the_same_file_elsewhere_is_the_same(own, main, tmp_path):
    lines(own("vae", "--iter_max", 2, content=packed(**right("vae"))))
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "mine.npz").rename(tmp_path / "elsewhere" / "mine.npz")
    assert "resuming from step 2" in "\n".join(lines(main("vae", "--data", moved, "--iter_max", 3)))


@pytest.mark.parametrize("stem", ["a", "fashion-mnist_v1.2", "Straße", "mnist", "x" * 100])
def test_the_stem_is_part_of_the_name(stem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"{stem}.npz").touch()
    assert run_vae.parse(["--data", f"{stem}.npz"]).name == f"model=vae_z=10_data={stem}_run=0000"


def test_dark_test_images_beside_bright_ones_warn(own, read, capfd):
    dark = np.eye(28, dtype=np.uint8)[None]  # bytes of 0 and 1: nearly black where x goes to 255
    said = lines(own("vae", "--iter_max", 2, content=packed(x=grey(60), x_test=dark)))
    warnings = [line for line in said if "store them as floats" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ")
    capfd.readouterr()
    for split in ["train", "test"]:
        read(split, x=grey(60), x_test=grey(5))
    assert capfd.readouterr().out == ""


def test_dark_test_images_beside_floats_are_refused(own):
    content = packed(x=grey(60) / 255, x_test=(grey(5) > 127).astype(int))
    line = refusal(own("vae", "--iter_max", 2, content=content))
    assert "x_test with more than black: 0 and 1 are levels of 255" in line


def test_a_stem_of_too_many_bytes_is_refused(tmp_path, main):
    path = tmp_path / f"{'数' * 34}.npz"
    path.write_bytes(packed(x=grey(60)))
    assert "takes up to 100 bytes of letters" in refusal(main("vae", "--data", path))


def test_metrics_of_other_weights_are_not_kept(own, tmp_path):
    content = packed(**right("vae"))
    lines(own("vae", "--iter_max", 2, "--seed", 1, content=content))
    lines(own("vae", "--iter_max", 2, "--train", 0, "--iw", 10))
    assert "niwae_10" in results(tmp_path, NAMES["vae"])["figures"]
    shutil.rmtree(tmp_path / "checkpoints")
    lines(own("vae", "--iter_max", 2, "--seed", 2, content=content))
    assert "niwae_10" not in results(tmp_path, NAMES["vae"])["figures"]


def test_more_labels_than_there_are_are_refused(own):
    line = refusal(own("ssvae", "--iter_max", 2, "--labels", 60, content=packed(**right("ssvae"))))
    assert "argument --labels: takes 6 images of each digit, and of 4 there are 5" in line


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    """One bit of a pixel is another one."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def held(model: str, **changes) -> bytes:
    """A file that is right for a model but for these arrays; None leaves one out."""
    arrays = {**right(model), **changes}
    return packed(**{name: array for name, array in arrays.items() if array is not None})


X = grey(60)
F = grey(60) / 255
OBJECTS = np.array([object()] * 60)
ONE_NAN = np.where(np.arange(3072).reshape(32, 32, 3) == 77, np.nan, colour(60) / 255)
NEEDED = "the labels, which this model needs"
WRONG = {  # script, content, words of the line
    "no images": ("vae", packed(pixels=X), "has no images x"),
    "no images, and what is there": ("vae", packed(pixels=X, y=labels(60)),
        "no images x or x_train; it holds pixels (60, 28, 28), y (60,)"),
    "no images but objects": ("vae", packed(pixels=OBJECTS), "it holds pixels (objects)"),
    "no arrays": ("vae", packed(), "no images x or x_train; it holds nothing"),
    "images twice": ("vae", packed(x=X, x_train=X),
        "has both x and x_train: keep the one that is meant"),
    "labels twice": ("ssvae", held("ssvae", y_train=labels(60)), "has both y and y_train"),
    "a number for images": ("vae", packed(x=np.array(3)), "of shape"),
    "an empty array": ("vae", packed(x=X[:0]), "shape"),
    "one image": ("vae", packed(x=X[:1]), "one image"),
    "32 pixels": ("vae", packed(x=np.zeros((60, 32, 32))),
        "of shape (n, 28, 28) or (n, 784), not ("),
    "rows of 783": ("vae", packed(x=np.zeros((60, 783))), ", 783)"),
    "one axis": ("vae", packed(x=np.zeros(60)), "shape"),
    "a channel too many": ("vae", packed(x=np.zeros((60, 28, 28, 2))), ", 28, 28, 2)"),
    "rows in a channel": ("vae", packed(x=np.zeros((60, 1, 784))), ", 1, 784)"),
    "colour for a VAE": ("vae", held("fsvae"), "(n, 784)"),
    "grey for an FSVAE": ("fsvae", held("vae"), "of shape (n, 32, 32, 3), not ("),
    "channels between": ("fsvae", held("fsvae", x=np.zeros((60, 32, 3, 32))), ", 32, 3, 32)"),
    "Keras's images of another shape": ("vae", packed(x_train=np.zeros((60, 9))),
        "should have x_train of shape"),
    "Keras's labels to 10": ("ssvae", packed(x_train=X, y_train=labels(60) + 1),
        "should have y_train with labels"),
    "test images of another shape": ("vae", held("vae", x_test=np.zeros((5, 32, 32))), "x_test"),
    "a number for test images": ("vae", held("vae", x_test=np.array(3)), "x_test"),
    "words": ("vae", packed(x=np.full((60, 784), "a")), "whole numbers or floats"),
    "complex numbers": ("vae", packed(x=F + 0j), "whole numbers or floats"),
    "pickled objects": ("vae", packed(x=OBJECTS), "holds pickled objects, which are not read"),
    "pickled labels": ("ssvae", held("ssvae", y=OBJECTS), "holds pickled objects"),
    "floats to 255": ("vae", packed(x=X.astype(np.float32)),
        "from 0 to 1, not from 0 to 255; divide them by 255"),
    "floats below zero": ("vae", packed(x=F - 0.5), "from 0 to 1, not from -0.5 to 0.5"),
    "floats from -1": ("vae", packed(x=2 * F - 1),
        "if they are scaled to -1 to 1, add 1 and divide by 2"),
    "floats to 1000": ("vae", packed(x=F * 1000), "from 0 to 1, not from 0 to 1000"),
    "whole numbers to 256": ("vae", packed(x=X.astype(int) + 1),
        "from 0 to 255, not from 1 to 256"),
    "whole numbers below zero": ("vae", packed(x=X.astype(int) - 1),
        "from 0 to 255, not from -1 to 254"),
    "whole numbers to one": ("vae", packed(x=(X > 127).astype(np.uint8)), "store them as floats"),
    "NaN": ("vae", packed(x=np.where(F > 0.99, np.nan, F)), "nan"),
    "one NaN": ("fsvae", held("fsvae", x=ONE_NAN), "nan"),
    "infinity": ("vae", packed(x=np.where(F > 0.99, np.inf, F)), "inf"),
    "test images out of range": ("vae", held("vae", x_test=X[:5] * 2.0), "x_test"),
    "no labels for an SSVAE": ("ssvae", held("ssvae", y=None), NEEDED),
    "no labels for an FSVAE": ("fsvae", held("fsvae", y=None), NEEDED),
    "no test labels": ("ssvae", held("ssvae", x_test=X[:5]), f"y_test, {NEEDED}"),
    "test labels without images": ("vae", held("vae", y_test=labels(5)),
        "has y_test and no images x_test"),
    "label 10": ("ssvae", held("ssvae", y=labels(60) + 1), "labels 0 to 9, not"),
    "label -1": ("ssvae", held("ssvae", y=labels(60) - 1), "labels 0 to 9, not"),
    "label 10 of a test image": ("fsvae", held("fsvae", x_test=colour(5), y_test=np.full(5, 10)),
        "y_test"),
    "float labels": ("ssvae", held("ssvae", y=labels(60) + 0.0), "whole numbers"),
    "one-hot labels": ("ssvae", held("ssvae", y=np.eye(10)[labels(60)].astype(int)), "y"),
    "too few labels": ("ssvae", held("ssvae", y=labels(59)), "of shape"),
    "a number for labels": ("ssvae", held("ssvae", y=np.array(3)), "y"),
    "two columns of labels": ("ssvae", held("ssvae", y=np.zeros((60, 2), int)), "of shape (60,)"),
    "a .npy renamed": ("vae", as_npy(X), "no .npz file"),
    "empty": ("vae", b"", "no .npz file"),
    "text": ("vae", b"no file of numpy's at all\n" * 100, "no .npz file"),
    "a bit flipped": ("vae", flipped(packed(x=X)), "cannot be read"),
}  # fmt: skip


def assert_refused(own, tmp_path, model: str, words: str, content: bytes) -> None:
    """In one line, before anything is stored: no more is left than the lock of the run."""
    (tmp_path / "mine.npz").unlink(missing_ok=True)
    before = {name: stored for name, stored in tree(tmp_path).items() if not name.endswith(".lock")}
    line = refusal(own(model, "--iter_max", 2, content=content))
    assert line.startswith(f"run_{model}.py: error: argument --data: ")
    assert "mine.npz" in line and words in line
    after = {name: stored for name, stored in tree(tmp_path).items() if not name.endswith(".lock")}
    assert after == before | {"mine.npz": content}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_in_one_line(wrong, own, tmp_path):
    model, content, words = WRONG[wrong]
    assert_refused(own, tmp_path, model, words, content=content)


def test_floats_just_above_one_are_no_bytes(own):
    """As interpolation leaves them: divided by 255 they would be black."""
    line = refusal(own("vae", "--iter_max", 2, content=packed(x=F * 1.02)))
    assert "from 0 to 1, not from 0 to 1.02" in line and "255" not in line


def test_a_truncated_file_is_refused_wherever_it_ends(own, tmp_path):
    content = packed(**right("vae"))
    size = len(content)
    for end in [1, 3, 4, 29, 100, 300, size // 2, size - 400, size - 22, size - 1]:
        assert_refused(own, tmp_path, "vae", "truncated", content=content[:end])


def test_a_folder_for_a_file_is_refused(own, tmp_path):
    (tmp_path / "mine.npz").mkdir()
    assert "there is no file" in refusal(own("vae", "--iter_max", 2))


def test_a_file_gone_before_reading_is_one_line(own, tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"")
    options.read_once.cache_clear()
    (tmp_path / "mine.npz").unlink()
    with pytest.raises(UsageError, match=re.escape("mine.npz cannot be read (No such file")):
        data.own(str(tmp_path / "mine.npz"), "train", False, False)


@pytest.mark.parametrize("shape", ["mine.npz/", "mine.npz/."])
def test_a_path_with_a_slash_is_refused(shape, own, main, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    before = tree(tmp_path)
    assert "--data" in refusal(main("vae", "--data", f"{tmp_path}/{shape}", "--iter_max", 1))
    assert tree(tmp_path) == before


def test_metrics_of_two_files_are_never_mixed(own, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    lines(own("vae", "--iter_max", 1, "--train", 0, "--iw", 1))
    first = results(tmp_path, NAMES["vae"])
    lines(own("vae", "--iter_max", 1, "--train", 0, "--iw", 2, content=packed(x=grey(60, seed=1))))
    second = results(tmp_path, NAMES["vae"])
    assert "niwae_1" in first["figures"] and "niwae_1" not in second["figures"]
    assert first["data"] != second["data"]
    assert second["data"].startswith("mine.npz, a file of SHA-256 ")


def test_a_changed_file_is_noticed_in_one_process(own, main, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    (tmp_path / "mine.npz").write_bytes(packed(x=grey(60, seed=1)))
    assert "SHA-256" in refusal(main("vae", "--data", tmp_path / "mine.npz", "--iter_max", 2))


@pytest.mark.parametrize("raw", ["x", "y"])
def test_a_member_that_is_no_array_is_refused(raw, own):
    buffer = io.BytesIO(held("vae", **{raw: None}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(raw, b"hello")
    assert "mine.npz" in refusal(own("ssvae", "--iter_max", 1, content=buffer.getvalue()))

"""--data FILE.npz: a user's own images train, go on and are evaluated; a file that is not right is told in one line."""

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
    """Run a script on mine.npz, as it is or made anew: own("vae", "--iter_max", 3, content=packed(x=x))."""

    def run(model: str, *flags, content: bytes | None = None, **kwargs) -> subprocess.CompletedProcess:
        if content is not None:
            (tmp_path / "mine.npz").write_bytes(content)
        options.content.cache_clear()  # as in a process of its own
        return main(model, "--data", tmp_path / "mine.npz", *FLAGS.get(model, []), *flags, **kwargs)

    return run


@pytest.fixture
def read(tmp_path):
    """A split as a script reads it from a file of these arrays: read("train", x=x, y=y)."""

    def images(split: str, in_colour=False, labelled=False, **arrays) -> data.Images:
        (tmp_path / "mine.npz").write_bytes(packed(**arrays))
        options.content.cache_clear()
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
def test_a_model_trains_on_a_users_images_goes_on_bit_for_bit_and_is_evaluated(model, own, tmp_path):
    """Fifty-four of them, fewer than a batch; the last tenth is held out, and the line says so."""
    whole, parts, name = tmp_path / "whole", tmp_path / "parts", NAMES[model]
    whole.mkdir(), parts.mkdir()
    trained = lines(own(model, "--iter_max", 5, content=packed(**right(model)), cwd=whole))
    assert sum("last tenth, 6 images, is held out" in line for line in trained) == 1
    assert [path.name for path in (whole / "checkpoints").iterdir()] == [name]
    for stop in (2, 5):
        lines(own(model, "--iter_max", stop, cwd=parts))
    assert same(weights(whole, name, 5), weights(parts, name, 5)) and table(whole, name) == table(parts, name)
    loaded = lines(own(model, "--iter_max", 5, "--train", 0, cwd=whole))
    assert trained[-1] in loaded and "DRAWN" not in "".join(trained + loaded)
    found = results(whole, name)
    digest = hashlib.sha256((tmp_path / "mine.npz").read_bytes()).hexdigest()
    assert found["data"] == f"mine.npz, a file of SHA-256 {digest}" and found["test_images"] == 6
    assert "test images: 6" in "\n".join(loaded) and "course" not in "\n".join(loaded)


def test_test_images_of_a_file_are_those_that_are_evaluated(own, tmp_path):
    """Seven of them, all of one digit."""
    mine = right("vae") | {"x_test": grey(7, seed=1), "y_test": np.full(7, 3)}
    printed = lines(own("vae", "--iter_max", 2, content=packed(**mine)))
    assert not any("held out" in line for line in printed)
    model = VAE()
    model.load_state_dict(weights(tmp_path, NAMES["vae"], 2))
    x = data.binarize_once(torch.from_numpy(grey(7, seed=1)).flatten(1))
    assert printed[-1] == "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**evaluate.bounds(model, x, ()))
    lines(own("ssvae", "--iter_max", 2))
    found = results(tmp_path, NAMES["ssvae"])
    assert [sum(row) for row in found["confusion"]] == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    assert found["figures"]["accuracy"] == found["confusion"][3][3] / 7 == found["per_digit_accuracy"][3]
    assert [found["per_digit_accuracy"][digit] for digit in (0, 9)] == [0, 0]


def test_a_vae_needs_no_labels(own, tmp_path):
    lines(own("vae", "--iter_max", 2, content=packed(x=grey(60)), plots=True))
    assert (tmp_path / "logs" / NAMES["vae"] / "latent.png").stat().st_size > 1000


def test_one_test_image_is_enough(own):
    lines(own("gmvae", "--iter_max", 2, content=packed(x=grey(12)), plots=True))


def test_all_test_images_are_evaluated_where_that_is_wanted_and_both_figures_are_kept_apart(own, tmp_path):
    x_test = grey(230, seed=1)
    flags = ("--iter_max", 2, "--runs", 2)
    lines(own("vae", *flags, content=packed(x=grey(60), y=labels(60), x_test=x_test, y_test=labels(230))))
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
    assert subset["figures"]["nelbo"] == pytest.approx(evaluate.bounds(model, x[:100], ())["nelbo"], rel=1e-3)
    series = "model=vae_z=10_data=mine"
    summaries = {path.name for path in (tmp_path / "logs").glob("*.json")}
    assert summaries == {f"{series}_summary.json", f"{series}_test=all_summary.json"}


def test_bytes_floats_and_rows_of_pixels_give_the_same_images(read):
    x = grey(60)
    wanted = torch.from_numpy(x.reshape(60, 784)[:54])
    in_words = [x, x.reshape(60, 784), x.astype(np.int64), x.astype(">u2"), np.asfortranarray(x)]
    in_words += [(x / 255).astype(kind) for kind in (np.float16, np.float32, np.float64, ">f4")]
    for given in in_words:
        images = read("train", x=given, y=labels(60).astype(np.uint8))
        assert torch.equal(images.pixels, wanted) and images.pixels.dtype == torch.uint8, given.dtype
        assert images.labels.tolist() == labels(54).tolist() and images.labels.dtype == torch.int64
    binary = read("train", x=x > 127)
    assert torch.equal(binary.pixels, (wanted > 127) * torch.tensor(255, dtype=torch.uint8))
    assert set(binary.labels.tolist()) == {-1}


def test_a_compressed_file_is_read(own):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **right("vae"))
    lines(own("vae", "--iter_max", 1, content=buffer.getvalue()))


def test_grey_images_may_have_an_axis_of_one_channel(read):
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
    assert said[0].startswith("warning: y of ") and said[0].endswith("mine.npz is not labels 0 to 9 and is not used")


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_a_model_without_labels_trains_beside_any(model, own, tmp_path):
    said = lines(own(model, "--iter_max", 2, content=packed(x=grey(60), y=labels(60) * 100), plots=True))
    assert sum("is not labels 0 to 9 and is not used" in line for line in said) == 1
    assert (tmp_path / "logs" / NAMES[model] / "latent.png").stat().st_size > 1000


def test_the_last_tenth_is_held_out_and_nothing_is_in_both_splits(read):
    x, y = grey(47), labels(47)
    train, test = (read(split, x=x, y=y) for split in ("train", "test"))
    assert torch.equal(torch.cat([train.pixels, test.pixels]), torch.from_numpy(x).flatten(1))
    assert torch.cat([train.labels, test.labels]).tolist() == y.tolist() and len(test) == 4


def test_a_red_image_is_red_and_its_rows_are_rows(read):
    """Channel after channel, as the model and the pictures have them."""
    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[3, 5, 7, 0] = 200  # row 5, column 7, red
    x[4, 5, 7, 2] = 100  # blue
    for given in (x, x / 255):
        images = read("train", in_colour=True, labelled=True, x=given, y=labels(20))
        assert images.pixels.shape == (18, 3072)
        assert images.pixels.nonzero().tolist() == [[3, 5 * 32 + 7], [4, 2 * 1024 + 5 * 32 + 7]]
        assert images.pixels[3, 5 * 32 + 7] == 200 and images.pixels[4, 2 * 1024 + 5 * 32 + 7] == 100


def test_a_file_that_has_changed_is_refused_when_a_run_goes_on_and_read_when_it_is_evaluated(own, tmp_path):
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
    assert "going on from step 2" in "\n".join(lines(main("vae", "--data", moved, "--iter_max", 3)))


@pytest.mark.parametrize("stem", ["a", "fashion-mnist_v1.2", "Straße", "mnist", "x" * 100])
def test_the_stem_of_the_file_is_part_of_the_name(stem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"{stem}.npz").touch()
    assert run_vae.Run(data=f"{stem}.npz").name == f"model=vae_z=10_data={stem}_run=0000"


def test_dark_test_images_are_of_the_scale_of_the_training_images(own, tmp_path):
    dark = np.eye(28, dtype=np.uint8)[None]  # bytes of 0 and 1: nearly black where x goes to 255
    said = lines(own("vae", "--iter_max", 2, content=packed(x=grey(60), x_test=dark)))
    assert sum(line.startswith("warning: ") and "store them as floats" in line for line in said) == 1
    bright = packed(x=grey(60), x_test=grey(5))
    assert "warning" not in "".join(lines(own("vae", "--iter_max", 2, "--run", 1, content=bright)))


def test_test_images_of_zero_and_one_beside_floats_are_refused(own):
    line = refusal(own("vae", "--iter_max", 2, content=packed(x=grey(60) / 255, x_test=(grey(5) > 127).astype(int))))
    assert "x_test with more than black: 0 and 1 are levels of 255" in line


def test_a_stem_of_too_many_bytes_is_refused(tmp_path, main):
    path = tmp_path / f"{'数' * 34}.npz"
    path.write_bytes(packed(x=grey(60)))
    assert "takes up to 100 bytes of letters" in refusal(main("vae", "--data", path))


def test_figures_of_other_weights_of_the_same_name_are_not_kept(own, tmp_path):
    content = packed(**right("vae"))
    for seed, more in ((1, ["--train", 0, "--iw", 10]), (2, [])):
        lines(own("vae", "--iter_max", 2, "--seed", seed, content=content))
        if more:
            lines(own("vae", "--iter_max", 2, *more))
            assert "niwae_10" in results(tmp_path, NAMES["vae"])["figures"]
            shutil.rmtree(tmp_path / "checkpoints")
    assert "niwae_10" not in results(tmp_path, NAMES["vae"])["figures"]


def test_more_labels_than_there_are_of_a_digit_are_refused_with_their_number(own):
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
    return packed(**{name: value for name, value in (right(model) | changes).items() if value is not None})


X, F = grey(60), grey(60) / 255
WRONG = {  # script, content, words of the line
    "no images": ("vae", packed(pixels=X), "has no images x"),
    "no images, and what is there": ("vae", packed(pixels=X, y=labels(60)),
        "no images x or x_train; it holds pixels (60, 28, 28), y (60,)"),
    "no images but objects": ("vae", packed(pixels=np.array([object()])), "it holds pixels (objects)"),
    "no arrays": ("vae", packed(), "no images x or x_train; it holds nothing"),
    "images twice": ("vae", packed(x=X, x_train=X), "has both x and x_train: keep the one that is meant"),
    "labels twice": ("ssvae", held("ssvae", y_train=labels(60)), "has both y and y_train"),
    "a number for images": ("vae", packed(x=np.array(3)), "of shape"),
    "an empty array": ("vae", packed(x=X[:0]), "shape"),
    "one image": ("vae", packed(x=X[:1]), "one image"),
    "32 pixels": ("vae", packed(x=np.zeros((60, 32, 32))), "of shape (n, 28, 28) or (n, 784), not ("),
    "rows of 783": ("vae", packed(x=np.zeros((60, 783))), ", 783)"),
    "one axis": ("vae", packed(x=np.zeros(60)), "shape"),
    "a channel too many": ("vae", packed(x=np.zeros((60, 28, 28, 2))), ", 28, 28, 2)"),
    "rows in a channel": ("vae", packed(x=np.zeros((60, 1, 784))), ", 1, 784)"),
    "colour for a VAE": ("vae", held("fsvae"), "(n, 784)"),
    "grey for an FSVAE": ("fsvae", held("vae"), "of shape (n, 32, 32, 3), not ("),
    "channels between": ("fsvae", held("fsvae", x=np.zeros((60, 32, 3, 32))), ", 32, 3, 32)"),
    "Keras's images of another shape": ("vae", packed(x_train=np.zeros((60, 9))), "should have x_train of shape"),
    "Keras's labels to 10": ("ssvae", packed(x_train=X, y_train=labels(60) + 1), "should have y_train with labels"),
    "test images of another shape": ("vae", held("vae", x_test=np.zeros((5, 32, 32))), "x_test"),
    "a number for test images": ("vae", held("vae", x_test=np.array(3)), "x_test"),
    "words": ("vae", packed(x=np.full((60, 784), "a")), "whole numbers or floats"),
    "complex numbers": ("vae", packed(x=F + 0j), "whole numbers or floats"),
    "pickled objects": ("vae", packed(x=np.array([object()] * 60)), "holds pickled objects, which are not read"),
    "pickled labels": ("ssvae", held("ssvae", y=np.array([object()] * 60)), "holds pickled objects"),
    "floats to 255": ("vae", packed(x=X.astype(np.float32)), "from 0 to 1, not from 0 to 255; divide them by 255"),
    "floats below zero": ("vae", packed(x=F - 0.5), "from 0 to 1, not from -0.5 to 0.5"),
    "floats from -1": ("vae", packed(x=2 * F - 1), "if they are scaled to -1 to 1, add 1 and divide by 2"),
    "floats to 1000": ("vae", packed(x=F * 1000), "from 0 to 1, not from 0 to 1000"),
    "whole numbers to 256": ("vae", packed(x=X.astype(int) + 1), "from 0 to 255, not from 1 to 256"),
    "whole numbers below zero": ("vae", packed(x=X.astype(int) - 1), "from 0 to 255, not from -1 to 254"),
    "whole numbers to one": ("vae", packed(x=(X > 127).astype(np.uint8)), "store them as floats"),
    "NaN": ("vae", packed(x=np.where(F > 0.99, np.nan, F)), "nan"),
    "one NaN": ("fsvae", held("fsvae", x=np.where(np.arange(3072).reshape(32, 32, 3) == 77, np.nan, colour(60) / 255)),
        "nan"),
    "infinity": ("vae", packed(x=np.where(F > 0.99, np.inf, F)), "inf"),
    "test images out of range": ("vae", held("vae", x_test=X[:5] * 2.0), "x_test"),
    "no labels for an SSVAE": ("ssvae", held("ssvae", y=None), "the labels, which this model needs"),
    "no labels for an FSVAE": ("fsvae", held("fsvae", y=None), "the labels, which this model needs"),
    "no test labels": ("ssvae", held("ssvae", x_test=X[:5]), "y_test, the labels, which this model needs"),
    "test labels without images": ("vae", held("vae", y_test=labels(5)), "has y_test and no images x_test"),
    "label 10": ("ssvae", held("ssvae", y=labels(60) + 1), "labels 0 to 9, not"),
    "label -1": ("ssvae", held("ssvae", y=labels(60) - 1), "labels 0 to 9, not"),
    "label 10 of an FSVAE's test image": ("fsvae", held("fsvae", x_test=colour(5), y_test=np.full(5, 10)), "y_test"),
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
    assert line.startswith(f"run_{model}.py: error: argument --data: ") and "mine.npz" in line and words in line, line
    after = {name: stored for name, stored in tree(tmp_path).items() if not name.endswith(".lock")}
    assert after == before | {"mine.npz": content}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_not_right_is_refused_in_one_line(wrong, own, tmp_path):
    model, content, words = WRONG[wrong]
    assert_refused(own, tmp_path, model, words, content=content)


def test_floats_a_little_above_one_are_not_taken_for_bytes(own):
    """As interpolation leaves them: divided by 255 they would be black."""
    line = refusal(own("vae", "--iter_max", 2, content=packed(x=F * 1.02)))
    assert "from 0 to 1, not from 0 to 1.02" in line and "255" not in line


def test_a_truncated_file_is_refused_in_one_line_wherever_it_ends(own, tmp_path):
    content = packed(**right("vae"))
    for end in (1, 3, 4, 29, 100, 300, len(content) // 2, len(content) - 400, len(content) - 22, len(content) - 1):
        assert_refused(own, tmp_path, "vae", "truncated", content=content[:end])


def test_a_folder_in_the_place_of_a_file_is_refused(own, tmp_path):
    (tmp_path / "mine.npz").mkdir()
    assert "there is no file" in refusal(own("vae", "--iter_max", 2))


def test_a_file_that_is_gone_between_the_command_line_and_its_reading_is_told_in_one_line(own, tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"")
    options.content.cache_clear()
    (tmp_path / "mine.npz").unlink()
    with pytest.raises(UsageError, match=re.escape("mine.npz cannot be read (No such file")):
        data.own(str(tmp_path / "mine.npz"), "train", False, False)


@pytest.mark.parametrize("shape", ["mine.npz/", "mine.npz/."])
def test_a_path_that_only_looks_like_a_file_is_never_taken_for_the_real_data(shape, own, main, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    before = tree(tmp_path)
    assert "--data" in refusal(main("vae", "--data", f"{tmp_path}/{shape}", "--iter_max", 1))
    assert tree(tmp_path) == before


def test_figures_of_two_files_of_one_name_are_never_mixed(own, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    lines(own("vae", "--iter_max", 1, "--train", 0, "--iw", 1))
    first = results(tmp_path, NAMES["vae"])
    lines(own("vae", "--iter_max", 1, "--train", 0, "--iw", 2, content=packed(x=grey(60, seed=1))))
    second = results(tmp_path, NAMES["vae"])
    assert "niwae_1" in first["figures"] and "niwae_1" not in second["figures"]
    assert first["data"] != second["data"] and second["data"].startswith("mine.npz, a file of SHA-256 ")


def test_a_file_that_changed_is_refused_in_the_same_process_too(own, main, tmp_path):
    lines(own("vae", "--iter_max", 1, content=packed(**right())))
    (tmp_path / "mine.npz").write_bytes(packed(x=grey(60, seed=1)))
    assert "SHA-256" in refusal(main("vae", "--data", tmp_path / "mine.npz", "--iter_max", 2))


@pytest.mark.parametrize("raw", ["x", "y"])
def test_a_member_that_is_no_array_is_refused_in_one_line(raw, own):
    buffer = io.BytesIO(packed(**{name: array for name, array in right().items() if name != raw}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(raw, b"hello")
    assert "mine.npz" in refusal(own("ssvae", "--iter_max", 1, content=buffer.getvalue()))

"""The compiled step does what the plain one does, keeps its bits, and gives way where it cannot be had."""

import signal

import pytest
import torch
from conftest import NAMES, needs_compiler, same, table, weights

from codebase import train
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime import device
from codebase.runtime.processes import ALONE

MODELS = {"vae": VAE, "gmvae": GMVAE, "ssvae": SSVAE, "ssvae gw=0": lambda: SSVAE(gen_weight=0), "fsvae": FSVAE}
MODELS |= {"vae train_iw=3": lambda: VAE(train_iw=3), "gmvae train_iw=3": lambda: GMVAE(train_iw=3)}


def images(kind: str, count: int):
    """What the loss of a model takes, as a batch of train.backward."""
    x, y = torch.rand(count, 3072 if kind == "fsvae" else 784).round(), torch.eye(10).repeat(count // 10, 1)
    shared = (x[:100], y[:100]) if kind.startswith("ssvae") else ()
    return lambda index: ((x[index], y[index]) if kind == "fsvae" else (x[index],), shared)


def gradients(kind: str, count: int, compiled: bool):
    """Terms and gradients of one step, by name; the same numbers go in each time."""
    torch.manual_seed(0)
    model, batch = MODELS[kind](), images(kind, count)
    inputs, shared = batch(torch.arange(min(count, train.PIECE)))
    add = train.compiled_gradient(model, "cpu", *inputs, *shared) if compiled else train.add_gradient
    torch.manual_seed(1)
    names, terms = train.backward(model, batch, torch.arange(count), ALONE, add)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return dict(zip(names, terms, strict=True)), {name: value for name, value in found.items() if value is not None}


def compare(kind: str, count: int) -> None:
    (terms, plain), (same_terms, compiled) = gradients(kind, count, False), gradients(kind, count, True)
    torch.testing.assert_close(same_terms, terms, rtol=1e-5, atol=1e-5)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(compiled[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.fixture
def traced(monkeypatch):
    """Let the graph be traced whole as for compilation, and then run by torch's own kernels: no compiler, no wait."""

    def compile_graph(function, kind):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(train, "compile_graph", compile_graph)


@pytest.mark.parametrize("kind, count", [*((kind, 100) for kind in MODELS), ("vae", 250), ("ssvae", 250)])
def test_the_traced_step_has_the_gradients_and_the_terms_of_the_plain_one(kind, count, traced, monkeypatch):
    monkeypatch.setattr(
        train, "PIECE", 100
    )  # larger batches, and samples of them, go through in three pieces of two sizes
    compare(kind, count)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_the_compiled_step_has_the_gradients_and_the_terms_of_the_plain_one(kind):
    compare(kind, 100)


@needs_compiler
def test_compiled_training_has_the_same_bits_in_one_piece_and_in_parts_and_the_figures_of_the_plain_one(
    script, tmp_path
):
    for folder in ("whole", "parts", "plain"):
        (tmp_path / folder).mkdir()
    flags = "vae", "--compile", 1, "--iter_max"
    whole = script(*flags, 150, cwd=tmp_path / "whole")
    assert "steps: compiled" in whole.stdout, whole.stdout + whole.stderr
    script(*flags, 70, cwd=tmp_path / "parts")
    script("vae", "--iter_max", 150, cwd=tmp_path / "parts")  # auto goes on as it was begun
    script("vae", "--compile", 0, "--iter_max", 150, cwd=tmp_path / "plain")
    found = [weights(tmp_path / folder, NAMES["vae"], 150) for folder in ("whole", "parts", "plain")]
    rows = [table(tmp_path / folder, NAMES["vae"]) for folder in ("whole", "parts", "plain")]
    assert same(found[0], found[1]) and rows[0] == rows[1]
    for row, plain in zip(rows[0], rows[2], strict=True):
        assert float(row["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)


@pytest.fixture
def broken(monkeypatch):
    """Compiling fails, after numbers were drawn."""

    def compile_graph(function, kind):
        torch.rand(10)
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(train, "compile_graph", compile_graph)


def test_where_compiling_fails_the_plain_step_runs_and_one_line_says_why(script, tmp_path, broken):
    (tmp_path / "plain").mkdir()
    result = script("vae", "--iter_max", 5, "--compile", 1)
    said = [line for line in result.stdout.splitlines() if line.startswith("steps:")]
    assert result.returncode == 0 and said == ["steps: plain (compiling failed: RuntimeError: no compiler)"]
    script("vae", "--iter_max", 5, "--compile", 0, cwd=tmp_path / "plain")
    assert same(*(weights(folder, NAMES["vae"], 5) for folder in (tmp_path, tmp_path / "plain")))
    assert torch.load(tmp_path / "checkpoints" / NAMES["vae"] / "state.pt")["compiled"] is False


def test_going_on_in_another_way_than_before_says_that_the_bits_will_differ(script, traced, monkeypatch):
    assert "bits" not in script("vae", "--iter_max", 4, "--compile", 1).stdout
    went_on = script("vae", "--iter_max", 6, "--compile", "auto").stdout
    assert "steps: compiled" in went_on and "bits" not in went_on
    assert "the last steps were compiled: the bits will differ" in script("vae", "--iter_max", 8, "--compile", 0).stdout
    assert "steps: plain (as its last steps)" in script("vae", "--iter_max", 9).stdout


def test_auto_says_where_one_piece_would_be_compiled(script, traced, monkeypatch):
    """The first part was too short for it, and its way is kept."""
    monkeypatch.setattr(device, "WORTH", 6)
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    assert "bits" not in script("vae", "--iter_max", 3, "--device", "cpu").stdout
    assert "bits" not in script("vae", "--iter_max", 5, "--device", "cpu").stdout
    said = script("vae", "--iter_max", 7, "--device", "cpu").stdout
    assert "steps: plain (as its last steps)" in said
    (line,) = (line for line in said.splitlines() if "bits" in line)
    assert "in one piece is compiled: the bits will differ" in line
    whole = script("vae", "--iter_max", 7, "--device", "cpu", "--run", 1).stdout
    assert "steps: compiled" in whole and "bits" not in whole


@pytest.mark.parametrize(
    "asked, steps, kind, tools, compiled",
    [
        ("auto", 20_000, "cpu", ["my-compiler"], True),
        ("auto", 20_000, "cpu", ["g++"], False),
        ("auto", 20_000, "cuda", ["triton"], True),
        ("auto", 20_000, "cuda", ["g++"], False),
        ("auto", 20_000, "mps", ["g++"], False),
        ("auto", 19_999, "cpu", ["my-compiler"], False),
        ("1", 1, "cpu", [], True),
        ("0", 20_000, "cpu", ["my-compiler"], False),
    ],
)
def test_auto_decides_by_the_tools_and_the_number_of_steps(asked, steps, kind, tools, compiled, monkeypatch):
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(device, "find_spec", lambda name: name if name in tools else None)
    why = device.plain_because(asked, steps, kind, 1)
    assert (why == "") == compiled
    assert asked != "auto" or steps < 20_000 or compiled or kind in why


def test_a_signal_while_the_step_is_compiled_ends_the_run_at_once_and_nothing_is_lost(script, tmp_path, monkeypatch):
    script("vae", "--iter_max", 3)
    before = (tmp_path / "checkpoints" / NAMES["vae"] / "state.pt").read_bytes()
    monkeypatch.setattr(train, "compile_graph", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = script("vae", "--iter_max", 6, "--compile", 1)
    assert result.returncode == 143 and "Traceback" not in result.stderr
    assert (tmp_path / "checkpoints" / NAMES["vae"] / "state.pt").read_bytes() == before


def test_nothing_is_compiled_where_no_step_is_left(script, tmp_path, traced):
    script("vae", "--iter_max", 3, "--compile", 1)
    (tmp_path / "checkpoints" / NAMES["vae"] / "model-00003.pt").unlink()
    again = script("vae", "--iter_max", 3, "--compile", 1)
    assert again.returncode == 0 and "compil" not in again.stdout
    assert torch.load(tmp_path / "checkpoints" / NAMES["vae"] / "state.pt")["compiled"] is True

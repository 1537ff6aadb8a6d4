"""The compiled step does what the plain one does, and gives way where it cannot be had."""

import signal

import pytest
import torch
from conftest import NAMES, lines, needs_compiler, only_error, same, state, table, weights

import run_vae
from codebase import train
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime.parallel import Processes

MODELS = {
    "vae": VAE,
    "gmvae": GMVAE,
    "ssvae": SSVAE,
    "ssvae gw=0": lambda: SSVAE(gen_weight=0),
    "fsvae": FSVAE,
    "vae train_iw=3": lambda: VAE(train_iw=3),
    "gmvae train_iw=3": lambda: GMVAE(train_iw=3),
}


def batch_for(kind: str, count: int) -> train.Batch:
    """What the loss of a model takes, of so many random images."""
    x = torch.rand(count, 3072 if kind == "fsvae" else 784).round()
    y = torch.eye(10).repeat(count // 10, 1)

    def batch(index):
        if kind == "fsvae":
            return x[index], y[index]
        if kind.startswith("ssvae"):
            return x[index], x[:100], y[:100]
        return (x[index],)

    return batch


def terms_and_gradients(kind: str, compiled: bool):
    """Of one step, by name; the same numbers go in each time. The weights stay as they are."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    batch = batch_for(kind, 100)
    index = torch.arange(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    if compiled:
        step = train.compiled_step(model, optimizer, batch, index)
    else:
        step = train.plain_step(model, optimizer, batch, Processes())
    torch.manual_seed(1)
    terms = step(index)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return terms, gradients


def compare(kind: str, tolerance: float = 1e-5) -> None:
    terms, gradients = terms_and_gradients(kind, compiled=False)
    same_terms, same_gradients = terms_and_gradients(kind, compiled=True)
    torch.testing.assert_close(same_terms, terms, rtol=1e-5, atol=1e-5)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        compiled = same_gradients[name] / scale
        torch.testing.assert_close(compiled, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.fixture
def traced(monkeypatch):
    """The graph is traced whole as for compiling, and run by torch's own kernels: no wait."""

    def compile_graph(function):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(train, "compile_graph", compile_graph)


@pytest.mark.parametrize("kind", ["ssvae", "ssvae gw=0", "fsvae", "gmvae train_iw=3"])
def test_the_traced_step_is_the_plain_one(kind, traced):
    compare(kind)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_the_compiled_step_is_the_plain_one(kind):
    tolerance = 1e-5
    if "train_iw" in kind:
        # A log weight of -545 is rounded to 6e-5, and samples are weighed by the exponential of it:
        # in float32 the plain step is as far from the exact gradient as the compiled one.
        tolerance = 5e-5
    compare(kind, tolerance)


@needs_compiler
def test_compiled_training_keeps_its_bits_in_parts(few, script, tmp_path):
    """And has the metrics of the plain one."""
    made = {}
    for folder in ["whole", "parts", "plain"]:
        made[folder] = tmp_path / folder
        made[folder].mkdir()
    printed = lines(script("vae", "--compile", 1, "--iter_max", 50, cwd=made["whole"]))
    assert any(line.startswith("steps: compiled") for line in printed), printed
    lines(script("vae", "--compile", 1, "--iter_max", 20, cwd=made["parts"]))
    lines(script("vae", "--iter_max", 50, cwd=made["parts"]))  # auto resumes as it was begun
    lines(script("vae", "--compile", 0, "--iter_max", 50, cwd=made["plain"]))
    whole = weights(made["whole"], NAMES["vae"], 50)
    assert same(whole, weights(made["parts"], NAMES["vae"], 50))
    rows = table(made["whole"], NAMES["vae"])
    assert rows == table(made["parts"], NAMES["vae"])
    for row, plain in zip(rows, table(made["plain"], NAMES["vae"]), strict=True):
        assert float(row["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)


# ---------------------------------------------------------------------------------------------
# What is compiled, and what is said of it


@pytest.fixture
def broken(monkeypatch):
    """Compiling fails, after numbers were drawn."""

    def compile_graph(function):
        torch.rand(10)
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(train, "compile_graph", compile_graph)


def test_where_compiling_fails_the_plain_step_runs(few, script, tmp_path, broken):
    """One line says why, and no bit differs."""
    (tmp_path / "plain").mkdir()
    printed = lines(script("vae", "--iter_max", 5, "--compile", 1))
    said = [line for line in printed if line.startswith("steps:")]
    assert said == ["steps: plain (compiling failed: RuntimeError: no compiler)"]
    lines(script("vae", "--iter_max", 5, "--compile", 0, cwd=tmp_path / "plain"))
    tried = weights(tmp_path, NAMES["vae"], 5)
    assert same(tried, weights(tmp_path / "plain", NAMES["vae"], 5))
    assert state(tmp_path)["compiled"] is False


def test_resuming_in_another_way_is_said(few, script, traced):
    """The bits will differ from those of a run in one piece. In the same way it is silent."""
    assert "bits" not in script("vae", "--iter_max", 4, "--compile", 1).stdout
    same_way = script("vae", "--iter_max", 5, "--compile", 1).stdout
    assert "steps: compiled" in same_way
    assert "bits" not in same_way
    resumed = script("vae", "--iter_max", 6, "--compile", "auto").stdout
    assert "steps: compiled" in resumed
    assert "a run in one piece would be compiled otherwise" in resumed  # of six steps, not at all
    plain = script("vae", "--iter_max", 8, "--compile", 0).stdout
    assert "its bits will differ" in plain
    assert "steps: plain (as the steps before)" in script("vae", "--iter_max", 9).stdout


def test_auto_says_where_one_piece_is_compiled(few, script, traced, monkeypatch):
    """The first part was too short for it, and its way is kept."""
    monkeypatch.setattr(train, "COMPILE_FROM", 6)
    monkeypatch.setattr(train.shutil, "which", lambda name: name)
    for steps in (3, 5):
        assert "bits" not in script("vae", "--iter_max", steps, "--device", "cpu").stdout
    said = script("vae", "--iter_max", 7, "--device", "cpu").stdout
    assert "steps: plain (as the steps before)" in said
    (line,) = [line for line in said.splitlines() if "bits" in line]
    assert "in one piece would be compiled" in line
    whole = script("vae", "--iter_max", 7, "--device", "cpu", "--run", 1).stdout
    assert "steps: compiled" in whole
    assert "bits" not in whole


@pytest.mark.parametrize(
    "asked, steps, device, tools, compiled",
    [
        ("auto", 20_000, "cpu", ["my-compiler"], True),
        ("auto", 20_000, "cpu", ["g++"], False),
        ("auto", 1, "cuda", [], True),  # recorded, which takes no compiler and no time
        ("0", 20_000, "cuda", [], False),
        ("auto", 20_000, "mps", ["g++"], False),
        ("auto", 19_999, "cpu", ["my-compiler"], False),
        ("1", 1, "cpu", [], True),
        ("0", 20_000, "cpu", ["my-compiler"], False),
    ],
)
def test_tools_and_steps_decide(asked, steps, device, tools, compiled, monkeypatch):
    def find(name):
        return name if name in tools else None

    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(train.shutil, "which", find)
    run = run_vae.parse(["--compile", asked, "--iter_max", str(steps), "--data", "digits"])
    why = train.why_plain(run.changed(device=device), process_count=1, before=None)
    assert (why == "") == compiled
    if asked == "auto" and steps == 20_000 and not compiled:
        assert device in why


@pytest.mark.parametrize("asked", ["auto", "1"])
def test_steps_of_several_processes_are_plain(asked):
    run = run_vae.parse(["--compile", asked, "--iter_max", "20000"]).changed(device="cpu")
    assert train.why_plain(run, process_count=2, before=None) == "2 processes"
    assert train.why_plain(run, process_count=2, before=True) == "2 processes"


def test_a_signal_while_the_step_is_compiled(few, script, tmp_path, monkeypatch):
    """It ends the run at once, and nothing is lost."""
    lines(script("vae", "--iter_max", 3))
    path = tmp_path / "checkpoints" / NAMES["vae"] / "state.pt"
    before = path.read_bytes()

    def interrupt(function):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "compile_graph", interrupt)
    only_error(script("vae", "--iter_max", 6, "--compile", 1), 143)
    assert path.read_bytes() == before


def test_nothing_is_compiled_where_no_step_is_left(few, script, tmp_path, traced):
    lines(script("vae", "--iter_max", 3, "--compile", 1))
    (tmp_path / "checkpoints" / NAMES["vae"] / "model-00003.pt").unlink()
    assert "compil" not in "\n".join(lines(script("vae", "--iter_max", 3, "--compile", 1)))
    assert state(tmp_path)["compiled"] is True

"""The compiled step does what the plain one does, and gives way where it cannot be had."""

import functools
import os
import signal
import subprocess

import pytest
import torch
from conftest import NAMES, command, lines, needs_compiler, only_error, same, state, table, weights
from untrained import made, rows

import run_vae
from codebase import train
from codebase.runtime.parallel import Processes


def compare(kind: str, settings: dict, tolerance: float = 1e-5) -> None:
    """Terms and gradients of a plain and a compiled step on the same numbers are close."""
    model = made(kind, **settings)
    batch = functools.partial(rows, kind)
    index = torch.arange(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)  # the weights stay as they are
    plain = train.plain_step(model, optimizer, batch, Processes())
    torch.manual_seed(1)
    terms = plain(index)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    compiled = train.compiled_step(model, optimizer, batch, index)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(index), terms, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        wanted = gradients[name]
        if wanted is None:
            assert parameter.grad is None, name
            continue
        scale = wanted.abs().max()
        found = parameter.grad / scale
        torch.testing.assert_close(found, wanted / scale, rtol=0, atol=tolerance, msg=name)


def test_the_traced_step_is_the_plain_one(monkeypatch):
    """The graph is traced whole as for compiling, and run by torch's own kernels: no wait."""

    def trace(function):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(train, "compile_graph", trace)
    compare("ssvae", {})


@needs_compiler
@pytest.mark.long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no AVX-512")
def test_a_graph_compiled_with_avx512_serves_avx2(digits_dir, tmp_path):
    """As where a user sets ATEN_CPU_CAPABILITY between two runs on a machine."""
    found = {}
    libraries = []
    for instructions in ("avx512", "avx2"):
        folder = tmp_path / instructions
        folder.mkdir()
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        environment["ATEN_CPU_CAPABILITY"] = instructions
        flags = ["--data", "digits", "--data_dir", digits_dir, "--iter_max", 20, "--compile", 1]
        settings = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE}
        result = subprocess.run(command("vae", *flags), check=True, **settings)
        assert "steps: compiled" in result.stdout
        found[instructions] = weights(folder, NAMES["vae"], 20)
        libraries.append(sorted((tmp_path / "cache").rglob("*.so")))
    assert libraries[0] == libraries[1]  # the second run takes what the first one has compiled
    torch.testing.assert_close(found["avx2"], found["avx512"], rtol=0, atol=1e-4)


STEPS = [
    ("vae", {}),
    ("ssvae", {}),
    ("ssvae", {"gen_weight": 0}),
    ("fsvae", {}),
    ("gmvae", {"train_iw": 3}),
]


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("kind, settings", STEPS)
def test_the_compiled_step_is_the_plain_one(kind, settings):
    tolerance = 1e-5
    if "train_iw" in settings:
        # A log weight of -545 is rounded to 6e-5, and samples are weighed by the exponential of it:
        # in float32 the plain step is as far from the exact gradient as the compiled one.
        tolerance = 5e-5
    compare(kind, settings, tolerance)


@needs_compiler
def test_compiled_training_keeps_its_bits_in_parts(few, script, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    printed = lines(script("vae", "--compile", 1, "--iter_max", 50, cwd=whole))
    assert any(line.startswith("steps: compiled") for line in printed), printed
    lines(script("vae", "--compile", 1, "--iter_max", 20, cwd=parts))
    lines(script("vae", "--iter_max", 50, cwd=parts))  # auto resumes as it was begun
    assert same(weights(whole, NAMES["vae"], 50), weights(parts, NAMES["vae"], 50))
    assert table(whole, NAMES["vae"]) == table(parts, NAMES["vae"])


# ---------------------------------------------------------------------------------------------
# What is compiled, and what is said of it


def test_where_compiling_fails_the_plain_step_runs(few, script, tmp_path, monkeypatch):
    """One line says why, and no bit differs."""

    def fail(function):
        torch.rand(10)
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(train, "compile_graph", fail)
    (tmp_path / "plain").mkdir()
    printed = lines(script("vae", "--iter_max", 5, "--compile", 1))
    said = [line for line in printed if line.startswith("steps:")]
    assert said == ["steps: plain (compiling failed: RuntimeError: no compiler)"]
    lines(script("vae", "--iter_max", 5, "--compile", 0, cwd=tmp_path / "plain"))
    tried = weights(tmp_path, NAMES["vae"], 5)
    assert same(tried, weights(tmp_path / "plain", NAMES["vae"], 5))
    assert state(tmp_path)["compiled"] is False


def test_resuming_in_another_way_is_said(few, script, monkeypatch):
    """The bits will differ from those of a run in one piece. In the same way it is silent."""
    monkeypatch.setattr(train, "compile_graph", lambda function: function)
    lines(script("vae", "--iter_max", 4, "--compile", 1))
    same_way = script("vae", "--iter_max", 5, "--compile", 1).stdout
    assert "steps: compiled" in same_way
    assert "bits" not in same_way
    resumed = script("vae", "--iter_max", 6, "--compile", "auto").stdout
    assert "steps: compiled" in resumed
    assert "a run in one piece would be compiled otherwise" in resumed  # of six steps, not at all
    plain = script("vae", "--iter_max", 8, "--compile", 0).stdout
    assert "its bits will differ" in plain
    assert "steps: plain (as the steps before)" in script("vae", "--iter_max", 9).stdout


DECISIONS = [  # --compile, --iter_max, device, processes, $CXX, and whether the step is plain
    ("auto", 20_000, "cpu", 1, "mine", False),
    ("auto", 20_000, "cpu", 1, "missing", True),
    ("auto", 19_999, "cpu", 1, "mine", True),
    ("auto", 1, "cuda", 1, "missing", False),  # recorded, which takes no compiler and no time
    ("auto", 20_000, "mps", 1, "mine", True),
    ("0", 20_000, "cpu", 1, "mine", True),
    ("1", 1, "cpu", 1, "mine", False),
    ("1", 20_000, "cpu", 2, "mine", True),
]


@pytest.mark.parametrize("asked, steps, device, processes, cxx, plain", DECISIONS)
def test_what_decides_on_compiling(asked, steps, device, processes, cxx, plain, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(train.shutil, "which", lambda name: name if name == "mine" else None)
    run = run_vae.parse(["--compile", asked, "--iter_max", str(steps), "--data", "digits"])
    why = train.why_plain(run.changed(device=device), process_count=processes, before=None)
    assert (why != "") == plain


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

"""What the tests share: the scripts as a user calls them, the drawn digits, and real MNIST where it is present."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MNIST = Path(os.environ.get("MNIST_DIR", ROOT.parent / "shared" / "data"))
REFERENCE = Path(os.environ.get("REFERENCE_DIR", ROOT.parent / "shared" / "reference"))
sys.path.insert(0, str(ROOT))

needs_mnist = pytest.mark.skipif(
    not (MNIST / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists(), reason="no MNIST in MNIST_DIR"
)
needs_reference = pytest.mark.skipif(
    not (REFERENCE / "checkpoints").exists(), reason="no reference checkpoints in REFERENCE_DIR"
)


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / f"run_{script}.py"), *map(str, flags)]


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """A data folder in which the drawn digits are stored once for all tests."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture
def script(tmp_path, digits_dir, monkeypatch, capfd):
    """Call main() of a script in an empty folder on drawn digits: script("vae", "--iter_max", 20)."""

    def run(name: str, *flags, cwd=tmp_path) -> subprocess.CompletedProcess:
        words = [f"run_{name}.py", "--data", "digits", "--data_dir", str(digits_dir), *map(str, flags)]
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", words)
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            code = importlib.import_module(f"run_{name}").main(words[1:])
        except SystemExit as exit:
            code = exit.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


@pytest.fixture
def process(tmp_path, digits_dir):
    """Run a script in a process of its own: process("vae", "--iter_max", 20) -> CompletedProcess."""

    def run(name: str, *flags, env=None, cwd=tmp_path) -> subprocess.CompletedProcess:
        flags = ["--data", "digits", "--data_dir", digits_dir, *flags]
        return subprocess.run(
            command(name, *flags),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

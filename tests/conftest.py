"""What tests share: scripts as a user calls them, what they stored, digits, MNIST if present."""

import csv
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# Before torch is loaded: two threads that share a busy machine wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
MNIST = Path(os.environ.get("MNIST_DIR", ROOT.parent / "shared" / "data"))
REFERENCE = Path(os.environ.get("REFERENCE_DIR", ROOT.parent / "shared" / "reference"))
sys.path.insert(0, str(ROOT))

NAMES = {  # of the runs with default settings on the drawn digits
    "vae": "model=vae_z=10_data=digits_run=0000",
    "gmvae": "model=gmvae_z=10_k=500_data=digits_run=0000",
    "ssvae": "model=ssvae_gw=001_cw=100_data=digits_run=0000",
    "fsvae": "model=fsvae_data=digits_run=0000",
}

MNIST_TEST = MNIST / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
CHECKPOINTS = REFERENCE / "checkpoints"
COMPILER = shutil.which("g++")

skip_if = pytest.mark.skipif
needs_mnist = skip_if(not MNIST_TEST.exists(), reason="no MNIST in MNIST_DIR")
needs_reference = skip_if(not CHECKPOINTS.exists(), reason="no checkpoints in REFERENCE_DIR")
needs_compiler = skip_if(not COMPILER, reason="no C++ compiler on this machine")
needs_cuda = skip_if(not torch.cuda.is_available(), reason="no CUDA on this machine")


# A shell's `nohup ... &` leaves these ignored, and so they would be in every process started here.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_addoption(parser):
    text = "the long variants too: more kills, more models"
    parser.addoption("--long", action="store_true", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long variant: --long runs it"))


@pytest.fixture(scope="session")
def long(request) -> bool:
    """Whether the long variants were asked for."""
    return request.config.getoption("--long")


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / f"run_{script}.py"), *map(str, flags)]


def of_all_workers(tmp_path_factory) -> Path:
    """A folder of this test run that its workers share."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        return base.parent
    return base


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """A data folder in which the drawn digits are stored once for all tests."""
    from codebase import data

    folder = of_all_workers(tmp_path_factory) / "drawn"
    folder.mkdir(exist_ok=True)
    for split in ["train", "test"]:  # the colour ones are drawn by the first test that wants them
        data.drawn_digits(str(folder), split, False)
    return folder


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """Call main() of a script in an empty folder, with no other flags: main("vae", "--z", 4).

    Its plots are stored without being rendered, which takes longest of all, unless plots=True.
    """

    def savefig(figure, file, **options) -> None:
        file.write(b"a plot")

    def run(name: str, *flags, cwd=tmp_path, plots=False) -> subprocess.CompletedProcess:
        words = [f"run_{name}.py", *map(str, flags)]
        if not plots:
            monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        try:
            code = importlib.import_module(f"run_{name}").main(words[1:])
        except SystemExit as exit:
            code = exit.code
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


@pytest.fixture
def script(main, digits_dir):
    """Call main() of a script in an empty folder on drawn digits: script("vae", "--z", 4)."""

    def run(name: str, *flags, **kwargs) -> subprocess.CompletedProcess:
        return main(name, "--data", "digits", "--data_dir", digits_dir, *flags, **kwargs)

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Send all downloads to a port on which nobody listens, those of started processes too."""
    # It is made at the first download, with the proxies of that time.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ["no_proxy", "NO_PROXY"]:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def process(tmp_path, digits_dir):
    """Run a script in a process of its own on drawn digits: process("vae", "--z", 4)."""

    def run(name: str, *flags, env=None, cwd=tmp_path) -> subprocess.CompletedProcess:
        words = command(name, "--data", "digits", "--data_dir", digits_dir, *flags)
        return subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def start(model: str, folder: Path, digits_dir: Path, *flags, **kwargs) -> subprocess.Popen:
    """A script in a process of its own that is left running."""
    words = command(model, "--data", "digits", "--data_dir", digits_dir, *flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=pipe, text=True, **kwargs)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a file is there, or the process that should write it has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def torchrun(
    count: int, model: str, folder: Path, digits_dir: Path, *flags, env=None
) -> subprocess.CompletedProcess:
    """A script on several processes of one thread each."""
    script = command(model, "--data", "digits", "--data_dir", digits_dir, *flags)
    return on_processes(count, folder, script[1:], env)


def on_processes(
    count: int, folder: Path, program: list[str], env=None
) -> subprocess.CompletedProcess:
    """A Python program and its flags on several processes, which torchrun starts in a folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={count}", "--", *program],
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content[str(path.relative_to(folder))] = path.read_bytes()
    return content


def weights(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """The weights that a run stored at a step."""
    return torch.load(folder / "checkpoints" / name / f"model-{step:05d}.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """metrics.csv without the one column that no two runs share."""
    with (folder / "logs" / name / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def checkpoint_steps(folder: Path, model: str) -> list[int]:
    """The steps at which the default run of a model stored its weights, ascending."""
    paths = (folder / "checkpoints" / NAMES[model]).glob("model-*.pt")
    return sorted(int(path.stem.removeprefix("model-")) for path in paths)


class Largest(TorchDispatchMode):
    """Inside, remember the size of the largest tensor that is made."""

    elements = 0
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage().nbytes()  # less than its elements' where expanded
                self.elements = max(self.elements, made.numel())
                self.bytes = max(self.bytes, storage)
        return out

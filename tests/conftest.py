"""What tests share: scripts as a user calls them, what they stored, digits, MNIST if present."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from hashlib import sha256
from pathlib import Path

# Before torch is loaded: two threads that share a busy machine wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# And tests compare bits of the CPU. The workers of xdist inherit what the first process has.
if "PYTEST_XDIST_WORKER" not in os.environ and "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image

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

SHIPPED = {  # the weights that come with the code
    "vae": "model=vae_z=10_run=2021/model-20000.pt",
    "gmvae": "model=gmvae_z=10_k=500_run=2021/model-20000.pt",
    "ssvae": "model=ssvae_gw=001_cw=100_run=2021/model-30000.pt",
}

skip_if = pytest.mark.skipif
needs_mnist = skip_if(not (MNIST / "MNIST/raw").exists(), reason="no MNIST in MNIST_DIR")
needs_reference = skip_if(not (REFERENCE / "checkpoints").exists(), reason="no REFERENCE_DIR")
needs_compiler = skip_if(not shutil.which("g++"), reason="no C++ compiler on this machine")
needs_cuda = skip_if(not torch.cuda.is_available(), reason="no CUDA here, or no --gpu")


# A shell's `nohup ... &` leaves these ignored, and so they would be in every process started here.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_addoption(parser):
    text = "the long variants too: more kills, more models"
    parser.addoption("--long", action="store_true", help=text)
    parser.addoption("--gpu", action="store_true", help="show the GPUs to the tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long variant: --long runs it"))


# ---------------------------------------------------------------------------------------------
# Data


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """A data folder in which the drawn digits are stored once for all tests."""
    from codebase import data

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "drawn"
    folder.mkdir(exist_ok=True)
    for split in ["train", "test"]:  # the colour ones are drawn by the first test that wants them
        data.drawn_digits(str(folder), split, False)
    return folder


def idx_file(header: list[int], content: np.ndarray) -> bytes:
    """A file as those of MNIST: a magic number and counts, and then bytes."""
    return np.array(header, ">i4").tobytes() + content.tobytes()


@pytest.fixture
def few(monkeypatch):
    """Splits of 1,500 and 1,200 images of noise in the place of a data set's; quick evaluations.

    A picture's bits are kept, without the time that its compression takes.
    """
    from untrained import noise

    from codebase import data, evaluate

    def load(run, split):
        count = {"train": 1500, "test": 1200}[split]
        return noise(count, 3072 if run.real_data == "svhn" else 784, seed=count)

    def save_image(image, file, **_) -> None:
        file.write(sha256(image.tobytes()).digest())

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(evaluate, "SAMPLES", 10)
    monkeypatch.setattr(Image.Image, "save", save_image)


@pytest.fixture
def no_network(monkeypatch):
    """Send all downloads to a port on which nobody listens, those of started processes too."""
    # It is made at the first download, with the proxies of that time.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ["no_proxy", "NO_PROXY"]:
        monkeypatch.delenv(variable, raising=False)


# ---------------------------------------------------------------------------------------------
# Scripts


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


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / f"run_{script}.py"), *map(str, flags)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a file is there, or the process that should write it has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def signal_at(monkeypatch, count: int, number: int) -> None:
    """Send this process a signal within that step of training, counted from 1 from here on."""
    step = torch.optim.Adam.step
    calls = []

    def signalled(*args, **kwargs):
        calls.append(number)
        if len(calls) == count:
            signal.raise_signal(number)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", signalled)


def raising(error: BaseException):
    """A function that raises this, whatever it is called with."""

    def raise_it(*_, **__):
        raise error

    return raise_it


def lines(result: subprocess.CompletedProcess) -> list[str]:
    """What a command printed that went well."""
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def only_error(result: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line on stderr of a command that ended with that code."""
    assert result.returncode == code, result
    (line,) = result.stderr.splitlines()
    return line


# ---------------------------------------------------------------------------------------------
# What they stored


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content[str(path.relative_to(folder))] = path.read_bytes()
    return content


def comparable(values):
    """Nested dictionaries in which every tensor is a checksum of its bits."""
    if isinstance(values, dict):
        return {key: comparable(value) for key, value in values.items()}
    if isinstance(values, torch.Tensor):
        return sha256(values.numpy().tobytes()).hexdigest()
    return values


def stored(folder: Path) -> dict:
    """Every file of the runs, comparable; without the seconds, which no two runs share."""
    found = {}
    for file, content in tree(folder).items():
        path = folder / file
        if path.name == "metrics.csv":
            content = table(folder, path.parent.name)
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
        if path.name == "state.pt":
            content["metrics"]["seconds"] = 0
            content["metrics"]["rows"] = [row[:-1] for row in content["metrics"]["rows"]]
        found[file] = comparable(content)
    return found


def weights(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """The weights that a run stored at a step."""
    return torch.load(folder / "checkpoints" / name / f"model-{step:05d}.pt", weights_only=True)


def state(folder: Path, name: str = NAMES["vae"]) -> dict:
    """What a run resumes from."""
    return torch.load(folder / "checkpoints" / name / "state.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(folder: Path, name: str, file: str = "metrics.csv") -> list[dict[str, str]]:
    """The rows of metrics.csv, or of test.csv, without the one column that no two runs share."""
    with (folder / "logs" / name / file).open() as opened:
        rows = list(csv.DictReader(opened))
    for row in rows:
        row.pop("seconds", None)
    return rows


def results(folder: Path, name: str = NAMES["vae"]) -> dict:
    return json.loads((folder / "logs" / name / "results.json").read_text())


def checkpoint_steps(folder: Path, model: str) -> list[int]:
    """The steps at which the default run of a model stored its weights, ascending."""
    paths = (folder / "checkpoints" / NAMES[model]).glob("model-*.pt")
    return sorted(int(path.stem.removeprefix("model-")) for path in paths)

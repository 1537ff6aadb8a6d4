"""The oldest versions that requirements.txt admits. It needs a network, or pip's cache."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

FILES = ["requirements.txt", "tests/requirements.txt"]
NOT_NEEDED = ["ruff", "import-linter"]  # tools that no test uses
FAST = ["math", "models", "data", "evaluate", "plots", "course", "resume"]


def oldest_versions() -> list[str]:
    """What pip installs of each requirement, at its lowest version."""
    pins = []
    for file in FILES:
        for requirement in (ROOT / file).read_text().split():
            name, lowest = requirement.split(">=")
            if name not in NOT_NEEDED:
                pins.append(f"{name}=={lowest}")
    return pins


@pytest.mark.long
def test_the_fast_tests_pass_on_the_oldest_versions():
    # Not in pytest's own folder, which keeps the gigabytes of the last three runs.
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *oldest_versions()], check=True)
        tests = [f"tests/test_{name}.py" for name in FAST]
        options = ["-p", "no:cacheprovider", "-W", "ignore"]
        run = [python, "-m", "pytest", *options, *tests]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

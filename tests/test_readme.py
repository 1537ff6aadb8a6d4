"""The README's Python examples run as they stand, and its flags are the scripts' own."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from codebase import checkpoint, cli
from codebase.models.vae import VAE

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_readme_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoint.save_model_by_name(VAE(name="model=vae_z=10_run=0000"), 20_000)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{EXAMPLES[number]}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_there_are_two_examples_and_every_flag_is_explained():
    assert len(EXAMPLES) >= 2
    assert [flag for flag in cli.FLAGS if f"`--{flag}`" not in README] == []

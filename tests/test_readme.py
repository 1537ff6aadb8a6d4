"""The README's Python examples run as they stand, its commands are taken, and its flags are the scripts' own."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import NAMES, ROOT

from codebase import checkpoint
from codebase.models.vae import VAE
from codebase.runtime import options

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)
KINDS = {model: importlib.import_module(f"run_{model}").Run for model in NAMES}
FLAGS = {model: {field.name for field in fields(kind)} | {"runs"} for model, kind in KINDS.items()}
TABLE = re.findall(r"^\| `--(\w+)` \| (.*?) \|", README, flags=re.M)  # flag and default
CODE = re.findall(r"```.*?```|`[^`\n]+`", README, flags=re.S)
COMMANDS = re.findall(rf"run_({'|'.join(NAMES)})\.py([^\n`#|&;()]*)", "\n".join(CODE))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_readme_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoint.save_model_by_name(VAE(name="model=vae_z=10_run=0000"), 20_000)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{EXAMPLES[number]}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_there_are_two_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.long
def test_the_write_ups_example_prints_what_stands_below_it():
    page = (ROOT / "docs" / "writeup.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, flags=re.S).groups()
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    number = r"\d+\.\d\d"
    assert re.sub(number, "", printed) == re.sub(number, "", shown)
    assert [*map(float, re.findall(number, printed))] == pytest.approx(
        [*map(float, re.findall(number, shown))], abs=0.05
    )


def test_what_the_readme_shows_of_a_run_is_what_the_tables_have_of_it():
    stored = json.loads((ROOT / "docs" / "figures.json").read_text())["model=vae_z=10_run=0000"]["figures"]
    bound = "NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**stored)
    assert README.splitlines().count(bound) == 2  # of the training, and of --train 0
    for m in (1, 10, 100, 1000):
        assert f"Negative IWAE-{m}: {stored[f'niwae_{m}']}" in README.splitlines()


def test_every_flag_of_every_script_is_explained_and_every_flag_explained_is_one():
    listed = [flag for flag, _ in TABLE]
    assert set(listed) == set.union(*FLAGS.values()) and len(listed) == len(set(listed))


def test_the_defaults_in_the_readme_are_the_scripts():
    for flag, shown in TABLE:
        for model, kind in KINDS.items():
            default = {field.name: field.default for field in fields(kind)}.get(flag)
            if default is not None:  # one for all scripts, or (SSVAE 30000, ...) where a script has another
                values = default if isinstance(default, tuple) else [default]
                words = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
                assert shown.split(" (")[0] == words or f"{model.upper()} {words}" in shown, (flag, model)


@pytest.mark.parametrize("model, written", COMMANDS, ids=[f"{model}{words}".strip() for model, words in COMMANDS])
def test_a_command_of_the_readme_is_taken(model, written, tmp_path, monkeypatch):
    words = [{"D": "--data_dir=.", "$ID": "1"}.get(word, word) for word in shlex.split(written)]
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.endswith(".npz"):  # a user's own images
            (tmp_path / word).touch()
    values = options.parse(KINDS[model], "", words)
    KINDS[model](**{name: value for name, value in values.items() if name != "runs"} | {"data": "digits"})

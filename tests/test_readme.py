"""The pages' commands and examples run as a user types them; their flags are the scripts' own."""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT
from PIL import Image

from codebase.runtime import options

PATHS = ("README.md", "docs/usage.md", "docs/writeup.md")
PAGES = {name: (ROOT / name).read_text() for name in PATHS}
README = PAGES["README.md"]
KINDS = {model: importlib.import_module(f"run_{model}").Run for model in NAMES}
FLAGS = {model: {field.name for field in fields(kind)} | {"runs"} for model, kind in KINDS.items()}
TABLE = re.findall(r"^\| `--(\w+)` \| (.*?) \|", README, flags=re.M)  # flag and default

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
SLOW = ("run_vae.main", "range(40)")  # a training, and forty evaluations of two models


def pasted(page: str) -> list[tuple[str, str]]:
    """What a reader may paste from a page: pairs of "bash" or "python" and the code.

    First its blocks in order, then what stands after `$ ` where it shows a terminal, then each
    `python ...` in its text.
    """
    text = PAGES[page]
    blocks = FENCE.findall(text)
    found = [(language, code) for language, code in blocks if language in ("bash", "python")]
    for language, code in blocks:
        if not language:
            found += [("bash", line) for line in re.findall(r"^\$ (.*)", code, flags=re.M)]
    lines = re.findall(r"`!?((?:nohup |torchrun |python3? )[^`\n]+)`", FENCE.sub("", text))
    return found + [("bash", line) for line in lines]


def cases(language: str) -> list:
    return [
        pytest.param(code, id=f"{page}, {number}")
        for page in PAGES
        for number, (kind, code) in enumerate(pasted(page), 1)
        if kind == language
    ]


# Stands in for python, python3, torchrun and pip, first on PATH, and notes the words that it was
# given. `python -m venv FOLDER` makes a folder of such stand-ins. With $FEW_STEPS it then runs a
# script, with a few steps on a few images, or as it stands where it loads the shipped weights.
STAND_IN = """#!/bin/bash
line=$(printf '%q ' "$(basename "$0")" "$@")
echo "$line" >> "$NOTED"
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in python pip; do cp "$0" "$3/bin/$name"; done
fi
if [ -n "$FEW_STEPS" ] && [[ " $*" =~ \\ run_([a-z]+)\\.py ]]; then
    if [[ " $* " != *" --run 2021 "* ]]; then
        set -- "$@" --iter_max 4 --iter_save 2
        if [[ " $* " != *" --data "* ]]; then set -- "$@" --data "few_${BASH_REMATCH[1]}.npz"; fi
    fi
    if [ "$(basename "$0")" = torchrun ]; then set -- -m torch.distributed.run "$@"; fi
    exec "$REAL_PYTHON" "$@"
fi
"""
TMUX = '#!/bin/bash\nexec bash -c "${@: -1}"\n'  # the command of a new session, in this one


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The root of a fresh clone as the current folder, with the shipped weights."""
    for path in [*ROOT.glob("run_*.py"), ROOT / "codebase", ROOT / "docs", ROOT / "tests"]:
        (tmp_path / path.name).symlink_to(path)
    shipped = (ROOT / "checkpoints" / ".gitignore").read_text()
    for name in re.findall(r"^!(model=.*\.pt)$", shipped, flags=re.M):
        place = tmp_path / "checkpoints" / name
        place.parent.mkdir(parents=True)
        shutil.copy(ROOT / "checkpoints" / name, place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def users_files(clone) -> None:
    """A user's pictures, and FashionMNIST's files with few images: nothing is downloaded then."""
    (clone / "pictures").mkdir()
    random = np.random.RandomState(0)
    for number in range(20):
        picture = random.randint(0, 256, (40, 30, 3)).astype(np.uint8)
        Image.fromarray(picture).save(clone / "pictures" / f"{number % 10}-{number}.png")
    folder = clone / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = random.randint(0, 256, (30, 28, 28)).astype(np.uint8)
        labels = (np.arange(30) % 10).astype(np.uint8)
        images = struct.pack(">4i", 0x803, 30, 28, 28) + pixels.tobytes()
        digits = struct.pack(">2i", 0x801, 30) + labels.tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(digits)


@pytest.fixture
def shell(clone, tmp_path_factory):
    """shell("python run_vae.py"): run it in bash; return the result and the commands it gave."""
    stand_ins = tmp_path_factory.mktemp("stand_ins")
    for name in ("python", "python3", "torchrun", "pip"):
        (stand_ins / name).write_text(STAND_IN)
    (stand_ins / "tmux").write_text(TMUX)
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    noted = stand_ins / "noted.txt"

    def run(script: str, few_steps: bool = False, timeout: int = 60):
        noted.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "NOTED": str(noted),
            "REAL_PYTHON": sys.executable,
            "FEW_STEPS": "1" if few_steps else "",
        }
        words = ["bash", "-e", "-c", f"{script}\nwait"]
        settings = {"cwd": clone, "env": environment, "timeout": timeout}
        result = subprocess.run(words, capture_output=True, text=True, **settings)
        return result, [shlex.split(line) for line in noted.read_text().splitlines()]

    return run


class Parsed(BaseException):
    """A program's parser has taken its command line."""


@pytest.fixture
def take(clone, monkeypatch):
    """take(["python", "run_vae.py", "--run", "1"]): have the program check its flags alone."""

    def only_parse(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args

    def check(words: list[str]) -> None:
        program, *words = words
        if program == "torchrun":
            assert words[0].startswith("--nproc_per_node=")
            words = words[words.index("--") + 1 :]
        if words[0] == "install" or words[:2] in (["-m", "pytest"], ["-m", "venv"]):
            files = [words[at + 1] for at, word in enumerate(words) if word == "-r"]
            assert all((ROOT / file).is_file() for file in files)
            return
        script, *flags = words
        assert (ROOT / script).is_file(), script
        if script.startswith("run_"):
            for flag in flags:
                if flag.endswith(".npz"):
                    (clone / flag).touch()
            options.parse(KINDS[script.removeprefix("run_").removesuffix(".py")], "", flags)
            return
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")

    return check


@pytest.mark.parametrize("script", cases("bash"))
def test_commands_of_a_page_are_taken(script, shell, take):
    result, commands = shell(script)
    assert result.returncode == 0, result.stderr
    assert commands, "it calls no program of the project's"
    for words in commands:
        take(words)


@pytest.mark.parametrize("flags", [["D"], ["--data_dir", ""], ["--iw"]], ids=str)
def test_a_wrong_command_is_not_taken(flags, take):
    with pytest.raises(SystemExit) as stopped:
        take(["python", "run_vae.py", *flags])
    assert stopped.value.code == 2


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, clone, shell, users_files, no_network):
    for model in NAMES:
        shape = (200, 32, 32, 3) if model == "fsvae" else (200, 28, 28)
        x = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
        y = np.arange(200) % 10
        np.savez(clone / f"few_{model}.npz", x=x, y=y, x_test=x[:50], y_test=y[:50])
    for language, code in pasted(page):
        if language == "python":
            words = [sys.executable, "-c", code]
            result = subprocess.run(words, capture_output=True, text=True, timeout=600)
        else:
            result, _ = shell(code, few_steps=True, timeout=1200)
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
        assert "error" not in result.stderr, f"{code}\n{result.stderr}"


@pytest.mark.parametrize("code", cases("python"))
def test_an_example_runs(code, clone, users_files):
    if any(word in code for word in SLOW):
        pytest.skip("a slow example: --long runs it")
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def test_every_page_has_examples_and_commands():
    for page in PAGES:
        kinds = [kind for kind, _ in pasted(page)]
        assert kinds.count("bash") >= 2 and kinds.count("python") >= 1
    assert len(cases("python")) >= 2


def test_links_between_the_pages_lead_somewhere():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", FENCE.sub("", text)):
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.is_file(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text().lower(), flags=re.M)
                plain = [re.sub(r"[^\w\- ]", "", title) for title in titles]
                anchors = [title.replace(" ", "-") for title in plain]
                assert anchor in anchors, f"{page}: #{anchor}"


@pytest.mark.long
def test_the_write_ups_example_prints_what_stands_below_it():
    page = PAGES["docs/writeup.md"]
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
                assert shown.split(" (")[0] == words or f"{model.upper()} {words}" in shown, (
                    flag,
                    model,
                )

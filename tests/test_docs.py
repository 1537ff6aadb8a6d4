"""The pages say what is so: commands and examples run as a user types them, flags are the scripts'.

Links lead somewhere, and every promise names a test that is there.
"""

import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, idx_file
from PIL import Image

PATHS = ["README.md", "docs/usage.md", "docs/design.md", "docs/benchmark.md", "docs/writeup.md"]
PAGES = {name: (ROOT / name).read_text() for name in PATHS}
README = PAGES["README.md"]
DESIGN = PAGES["docs/design.md"]
SCRIPTS = {model: importlib.import_module(f"run_{model}") for model in NAMES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
SLOW = ["run_vae.main", "range(40)"]  # a training, and forty evaluations of two models
TESTS = set()
for path in (ROOT / "tests").glob("test_*.py"):
    TESTS.update(re.findall(r"^def (test_\w+)", path.read_text(), flags=re.M))


def section(page: str, title: str) -> str:
    """What stands below a title, up to the next one of any level."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", page, flags=re.S | re.M)[1]


def flags_of(page: str) -> dict[str, str]:
    """The flags of a page's tables, with their defaults as they are shown."""
    found = {}
    for names, default in re.findall(r"^\| (`--.*?) \| (.*?) \|", PAGES[page], flags=re.M):
        for name in re.findall(r"--(\w+)", names):
            assert name not in found
            found[name] = default
    return found


def pasted(page: str) -> list[tuple[str, str]]:
    """What a reader may paste from a page: pairs of "bash" or "python" and the code.

    First its blocks in order, then what stands after `$ ` where it shows a terminal, then each
    `python ...` in its text.
    """
    text = PAGES[page]
    blocks = FENCE.findall(text)
    found = [(language, code) for language, code in blocks if language in ("bash", "python")]
    lines = []
    for language, code in blocks:
        if not language:
            lines += re.findall(r"^\$ (.*)", code, flags=re.M)
    lines += re.findall(r"`!?((?:nohup |torchrun |python3? )[^`\n]+)`", FENCE.sub("", text))
    return found + [("bash", line) for line in lines]


def cases(language: str) -> list:
    found = []
    for page in PAGES:
        for number, (kind, code) in enumerate(pasted(page), 1):
            if kind == language:
                found.append(pytest.param(code, id=f"{page}, {number}"))
    return found


# Stands in for the programs below, first on PATH, and notes the words that it was
# given. `python -m venv FOLDER` makes a folder of such stand-ins. With $FEW_STEPS it then runs a
# script, with a few steps on a few images, or as it stands where it loads the shipped weights.
PROGRAMS = ["python", "python3", "torchrun", "pip", "lint-imports"]
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
    """The root of a fresh clone, installed, as the current folder; with the shipped weights."""
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()  # the stand-ins are on PATH already
    for path in [*ROOT.glob("run_*.py"), ROOT / "codebase", ROOT / "docs", ROOT / "tests"]:
        (tmp_path / path.name).symlink_to(path)
    shipped = (ROOT / "checkpoints" / ".gitignore").read_text()
    for name in re.findall(r"^!(model=.*\.pt)$", shipped, flags=re.M):
        place = tmp_path / "checkpoints" / name
        place.parent.mkdir(parents=True)
        shutil.copy(ROOT / "checkpoints" / name, place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def few_images(clone: Path, name: str) -> None:
    """Write a data set's files with few images, so that torchvision downloads nothing."""
    folder = clone / "data" / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        pixels = np.random.RandomState(0).randint(0, 256, (30, 28, 28)).astype(np.uint8)
        labels = (np.arange(30) % 10).astype(np.uint8)
        images = idx_file([2051, 30, 28, 28], pixels)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_file([2049, 30], labels))


@pytest.fixture
def users_files(clone) -> None:
    """A user's pictures, and few images of the data sets that examples load."""
    (clone / "pictures").mkdir()
    random = np.random.RandomState(0)
    for number in range(20):
        picture = random.randint(0, 256, (40, 30, 3)).astype(np.uint8)
        Image.fromarray(picture).save(clone / "pictures" / f"{number % 10}-{number}.png")
    few_images(clone, "FashionMNIST")
    few_images(clone, "MNIST")


@pytest.fixture
def shell(clone, tmp_path_factory):
    """shell("python run_vae.py"): run it in bash; return the result and the commands it gave."""
    stand_ins = tmp_path_factory.mktemp("stand_ins")
    for name in PROGRAMS:
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


def assert_taken(words: list[str], folder: Path) -> None:
    """The flags of a command are the script's, and the files that it names are there."""
    program, *words = words
    if program == "torchrun":
        assert words[0].startswith("--nproc_per_node=")
        words = words[words.index("--") + 1 :]
    if program in ("pip", "lint-imports") or words[0] == "-m":
        for option, value in itertools.pairwise(words):
            assert option != "-r" or (ROOT / value).is_file()
            assert option != "-k" or any(value in test for test in TESTS)
        return
    script, *flags = words
    assert (ROOT / script).is_file(), script
    if script.startswith("run_"):
        for flag in flags:
            if flag.endswith(".npz"):
                (folder / flag).touch()
        SCRIPTS[script.removeprefix("run_").removesuffix(".py")].parse(flags)
    if script == "docs/reproduce.py":
        importlib.import_module("reproduce").parse(flags)


@pytest.mark.parametrize("script", cases("bash"))
def test_commands_of_a_page_are_taken(script, shell, clone, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    result, commands = shell(script)
    assert result.returncode == 0, result.stderr
    assert commands, "it calls no program of the project's"
    for words in commands:
        assert_taken(words, clone)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, clone, shell, users_files, no_network):
    for model in NAMES:
        shape = (200, 32, 32, 3) if model == "fsvae" else (200, 28, 28)
        x = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
        y = np.arange(200) % 10
        np.savez(clone / f"few_{model}.npz", x=x, y=y, x_test=x[:50], y_test=y[:50])
    for language, code in pasted(page):
        shutil.rmtree(clone / "data" / "MNIST", ignore_errors=True)  # scripts verify its files
        if language == "python":
            if "import MNIST" in code:
                few_images(clone, "MNIST")
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


def test_the_readme_shows_what_is_printed(clone, main):
    shown = re.search(r"^```\n(files in .*?)^```", README, flags=re.S | re.M)[1]
    result = main("vae", "--run", 2021, "--train", 0, cwd=clone)
    printed = result.stdout[result.stdout.index("files in ") :]
    number = r"\d+\.\d+"
    assert re.sub(number, "", printed) == re.sub(number, "", shown)
    numbers = [float(text) for text in re.findall(number, printed)]
    expected = [float(text) for text in re.findall(number, shown)]
    assert numbers == pytest.approx(expected, abs=0.01)


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


def test_results_in_the_readme_are_the_tables():
    marked = re.compile(r"<!-- table .*?<!-- end -->", flags=re.S)
    number = r"\d+\.\d+(?: ± \d+\.\d+)?"
    tables = "".join(table for page in PAGES.values() for table in marked.findall(page))
    told = section(README, "The five problems") + section(README, "Results")
    quoted = re.findall(number, FENCE.sub("", marked.sub("", told)))
    assert len(quoted) >= 10
    assert set(quoted) <= set(re.findall(number, tables))


def test_the_readme_quotes_the_rows_of_the_literatures_table():
    told = " ".join(section(README, "Results").split())
    for row, sentence in {
        "VAE | 50 | 0.002 | cosine | 350 | 1": "is then {} nats",
        "VAE | 50 | 0.001 | cosine | 200 | 1": "the VAE has {} (",
        "GMVAE | 50 | 0.001 | cosine | 200 | 1": "The GMVAE reaches {} with",
        "Burda et al. 2016, VAE | 50 |  | falling | 3280 | 1": "Burda et al. 2016 report {}.",
        "VAE | 50 | 0.002 | cosine | 350 | 50": "in both commands), the same model has {} (",
        "Burda et al. 2016, IWAE | 50 |  | falling | 3280 | 50": "and theirs {}.",
    }.items():
        cells = re.search(rf"^\| {re.escape(row)} \| (.*)", PAGES["docs/writeup.md"], flags=re.M)[1]
        iwae_5000 = cells.split(" | ")[1]  # behind the NELBO
        assert sentence.format(iwae_5000) in told


def defaults(model: str) -> dict[str, object]:
    """The flags of a script, which its --help names, and their defaults."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        SCRIPTS[model].parse(["--help"])
    names = re.findall(r"^  --(\w+)", help_text.getvalue(), flags=re.M)
    run = SCRIPTS[model].parse([])
    return {name: getattr(run, name) for name in names}


def test_flags_and_their_defaults_are_the_scripts():
    """The page of usage has all of them and no other, the README some of these."""
    listed = flags_of("docs/usage.md")
    assert flags_of("README.md").items() <= listed.items()
    flags = set()
    for model in NAMES:
        flags.update(defaults(model))
        for flag, default in defaults(model).items():
            values = default if isinstance(default, list) else [default]
            texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
            # One for all scripts, or (SSVAE 30000, ...) where a script has another.
            of_all, _, of_some = listed[flag].partition(" (")
            others = dict(re.findall(r"(\w+) (\w+)", of_some))
            if flag != "seed":  # which is the number of the run
                assert others.get(model.upper(), of_all) == " ".join(texts), flag
    assert flags == set(listed)


def test_every_promise_names_tests_that_exist():
    rows = section(DESIGN, "What is promised").split("|---|---|\n")[1].split("\n\n")[0]
    for row in rows.splitlines():
        promise, tests = row.strip("| ").split(" | ")
        assert promise.endswith("."), row
        assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests), row
    named = set(re.findall(r"`(test_\w+)`", DESIGN))
    assert named <= TESTS, sorted(named - TESTS)


def test_every_module_has_its_line():
    table = section(DESIGN, "The layers of the code")
    listed = re.findall(r"`((?:codebase/|run_)[\w/]+\.py)`", table)
    files = [*ROOT.glob("run_*.py"), *ROOT.glob("codebase/**/*.py")]
    modules = [str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"]
    assert sorted(listed) == sorted(modules)

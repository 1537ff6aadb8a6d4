"""Which data set a run has: its files, their download, and the drawn digits in their place."""

import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from codebase.runtime.files import Missing, UsageError, model_path, state_path, stored_steps
from codebase.runtime.options import Run

SILENCE = 10  # seconds without a byte after which a download is given up
A_DAY = 24 * 60 * 60  # seconds after which a download's folder is of a process that was killed


def files(run: Run) -> list[Path]:
    """The files of the run's real data set, as a user would put them in place by hand."""
    folder = Path(run.data_dir)
    if run.real_data == "svhn":
        splits = ["test"]
        if run.train and run.split != "test":
            splits = [run.split, "test"]
        return [folder / f"{split}_32x32.mat" for split in splits]
    names = ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    if run.train:
        names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", *names]
    return [folder / "MNIST" / "raw" / name for name in names]


def is_usable(run: Run) -> bool:
    """Whether the files that are there are enough: an FSVAE can do without the test split."""
    there = [path.exists() for path in files(run)]
    if run.real_data == "svhn":
        return there[0] or Path(run.data_dir, f"{run.split}_32x32.mat").exists()
    return all(there)


# ---- the choice of the data set ----


def resolve_data(asked: str, real: Run, digits: Run) -> str:
    """The data set of a run, which is one of two that differ in it alone; asked: what --data says.

    Missing files are downloaded; under auto the drawn digits take their place, with a banner.
    Raises Missing where --train 0 has no checkpoint to load, before anything is downloaded, and
    UsageError where files cannot be had.
    """
    if asked == "digits":
        candidates = [digits]
    elif asked == real.data or is_usable(real):
        candidates = [real]
    else:
        candidates = [real, digits]
    if not real.train:
        stored = [run for run in candidates if model_path(run.name, run.iter_max).is_file()]
        if not stored:
            _no_checkpoint(candidates[0])
        candidates = stored
    if asked == "digits":
        return digits.data

    if real in candidates:
        if real.own_images or not real.needs_files:
            return real.data
        reason = fetch(real)
        if is_usable(real):
            if reason:
                name = files(real)[-1].name
                print(f"{name} cannot be had ({reason}): evaluating on training images")
            return real.data
    else:
        reason = "its files are not there, nor is a checkpoint of it"
    if digits not in candidates:
        raise UsageError(_cannot_be_had(real, reason))
    _print_banner(real, reason)
    return digits.data


def _no_checkpoint(run: Run) -> list[Run]:
    words = [word for word in sys.argv[1:] if not word.startswith("--train=")]
    while "--train" in words:
        at = words.index("--train")
        del words[at : at + 2]
    steps = stored_steps(run.name)
    how = f"to train one: {shlex.join([Path(sys.argv[0]).name, *words])}"
    if steps and not state_path(run.name).exists():
        how = "it has no state to resume from: give one of them, or train another --run"
    package = Path(__file__).resolve().parents[2]
    if (package / model_path(run.name, run.iter_max)).is_file():
        how = f"it is in {package / 'checkpoints'}: run the command in {package}"
    known = ", ".join(str(step) for step in steps) or "none"
    path = model_path(run.name, run.iter_max)
    raise Missing(f"there is no {path}; checkpoints of this run: {known}; {how}")


def _cannot_be_had(real: Run, reason: str) -> str:
    """The line of error where nothing may take the place of the real data set."""
    parts = [f"{real.data.upper()} cannot be downloaded ({reason})"]
    near = near_miss(real)
    if near:
        parts.append(near)
    listed = ", ".join(str(path) for path in files(real))
    parts.append(f"put these files in place by hand: {listed}")
    if real.train:
        parts.append("or use --data digits")
    return "; ".join(parts)


def _print_banner(real: Run, reason: str) -> None:
    name = real.data.upper()
    wanted = files(real)
    instead = "training and evaluating on DRAWN DIGITS instead"
    listed = ", ".join(path.name for path in wanted)
    near = near_miss(real)
    print("*" * 100)
    print(f"NO {name} ({reason}): {instead}. Figures are not {name}'s.")
    print(f"Looked in {wanted[0].parent.absolute()} for {listed}.")
    if near:
        print(f"But {near}.")
    print("*" * 100, flush=True)


# ---- files that are there under another name ----


def near_miss(run: Run) -> str:
    """Where the run's missing files lie under other names or in other folders, and what mends it.

    In a few words, or "" where there is nothing like them.
    """
    missing = [path for path in files(run) if not path.exists()]
    found = {}
    for path in missing:
        for candidate in _places(run, path):
            if candidate.is_file():
                found[path] = candidate
                break
    if found:
        return _mend(found)
    if run.real_data == "svhn" and run.train:
        for split in ("train", "extra"):
            path = Path(run.data_dir, f"{split}_32x32.mat")
            if path.exists():
                return f"there is {path}: give --split {split} to train on it"
    return ""


def _places(run: Run, path: Path) -> list[Path]:
    """Where a missing file may lie otherwise, the likeliest place first."""
    folder = Path(run.data_dir)
    if run.real_data == "svhn":
        return [folder / subfolder / path.name for subfolder in ("SVHN", "svhn", "raw")]
    dotted = path.name.replace("-idx", ".idx")  # as many tools unpack it
    names = [path.name, dotted, f"{path.name}.gz", f"{dotted}.gz"]
    folders = [path.parent, folder / "MNIST", folder / "raw", folder]
    places = []
    for name in names:
        places += [place / name for place in folders]
    return places


def _mend(found: dict[Path, Path]) -> str:
    """What mends it that files lie elsewhere; found: path where a file should be -> where it is."""
    wanted, there = next(iter(found.items()))
    more = ""
    likewise = ""
    if len(found) > 1:
        more = f" (and {len(found) - 1} more)"
        likewise = ", and the others likewise"
    folder = Path(os.path.abspath(there)).parent
    has_layout = folder.name == "raw" and folder.parent.name == "MNIST"
    has_names = all(here.name == path.name for path, here in found.items())
    if has_layout and has_names:
        return f"there is {there}{more}: give --data_dir {shlex.quote(str(folder.parent.parent))}"
    command = ["mv", str(there), str(wanted)]
    line = shlex.join(command)
    if there.suffix == ".gz":
        line = f"gunzip -c {shlex.quote(str(there))} > {shlex.quote(str(wanted))}"
    if not wanted.parent.exists():
        line = f"mkdir -p {shlex.quote(str(wanted.parent))} && {line}"
    return f"there is {there}{more}: {line}{likewise}"


# ---- the download ----


def fetch(run: Run) -> str | None:
    """Fetch the run's missing files, however long that takes while bytes arrive.

    torchvision downloads them with its progress bar and checks them in a folder of their own; whole
    files are then moved to their place, so that an interrupted download leaves none that could be
    taken for whole. Returns None, or in a few words why they could not be had. Raises UsageError
    where the folder for them cannot be made.
    """
    missing = [path for path in files(run) if not path.exists()]
    if not missing:
        return None
    folder = Path(run.data_dir)
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"{folder} cannot be made ({error.strerror})"
        raise UsageError(f"argument --data_dir: {problem}") from error
    _remove_left_over(folder)
    listed = ", ".join(path.name for path in missing)
    print(f"downloading {listed} to {folder}", flush=True)
    try:
        with (
            _time_out(SILENCE),
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as place,
        ):
            if run.real_data == "mnist":
                _fetch_mnist(run, place)
            else:
                _fetch_svhn(missing, place)
    except Exception as error:  # no network, no space, a wrong checksum: the files are not there
        if is_new:
            with suppress(OSError):  # where something is in it
                folder.rmdir()
        return _in_few_words(error)
    return None


def _fetch_mnist(run: Run, place: str) -> None:
    """All four files, of which those that are missing move to their place."""
    from torchvision import datasets  # only here: most runs have their files, and it loads slowly

    datasets.MNIST(place, download=True)
    for path in files(replace(run, train=1)):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(place, "MNIST", "raw", path.name), path)


def _fetch_svhn(missing: list[Path], place: str) -> None:
    """One file after the other: what has arrived stays, whatever becomes of the next."""
    from torchvision import datasets  # only here: most runs have their files, and it loads slowly

    for path in missing:
        split = path.name.split("_")[0]
        url, name, md5 = datasets.SVHN.split_list[split]
        datasets.utils.download_url(url, place, name, md5)
        os.replace(Path(place, name), path)


@contextmanager
def _time_out(seconds: float) -> Iterator[None]:
    """Have new connections give up after that many seconds without a byte."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _remove_left_over(folder: Path) -> None:
    """Remove what downloads left that were killed; those of the last day may be under way."""
    for left_over in folder.glob(".download-*"):
        if time.time() - left_over.stat().st_mtime > A_DAY:
            shutil.rmtree(left_over, ignore_errors=True)


def _in_few_words(error: Exception) -> str:
    """Why a download failed, in one line."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    if "timed out" in text:
        return f"no answer for {SILENCE} seconds"
    return text.splitlines()[-1]

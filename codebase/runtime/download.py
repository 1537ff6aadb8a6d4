"""Which data set a run has: its files, their download, and the drawn digits in their place."""

import os
import shlex
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from codebase.runtime.files import (
    Missing,
    UsageError,
    is_there,
    model_path,
    state_path,
    stored_steps,
)
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
    there = [is_there(path) for path in files(run)]
    if run.real_data == "svhn":
        return there[0] or is_there(Path(run.data_dir, f"{run.split}_32x32.mat"))
    return all(there)


# ---------------------------------------------------------------------------------------------
# The choice of the data set


def choose_data(run: Run) -> str:
    """The data set of a run: what --data says, or under auto the real one or drawn digits.

    Missing files are downloaded; where they cannot be had, under auto drawn digits take their
    place, with a banner. Raises Missing where --train 0 has no checkpoint to load, before anything
    is downloaded, and UsageError where files cannot be had.
    """
    if run.own_images or run.data == "digits":
        require_checkpoint(run)
        return run.data
    real = run.changed(data=run.real_data)
    digits = run.changed(data="digits")
    may_be_digits = run.data == "auto" and not is_usable(real)
    if may_be_digits and not run.train and not has_checkpoint(real) and has_checkpoint(digits):
        print_banner(real, "its files are not there, nor is a checkpoint of it")
        return "digits"
    require_checkpoint(real)
    if not real.needs_files:
        return real.data
    reason = fetch(real)
    if is_usable(real):
        if reason:
            name = files(real)[-1].name
            print(f"{name} cannot be had ({reason}): evaluating on training images")
        return real.data
    if may_be_digits and (run.train or has_checkpoint(digits)):
        print_banner(real, reason)
        return "digits"
    raise UsageError(cannot_be_had(real, reason))


def has_checkpoint(run: Run) -> bool:
    return model_path(run.name, run.iter_max).is_file()


def require_checkpoint(run: Run) -> None:
    """Raise Missing where --train 0 has no checkpoint to load."""
    if run.train or has_checkpoint(run):
        return
    path = model_path(run.name, run.iter_max)
    steps = stored_steps(run.name)
    advice = f"to train one: {run.command(without=['--train'])}"
    if steps and not state_path(run.name).exists():
        advice = "it has no state to resume from: give one of these, or train another --run"
    elif steps and run.iter_max < steps[-1]:
        advice = "it was trained further: give one of these, or train another --run"
    clone = Path(__file__).resolve().parents[2]
    if not steps and (clone / path).is_file():
        advice = f"there is one in {clone / 'checkpoints'}: run the script in {clone}"
    known = ", ".join(str(step) for step in steps)
    raise Missing(f"there is no {path}; checkpoints of this run: {known or 'none'}; {advice}")


def cannot_be_had(real: Run, reason: str) -> str:
    """The line of error where nothing may take the place of the real data set."""
    near = near_miss(real)
    listed = ", ".join(str(path) for path in files(real))
    line = f"{real.data.upper()} cannot be downloaded ({reason})"
    if near:
        line += f"; {near}"
    line += f"; put these files in place by hand: {listed}"
    if real.train:
        line += "; or use --data digits"
    return line


def print_banner(real: Run, reason: str) -> None:
    name = real.data.upper()
    wanted = files(real)
    near = near_miss(real)
    listed = ", ".join(path.name for path in wanted)
    print("*" * 100)
    print(f"NO {name} ({reason}): training and evaluating on DRAWN DIGITS instead.")
    print(f"Metrics are not {name}'s. Looked in {wanted[0].parent.absolute()} for {listed}.")
    if near:
        print(f"But {near}.")
    print("*" * 100, flush=True)


# ---------------------------------------------------------------------------------------------
# Files that are there under another name


def near_miss(run: Run) -> str:
    """Where the run's missing files lie otherwise, and what mends it, in a few words, or ""."""
    found = []
    for wanted in files(run):
        there = [place for place in places(run, wanted) if os.path.isfile(place)]
        if there and not is_there(wanted):
            found.append((there[0], wanted))
    if found:
        return how_to_mend(found)
    if run.real_data == "svhn" and run.train:
        for split in ["train", "extra"]:
            path = Path(run.data_dir, f"{split}_32x32.mat")
            if is_there(path):
                return f"there is {path}: give --split {split} to train on it"
    return ""


def places(run: Run, wanted: Path) -> list[Path]:
    """Where a missing file may lie otherwise, the likeliest place first."""
    folder = Path(run.data_dir)
    if run.real_data == "svhn":
        return [folder / subfolder / wanted.name for subfolder in ["SVHN", "svhn", "raw"]]
    dotted = wanted.name.replace("-idx", ".idx")  # as many tools unpack it
    places = []
    for name in [wanted.name, dotted, f"{wanted.name}.gz", f"{dotted}.gz"]:
        for subfolder in ["MNIST/raw", "MNIST", "raw", "."]:
            places.append(folder / subfolder / name)
    return places


def how_to_mend(found: list[tuple[Path, Path]]) -> str:
    """What to do with files that lie elsewhere; found: where each is, and where it should be."""
    there, wanted = found[0]
    others = ""
    likewise = ""
    if len(found) > 1:
        others = f" (and {len(found) - 1} more)"
        likewise = ", and the others likewise"
    folder = Path(os.path.abspath(there)).parent
    has_names = all(there.name == wanted.name for there, wanted in found)
    if has_names and folder.parts[-2:] == ("MNIST", "raw"):
        return f"there is {there}{others}: give --data_dir {shlex.quote(str(folder.parents[1]))}"
    verb = "unpack" if there.suffix == ".gz" else "move"
    return f"there is {there}{others}: {verb} it to {wanted}{likewise}"


# ---------------------------------------------------------------------------------------------
# The download


def fetch(run: Run) -> str | None:
    """Fetch the run's missing files, however long that takes while bytes arrive.

    torchvision downloads them with its progress bar and checks them in a folder of their own; whole
    files are then moved to their place, so that an interrupted download leaves none that could be
    taken for whole. Returns None, or in a few words why they could not be had. Raises UsageError
    where the folder for them cannot be made.
    """
    missing = [path for path in files(run) if not is_there(path)]
    if not missing:
        return None
    folder = Path(run.data_dir)
    is_new = not is_there(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"{folder} cannot be made ({error.strerror})"
        raise UsageError(f"argument --data_dir: {problem}") from error
    remove_left_over(folder)
    listed = ", ".join(path.name for path in missing)
    print(f"downloading {listed} to {folder}", flush=True)
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(SILENCE)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as place:
            if run.real_data == "mnist":
                fetch_mnist(run, place)
            else:
                fetch_svhn(missing, place)
    except Exception as error:  # no network, no space, a wrong checksum: the files are not there
        if is_new:
            with suppress(OSError):  # where something is in it
                folder.rmdir()
        return in_few_words(error)
    finally:
        socket.setdefaulttimeout(before)
    return None


def fetch_mnist(run: Run, place: str) -> None:
    """All four files, of which those that are missing move to their place."""
    from torchvision import datasets  # only here: most runs have their files, and it loads slowly

    datasets.MNIST(place, download=True)
    for path in files(run.changed(train=1)):
        if not is_there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            move(Path(place, "MNIST", "raw", path.name), path)


def fetch_svhn(missing: list[Path], place: str) -> None:
    """One file after the other: what has arrived stays, whatever becomes of the next."""
    from torchvision import datasets  # only here: most runs have their files, and it loads slowly

    for path in missing:
        split = path.name.split("_")[0]
        url, name, md5 = datasets.SVHN.split_list[split]
        datasets.utils.download_url(url, place, name, md5)
        move(Path(place, name), path)


def move(whole: Path, goal: Path) -> None:
    """Move a whole file to its goal, which may be on another disk; no part of it is seen there."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=goal.parent) as beside:
        os.replace(shutil.move(whole, beside), goal)


def remove_left_over(folder: Path) -> None:
    """Remove what downloads left that were killed; those of the last day may be under way."""
    for left_over in folder.glob(".download-*"):
        with suppress(OSError):  # of a download that ends just now
            if time.time() - left_over.stat().st_mtime > A_DAY:
                shutil.rmtree(left_over, ignore_errors=True)


def in_few_words(error: Exception) -> str:
    """Why a download failed, in one line."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    if "timed out" in text:
        return f"no answer for {SILENCE} seconds"
    return text.splitlines()[-1]

"""Which data set a run has: its files, their download, and the drawn digits where they cannot be had."""

import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from codebase.runtime.files import Missing, UsageError, model_path, state_path, stored_steps
from codebase.runtime.options import Run

SILENCE = 10  # seconds without a byte after which a download is given up


def files(run: Run) -> list[Path]:
    """The files of the run's real data set, as a user would put them in place by hand."""
    if run.real_data == "svhn":
        splits = dict.fromkeys([run.split, "test"] if run.train else ["test"])
        return [Path(run.data_dir, f"{split}_32x32.mat") for split in splits]
    splits = ("train", "t10k") if run.train else ("t10k",)
    kinds = [f"{split}-{kind}-ubyte" for split in splits for kind in ("images-idx3", "labels-idx1")]
    return [Path(run.data_dir, "MNIST", "raw", name) for name in kinds]


def usable(run: Run) -> bool:
    """Whether the run can do with the files that are there: an FSVAE can do without the test split."""
    there = [path.exists() for path in files(run)]
    return there[0] or Path(run.data_dir, f"{run.split}_32x32.mat").exists() if run.real_data == "svhn" else all(there)


def resolve_data(asked: str, real: Run, digits: Run) -> str:
    """The data set of a run, which is one of two that differ in it alone; asked: what --data says.

    Missing files are downloaded; under auto the drawn digits take their place, with a banner. Raises Missing where
    --train 0 has no checkpoint to load, before anything is downloaded, and UsageError where files cannot be had.
    """
    name, runs = real.data.upper(), [real] if asked == real.data or usable(real) else [real, digits]
    if asked == "digits":
        runs = [digits]
    if not real.train:
        runs = [run for run in runs if model_path(run.name, run.iter_max).is_file()] or _no_checkpoint(runs[0])
    if asked == "digits" or (real in runs and (real.own_images or not real.needs_files)):
        return runs[0].data
    why = download(real) if real in runs else "its files are not there, nor is a checkpoint of it"
    if real in runs and usable(real):
        if why:
            print(f"{files(real)[-1].name} cannot be had ({why}): evaluating on training images")
        return real.data
    if digits not in runs:
        hand = f"put these files in place by hand: {', '.join(map(str, files(real)))}"
        raise UsageError(f"{name} cannot be downloaded ({why}); {hand}{'; or use --data digits' * real.train}")
    line = f"NO {name} ({why}): training and evaluating on DRAWN DIGITS instead. Figures are not {name}'s."
    print(f"{'*' * 100}\n{line}\n{'*' * 100}", flush=True)
    return digits.data


def _no_checkpoint(run: Run) -> list[Run]:
    words = [word for word in sys.argv[1:] if not word.startswith("--train=")]
    while "--train" in words:
        del words[(at := words.index("--train")) : at + 2]
    steps, how = stored_steps(run.name), f"to train one: {shlex.join([Path(sys.argv[0]).name, *words])}"
    if steps and not state_path(run.name).exists():
        how = "it has no state to go on from: give one of them, or train another --run"
    package = Path(__file__).resolve().parents[2]
    if (package / model_path(run.name, run.iter_max)).is_file():
        how = f"it is in {package / 'checkpoints'}: run the command in {package}"
    known = ", ".join(map(str, steps)) or "none"
    raise Missing(f"there is no {model_path(run.name, run.iter_max)}; checkpoints of this run: {known}; {how}")


def download(run: Run) -> str | None:
    """Fetch the run's missing files by torchvision, with its progress bar, however long it takes while bytes arrive.

    Files arrive whole or not at all. Returns None, or in a few words why they could not be had.
    """
    if not (missing := [path for path in files(run) if not path.exists()]):
        return None
    new = not Path(run.data_dir).exists()
    try:
        Path(run.data_dir).mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"argument --data_dir: {run.data_dir} cannot be made ({error.strerror})") from error
    for left_over in Path(run.data_dir).glob(".download-*"):  # of a process that was killed long ago
        if time.time() - left_over.stat().st_mtime > 86400:
            shutil.rmtree(left_over, ignore_errors=True)
    print(f"downloading {', '.join(path.name for path in missing)} to {run.data_dir}", flush=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=run.data_dir) as place:
            from torchvision import datasets  # only here: most runs have their files, and it takes seconds to load

            if run.real_data == "mnist":
                datasets.MNIST(place, download=True)  # its four files at once
                missing = [path for path in files(replace(run, train=1)) if not path.exists()]
            for path in missing:
                if run.real_data == "svhn":
                    url, name, md5 = datasets.SVHN.split_list[path.name.split("_")[0]]
                    datasets.utils.download_url(url, place, name, md5)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(place, path.relative_to(run.data_dir)), path)
    except Exception as error:  # no network, no space, a wrong checksum: whatever it is, the files are not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        with suppress(OSError):  # where something is in it
            new and Path(run.data_dir).rmdir()
        return f"no answer for {SILENCE} seconds" if "timed out" in reason else reason
    finally:
        socket.setdefaulttimeout(patience)

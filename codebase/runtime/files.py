"""Where the files of a run lie, how they are written, and what can go wrong with a run."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to do. Exit code 2."""


class Missing(UsageError, FileNotFoundError):
    """A file that was asked for does not exist."""


class RunError(Exception):
    """Something broke during a run, as a loss that is not finite. Exit code 1."""


class FailedElsewhere(RunError):
    """Another process of the run failed, and says why."""


class ProcessLost(RunError):
    """Another process of the run is gone; the last state is there to resume from."""


class Stopped(Exception):
    """A signal ended training, and its state is saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def require(condition: bool, message: str) -> None:
    """Raise UsageError with that message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def is_there(path: Path) -> bool:
    """Whether a file or folder is there and can be seen.

    In a folder that this user may not enter nothing is; Path.exists would raise PermissionError.
    """
    return os.path.exists(path)


def checkpoint_dir(name: str) -> Path:
    return Path("checkpoints", name)


def log_dir(name: str) -> Path:
    return Path("logs", name)


def model_path(name: str, step: int) -> Path:
    return checkpoint_dir(name) / f"model-{step:05d}.pt"


def state_path(name: str) -> Path:
    return checkpoint_dir(name) / "state.pt"


def stored_steps(name: str) -> list[int]:
    """The steps of the run's checkpoints, ascending."""
    steps = []
    for path in checkpoint_dir(name).glob("model-*.pt"):
        step = path.stem.removeprefix("model-")
        if step.isdecimal() and path == model_path(name, int(step)):
            steps.append(int(step))
    return sorted(steps)


def write(path: Path, content: bytes) -> None:
    """Replace a file, so that after a crash the old content or the new one is there, and whole.

    The content is written to a file beside it, flushed to the disk, and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # the file that the user knows
        with contextlib.suppress(OSError):  # the error under way is the one to report
            beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by this dictionary as JSON. Raises ValueError where a number is not finite."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write(path, f"{text}\n".encode())

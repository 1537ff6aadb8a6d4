"""Files that must survive: where a run's files lie, atomic writing, and what can go wrong."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message says why and what to do. Exit code 2."""


class Missing(UsageError, FileNotFoundError):
    """A file that was asked for does not exist."""


class RunError(Exception):
    """Something broke while running: a loss that is not finite, another process that died. Exit code 1."""


class Parted(RunError):
    """Another process of the run is gone; the last state is there to resume from."""


class Stopped(Exception):
    """A signal, of number args[1], ended training after its state was saved. Exit code 128 + that number."""


def require(condition: bool, message: str) -> None:
    """Raise UsageError with that message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def model_path(name: str, step: int) -> Path:
    return Path("checkpoints", name, f"model-{step:05d}.pt")


def state_path(name: str) -> Path:
    return Path("checkpoints", name, "state.pt")


def log_dir(name: str) -> Path:
    return Path("logs", name)


def stored_steps(name: str) -> list[int]:
    """The steps of the run's checkpoints, ascending."""
    steps = (path.stem.removeprefix("model-") for path in Path("checkpoints", name).glob("model-*.pt"))
    return sorted(int(step) for step in steps if step.isdecimal())


def write(path: Path, content: bytes | str | dict[str, Any]) -> None:
    """Write a file (a dictionary as JSON) beside its place, flush and rename it: old or new is there, and whole.

    Raises ValueError, and writes nothing, where a dictionary holds NaN or infinity: JSON has neither.
    """
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with suppress(OSError):  # the error under way is the one to tell
            beside.unlink(missing_ok=True)  # it is there where something failed

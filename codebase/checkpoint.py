"""Files that must survive: atomic writing, checkpoints, the state for resuming, and one process per run.

torch is imported where it is used, so that a command line can be checked against the files before torch is loaded.
"""

import io
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

writes = True  # False in all but the first of several processes: they write nothing
RESTART = "choose another --run, or --overwrite 1 to start over"
IGNORED_KEYS = {"x_v", "y_prior"}  # constants that some existing files carry


class Refused(Exception):
    """What was asked for cannot be done as asked; the message says why and what to do. Exit code 2."""


class Missing(Refused, FileNotFoundError):
    """A file that was asked for does not exist."""


class Fault(Exception):
    """Something broke while running: a full disk, a loss that is not finite. Exit code 1."""


class Stopped(Exception):
    """A signal ended training after its state was saved; signum is its number."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, state saved; the same command goes on from there")
        self.signum = signum


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


def write(path: Path, content: bytes | str) -> None:
    """Write a file beside its place, flush it to disk and rename it: a reader sees the old file or the new one."""
    if not writes:
        return
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # make the rename itself durable, where a folder can be flushed
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def hold(name: str):
    """Be the only process that works on the run; raises Refused with the other's process id. The dead hold nothing."""
    import filelock

    folder = log_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".owner"
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = owner.read_text().strip() if owner.exists() else "unknown"
        raise Refused(f"{name} is in use by process {pid}: wait for it, or choose another --run") from None
    try:
        write(owner, f"{os.getpid()}\n")
        for place in (folder, model_path(name, 0).parent):
            for left_over in place.glob(".*.tmp"):
                left_over.unlink()
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def discard(name: str) -> None:
    """Delete what earlier training of this run stored; only --overwrite 1 comes here."""
    paths = [model_path(name, step) for step in stored_steps(name)] + [state_path(name)]
    for path in paths + [path for path in log_dir(name).glob("*.*") if path.suffix in {".png", ".csv", ".json"}]:
        path.unlink(missing_ok=True)


def _write_tensors(path: Path, content: dict) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def _read_tensors(path: Path) -> dict:
    """Read tensors and plain values, on the CPU; code in the file is never run, and damage is found by its CRC-32."""
    import torch

    if not path.is_file():
        raise Missing(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise Refused(f"{path} is damaged (checksum of {damaged}): put an intact copy in its place")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (Refused, OSError, MemoryError):
        raise
    except Exception as error:
        what = "holds more than tensors, and code in it is not run" if "eights" in str(error) else "cannot be read"
        raise Refused(f"{path} {what}: truncated, damaged or no checkpoint; put an intact copy in its place") from error
    if not isinstance(content, dict):
        raise Refused(f"{path} holds no dictionary of tensors but a {type(content).__name__}")
    return content


def save_model_by_name(model, global_step: int) -> Path:
    """Write the model's state_dict, on the CPU, as checkpoints/<model.name>/model-<step>.pt; return the path."""
    path = model_path(model.name, global_step)
    _write_tensors(path, {key: value.detach().cpu() for key, value in model.state_dict().items()})
    return path


def load_model_by_name(model, global_step: int, device=None):
    """Load checkpoints/<model.name>/model-<step>.pt into the model, then move it to the device if one is given.

    Returns the model. Raises Missing (a FileNotFoundError) where there is no such file, Refused where the file is
    damaged, would run code, belongs to another model or holds values that are not finite; the model is then unchanged.
    """
    path = model_path(model.name, global_step)
    check_weights(path, stored := _read_tensors(path), model)
    model.load_state_dict({key: value for key, value in stored.items() if key not in IGNORED_KEYS})
    return model if device is None else model.to(device)


def check_weights(path: Path, stored: dict, model) -> None:
    """Raise Refused unless stored has exactly the model's keys, with its shapes and finite values."""
    import torch

    expected = model.state_dict()
    if missing := [key for key in expected if key not in stored]:
        raise Refused(f"{path} is of another model than {model.name}: it has no {missing[0]}")
    if unknown := [key for key in stored if key not in expected and key not in IGNORED_KEYS]:
        raise Refused(f"{path} is of another model than {model.name}: it has {unknown[0]}, which the model has not")
    for key, value in expected.items():
        found = stored[key]
        if not isinstance(found, torch.Tensor) or found.shape != value.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise Refused(f"{path}: {key} should be of shape {tuple(value.shape)}, found {shape}")
        if not torch.isfinite(found).all():
            raise Refused(f"{path}: {key} holds values that are not finite")


def save_state(name: str, state: dict) -> None:
    """Replace the one file that training goes on from."""
    _write_tensors(state_path(name), state)


def load_state(name: str) -> dict | None:
    """The stored state of an unfinished or finished training, or None."""
    if not state_path(name).exists():
        return None
    state = _read_tensors(state_path(name))
    if missing := {"step", "settings", "model", "table", "optimizer", "random"} - state.keys():
        raise Refused(f"{state_path(name)} is no state to go on from: it has no {min(missing)}; {RESTART}")
    return state

"""Weights and training state in files. Files are read, never run; what they hold is checked before it is used."""

import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codebase.runtime.files import Missing, UsageError, log_dir, model_path, require, state_path, stored_steps, write
from codebase.runtime.options import Run

RESTART = "choose another --run, or --overwrite 1 to start over"
IGNORED_KEYS = {"x_v", "y_prior"}  # constants that some existing files carry
OPTIONAL_KEYS = {"z_prior_m", "z_prior_v"}  # constants that some existing files lack
NESTS = ("state_dict", "model_state_dict")  # keys under which other programs store weights
WRAPPED = re.compile(r"(module\.|_orig_mod\.)+")  # what DataParallel and torch.compile put first
FORMAT = 2  # of state files; a state of another format is refused
STATE = {"step", "settings", "model", "table", "optimizer", "random"}
LOGS = re.compile(
    r"(metrics|test)\.csv|(config|results)\.json"
    r"|(samples(-\d{7,})?|reconstructions|interpolations|latent|curves|confusion|styles)\.png"
)


def save_model_by_name(model: nn.Module, global_step: int) -> Path:
    """Write the model's state_dict, on the CPU, as checkpoints/<model.name>/model-<step>.pt; return the path."""
    path = model_path(model.name, global_step)
    _write_tensors(path, {key: value.detach().cpu() for key, value in model.state_dict().items()})
    return path


def load_model_by_name(model: nn.Module, global_step: int, device: torch.device | str | None = None) -> nn.Module:
    """Load checkpoints/<model.name>/model-<step>.pt into the model, then move it to the device if one is given.

    Returns the model. Raises Missing (a FileNotFoundError) where there is no such file, UsageError where the file is
    damaged, would run code, belongs to another model or holds values that are not finite; the model is then unchanged.
    """
    model.load_state_dict(read_weights(model, global_step))
    return model if device is None else model.to(device)


def read_weights(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """The weights in checkpoints/<model.name>/model-<step>.pt, checked to be the model's; raises as above."""
    path = model_path(model.name, step)
    return check_weights(path, _read_tensors(path), model)


def check_weights(path: Path, stored: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's keys of stored; constants of OPTIONAL_KEYS that it lacks are the model's own.

    Raises UsageError unless it has the others, and them alone, with their shapes and finite values.
    """
    _refuse_wrapped(path, stored)
    expected = model.state_dict()
    constants = {key: value for key, value in expected.items() if key in OPTIONAL_KEYS}
    stored = constants | stored
    for key in (expected.keys() ^ stored.keys()) - IGNORED_KEYS:
        what = f"it has no {key}" if key in expected else f"it has {key}, which the model has not"
        raise UsageError(f"{path} is of another model than {model.name}: {what}")
    for key, value in expected.items():
        shape, found = tuple(value.shape), tuple(getattr(stored[key], "shape", ()))
        require(found == shape, f"{path}: {key} should be of shape {shape}, found {found}")
        require(bool(torch.isfinite(stored[key]).all()), f"{path}: {key} holds values that are not finite")
    return {key: stored[key] for key in expected}


def _refuse_wrapped(path: Path, stored: dict[str, Any]) -> None:
    """Raise UsageError, with the cure, where weights lie one level deeper or under longer names."""
    for nest in NESTS:
        if nest in stored:
            found = f"{path} is no bare state_dict: its weights lie inside {nest!r}"
            raise UsageError(f"{found}; {_conversion(path, f'stored[{nest!r}]')}")
    for key in stored:
        wrapper = WRAPPED.match(str(key))
        if wrapper:
            prefix = wrapper.group()
            weights = f"{{key.removeprefix({prefix!r}): stored[key] for key in stored}}"
            found = f"{path} has the weights of a wrapped model: its keys begin with {prefix!r}"
            raise UsageError(f"{found}; {_conversion(path, weights)}")


def _conversion(path: Path, weights: str) -> str:
    """What converts the file, as Python; weights: an expression of what is stored in it now."""
    load = f"stored = torch.load({str(path)!r}, weights_only=True)"
    save = f"torch.save({weights}, {str(path)!r})"
    return f"convert it once, in Python: import torch; {load}; {save}"


def save_state(name: str, state: dict[str, Any]) -> None:
    """Replace the one file that training goes on from: the commit record of a save, written last."""
    _write_tensors(state_path(name), {"format": FORMAT, **state})


def load_state(model: nn.Module, run: Run) -> dict[str, Any] | None:
    """The stored state of the run, checked to be made with its settings, or None where there is none."""
    path = state_path(run.name)
    if not path.exists():
        return None
    state = _read_tensors(path)
    ours = f"{path} is of another revision, which this one does not go on from (--train 0 loads its weights): {RESTART}"
    require(state.get("format") == FORMAT, ours)
    missing = ", ".join(sorted(STATE - state.keys()))
    require(not missing, f"{path} is no state to go on from: it has no {missing}")
    if state["step"] == 0 and not stored_steps(run.name):
        return None  # nothing was trained yet, so nothing is bound to its settings
    for key, value in run.settings().items():
        made = state["settings"].get(key, getattr(type(run), key, None))  # of a flag that is newer than the state
        require(made == value, f"argument --{key}: {run.name} was made with {made}, not {value}: give that, {RESTART}")
    check_weights(path, state["model"], model)
    return state


def find(model: nn.Module, run: Run) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any] | None]:
    """What a run begins with: the weights at --iter_max, or the state that training goes on from, or neither.

    Under --overwrite 1 what earlier training stored is deleted first. Raises UsageError where what is stored
    contradicts the command line.
    """
    if run.overwrite:
        discard(run.name)
    state, stored = load_state(model, run) if run.train else None, stored_steps(run.name)
    step = state["step"] if state else math.inf if stored else 0  # nothing goes on from weights alone
    if run.iter_max in stored and run.iter_max <= step:
        return read_weights(model, run.iter_max), None
    choices = [f"{step} or more to resume"] if state else []
    if stored:
        choices.append(f"one of its checkpoints {stored}")
    stands = f"is at step {step}, beyond {run.iter_max}" if state else "has no state to resume from"
    wrong = f"argument --iter_max: {run.name} {stands}: give {', '.join(choices)}, {RESTART}"
    require(step <= run.iter_max, wrong)
    return None, state


def discard(name: str) -> None:
    """Delete what earlier training of this run stored, and nothing else; only --overwrite 1 comes here."""
    logs = [path for path in log_dir(name).glob("*") if LOGS.fullmatch(path.name)]
    shipped = Path("checkpoints", ".gitignore")
    if stored_steps(name) and shipped.is_file() and name in shipped.read_text():
        print(f"warning: --overwrite 1 deletes checkpoints/{name}, which came with this package and is tracked by git")
    for path in logs + [model_path(name, step) for step in stored_steps(name)] + [state_path(name)]:
        path.unlink(missing_ok=True)


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def _read_tensors(path: Path) -> dict[str, Any]:
    """Read tensors and plain values, on the CPU; code in the file is never run, and damage is found by its CRC-32."""
    if not path.is_file():
        raise Missing(f"there is no file {path}")
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.is_zipfile(content) and (damaged := zipfile.ZipFile(content).testzip()):
            raise zipfile.BadZipFile(damaged)
        content.seek(0)
        stored = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        what = "truncated, damaged, no checkpoint, or more than tensors (code in it is not run)"
        raise UsageError(f"{path} cannot be read: {what}; put an intact copy in its place") from error
    require(isinstance(stored, dict), f"{path} holds no dictionary of tensors but a {type(stored).__name__}")
    return stored

"""Weights and training state in files. Files are read, never run, and checked before use."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codebase.runtime.files import (
    Missing,
    UsageError,
    checkpoint_dir,
    log_dir,
    model_path,
    require,
    state_path,
    stored_steps,
    write,
)
from codebase.runtime.options import Run

RESTART = "choose another --run, or --overwrite 1 to start over"
IGNORED_KEYS = {"x_v", "y_prior"}  # constants that some existing files carry
CONSTANT_KEYS = {"z_prior_m", "z_prior_v"}  # constants that some existing files lack
FORMAT = 3  # of state files; a state of another format is refused
STATE_KEYS = {"step", "settings", "compiled", "processes", "model", "optimizer", "metrics"}
WRITTEN_LOGS = re.compile(
    r"(metrics|test)\.csv|(config|results)\.json"
    r"|(samples(-\d{7,})?|reconstructions|interpolations|latent|curves|confusion|styles)\.png"
)


# ---------------------------------------------------------------------------------------------
# Weights


def save_model_by_name(model: nn.Module, global_step: int) -> Path:
    """Write the model's weights as checkpoints/<model.name>/model-<step>.pt; return the path.

    The file is a bare state_dict of tensors on the CPU.
    """
    path = model_path(model.name, global_step)
    write_tensors(path, {key: value.detach().cpu() for key, value in model.state_dict().items()})
    return path


def load_model_by_name(
    model: nn.Module, global_step: int, device: torch.device | str | None = None
) -> nn.Module:
    """Load checkpoints/<model.name>/model-<step>.pt into the model; move it to the device, if any.

    Returns the model. Raises Missing (a FileNotFoundError) where there is no such file, and
    UsageError where the file is damaged, would run code, belongs to another model or holds values
    that are not finite; the model is then unchanged.
    """
    model.load_state_dict(read_weights(model, global_step))
    if device is not None:
        model.to(device)
    return model


def read_weights(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The weights of checkpoints/<model.name>/model-<step>.pt; raises as load_model_by_name."""
    path = model_path(model.name, step)
    return check_weights(path, read_tensors(path), model)


def check_weights(path: Path, stored: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The model's weights among those stored in a file.

    Raises UsageError unless the file has the model's keys, with their shapes and finite values, and
    no others. Constants that it lacks keep the model's own values; some older ones are ignored.
    """
    refuse_wrapped(path, stored)
    other_model = f"{path} is of another model than {model.name}"
    weights = {}
    for key, own in model.state_dict().items():
        value = stored.get(key)
        if value is None and key in CONSTANT_KEYS:
            value = own
        if value is None:
            raise UsageError(f"{other_model}: it has no {key}")
        wanted = tuple(own.shape)
        shape = tuple(getattr(value, "shape", ()))
        if not isinstance(value, Tensor) or shape != wanted:
            raise UsageError(f"{path}: {key} should be of shape {wanted}, and is of {shape}")
        if not torch.isfinite(value).all():
            raise UsageError(f"{path}: {key} holds values that are not finite")
        weights[key] = value
    for key in stored:
        if key not in weights and key not in IGNORED_KEYS:
            raise UsageError(f"{other_model}: it has {key} as well")
    return weights


def refuse_wrapped(path: Path, stored: dict[str, Any]) -> None:
    """Raise UsageError, with the cure, where weights lie deeper or have keys with a prefix."""
    for key in ["state_dict", "model_state_dict"]:
        if key in stored:
            found = f"its weights lie inside {key!r}"
            raise UsageError(how_to_convert(path, found, f"stored[{key!r}]"))
    for key in stored:
        wrapper = re.match(r"(module\.|_orig_mod\.)+", str(key))
        if wrapper:
            prefix = wrapper.group()
            found = f"it is of a wrapped model, its keys begin with {prefix!r}"
            weights = f"{{key.removeprefix({prefix!r}): stored[key] for key in stored}}"
            raise UsageError(how_to_convert(path, found, weights))


def how_to_convert(path: Path, found: str, weights: str) -> str:
    load = f"stored = torch.load({str(path)!r}, weights_only=True)"
    save = f"torch.save({weights}, {str(path)!r})"
    return f"{path}: {found}; convert it once, in Python: import torch; {load}; {save}"


# ---------------------------------------------------------------------------------------------
# The training state: what a run resumes from


def save_state(name: str, state: dict[str, Any]) -> None:
    """Replace the state of a run. It is written last of a save: what it tells of is there."""
    write_tensors(state_path(name), {"format": FORMAT, **state})


def load_state(model: nn.Module, run: Run) -> dict[str, Any] | None:
    """The stored state of the run, or None where nothing was trained yet.

    Raises UsageError where it is of another format, or of other settings than the run's.
    """
    path = state_path(run.name)
    if not path.exists():
        return None
    state = read_tensors(path)
    other = f"{path} is of another revision, from which this one does not resume "
    other += f"(--train 0 still loads the weights): {RESTART}"
    require(state.get("format") == FORMAT, other)
    missing = ", ".join(sorted(STATE_KEYS - state.keys()))
    require(not missing, f"{path} is no state to resume from: it has no {missing}")
    if state["step"] == 0 and not stored_steps(run.name):
        return None  # the run only began to train, with whatever settings
    for key, value in run.settings().items():
        require(key in state["settings"], other)  # a flag that is newer than the state
        stored = state["settings"][key]
        different = f"argument --{key}: {run.name} was made with {stored}, not {value}"
        require(stored == value, f"{different}: give that, {RESTART}")
    check_weights(path, state["model"], model)
    return state


def find(model: nn.Module, run: Run) -> tuple[dict[str, Tensor] | None, dict[str, Any] | None]:
    """What a run begins with: the weights of step --iter_max, the state to resume from, or neither.

    Under --train 0 these are the weights, and nothing else will do. Else:
    - without a state, the weights if there is a checkpoint of that step;
    - without a state and without any checkpoint, neither: training begins;
    - with a state of that step or beyond it, the weights if there is a checkpoint of that step;
    - with a state of that step or before it, the state.
    Anything else raises UsageError, which says what to give.

    Under --overwrite 1 what earlier training stored is deleted first; results.json is deleted
    wherever the run has no weights any more.
    """
    if run.overwrite:
        delete_run(run.name)
    steps = stored_steps(run.name)
    if not run.train:
        return read_weights(model, run.iter_max), None
    state = load_state(model, run)
    name = f"argument --iter_max: {run.name}"
    if state is None:
        if run.iter_max in steps:
            return read_weights(model, run.iter_max), None
        without = f"{name} has no state to resume from: give one of its checkpoints {steps}"
        require(not steps, f"{without}, {RESTART}")
        (log_dir(run.name) / "results.json").unlink(missing_ok=True)
        return None, None
    if run.iter_max in steps and run.iter_max <= state["step"]:
        return read_weights(model, run.iter_max), None
    if run.iter_max >= state["step"]:  # of the very step, where a signal stopped it there
        return None, state
    beyond = f"{name} is at step {state['step']}, beyond {run.iter_max}: "
    beyond += f"give {state['step']} or more to resume"
    if steps:
        beyond += f", one of its checkpoints {steps}"
    raise UsageError(f"{beyond}, {RESTART}")


def delete_run(name: str) -> None:
    """Delete what earlier training of this run stored, and nothing else: for --overwrite 1."""
    steps = stored_steps(name)
    shipped = Path("checkpoints", ".gitignore")
    if steps and shipped.is_file() and name in shipped.read_text():
        print(f"warning: --overwrite 1 deletes {checkpoint_dir(name)}, which came with the code")
    paths = [path for path in log_dir(name).glob("*") if WRITTEN_LOGS.fullmatch(path.name)]
    paths += [model_path(name, step) for step in steps]
    paths.append(state_path(name))
    for path in paths:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Files of tensors


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def read_tensors(path: Path) -> dict[str, Any]:
    """Read tensors and plain values, on the CPU. Code in the file is never run.

    Raises Missing where there is no file, UsageError where it is damaged. The CRC-32 of a zip file
    tells; files from before torch 1.6 have none, and in those only a cut is noticed.
    """
    if not path.is_file():
        raise Missing(f"there is no file {path}")
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.is_zipfile(content):
            damaged = zipfile.ZipFile(content).testzip()
            if damaged:
                raise zipfile.BadZipFile(damaged)
        content.seek(0)
        stored = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        what = "truncated, damaged, no checkpoint, or more than tensors (code in it is not run)"
        message = f"{path} cannot be read: {what}; put an intact copy in its place"
        raise UsageError(message) from error
    kind = type(stored).__name__
    require(isinstance(stored, dict), f"{path} holds no dictionary of tensors but a {kind}")
    return stored

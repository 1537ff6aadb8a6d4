"""What a run's device brings with it: which one there is, random states, evaluation without traces."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from codebase.runtime.files import require

GENERATORS = {"cpu": torch.random, "cuda": torch.cuda, "mps": torch.mps}


def resolve_device(asked: str) -> str:
    """The kind of device that --device asks for: cpu, cuda or mps. Raises UsageError where it is not there."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = {"gpu": "cuda", "auto": max(usable, key=usable.get)}.get(asked, asked)
    require(usable[kind], f"argument --device: torch finds no {kind} on this machine; takes cpu or auto")
    return kind


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and of the accelerator in use."""
    used = {"cpu": True, "cuda": torch.cuda.is_initialized(), "mps": torch.backends.mps.is_available()}
    return {kind: generator.get_rng_state() for kind, generator in GENERATORS.items() if used[kind]}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put the states of the generators that are here back."""
    for kind, stored in state.items():
        if kind == "cpu" or resolve_device("auto") == kind:
            GENERATORS[kind].set_rng_state(stored)


@contextmanager
def eval_mode(model: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with a random stream of its own; everything is put back after."""
    training, random = model.training, random_state()
    torch.manual_seed(seed)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        set_random_state(random)

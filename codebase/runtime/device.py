"""What a run's device brings with it: which one there is, random states, compilation, memory, evaluation."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from codebase.runtime.files import require

WORTH = 20_000  # steps that win the start-up of compiling back
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


def forked_random_states() -> AbstractContextManager:
    """Inside, random numbers may be drawn and seeded at will; the states of before are put back after.

    torch.manual_seed seeds every CUDA device, so all of them are put back, once CUDA is in use.
    """
    if torch.cuda.is_initialized():
        return torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda")
    if torch.backends.mps.is_available():
        return torch.random.fork_rng([0], device_type="mps")
    return torch.random.fork_rng([], device_type="cuda")


@contextmanager
def eval_mode(model: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with a random stream of its own; everything is put back after."""
    training = model.training
    with forked_random_states(), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def plain_because(asked: str, steps: int, device: str, processes: int) -> str:
    """In a few words, why a training of that many steps is not compiled, or "" where it is; asked: what --compile says.

    Tools and the number of steps decide, never a timing, so that the same command does the same at every start.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    tools = {"cpu": ("C++ compiler", shutil.which(compiler)), "cuda": ("Triton", find_spec("triton"))}
    needed, found = tools.get(device, ("compiler", None))
    reasons = {
        "--compile 0": asked == "0",
        f"{processes} processes": processes > 1,
        f"compiling pays from {WORTH:,} on; --compile 1 does it now": asked == "auto" and steps < WORTH,
        f"no {needed} for {device} found": asked == "auto" and not found,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def compile_graph(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function compiled whole, with the noise of torch's own generators; on CUDA a recorded graph of kernels."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # speaks of CUDA where there is none
    torch.compiler.reset()  # or what an earlier run of a series compiled counts against this one
    options = {"cpu": {"cpp_wrapper": True, "compile_threads": 1}}  # one file: more processes have nothing to do
    options |= {"cuda": {"triton.cudagraphs": True, "triton.autotune_pointwise": False}}  # nothing is chosen by time
    options = options.get(device, {}) | {"fallback_random": True}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, instead of giving it back and fetching it anew page by page.

    A freed block below 32 MB raises M_MMAP_THRESHOLD to its size, M_TRIM_THRESHOLD to twice that (mallopt(3)).
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@contextmanager
def no_denormals() -> Iterator[None]:
    """Inside, floats closer to 0 than 1.2e-38 are 0, for CPUs that trap on them; threads that start inside keep to it.

    Adam's averages get there where a gradient has vanished: of pixels that are black, of labels that are learnt.
    """
    before = bool(torch.tensor(1e-30) * 1e-10 == 0)
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The value of the smallest subnormal")  # numpy's, before 2.4
            yield
    finally:
        torch.set_flush_denormal(before)

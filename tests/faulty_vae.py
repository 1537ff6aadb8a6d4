"""run_vae.py in which something goes wrong on purpose: python faulty_vae.py FAULT [flags]."""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import run_vae
from codebase import train

RANK = int(os.environ["RANK"])


def at_step(number: int, fault: Callable[[], None]) -> None:
    """Call fault() before that step."""
    plain_step = train.plain_step
    steps = itertools.count(1)

    def faulty_plain_step(*args) -> Callable:
        step = plain_step(*args)

        def faulty_step(index):
            if next(steps) == number:
                fault()
            return step(index)

        return faulty_step

    train.plain_step = faulty_plain_step


def terminated_at_12() -> None:
    """Every process is in a folder of its own, as on machines that share none."""
    os.chdir(f"rank{RANK}")
    if RANK == 1:
        at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM))


def killed_at_16() -> None:
    if RANK == 1:
        at_step(16, lambda: os.kill(os.getpid(), signal.SIGKILL))


def out_of_memory_at_5() -> None:
    def fault() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: the second card is full")

    if RANK == 1:
        at_step(5, fault)


FAULTS = {
    "terminated at 12": terminated_at_12,
    "killed at 16": killed_at_16,
    "out of memory at 5": out_of_memory_at_5,
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    FAULTS[fault]()
    sys.exit(run_vae.main(sys.argv[1:]))

"""run_vae.py in which something goes wrong on purpose: python faulty_vae.py FAULT [flags]."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import run_vae
from codebase import evaluate, train
from codebase.runtime.parallel import Processes

RANK = int(os.environ["RANK"])


def at_step(number: int, fault: Callable[[], None]) -> None:
    """Call fault() before that step, counted over all runs of this process."""
    plain_step = train.plain_step
    steps = iter(range(1, 1_000_000))

    def faulty_plain_step(*args) -> Callable:
        step = plain_step(*args)

        def faulty_step(index):
            if next(steps) == number:
                fault()
            return step(index)

        return faulty_step

    train.plain_step = faulty_plain_step


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def apart() -> None:
    """Every process in a folder of its own, as on machines that share none."""
    os.chdir(f"rank{RANK}")


# ---------------------------------------------------------------------------------------------
# The faults


def slow_main_process() -> None:
    """The main process is the last to say that it failed."""
    speaks_of_failure = Processes.speaks_of_failure

    def slow(self, error: BaseException) -> bool:
        if RANK == 0:
            time.sleep(0.1)
        return speaks_of_failure(self, error)

    Processes.speaks_of_failure = slow


def terminated_at_12() -> None:
    apart()
    if RANK == 1:
        at_step(12, lambda: send(signal.SIGTERM))


def interrupted_at_16() -> None:
    apart()
    if RANK == 0:
        at_step(16, lambda: send(signal.SIGINT))


def killed_at_16() -> None:
    if RANK == 1:
        at_step(16, lambda: send(signal.SIGKILL))


def killed_in_evaluation() -> None:
    """One process dies when the bounds of the test set are due; the other one is busy then."""
    bounds = evaluate.bounds

    def faulty(*args, **kwargs) -> dict:
        if "progress" not in kwargs:  # at a checkpoint
            return bounds(*args, **kwargs)
        if RANK == 1:
            send(signal.SIGKILL)
        time.sleep(3)
        return bounds(*args, **kwargs)

    evaluate.bounds = faulty


def out_of_memory_at_5() -> None:
    def fault() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: the second card is full")

    if RANK == 1:
        at_step(5, fault)


FAULTS = {
    "slow main process": slow_main_process,
    "terminated at 12": terminated_at_12,
    "interrupted at 16": interrupted_at_16,
    "killed at 16": killed_at_16,
    "killed in evaluation": killed_in_evaluation,
    "out of memory at 5": out_of_memory_at_5,
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    FAULTS[fault]()
    sys.exit(run_vae.main(sys.argv[1:]))

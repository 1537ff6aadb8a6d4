"""One process, or those that torchrun starts, behind one interface: many train and evaluate what one does.

Of several, every process draws the batch, its binarisation and its noise for all images and keeps its own rows of each
piece, so the random streams of all of them, and of one process alone, are the same. Gradients are summed up.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from codebase.runtime.device import resolve_device
from codebase.runtime.files import Parted, RunError, UsageError, require


class Processes:
    """A process on its own; main says whether this one decides, writes and speaks."""

    rank, size, main = 0, 1, True

    def first(self, decide: Callable[[], Any]) -> Any:
        """What decide() returns or raises in the main process: in all of them."""
        return decide()

    def first_to_fail(self) -> bool:
        """Whether no other process has failed before: that one speaks for all."""
        return True

    def rows(self, count: int) -> slice:
        """The rows of count images that are this process's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def noise(self, count: int) -> AbstractContextManager:
        """Inside, torch.randn_like draws for all of count images and returns this process's rows."""
        return nullcontext()

    def sum(self, tensors: Sequence[Tensor], signum: int = 0) -> int:
        """Sum each tensor over all processes, in place; return the signal that any of them caught, or 0."""
        return signum


ALONE = Processes()


class Ranks(Processes):
    """A process among others."""

    def __init__(self, device: str):
        self.device = resolve_device(device)
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        self.main, backend = self.rank == 0, "nccl" if self.device == "cuda" else "gloo"
        patience = timedelta(days=1)  # a download of the main process takes long
        dist.init_process_group(backend, timeout=patience, store=self.store, rank=self.rank, world_size=self.size)
        if not self.main:
            # for the rest of the process
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115

    def first(self, decide: Callable[[], Any]) -> Any:
        answer, failure = [None, False], None
        try:
            answer[0] = decide() if self.main else None
        except BaseException as error:
            answer, failure = [None, True], error
        _together(dist.broadcast_object_list, answer)
        if answer[1]:
            raise failure or RunError()  # without a word: the main process says why
        return answer[0]

    def first_to_fail(self) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends the others: speak, and end in peace
        try:
            return self.store.add("failures of this run", 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True

    def noise(self, count: int) -> AbstractContextManager:
        rows = self.rows(count)

        class BatchNoise(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function is not torch.randn_like:
                    return function(*args, **(kwargs or {}))
                *leading, _, width = args[0].shape  # the last axis but one is the batch's
                return args[0].new_empty(*leading, count, width).normal_()[..., rows, :]

        return BatchNoise()

    def sum(self, tensors: Sequence[Tensor], signum: int = 0) -> int:
        """All in one message, and the signal too: one that a single process caught stops all of them at one step."""
        message = torch.cat([*(t.flatten() for t in tensors), torch.tensor([float(signum)], device=self.device)])
        _together(dist.all_reduce, message)
        *sums, caught = message.split([*(t.numel() for t in tensors), 1])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view_as(tensor))
        return (signum or 15) if caught.item() else 0


def _together(collective: Callable, argument: Any) -> None:
    """Call a collective; raise RunError, with torch's words, where it fails."""
    try:
        collective(argument)
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0]
        what = "another process of this run died" if "onnection" in words else "the processes of this run fell out"
        raise Parted(f"{what} ({words})") from error


def how_many() -> int:
    """The number of processes of the run, which torchrun and some cluster images put into WORLD_SIZE."""
    said = os.environ.get("WORLD_SIZE", "")
    if not said:
        return 1
    if not said.isdecimal() or int(said) == 0:
        raise UsageError(f"WORLD_SIZE is {said!r}, which is no number of processes: unset it")
    return int(said)


def check_processes(device: str) -> None:
    """Raise UsageError where several processes cannot find each other, or cannot compute on that kind of device."""
    size = os.environ["WORLD_SIZE"]
    needed = ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    start = "start several processes by torchrun, or unset WORLD_SIZE for one"
    require(not missing, f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: {start}")
    kind = resolve_device(device)
    other = "argument --device: several processes do not compute on mps: give --device cpu, or start one process"
    require(kind != "mps", other)
    if kind == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", int(os.environ["LOCAL_RANK"]) + 1))
        count = torch.cuda.device_count()
        each = f"{here} processes need a GPU each and {count} are here: start {count}, or give --device cpu"
        require(here <= count, f"argument --device: {each}")


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """This process among those of its run, on that kind of device.

    Raises UsageError where there is no such device, where there are more processes than devices, and where WORLD_SIZE
    asks for several processes and nothing says how they find each other.
    """
    if how_many() == 1:
        yield ALONE
        return
    check_processes(device)
    group = Ranks(device)
    try:
        yield group
    finally:
        with suppress(RuntimeError):  # where the others are gone
            dist.destroy_process_group()

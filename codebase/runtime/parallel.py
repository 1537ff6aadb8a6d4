"""The processes of a run: one, or those that torchrun starts, and the random numbers of each.

Every process computes its own rows of each batch, with its own random numbers. Gradients are
averaged, the first process decides and writes, and what one decides or suffers, all do.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codebase.runtime.files import FailedElsewhere, ProcessLost, require


def seed_generator(device: str, seed: int) -> None:
    """Seed the default generator of a device: "cpu", "cuda" or "mps".

    torch.manual_seed does so too, but also keeps a stack trace for each call before CUDA is used.
    """
    if device == "cuda":
        torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers of one training step in one process.

    The CPU's generator takes 32 bits of a seed. A sum gives no two steps of a run the same ones,
    which a hash would. Its factors keep runs and processes far apart, and its constant keeps steps
    away from small numbers, by which weights are drawn and models evaluated.
    """
    return (0x5851F42D + seed * 0x9E3779B1 + rank * 0x85EBCA6B + step) % 2**32


class Processes:
    """This process among those of a run, computing on that kind of device.

    rank: its number; size: how many there are; main: whether it decides, writes and speaks.
    """

    def __init__(self, device: str = "cpu", rank: int = 0, size: int = 1):
        self.device = device
        self.rank = rank
        self.size = size
        self.main = rank == 0

    def seed_step(self, seed: int, step: int) -> None:
        """Give this process the random numbers of a step: they depend on nothing before it."""
        seed_generator(self.device, step_seed(seed, step, self.rank))

    def rows(self, index: Tensor) -> Tensor:
        """This process's part of a batch."""
        if self.size == 1:
            return index
        return index.tensor_split(self.size)[self.rank]

    def add_up(self, tensors: Sequence[Tensor], weight: float = 1) -> None:
        """Replace each tensor by the sum of weight * tensor over the processes, in one message.

        With each process's share of the images as its weight that is the mean over all images.
        """
        if self.size == 1:
            return
        message = weight * torch.cat([tensor.flatten() for tensor in tensors])
        collective(dist.all_reduce, message)
        parts = message.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, parts, strict=True):
            tensor.copy_(total.view_as(tensor))

    def any_signal(self, caught: list[int]) -> int:
        """A signal that a process caught, the largest number of several processes, or 0."""
        number = caught[0] if caught else 0
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        collective(dist.all_reduce, largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def first(self, decide: Callable[[], Any]) -> Any:
        """What decide() returns in the main process, in all; where it raises there, all raise."""
        if self.size == 1:
            return decide()
        answer = [None, False]
        error = FailedElsewhere()
        if self.main:
            try:
                answer[0] = decide()
            except BaseException as failure:
                answer[1] = True
                error = failure
        collective(dist.broadcast_object_list, answer)
        if answer[1]:
            raise error
        return answer[0]

    def speaks_of_failure(self, error: BaseException) -> bool:
        """Whether this process is the first that can say why it fails: it speaks for all."""
        if self.size == 1:
            return True
        if isinstance(error, FailedElsewhere):
            return False
        # By this signal torchrun ends the others; each says its line or not, and ends in peace.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self.store.add("failures of this run", 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True


def collective(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Call a collective of torch; raise ProcessLost, with torch's words, where it fails."""
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0]
        what = "the processes of this run fell out"
        if "connection" in words.lower():
            what = "another process of this run died"
        raise ProcessLost(f"{what} ({words})") from error


def find_device(name: str) -> str:
    """The kind of device that --device names: cpu, cuda or mps.

    Raises UsageError where this machine has none.
    """
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        if has_cuda:
            return "cuda"
        return "mps" if has_mps else "cpu"
    device = "cuda" if name == "gpu" else name
    found = {"cpu": True, "cuda": has_cuda, "mps": has_mps}[device]
    message = f"argument --device: torch finds no {device} on this machine; takes cpu or auto"
    require(found, message)
    return device


def count_processes() -> int:
    """How many processes the run has: torchrun, and some cluster images, set WORLD_SIZE."""
    size = os.environ.get("WORLD_SIZE", "") or "1"
    wrong = f"WORLD_SIZE is {size!r}, which is no number of processes: unset it"
    require(size.isdecimal() and int(size) > 0, wrong)
    return int(size)


def check_processes(device: str, size: int) -> None:
    """Raise UsageError where processes cannot find each other, or compute on that device."""
    needed = ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = ", ".join(name for name in needed if not os.environ.get(name))
    start = "start several processes by torchrun, or unset WORLD_SIZE for one"
    require(not missing, f"WORLD_SIZE is {size}, but {missing} not set: {start}")
    for name in ["RANK", "LOCAL_RANK", "MASTER_PORT"]:
        value = os.environ[name]
        require(value.isdecimal(), f"{name} is {value!r}, which is no number: {start}")
    other = "several processes do not compute on mps: give --device cpu, or start one process"
    require(device != "mps", f"argument --device: {other}")
    if device == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        count = torch.cuda.device_count()
        each = f"{here} processes need a GPU each and {count} are here"
        cure = f"start {count}, or give --device cpu"
        require(here <= count, f"argument --device: {each}: {cure}")


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """This process among those of its run, on the device that --device names.

    torchrun tells each process of the others by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT. Raises UsageError where the device or one of these is missing.
    """
    size = count_processes()
    if size == 1:
        yield Processes(find_device(device))
        return
    device = find_device(device)
    check_processes(device, size)
    backend = "gloo"
    if device == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    processes = Processes(device, int(os.environ["RANK"]), size)
    patience = timedelta(days=1)  # a download by the main process may take long
    processes.store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend, timeout=patience, store=processes.store, rank=processes.rank, world_size=size
    )
    speech = sys.stdout
    with open(os.devnull, "w", encoding="utf-8", errors="replace") as silence:
        if not processes.main:
            sys.stdout = silence
        try:
            yield processes
        finally:
            sys.stdout = speech
            with contextlib.suppress(RuntimeError):  # where the others are gone
                dist.destroy_process_group()

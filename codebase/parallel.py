"""Training and evaluation on the processes that torchrun starts: together they do what one process does.

Every process draws the batch, its binarisation and its noise for all images and keeps its own rows of each piece, so
the random streams of all processes, and of one process alone, are the same. Gradients are added up weighted by rows.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from codebase.checkpoint import Fault, Refused
from codebase.train import Step


class Ranks:
    """This process's place among the others."""

    def __init__(self, device: str):
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def first(self, decide):
        """What decide() returns, or Refused raises, on rank 0: on all ranks; the others wait."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except Refused as error:
                answer[1] = str(error)
        self._together(dist.broadcast_object_list, answer)
        if answer[1] is not None:
            raise Refused(answer[1])
        return answer[0]

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are this process's."""
        if batch_size < self.size:
            raise Refused(f"argument --batch_size: takes at least one image per process, {self.size}, not {batch_size}")
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values over all processes, in place."""
        self._together(dist.all_reduce, values)
        return values

    def logsumexp(self, values: Tensor) -> Tensor:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        self._together(dist.all_gather, gathered, values)
        return torch.stack(gathered).logsumexp(0)

    @staticmethod
    def _together(collective, *args) -> None:
        try:
            collective(*args)
        except RuntimeError as error:
            raise Fault("another process of this run died; the same command goes on from the last state") from error


class _BatchNoise(TorchFunctionMode):
    """Inside, torch.randn_like(m) draws for the whole batch, the last axis but one, and returns this process's rows."""

    def __init__(self, rows: slice, batch_size: int):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn_like:
            shape = (*args[0].shape[:-2], self.batch_size, args[0].shape[-1])
            return torch.randn(shape, dtype=args[0].dtype, device=args[0].device)[..., self.rows, :]
        return function(*args, **(kwargs or {}))


class SharedStep(Step):
    """A Step of which this process does its rows."""

    def __init__(self, model, batch, optimizer, terms: Tensor, ranks: Ranks, caught: list[int]):
        super().__init__(model, batch, optimizer, terms)
        self.ranks, self.caught = ranks, caught

    def piece(self, inputs: tuple, shared: tuple, share: float) -> Tensor:
        size = len(inputs[0])
        rows = self.ranks.rows(size)
        with _BatchNoise(rows, size):
            return super().piece([value[rows] for value in inputs], shared, share * (rows.stop - rows.start) / size)

    def gradients(self, index: Tensor) -> Tensor:
        """Sum gradients, terms and caught signals over the processes, in one message."""
        terms = super().gradients(index)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        signals = torch.tensor([float(max(self.caught, default=0))], device=self.terms.device)
        parts = [gradient.flatten() for gradient in gradients] + [terms, signals]
        *sums, terms, signals = self.ranks.sum(torch.cat(parts)).split([part.numel() for part in parts])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        if signals.item() and not self.caught:  # a signal to one process stops all of them at the same step
            self.caught.append(15)
        return terms

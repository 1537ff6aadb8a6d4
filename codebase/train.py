"""The training loop: one step for every model, resumable bit for bit, as a CUDA graph where there is CUDA."""

import copy
import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from codebase import checkpoint
from codebase.checkpoint import Fault, Stopped
from codebase.evaluate import quietly, random_state, set_random_state

LOG_EVERY = 100  # steps per row of metrics.csv, each the mean of its steps
PIECE = 1000  # images that go through the model at once
COLUMNS = {
    "train/loss": "loss",
    "gen/elbo": "nelbo",  # the table shows what goes down
    "gen/kl_z": "kl",
    "gen/kl_y": "kl_y",
    "gen/rec": "rec",
    "class/ce": "ce",
    "class/acc": "acc",
}
Batch = Callable[[Tensor], tuple]


def order(n: int, batch_size: int, seed: int, start: int, device) -> Iterator[Tensor]:
    """Batches of positions from batch `start` on: shuffled passes over all n images, laid end to end."""

    def shuffled(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) % 2**32)
        return torch.randperm(n, generator=generator).to(device)

    epoch, offset = divmod(start * batch_size, n)
    ahead = shuffled(epoch)[offset:]
    while True:
        whole = len(ahead) // batch_size * batch_size
        if whole:
            yield from ahead[:whole].split(batch_size)
        epoch += 1
        ahead = torch.cat([ahead[whole:], shuffled(epoch)])


def adam(model: torch.nn.Module, device) -> torch.optim.Adam:
    """Adam with learning rate 1e-3, in one kernel where there is one."""
    kind = torch.device(device).type
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")


def adam_step(optimizer: torch.optim.Adam) -> None:
    """optimizer.step(), straight to the kernel: what torch does around it takes 0.2 ms, 7% of a VAE's step."""
    group = optimizer.param_groups[0]
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    states = [optimizer.state[parameter] for parameter in parameters]
    if not group["fused"] or not all(states):  # no such kernel, or the first step, which makes the states
        return optimizer.step()
    gradients, (beta1, beta2) = [parameter.grad for parameter in parameters], group["betas"]
    m, v, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    torch._foreach_add_(steps, 1)
    options = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    with torch.no_grad():
        torch._fused_adam_(parameters, gradients, m, v, [], steps, beta1=beta1, beta2=beta2, **options)


class Step:
    """One training step on the images at the positions of a batch; the terms of the loss add up on the device.

    batch(index) returns what model.loss takes: a tuple with a row per image, and a tuple shared by all images. A batch
    of more than 1,000 images goes through the model in equal pieces of at most that: time grows with it, not memory.
    """

    def __init__(self, model, batch: Batch, optimizer, terms: Tensor):
        self.model, self.batch, self.optimizer, self.terms = model, batch, optimizer, terms

    def gradients(self, index: Tensor) -> Tensor:
        """Leave the gradients of the loss in the parameters; return the terms of the loss."""
        inputs, shared = self.batch(index)
        count = math.ceil(len(index) / PIECE)
        pieces = zip(*(value.tensor_split(count) for value in inputs), strict=True)
        return sum(self.piece(piece, shared, len(piece[0]) / len(index)) for piece in pieces)

    def piece(self, inputs: tuple, shared: tuple, share: float) -> Tensor:
        """gradients of some images, which make up that share of the batch."""
        loss, summaries = self.model.loss(*inputs, *shared)
        (loss if share == 1 else loss * share).backward()
        with torch.no_grad():
            return torch.stack(list(summaries.values())) * share

    def __call__(self, index: Tensor) -> None:
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = None
        self.terms += self.gradients(index)
        adam_step(self.optimizer)


class Replayed:
    """A Step recorded once, as a CUDA graph, and replayed; random numbers go on from replay to replay."""

    def __init__(self, step: Step, index: Tensor, record=None):
        self.index = index.clone()  # the graph reads its batch from here
        before = _snapshot(step)
        for _ in range(3):  # let libraries allocate what they need outside the graph
            _on_side_stream(step, self.index)
        _restore(step, before)
        self.replay = (record or _record_cuda_graph)(step, self.index)

    def __call__(self, index: Tensor) -> None:
        self.index.copy_(index)
        self.replay()


def _on_side_stream(step: Step, index: Tensor) -> None:
    if index.device.type != "cuda":
        return step(index)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(index)
    torch.cuda.current_stream().wait_stream(side)


def _record_cuda_graph(step: Step, index: Tensor) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(index)
    return graph.replay


def _snapshot(step: Step) -> tuple:
    return copy.deepcopy((step.model.state_dict(), step.optimizer.state_dict()["state"], step.terms, random_state()))


def _restore(step: Step, before: tuple) -> None:
    """Put weights, optimizer and random state back in place: the tensors stay, so a graph can be recorded on them."""
    weights, moments, terms, random = before
    step.model.load_state_dict(weights)
    for number, parameter in enumerate(step.model.parameters()):
        for key, value in step.optimizer.state[parameter].items():
            value.copy_(moments[number][key]) if number in moments else value.zero_()
    step.terms.copy_(terms)
    set_random_state(random)


def keep_freed_memory(mapped: int = 1 << 30, trimmed: int = -1) -> None:
    """Have glibc keep freed memory for the next step, not hand it to the system and fault it in again (20% faster).

    mapped: bytes from which on a block is the system's own; trimmed: free bytes that are handed back, -1 for never.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, mapped)  # M_MMAP_THRESHOLD
        mallopt(-1, trimmed)  # M_TRIM_THRESHOLD


class Table:
    """The rows of metrics.csv, and the terms that add up to the next row."""

    def __init__(self, names: list[str], device, stored: dict | None):
        stored = stored or {"rows": [], "terms": [0.0] * len(names), "steps": 0, "seconds": 0.0}
        self.names, self.rows, self.steps = names, stored["rows"], stored["steps"]
        self.terms = torch.tensor(stored["terms"], device=device)
        self.began = time.monotonic() - stored["seconds"]

    def state(self) -> dict:
        return {"rows": self.rows, "terms": self.terms.tolist(), "steps": self.steps, "seconds": self.seconds()}

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def check(self, step: int) -> dict[str, float]:
        """The terms so far, by column; raises Fault where one is not finite."""
        values = dict(zip(map(COLUMNS.get, self.names), self.terms.tolist(), strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            terms = " and ".join(name for name in broken if name not in ("loss", "nelbo")) or "loss"
            raise Fault(f"{terms} not finite at step {step}: training stopped, the last checkpoint is kept")
        return values

    def close_row(self, step: int) -> dict[str, float]:
        means = {name: value / self.steps for name, value in self.check(step).items()}
        means["nelbo"] = 0.0 - means["nelbo"]
        self.rows.append([step, *means.values(), round(self.seconds(), 3)])
        self.terms.zero_()
        self.steps = 0
        return means

    def csv(self) -> str:
        head = ["step", *(COLUMNS[name] for name in self.names), "seconds"]
        return "".join(
            ",".join(f"{value:.10g}" if isinstance(value, float) else str(value) for value in row) + "\n"
            for row in [head, *self.rows]
        )


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, start: int, stop: int):
        shown = sys.stderr.isatty() and checkpoint.writes
        self.bar = tqdm(initial=start, total=stop, disable=not shown, dynamic_ncols=True, mininterval=0.5)
        self.stop, self.told, self.before = stop, time.monotonic(), start

    def show(self, step: int, means: dict[str, float]) -> None:
        figures = {key: f"{means[key]:.2f}" for key in ("loss", "kl", "rec", "ce", "acc") if means.get(key)}
        self.bar.set_postfix(figures, refresh=False)
        if self.bar.disable and checkpoint.writes and (now := time.monotonic()) > self.told + 5:
            rate = (step - self.before) / (now - self.told)
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            print(f"step {step:,} of {self.stop:,}: {text}, {rate:.0f} steps/s", file=sys.stderr, flush=True)
            self.told, self.before = now, step


def fit(model, batch: Batch, n: int, args, state: dict | None, on_save=lambda step: None) -> None:
    """Train model to step args.iter_max, from the stored state if there is one, and store checkpoints on the way.

    batch: see Step; n: the number of training images. on_save(step) is called after each checkpoint.
    Raises Stopped on SIGINT and SIGTERM, once the state is saved; Fault where a loss or a weight is not finite.
    """
    with quietly(model):
        inputs, shared = batch(torch.zeros(1, dtype=torch.int64, device=args.device))
        names = list(model.loss(*inputs, *shared)[1])
    optimizer, table, start = adam(model, args.device), Table(names, args.device, state and state["table"]), 0
    if state:
        start = state["step"]
        model.load_state_dict(state["model"])
        groups = optimizer.state_dict()["param_groups"]  # of this device, not of the one that the state comes from
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        set_random_state(state["random"])
    batches = order(n, args.batch_size, args.seed, start, args.device)
    progress = Progress(start, args.iter_max)

    def save(step: int, checkpointed: bool) -> None:
        table.check(step)
        if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
            raise Fault(f"weights not finite at step {step}: training stopped, the last checkpoint is kept")
        if checkpointed:
            checkpoint.save_model_by_name(model, step)
        state = {"step": step, "settings": args.settings, "model": model.state_dict(), "table": table.state()}
        state |= {"optimizer": optimizer.state_dict()["state"], "random": random_state()}
        checkpoint.save_state(model.name, state)
        checkpoint.write(checkpoint.log_dir(model.name) / "metrics.csv", table.csv())
        if checkpointed:
            on_save(step)

    with signals() as caught:
        train_step = fastest(model, batch, optimizer, table.terms, args, caught)
        for step in range(start + 1, args.iter_max + 1):
            train_step(next(batches))
            table.steps += 1
            progress.bar.update()
            last = step == args.iter_max
            if step % LOG_EVERY == 0 or last:
                progress.show(step, table.close_row(step))
            if step % args.iter_save == 0 or last:
                save(step, checkpointed=True)
            if caught and not last:
                save(step, checkpointed=False)
                raise Stopped(caught[0], step)
    progress.bar.close()


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of being ended by them."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fastest(model, batch: Batch, optimizer, terms: Tensor, args, caught: list[int]) -> Callable[[Tensor], None]:
    """The step of these processes, of this process, or on CUDA its graph where one can be recorded."""
    if args.ranks:
        from codebase.parallel import SharedStep

        return SharedStep(model, batch, optimizer, terms, args.ranks, caught)
    step = Step(model, batch, optimizer, terms)
    if torch.device(args.device).type == "cuda":
        try:
            return Replayed(step, torch.zeros(args.batch_size, dtype=torch.int64, device=args.device))
        except RuntimeError as error:
            print(f"training without a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
    return step

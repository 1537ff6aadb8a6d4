"""Training: the batches, what a step does, and the one loop, which can be stopped and gone on with bit for bit."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from codebase import checkpoint
from codebase.runtime import report
from codebase.runtime.device import compile_graph, plain_because, random_state, set_random_state
from codebase.runtime.files import RunError, Stopped, log_dir, model_path, state_path, write
from codebase.runtime.options import Run
from codebase.runtime.processes import Processes
from codebase.runtime.signals import ENDING, handled_signals

LOG_EVERY = 100  # steps per row of metrics.csv, each the mean of its steps
KEPT = "training stopped, the last checkpoint is kept"
WRITE_EVERY = 30  # seconds after which metrics.csv is brought up to date between two saves
PIECE = 1000  # images that go through the model at once
COLUMNS = {"train/loss": "loss", "gen/elbo": "nelbo", "gen/kl_z": "kl", "gen/kl_y": "kl_y", "gen/rec": "rec"}
COLUMNS |= {"class/ce": "ce", "class/acc": "acc"}  # of metrics.csv, which shows what goes down
Batch = Callable[[Tensor], tuple[tuple, tuple]]
Gradient = Callable[..., dict[str, Tensor]]
Watch = Callable[[int], dict[str, float]]


def order(n: int, batch_size: int, seed: int, start: int, device: str) -> Iterator[Tensor]:
    """Batches of positions from batch `start` on: shuffled passes over all n images, laid end to end."""
    first, done = divmod(start * batch_size, n)  # passes, and images of the one under way
    ahead = torch.empty(0, dtype=torch.int64, device=device)
    for epoch in count(first):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch) % 2**32)
        shuffled = torch.randperm(n, generator=generator).to(device)
        ahead, done = torch.cat([ahead, shuffled[done:]]), 0
        whole = len(ahead) // batch_size * batch_size
        yield from ahead[:whole].reshape(-1, batch_size)
        ahead = ahead[whole:]


def add_gradient(model: nn.Module, share: float, *tensors: Tensor) -> dict[str, Tensor]:
    """Add the gradient of share * model.loss(*tensors) to the parameters' grad; return the loss's terms by name."""
    loss, terms = model.loss(*tensors)
    (loss * share).backward()
    return terms


def compiled_gradient(model: nn.Module, device: str, *tensors: Tensor) -> Gradient:
    """add_gradient with forward and backward compiled into one graph; tensors: an example of what model.loss takes."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(model.loss(*tensors)[0], list(parameters.values()), allow_unused=True)
    used = [name for name, gradient in zip(parameters, found, strict=True) if gradient is not None]
    values = {name: parameters[name].detach() for name in used}  # of the same memory, so always of the last step
    graph = compile_graph(grad(lambda values, *tensors: functional_call(model, values, tensors), has_aux=True), device)

    def add(model: nn.Module, share: float, *tensors: Tensor) -> dict[str, Tensor]:
        gradients, terms = graph(values, *tensors)
        for name, gradient in gradients.items():
            parameter, gradient = parameters[name], gradient if share == 1 else share * gradient
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return terms

    return add


def choose_gradient(model: nn.Module, batch: Batch, run: Run, group: Processes, before: bool | None) -> Gradient:
    """add_gradient, compiled where --compile wants it and it works, and a line that says so.

    before: whether the last steps of a training that goes on were compiled, which auto keeps to; None of a new one.
    """
    why = plain_because(run.compile, run.iter_max, run.device, group.size)
    kept_plain = False  # where a run in one piece would be compiled
    if before is not None and run.compile == "auto" and group.size == 1:
        kept_plain = why == "" and not before
        why = "" if before else "as its last steps"
    add, random, began = add_gradient, random_state(), time.monotonic()
    if not why:
        print("compiling the step: about 20 s, or 3 s where it is stored from an earlier run", flush=True)
        try:
            first = torch.zeros(run.batch_size, dtype=torch.int64, device=run.device)
            inputs, shared = batch(first[:1])
            add = compiled_gradient(model, run.device, *inputs, *shared)
            backward(model, batch, first, group, add)
        except Exception as error:
            why = f"compiling failed: {type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
            add = add_gradient
        model.zero_grad()
        set_random_state(random)
    print(f"steps: plain ({why})" if why else f"steps: compiled, in {time.monotonic() - began:.1f} s")
    if kept_plain:
        print("a run of this --iter_max in one piece is compiled: the bits will differ from it")
    if before not in (None, not why):
        print(f"the last steps were {'compiled' if before else 'plain'}: the bits will differ from a run in one piece")
    return add


def backward(
    model: nn.Module, batch: Batch, index: Tensor, group: Processes, add: Gradient = add_gradient
) -> tuple[list[str], Tensor]:
    """Add the gradient of the loss on the images at index to the parameters' grad; return the loss's terms by name.

    batch(index) is what model.loss takes: a tuple with a row per image, and a tuple shared by all images. More than
    1,000 images, or samples of them, go through the model in equal pieces of at most that: time grows with the batch,
    not memory. Of several processes each does its rows of every piece. add: add_gradient, or the same compiled.
    """
    inputs, shared = batch(index)
    sums = torch.zeros((), device=index.device)
    pieces = min(math.ceil(len(index) * getattr(model, "train_iw", 1) / PIECE), len(index) // group.size)
    for piece in zip(*(value.tensor_split(pieces) for value in inputs), strict=True):
        rows = group.rows(len(piece[0]))
        share = (rows.stop - rows.start) / len(index)  # of the batch's images
        with group.noise(len(piece[0])):
            terms = add(model, share, *(value[rows] for value in piece), *shared)
        sums = sums + share * torch.stack(list(terms.values())).detach()
    return list(terms), sums


class Training:
    """What the steps of a training change, and how that is saved: weights, optimizer, and the table of the steps."""

    def __init__(self, model: nn.Module, run: Run, state: dict[str, Any] | None, watch: Watch):
        self.model, self.run, self.watch, table = model, run, watch, state["table"] if state else {}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=run.lr, fused=run.device in ("cpu", "cuda"))
        self.step, self.names, self.rows = state["step"] if state else 0, table.get("names", []), table.get("rows", [])
        self.tests: dict[int, dict[str, float]] = table.get("tests", {})  # what watch found, by step
        self.since, self.sums = table.get("since", 0), torch.tensor(table.get("sums", 0.0))  # steps since the last row
        self.began = time.monotonic() - table.get("seconds", 0.0)
        self.compiled = bool(state and state.get("compiled"))  # whether the last steps were
        if state:
            model.load_state_dict(state["model"])
            groups = self.optimizer.state_dict()["param_groups"]  # of this device, not of the one it comes from
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
            set_random_state(state["random"])

    def add(self, names: list[str], terms: Tensor) -> None:
        """Count a step with these terms of its loss; nothing is read from the device."""
        self.step, self.since = self.step + 1, self.since + 1
        self.names, self.sums = names, self.sums.to(terms.device) + terms

    def means(self) -> dict[str, float]:
        """The mean of each term over the steps since the last row; raises RunError where one is not finite."""
        sums = self.sums.tolist() if self.since else []
        means = {name: total / self.since for name, total in zip(self.names, sums, strict=False)}
        if broken := [COLUMNS[name] for name, mean in means.items() if not math.isfinite(mean)]:
            terms = " and ".join(name for name in broken if name not in ("loss", "nelbo")) or "loss"
            raise RunError(f"{terms} not finite at step {self.step}: {KEPT}")
        return {COLUMNS[name]: 0.0 - mean if name == "gen/elbo" else mean for name, mean in means.items()}

    def row(self, means: dict[str, float]) -> list[float]:
        """The row of the table that ends at this step, with these means."""
        return [self.step, *means.values(), round(time.monotonic() - self.began, 3)]

    def save_table(self) -> None:
        """Write metrics.csv; a row that is not closed yet comes last."""
        unfinished = [self.row(self.means())] if self.since else []
        write_table("metrics", self.run, [["step", *map(COLUMNS.get, self.names), "seconds"], *self.rows, *unfinished])

    def check(self) -> None:
        """Raise RunError where a loss or a weight is not finite."""
        self.means()
        if not all(torch.isfinite(value).all() for value in self.model.state_dict().values()):
            raise RunError(f"weights not finite at step {self.step}: {KEPT}")

    def save(self) -> None:
        """Store the table, the checkpoint where one is due, and last the state, the record that all of it is there."""
        self.save_table()
        due = self.step % self.run.iter_save == 0 or self.step == self.run.iter_max
        if self.step and due:
            if found := self.watch(self.step):
                if broken := [name for name, value in found.items() if not math.isfinite(value)]:
                    raise RunError(f"{' and '.join(broken)} of test images not finite at step {self.step}: {KEPT}")
                self.tests[self.step] = found
            checkpoint.save_model_by_name(self.model, self.step)
        if self.tests:
            rows = [[step, *found.values()] for step, found in self.tests.items()]
            write_table("test", self.run, [["step", *next(iter(self.tests.values()))], *rows])
        table = {"names": self.names, "rows": self.rows, "since": self.since, "sums": self.sums.tolist()}
        table |= {"seconds": time.monotonic() - self.began, "tests": self.tests}
        state = {"step": self.step, "settings": self.run.settings(), "compiled": self.compiled, "table": table}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        checkpoint.save_state(self.run.name, state | {"random": random_state()})


def write_table(name: str, run: Run, rows: list[list[Any]]) -> None:
    """Write logs/<run>/<name>.csv."""
    cells = ([f"{value:.10g}" if isinstance(value, float) else str(value) for value in row] for row in rows)
    write(log_dir(run.name) / f"{name}.csv", "".join(",".join(row) + "\n" for row in cells))


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and the hang-up of a terminal in a list instead of being ended by them."""
    caught: list[int] = []
    with handled_signals((signal.SIGINT, *ENDING), lambda number, _: caught.append(number)):
        yield caught


def update_table(training: Training, warned: bool) -> bool:
    """Write metrics.csv between two saves, which may fail: the next save has all of it. Return whether that was said.

    A spreadsheet that holds the file is no reason to end a training.
    """
    try:
        training.save_table()
    except OSError as error:
        if not warned:
            print(f"warning: metrics.csv not updated ({error.strerror or error}); training continues", flush=True)
        return True
    return warned


def fit(training: Training, batch: Batch, n: int, group: Processes) -> None:
    """Train to step --iter_max and store checkpoints on the way. batch: see backward; n: the number of training images.

    Raises Stopped on SIGINT, SIGTERM and SIGHUP, once the state is saved, and RunError where a loss or a weight is
    not finite.
    """
    model, run, stop, written = training.model, training.run, 0, time.monotonic()
    warned = False
    if training.step < run.iter_max:
        add = choose_gradient(model, batch, run, group, training.compiled if training.step else None)
        training.compiled = add is not add_gradient
    parameters = list(model.parameters())
    batches = order(n, run.batch_size, run.seed, training.step, run.device)
    with caught_signals() as caught, report.progress_bar(training.step, run.iter_max, group.main) as progress:
        if group.main:
            report.config(run)
            training.save()
        while training.step < run.iter_max and not stop:
            training.optimizer.zero_grad()
            names, terms = backward(model, batch, next(batches), group, add)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            stop = group.sum([*gradients, terms], next(iter(caught), 0))
            training.optimizer.step()
            training.add(names, terms)
            progress.update()

            if training.step % LOG_EVERY == 0:
                means = training.means()
                shown = {name: f"{mean:.2f}" for name, mean in means.items() if name != "nelbo" and mean}
                newest = training.tests.get(max(training.tests, default=0), {})
                shown |= {f"test_{name}": f"{value:.5g}" for name, value in list(newest.items())[:1]}
                progress.set_postfix(shown, refresh=False)
                training.rows.append(training.row(means))
                training.since, training.sums = 0, torch.zeros_like(training.sums)
            if training.step % run.iter_save == 0 or training.step == run.iter_max or stop:
                training.check()
                if group.main:
                    training.save()
            elif group.main and time.monotonic() > written + WRITE_EVERY:
                warned = update_table(training, warned)
                written = time.monotonic()
    if stop := group.sum([], next(iter(caught), 0)):  # one that came during the last save too, which is done by now
        raise Stopped(f"stopped at step {training.step}, state saved", stop)


def train(
    model: nn.Module,
    train_loader: Any,
    labeled_subset: Any,
    device: Any,
    tqdm: Any,
    writer: Any,
    iter_max: float = math.inf,
    iter_save: float = math.inf,
    model_name: str = "model",
    y_status: str = "none",
    reinitialize: bool = False,
) -> None:
    """The course's training function, for scripts that import it and never call it.

    Always raises NotImplementedError, which says what to call instead.
    """
    raise NotImplementedError(
        "the course's train() is not part of this package: run run_vae.py, run_gmvae.py,"
        " run_ssvae.py or run_fsvae.py, or write a loop around loss, terms = model.loss(x)"
    )


def train_or_load(model: nn.Module, batch: Batch, n: int, run: Run, group: Processes, watch: Watch) -> None:
    """Bring the model to step --iter_max: by training or going on (see fit), or from a checkpoint that is there.

    watch(step) is called at each checkpoint and returns figures of images that are not trained on, for test.csv. Raises
    UsageError where what is stored contradicts the command line.
    """
    report.begin(run, model)
    weights, state = group.first(lambda: checkpoint.find(model, run))
    if weights is not None:
        model.load_state_dict(weights)
        known = "" if state_path(run.name).exists() else ", with settings that are not stored"
        before = f", trained before{known}" if run.train else ""
        return print(f"loaded {model_path(run.name, run.iter_max)}{before}")
    if state and state["step"]:
        print(f"going on from step {state['step']:,}")
    began = time.monotonic()
    fit(Training(model, run, state, watch), batch, n, group)
    print(f"trained to step {run.iter_max:,} in {timedelta(seconds=round(time.monotonic() - began))}")

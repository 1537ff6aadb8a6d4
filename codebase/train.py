"""Training: the order of the images, a training step, the loop around it, and what it stores.

Step n of a run is a function of the weights, the optimizer and (seed, n): the images are looked
up by n, and the random numbers are seeded by n (and, of several processes, by the process). So
nothing random is ever stored, and a run that was resumed is the run that never stopped.
"""

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from codebase import checkpoint
from codebase.runtime import log, signals
from codebase.runtime.files import RunError, Stopped, log_dir, model_path, state_path
from codebase.runtime.options import Run
from codebase.runtime.parallel import Processes

LOG_EVERY = 100  # steps per row of metrics.csv, each the mean of its steps
WRITE_EVERY = 30  # seconds between two writes of metrics.csv, apart from saves
COMPILE_FROM = 20_000  # training steps from which on compiling pays, on busy cores too

# From a term of the loss to its column of metrics.csv; another term gives its own name. The ELBO
# is stored negated: like the loss it goes down.
COLUMNS = {
    "train/loss": "loss",
    "gen/elbo": "nelbo",
    "gen/kl_z": "kl",
    "gen/kl_y": "kl_y",
    "gen/rec": "rec",
    "class/ce": "ce",
    "class/acc": "acc",
}

Batch = Callable[[Tensor], tuple[Tensor, ...]]  # positions of images to what model.loss takes
Step = Callable[[Tensor], dict[str, Tensor]]  # positions of images to the terms of the loss
Evaluate = Callable[[int], dict[str, float]]  # a step to metrics of the test set


# ---------------------------------------------------------------------------------------------
# The order of the images


def order(n: int, batch_size: int, seed: int, start: int, device: str) -> Iterator[Tensor]:
    """The positions of batch number `start`, and of those after it, (batch_size,) each.

    They are shuffled passes over all n images, laid end to end; each pass has its own seed.
    """
    first_pass, done = divmod(start * batch_size, n)
    ahead = torch.empty(0, dtype=torch.int64, device=device)
    for number in count(first_pass):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)
        shuffled = torch.randperm(n, generator=generator).to(device)
        ahead = torch.cat([ahead, shuffled[done:]])
        done = 0
        whole = len(ahead) // batch_size * batch_size
        yield from ahead[:whole].reshape(-1, batch_size)
        ahead = ahead[whole:]


# ---------------------------------------------------------------------------------------------
# A training step


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, processes: Processes
) -> Step:
    """A step in torch's own words. Of several processes each takes its rows of the batch."""

    def step(index: Tensor) -> dict[str, Tensor]:
        rows = processes.rows(index)
        loss, terms = model.loss(*batch(rows))
        optimizer.zero_grad()
        loss.backward()
        terms = {name: term.detach() for name, term in terms.items()}
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        processes.add_up([*gradients, *terms.values()], weight=len(rows) / len(index))
        optimizer.step()
        return terms

    return step


def compiled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, example: Tensor
) -> Step:
    """The same step on a CPU, with the forward and the backward pass compiled into one graph.

    example: positions of images, to compile for.
    """
    inputs = batch(example)
    parameters = dict(model.named_parameters())
    # Without a generative loss most of an SSVAE has no gradient; Adam leaves such weights alone.
    model.loss(*inputs)[0].backward()
    used = {name: value for name, value in parameters.items() if value.grad is not None}
    model.zero_grad()
    weights = {name: value.detach() for name, value in used.items()}  # Adam's own memory

    def loss(weights: dict[str, Tensor], *inputs: Tensor):
        return functional_call(model, weights, inputs)

    graph = compile_graph(grad(loss, has_aux=True))
    graph(weights, *inputs)

    def step(index: Tensor) -> dict[str, Tensor]:
        gradients, terms = graph(weights, *batch(index))
        for name, gradient in gradients.items():
            used[name].grad = gradient
        optimizer.step()
        return terms

    return step


def compile_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled whole, with the random numbers of torch's own generators."""
    # This logger speaks of CUDA where there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # What an earlier run of a series compiled would count against this one.
    torch.compiler.reset()
    options = {
        "fallback_random": True,
        "cpp_wrapper": True,
        "compile_threads": 1,  # there is one file to compile
    }
    # In vectors of 512 bits torch's softplus and ELU take three times as long as in those of 256
    # bits (torch 2.14 on Zen 4). The width is the same on both kinds of CPU, and whatever
    # ATEN_CPU_CAPABILITY says: torch's store of compiled code does not note the width, and code
    # compiled for one width would skip half of the numbers with the other.
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        options["cpp.simdlen"] = 256
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def recorded_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, plain: Step, example: Tensor
) -> Step:
    """The plain step on a GPU, recorded as a CUDA graph: its kernels are launched all at once.

    It computes what the plain step does, bit for bit; the random numbers are seeded as for it.
    example: positions of images, to record with. Source: PyTorch's notes on CUDA graphs.
    """
    # A recording begins with a few real steps, which are undone after it. It reads and writes the
    # same memory at each launch, so weights and Adam's state are put back into theirs.
    weights = deepcopy(model.state_dict())
    adam_state = deepcopy(optimizer.state_dict()["state"])
    index = example.clone()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                plain(index)
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()
        with torch.cuda.graph(graph):
            terms = plain(index)
    finally:
        model.load_state_dict(weights)
        for parameter, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if parameter in adam_state:
                    value.copy_(adam_state[parameter][name])
                else:
                    value.zero_()

    def step(next_index: Tensor) -> dict[str, Tensor]:
        index.copy_(next_index)
        graph.replay()
        return terms

    return step


def why_plain(run: Run, process_count: int, before: bool | None) -> str:
    """In a few words, why the steps of a run are plain, or "" where they are compiled or recorded.

    before: whether the steps before were compiled, of a run that resumes: auto keeps to it. The
    flags and the tools decide, never a timing, so that a command does the same at every start.
    """
    if run.compile == "0":
        return "--compile 0"
    if process_count > 1:
        return f"{process_count} processes"
    if run.device == "mps":
        return "on mps"
    if run.device == "cuda" or run.compile == "1" or before is True:
        return ""
    if before is False:
        return "as the steps before"
    if run.iter_max < COMPILE_FROM:
        return f"compiling pays from {COMPILE_FROM:,} on; --compile 1 does it now"
    if not find_compiler():
        return f"no C++ compiler for {run.device} found"
    return ""


def find_compiler() -> bool:
    """Whether there is the C++ compiler that torch compiles with for a CPU."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", usual)) is not None


def choose_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    run: Run,
    processes: Processes,
    state: dict[str, Any] | None,
) -> tuple[Step, bool]:
    """The training step of a run, and whether it is compiled; says which, and why."""
    before = None
    if state and state.get("device", run.device) == run.device:
        before = state["compiled"]
    why = why_plain(run, processes.size, before)
    step = plain_step(model, optimizer, batch, processes)
    example = torch.zeros(run.batch_size, dtype=torch.int64, device=run.device)
    compiled = False
    failed = False
    if not why:
        try:
            if run.device == "cuda":
                step = recorded_step(model, optimizer, step, example)
                print("steps: recorded as a CUDA graph, with the bits of plain ones")
            else:
                depends = "15 s on idle cores, several times that on busy ones, 3 s if it is stored"
                print(f"compiling the step: about {depends}", flush=True)
                began = time.monotonic()
                step = compiled_step(model, optimizer, batch, example)
                compiled = True
                print(f"steps: compiled, in {time.monotonic() - began:.1f} s")
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            what = "recording" if run.device == "cuda" else "compiling"
            why = f"{what} failed: {type(error).__name__}: {lines[0]}"
            failed = True
            model.zero_grad()
    if why:
        print(f"steps: plain ({why})")
    # Whether a run in one piece would be compiled, with this --iter_max and where compiling works.
    may_compile = run.device == "cpu" and not failed
    whole_is_compiled = may_compile and not why_plain(run, processes.size, None)
    if before is not None and not (before == compiled == whole_is_compiled):
        print("a run in one piece would be compiled otherwise: its bits will differ from these")
    if state:
        say_what_differs(run, processes, state)
    return step, compiled


def say_what_differs(run: Run, processes: Processes, state: dict[str, Any]) -> None:
    """Say where the steps before were made in a way that gives other bits."""
    differences = []
    if state["processes"] != processes.size:
        differences.append(f"of {state['processes']} processes")
    threads = torch.get_num_threads()
    if state.get("device", run.device) != run.device:  # states of the revision before lack it
        differences.append(f"on {state['device']}")
    elif run.device == "cpu" and state.get("threads", threads) != threads:
        differences.append(f"of {state['threads']} threads")
    for difference in differences:
        print(f"the steps before were {difference}: the bits will differ")


# ---------------------------------------------------------------------------------------------
# The metrics of a training: metrics.csv and test.csv


class Metrics:
    """Two tables of a training run: the terms of its loss, and metrics of the test set.

    names   the terms
    rows    closed rows of metrics.csv
    sums    each term summed over the steps since the last row, on the device
    steps   how many steps these are
    tests   rows of test.csv, by step
    began   when this training would have begun, had it never been stopped
    warned  whether it was said that metrics.csv cannot be written between saves
    """

    def __init__(self, run: Run):
        self.folder = log_dir(run.name)
        self.names: list[str] = []
        self.rows: list[list[float]] = []
        self.sums = torch.zeros((), device=run.device)
        self.steps = 0
        self.tests: dict[int, dict[str, float]] = {}
        self.began = time.monotonic()
        self.warned = False

    def restore(self, stored: dict[str, Any]) -> None:
        """Continue the tables of a run that was stopped; stored: see to_store."""
        self.names = stored["names"]
        self.rows = stored["rows"]
        self.sums = torch.tensor(stored["sums"], device=self.sums.device)
        self.steps = stored["steps"]
        self.tests = stored["tests"]
        self.began -= stored["seconds"]

    def to_store(self) -> dict[str, Any]:
        """What a run that resumes needs of the tables."""
        return {
            "names": self.names,
            "rows": self.rows,
            "steps": self.steps,
            "sums": self.sums.tolist(),
            "tests": self.tests,
            "seconds": time.monotonic() - self.began,
        }

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count a step with these terms of its loss; nothing is read from the device."""
        self.names = list(terms)
        self.sums = self.sums + torch.stack(list(terms.values()))
        self.steps += 1

    def means(self, step: int) -> dict[str, float]:
        """The mean of each column over the steps since the last row.

        Raises RunError where one is not finite.
        """
        means = {}
        if self.steps:
            for name, total in zip(self.names, self.sums.tolist(), strict=True):
                mean = total / self.steps
                if name == "gen/elbo":
                    mean = 0.0 - mean  # the column is the NELBO; -mean would make -0.0 of 0
                means[COLUMNS.get(name, name)] = mean
        broken = [name for name, mean in means.items() if not math.isfinite(mean)]
        if broken:
            terms = [name for name in broken if name not in ("loss", "nelbo")]
            raise RunError(diverged(terms or ["loss"], step))
        return means

    def close_row(self, step: int) -> dict[str, float]:
        """End a row of metrics.csv at this step; return its means."""
        means = self.means(step)
        self.rows.append(self.row(step, means))
        self.sums = torch.zeros_like(self.sums)
        self.steps = 0
        return means

    def row(self, step: int, means: dict[str, float]) -> list[float]:
        return [step, *means.values(), round(time.monotonic() - self.began, 3)]

    def write(self, step: int) -> None:
        """Write metrics.csv and, once there is a checkpoint with metrics, test.csv.

        Until then a test.csv that is there is of an earlier training, and is removed.
        """
        self.write_terms(step)
        if not self.tests:
            (self.folder / "test.csv").unlink(missing_ok=True)
        else:
            names = list(next(iter(self.tests.values())))
            tests = [["step", *names]]
            for tested_step, found in self.tests.items():
                tests.append([tested_step, *found.values()])
            log.write_table(self.folder / "test.csv", tests)

    def write_terms(self, step: int) -> None:
        """Write metrics.csv, where a row that is not closed yet comes last."""
        header = ["step", *[COLUMNS.get(name, name) for name in self.names], "seconds"]
        rows = [header, *self.rows]
        if self.steps:
            rows.append(self.row(step, self.means(step)))
        log.write_table(self.folder / "metrics.csv", rows)

    def test(self, step: int, found: dict[str, float]) -> None:
        """Keep the metrics of the test set at a checkpoint; raise RunError if one is not finite."""
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if broken:
            names = " and ".join(broken)
            raise RunError(diverged([f"{names} of test images"], step))
        if found:
            self.tests[step] = found

    def shown(self, means: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows: the terms that there are, and the last test metric."""
        shown = {}
        for name, mean in means.items():
            if name != "nelbo" and mean != 0:
                shown[name] = f"{mean:.2f}"
        if self.tests:
            newest = self.tests[max(self.tests)]
            name = "accuracy" if "accuracy" in newest else "nelbo"
            shown[f"test_{name}"] = f"{newest[name]:.5g}"
        return shown


def diverged(names: list[str], step: int) -> str:
    kept = "training stopped, the last checkpoint is kept"
    return f"{' and '.join(names)} not finite at step {step}: {kept}"


# ---------------------------------------------------------------------------------------------
# The loop


def train(
    model: nn.Module,
    batch: Batch,
    n: int,
    run: Run,
    processes: Processes,
    evaluate: Evaluate,
    state: dict[str, Any] | None,
) -> None:
    """Train to step --iter_max and store checkpoints on the way.

    batch: see Batch; n: the number of training images; evaluate(step) returns metrics of the test
    set, for test.csv; state: what the run resumes from, if anything. Raises Stopped on SIGINT,
    SIGTERM and SIGHUP, once the state is saved, RunError where a loss or a weight is not finite.
    """
    start = 0
    optimizer = make_optimizer(model, run)
    metrics = Metrics(run)
    compiled = False
    if state:
        start = state["step"]
        compiled = state["compiled"]
        model.load_state_dict(state["model"])
        restore_optimizer(optimizer, state["optimizer"])
        metrics.restore(state["metrics"])
        print(f"resuming from step {start:,}")
    if start < run.iter_max:
        training_step, compiled = choose_step(model, optimizer, batch, run, processes, state)

    def save(step: int) -> None:
        refuse_diverged(model, step)
        if processes.main:
            store(step, model, optimizer, metrics, run, compiled, processes.size, evaluate)

    batches = order(n, run.batch_size, run.seed, start, run.device)
    written = time.monotonic()
    done = start
    if processes.main:
        log.store_config(run, processes.size)
    shown = processes.main
    with signals.collected() as caught, log.progress_bar(start, run.iter_max, shown) as bar:
        # Before the first step: shows that the folders can be written to, and stores what is due
        # of a run that a signal stopped at its last step.
        save(start)
        for step in range(start, run.iter_max):
            processes.seed_step(run.seed, step)
            if run.schedule == "cosine":
                set_rate(optimizer, cosine_rate(run, step))
            terms = training_step(next(batches))
            metrics.add(terms)
            bar.update()
            stop = processes.any_signal(caught)

            done = step + 1
            if done % LOG_EVERY == 0:
                bar.set_postfix(metrics.shown(metrics.close_row(done)), refresh=False)
            if stop or is_due(done, run):
                save(done)
            elif processes.main and time.monotonic() > written + WRITE_EVERY:
                write_if_possible(metrics, done)
                written = time.monotonic()
            if stop:
                break
    stop = processes.any_signal(caught)  # one that came during the last save too
    if stop:
        raise Stopped(f"stopped at step {done}, state saved", stop)


def make_optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Adam, as one kernel for all weights where torch has it."""
    if run.device == "cuda":
        # A recorded step reads the rate from the GPU's memory.
        rate = torch.tensor(run.lr, device="cuda")
        return torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=True)
    return torch.optim.Adam(model.parameters(), lr=run.lr, fused=run.device == "cpu")


def cosine_rate(run: Run, step: int) -> float:
    """The learning rate of a step, from 0 on: from --lr along half a cosine to 0 at --iter_max.

    Source: Loshchilov & Hutter 2017, equation 5, without restarts.
    """
    return run.lr * (1 + math.cos(math.pi * step / run.iter_max)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give the optimizer its learning rate, in its own memory where that is on a GPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: dict[int, Any]) -> None:
    """Give the optimizer its state of each weight; its settings are those of this run's device."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": stored, "param_groups": groups})


def is_due(step: int, run: Run) -> bool:
    """Whether a checkpoint is to be stored at this step."""
    return step > 0 and (step % run.iter_save == 0 or step == run.iter_max)


def refuse_diverged(model: nn.Module, step: int) -> None:
    """Raise RunError where a weight is not finite."""
    for value in model.state_dict().values():
        if not torch.isfinite(value).all():
            raise RunError(diverged(["weights"], step))


def store(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    run: Run,
    compiled: bool,
    process_count: int,
    evaluate: Evaluate,
) -> None:
    """Store what the logs have, the checkpoint where one is due, and last the state.

    The state says what there is. A run that is killed before it is written resumes from the state
    before, computes the same steps, and writes the same files once more. A plot or a table that
    cannot be written, as where another program holds it, is raised after the state is stored, so
    no step is lost; the checkpoint is left out then, and the run that resumes stores all of it.
    """
    problem = None
    try:
        if is_due(step, run):
            metrics.test(step, evaluate(step))
        metrics.write(step)
    except OSError as error:
        problem = error
    if is_due(step, run) and problem is None:
        checkpoint.save_model_by_name(model, step)
    state = {
        "step": step,
        "settings": run.settings(),
        "compiled": compiled,
        "processes": process_count,
        "device": run.device,
        "threads": torch.get_num_threads(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "metrics": metrics.to_store(),
    }
    checkpoint.save_state(run.name, state)
    if problem is not None:
        raise problem


def write_if_possible(metrics: Metrics, step: int) -> None:
    """Bring metrics.csv up to date between saves; another program may hold the file."""
    try:
        metrics.write_terms(step)
    except OSError as error:
        if not metrics.warned:
            log.say(f"warning: metrics.csv cannot be written ({error.strerror or error})")
        metrics.warned = True


def train_or_load(
    model: nn.Module, batch: Batch, n: int, run: Run, processes: Processes, evaluate: Evaluate
) -> None:
    """Bring the model to step --iter_max: by training (see train), or from a checkpoint.

    Raises UsageError where what is stored contradicts the command line.
    """
    log.print_run(run, model)
    weights, state = processes.first(lambda: checkpoint.find(model, run))
    if weights is None:
        began = time.monotonic()
        train(model, batch, n, run, processes, evaluate, state)
        duration = timedelta(seconds=round(time.monotonic() - began))
        print(f"trained to step {run.iter_max:,} in {duration}")
        return
    model.load_state_dict(weights)
    line = f"loaded {model_path(run.name, run.iter_max)}"
    if run.train:
        line += ", trained before"
        if not state_path(run.name).exists():
            line += ", with settings that are not stored"
    print(line)

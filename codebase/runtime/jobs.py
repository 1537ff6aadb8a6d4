"""The runs of a series side by side, each in a process of its own.

Every run sends its lines, and in the end what became of it, through a pipe. The process that
started them prints the lines, so that no two mix, and passes a signal on to all runs.
"""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple

from tqdm import tqdm

from codebase.runtime import signals
from codebase.runtime.files import UsageError
from codebase.runtime.options import Run

PROCESSES = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
Result = tuple[int, dict[str, float]]  # of a run: exit code and metrics
PROGRESS = re.compile(r"(step|sample) (\d+) of (\d+)(.*), .*")  # see log.progress_bar


class Job(NamedTuple):
    """A run in a process, and the end of the pipe from which its messages are read."""

    run: Run
    process: Any
    pipe: connection.Connection


def how_many(run: Run, processes) -> int:
    """How many runs of a series are done at a time, at most; each has that share of the cores.

    A number counts as it is, so that the rest of a stopped series has the threads of its begin.
    """
    if run.jobs != "auto":
        return run.jobs
    if processes.device != "cpu" or processes.size > 1:
        return 1
    return min(core_count(), run.runs)


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------
# The process that starts the runs


def side_by_side(
    runs: list[Run], count: int, do_run: Callable[[Run], Result]
) -> tuple[dict[int, Result], int]:
    """Do so many runs at a time; return what do_run returned, by the run's number, and a signal.

    do_run is a function of a module, so that it can be sent to the process of the run. A signal
    (0: none came) ends all runs that work; the results have none that had not begun.
    """
    screen = Screen()
    waiting = list(runs)
    working: dict[connection.Connection, Job] = {}
    results = {}
    stop_sent = False
    with signals.collected() as caught, share_of_threads(count):
        try:
            while working or (waiting and not caught):
                while waiting and len(working) < count and not caught:
                    job = start(waiting.pop(0), do_run, screen.seconds)
                    working[job.pipe] = job
                if caught and not stop_sent:
                    stop(working)
                    stop_sent = True
                for pipe in connection.wait(list(working), timeout=0.2):
                    job = working[pipe]
                    if not receive(job, screen, results):
                        finish(working.pop(pipe), screen, results, bool(caught))
        finally:
            stop(working)
            for job in working.values():  # only where something broke here
                job.pipe.close()
                job.process.join()
            screen.close()
    number = caught[0] if caught else 0
    return results, number


def start(run: Run, do_run: Callable[[Run], Result], seconds: float) -> Job:
    """Start the process of a run, which shows its progress every so many seconds."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(writer, seconds, do_run, run))
    try:
        with deaf_to_interrupts():
            process.start()
    except RuntimeError as error:  # inside a run's own import of the program
        cure = "call main() below `if __name__ == '__main__':`"
        raise UsageError(f"--jobs imports this program again for each run: {cure}") from error
    writer.close()
    return Job(run, process, reader)


def receive(job: Job, screen: "Screen", results: dict[int, Result]) -> bool:
    """Read the next message of a run; return whether there was one."""
    try:
        kind, content = job.pipe.recv()
    except (EOFError, OSError):
        return False
    if kind == "result":
        results[job.run.run] = content
    else:
        screen.show(job.run.run, kind, content)
    return True


def finish(job: Job, screen: "Screen", results: dict[int, Result], stopped: bool) -> None:
    """Wait for the process of a run to exit; report it if it left no result."""
    job.process.join()
    job.pipe.close()
    number = job.run.run
    screen.remove_bar(number)
    if number not in results:
        results[number] = (1, {})
        if not stopped:
            line = f"error: its process died, exit code {job.process.exitcode}"
            line += "; checkpoints are intact"
            if job.process.exitcode == -9:  # as Linux ends processes where memory is short
                line += "; if memory was short, use a smaller --jobs"
            screen.show(number, "stderr", line)


def stop(working: dict[Any, Job]) -> None:
    """Have all runs save their states and end."""
    if os.name == "nt":  # where a run has heard the Ctrl-C itself, and this would kill it
        return
    for job in working.values():
        job.process.terminate()


@contextlib.contextmanager
def share_of_threads(count: int) -> Iterator[None]:
    """Inside, a new process computes with its share of the cores, unless the user says otherwise.

    torch reads this when it is loaded, so it has to be in the environment of a new process.
    """
    theirs = "OMP_NUM_THREADS" in os.environ
    if not theirs:
        os.environ["OMP_NUM_THREADS"] = str(max(1, core_count() // count))
    try:
        yield
    finally:
        if not theirs:
            del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """A process that is started inside never gets a Ctrl-C, which a terminal sends to all.

    One that comes meanwhile reaches this process afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start lets signals in again, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Screen:
    """Where the lines of the runs go; on a terminal their progress is a bar for each.

    seconds: how often a run shows its progress.
    """

    def __init__(self):
        self.terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
        self.seconds = 0.5 if self.terminal else 5
        self.bars: dict[int, tqdm] = {}

    def show(self, number: int, stream: str, line: str) -> None:
        """Print a line of a run to stdout or stderr, or move its bar. Nobody has to read it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            progress = PROGRESS.fullmatch(line)
            if progress and self.terminal:
                self.move_bar(number, *progress.groups())
            else:
                file = getattr(sys, stream)
                tqdm.write(f"run {number}: {line}", file=file)
                file.flush()

    def move_bar(self, number: int, unit: str, done: str, total: str, about: str) -> None:
        bar = self.bars.get(number)
        if bar is None or (bar.unit, bar.total) != (f" {unit}s", int(total)):
            self.remove_bar(number)
            options = {"initial": int(done), "total": int(total), "unit": f" {unit}s"}
            bar = tqdm(**options, desc=f"run {number}", leave=False, dynamic_ncols=True)
            self.bars[number] = bar
        bar.set_postfix_str(about.removeprefix(", "), refresh=False)
        bar.update(int(done) - bar.n)

    def remove_bar(self, number: int) -> None:
        if number in self.bars:
            with contextlib.suppress(OSError, ValueError):
                self.bars.pop(number).close()

    def close(self) -> None:
        for number in list(self.bars):
            self.remove_bar(number)


# ---------------------------------------------------------------------------------------------
# The process of a run


def work(
    pipe: connection.Connection, seconds: float, do_run: Callable[[Run], Result], run: Run
) -> None:
    """Do a run; send its lines through the pipe, and last what do_run returned."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is shared: a killed process would hold it for ever
    sys.stdout = Lines(pipe, "stdout", seconds)
    sys.stderr = Lines(pipe, "stderr", seconds)
    result = do_run(run)
    sys.stdout.send("result", result)


def end_with_parent() -> None:
    """Save the state and end where the process that started this one is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class Lines(io.TextIOBase):
    """A stream that sends whole lines through a pipe, whether or not somebody is there to hear.

    seconds: how often log.progress_bar writes a line of progress.
    """

    lock = threading.Lock()  # stdout and stderr share the pipe

    def __init__(self, pipe: connection.Connection, name: str, seconds: float):
        self.pipe = pipe
        self.name = name
        self.seconds = seconds
        self.begun = ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            line = line.strip("\r").rstrip()
            if line:
                self.send(self.name, line)
        return len(text)

    def send(self, kind: str, content: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.pipe.send((kind, content))

"""What surrounds the runs of a script: series, data set, device, lock, signals, exit codes."""

import contextlib
import errno
import functools
import os
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codebase.runtime import files, options, signals
from codebase.runtime.options import Run

# Threads of OpenMP that wait for each other keep their core busy for so many turns before they
# sleep. Where another program wants the core, a step takes 1.6 times as long with libgomp's own
# number.
SPIN_COUNT = "1000"

SAME_COMMAND = "the same command resumes from there"

# What a file system without locks answers, as NFS without lockd and some SMB shares.
NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


def launch(
    parse: Callable[[Sequence[str] | None], Run],
    one_run: Callable[..., dict[str, float]],
    argv: Sequence[str] | None,
) -> int:
    """Do the runs that a command line asks for; return the exit code.

    parse(argv) makes the first run of it, or ends the program; one_run(run, processes) does one
    and returns its metrics. The metrics of several runs are summarised. A failed run does not take
    the others down, but a signal does, and of several processes any failure.
    """
    with usable_streams(), signals.handled(signals.END, end_program):
        first = None
        try:
            first = parse(argv)
            if "OMP_WAIT_POLICY" not in os.environ:
                os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
            options.read_once.cache_clear()
            return do_runs(first, one_run)
        except BaseException as error:  # outside of any run: no such device, a signal
            if first is None and isinstance(error, SystemExit):
                raise  # the parser has spoken
            # Every process of torchrun has these: the first one says it.
            everybody_has_it = isinstance(error, files.UsageError | SystemExit)
            speak = not everybody_has_it or options.speaks_for_all()
            if not speak and isinstance(error, files.UsageError):
                time.sleep(5)  # torchrun ends the first process where another one ends before it
            return explain(error, first, speak)


def do_runs(first: Run, one_run: Callable[..., dict[str, float]]) -> int:
    """Do the runs and summarise them; return the exit code."""
    # Imported here, so that a command line is checked before torch is loaded. A signal waits till
    # then: inside an import it may be swallowed, or be taken for a module that is missing.
    with signals.collected() as caught:
        from codebase.runtime import jobs, log, parallel
    if caught:
        end_program(caught[0], None)

    with parallel.join(first.device) as processes:
        count = jobs.how_many(first, processes)
        if count > 1:
            code, done = several_at_a_time(first, one_run, processes, count)
        else:
            code, done = one_after_another(first, one_run, processes)
        if code > 128 or (code and processes.size > 1):
            return code
        # The data set is part of a series' name, and auto may change it in between.
        runs = {}
        metrics = defaultdict(dict)
        for run, found in done:
            runs[run.series] = run
            metrics[run.series][run.run] = found
        if first.runs > 1 and processes.main:
            for series, run in runs.items():
                log.summarise(run, metrics[series])
    return code


FinishedRuns = list[tuple[Run, dict[str, float]]]  # each with its metrics


def one_after_another(first: Run, one_run: Callable, processes) -> tuple[int, FinishedRuns]:
    """Do the runs in this process; return the exit code and what was done."""
    code = 0
    done = []
    with own_torch_settings(processes.device):
        for run in first.of_series():
            stamp = state_stamp(run)
            try:
                run = with_data_and_device(run, processes)
                stamp = state_stamp(run)
                with lock(run.name, processes):
                    done.append((run, one_run(run, processes)))
            except BaseException as error:
                # Of processes without a shared folder, the first one alone has written the state.
                stored = isinstance(error, files.Stopped | files.ProcessLost)
                begun = stored or state_stamp(run) != stamp
                left = run.run + 1 if begun else run.run
                resume = how_to_resume(first, list(range(left, first.run + first.runs)))
                speak = processes.speaks_of_failure(error)
                code = max(code, explain(error, run, speak, resume))
                if code > 128 or processes.size > 1:
                    break
    return code, done


def several_at_a_time(
    first: Run, one_run: Callable, processes, count: int
) -> tuple[int, FinishedRuns]:
    """Do so many runs at a time; return the exit code and what was done."""
    from codebase.runtime import jobs

    code = 0
    runs = []
    if first.train:
        first = with_data_and_device(first, processes)  # downloaded once, here
    for run in first.of_series():
        try:
            if not first.train:
                run = with_data_and_device(run, processes)
            runs.append(run)
        except files.UsageError as error:
            code = max(code, explain(error, run, True))
    stamps = [state_stamp(run) for run in runs]
    results, stop = jobs.side_by_side(runs, count, functools.partial(one_job, one_run))
    done = []
    for run in runs:
        if run.run in results:
            code_of_run, metrics = results[run.run]
            code = max(code, code_of_run)
            if code_of_run == 0:
                done.append((run, metrics))
    if stop:
        code = 128 + stop
    if code > 128:
        pairs = zip(runs, stamps, strict=True)
        not_begun = [run.run for run, stamp in pairs if state_stamp(run) == stamp]
        same = "the same command resumes every run from its last state"
        if first.overwrite:
            same = "no run had begun, so the same command does no harm"
        print_last_line(f"stopped; {how_to_resume(first, not_begun, count) or same}")
    return code, done


def one_job(one_run: Callable, run: Run) -> tuple[int, dict[str, float]]:
    """Do a run in a process of its own; return its exit code and metrics."""
    from codebase.runtime import parallel

    processes = parallel.Processes(run.device)
    with signals.handled(signals.END, end_program):
        try:
            with own_torch_settings(run.device), lock(run.name, processes):
                return 0, one_run(run, processes)
        except files.Stopped as stopped:
            print(stopped, file=sys.stderr)  # how to resume is said once, for all runs
            return 128 + stopped.signal_number, {}
        except BaseException as error:
            return explain(error, run, True), {}


def with_data_and_device(run: Run, processes) -> Run:
    """The run with the data set and the device that there are; missing files are downloaded.

    Raises UsageError where there are none, or fewer images in a batch than processes.
    """
    from codebase.runtime import download

    enough = f"takes at least one image per process, {processes.size}, not {run.batch_size}"
    files.require(run.batch_size >= processes.size, f"argument --batch_size: {enough}")
    data = processes.first(lambda: download.choose_data(run))
    return run.changed(data=data, device=processes.device)


# ---------------------------------------------------------------------------------------------
# One process a run
#
# The lock belongs to the process, not to the file: who dies holds nothing, and a file .lock that
# was left over blocks nobody. Who holds it may remove what killed processes left half-written.


@contextlib.contextmanager
def lock(name: str, processes) -> Iterator[None]:
    """Be the only process, or the only ones, that work on a run; raise UsageError if not."""
    import filelock

    folder = files.log_dir(name)
    file_lock = filelock.FileLock(folder / ".lock")
    processes.first(lambda: acquire(file_lock, name))
    try:
        yield
    finally:
        if processes.main:
            release(file_lock, folder)


def acquire(file_lock, name: str) -> None:
    """Take the lock and remove what killed processes left half-written."""
    import filelock

    path = Path(file_lock.lock_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    no_locks = f"warning: {path} cannot be locked here: let no other process work on this run"
    try:
        file_lock.acquire(timeout=0)
    except NotImplementedError:
        print(no_locks)
    except filelock.Timeout:
        if not has_no_locks(path):
            message = f"{name} is in use by another process: wait for it, or choose another --run"
            raise files.UsageError(message) from None
        print(no_locks)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            with contextlib.suppress(OSError):  # where it was made just now
                path.parent.rmdir()
            cure = "delete that file, or make its folder one that you can write to"
            message = f"{path} cannot be locked ({error.strerror or error}): {cure}"
            raise files.UsageError(message) from error
        print(no_locks)
    for folder in [path.parent, files.checkpoint_dir(name)]:
        for left_over in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                left_over.unlink()


def has_no_locks(path: Path) -> bool:
    """Whether a file system has no locks: some versions of filelock take that for a busy lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in NO_LOCKS
    return False


def release(file_lock, folder: Path) -> None:
    """Give the lock back, and remove the folder of a run that stored nothing in it.

    What fails here hides no error that is under way. Windows removes no open file, so there the
    lock file goes after the lock; elsewhere it goes before, while nobody else can have it.
    """
    unused = all(path.name == ".lock" for path in folder.glob("*"))
    if unused and os.name != "nt":
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()
    with contextlib.suppress(OSError):
        file_lock.release()
    if unused:
        with contextlib.suppress(OSError):  # other runs are in the folder above
            if os.name == "nt":
                (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()


# ---------------------------------------------------------------------------------------------
# Settings of the process that a run needs, put back after it


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Inside, what is printed goes somewhere, and no name is unprintable.

    A program without a console, as pythonw, has no streams; a stream may have been closed.
    """
    with contextlib.ExitStack() as stack:
        for name in ["stdout", "stderr"]:
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
                stack.enter_context(nowhere)
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, nowhere)
            elif hasattr(stream, "reconfigure") and hasattr(stream, "errors"):
                stack.callback(set_errors, stream, stream.errors)
                set_errors(stream, "backslashreplace")
        yield


def set_errors(stream, errors: str) -> None:
    """Say what a stream does with letters that it has not; it may be broken or closed by now."""
    with contextlib.suppress(OSError, ValueError):
        stream.reconfigure(errors=errors)


def end_program(number: int, frame) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextlib.contextmanager
def own_torch_settings(device: str) -> Iterator[None]:
    """Inside, torch computes without denormal numbers; a notebook's random numbers are kept.

    Denormal numbers are those closer to 0 than 1.2e-38: some CPUs compute them many times slower,
    and Adam's averages get there where a gradient has vanished, as of pixels that are black.
    """
    import torch

    # glibc's malloc then keeps what is freed, instead of fetching it anew page by page: a freed
    # block just below 32 MB raises its limits to that size (mallopt(3), M_MMAP_THRESHOLD).
    torch.empty(31 * 2**20, dtype=torch.uint8)
    flushed = bool(torch.tensor(1e-30) * 1e-10 == 0)
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    torch.set_flush_denormal(True)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            # numpy before 2.4 warns of the setting.
            warnings.filterwarnings("ignore", "The value of the smallest subnormal")
            yield
    finally:
        torch.set_flush_denormal(flushed)


# ---------------------------------------------------------------------------------------------
# Failures


def explain(error: BaseException, run: Run | None, speak: bool, resume: str = "") -> int:
    """Say in one line why a run failed, below a traceback where that is a bug; return the code.

    resume: what to type where the same command would not resume the run.
    """
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = f"error: {message}"
    advice = f"; {resume}" if resume else ""
    code = 1
    if isinstance(error, files.FailedElsewhere):
        return code
    if isinstance(error, files.Stopped):
        line = f"{message}; {resume or SAME_COMMAND}"
        code = 128 + error.signal_number
    elif isinstance(error, KeyboardInterrupt):
        line = f"interrupted{advice}"
        code = 130
    elif isinstance(error, SystemExit):
        line = f"terminated{advice}"
        code = error.code
    elif isinstance(error, files.UsageError):
        code = 2
    elif isinstance(error, MemoryError) or "out of memory" in line or "allocate memory" in line:
        line += f": out of memory; {how_to_need_less_memory(run)}"
    elif isinstance(error, files.ProcessLost):
        line += f"; its last state is stored: {resume or SAME_COMMAND}"
    elif isinstance(error, OSError) and error.errno is not None:
        where = error.filename or "while writing"
        line = f"error: {error.strerror or message}: {where}; checkpoints are intact"
    elif not isinstance(error, files.RunError) and speak:
        with contextlib.suppress(OSError):  # a closed terminal takes no words
            traceback.print_exception(error)
    if speak:
        print_last_line(line)
    return code


def print_last_line(line: str) -> None:
    """Print why the script ends; a closed terminal takes no words."""
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def state_stamp(run: Run) -> tuple[int, int] | None:
    """Number and time of a run's state file, which change when it is replaced; None: no file."""
    try:
        file = files.state_path(run.name).stat()
    except OSError:
        return None
    return file.st_ino, file.st_mtime_ns


def how_to_resume(first: Run, not_begun: list[int], count: int = 1) -> str:
    """What to type to resume the series that begins with a run, or "": the same command does it.

    With --overwrite 1 the same command would start over what was trained. not_begun: runs that are
    still to be started over; count: how many runs at a time, which gives them their threads.
    """
    if not first.overwrite or len(not_begun) == first.runs:
        return ""
    jobs = {"jobs": count} if count > 1 else {}
    without = ["--overwrite", *[f"--{flag}" for flag in jobs]]
    without_series = [*without, "--run", "--runs", "--seed"]
    commands = []
    for numbers in consecutive(not_begun):
        run = first.numbered(numbers[0])
        flags = {"run": run.run, "runs": len(numbers), "seed": run.seed, **jobs}
        commands.append(first.command(without_series, **flags, overwrite=1))
    commands.append(first.command(without, **jobs))
    return f"to resume: {' && '.join(commands)}"


def consecutive(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers, in parts without a gap."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return parts


def how_to_need_less_memory(run: Run | None) -> str:
    """Which flags make a run need less memory; the number of --iw's samples is none of them."""
    if run is None:
        return "end other programs"
    jobs = ["--jobs"] if run.jobs != 1 else []
    sizes = [f"--{flag}" for flag in ["k", "z"] if hasattr(run, flag)]
    if run.train:
        smaller = [*jobs, "--batch_size", *sizes]
        if getattr(run, "train_iw", 1) > 1:
            smaller.append("--train_iw")
        advice = f"use a smaller {' or '.join(smaller)}"
        if run.data == "svhn" and run.split == "extra":
            advice += ", or --split train"
        return advice
    advice = ""
    if jobs:
        advice += "use a smaller --jobs, "
    if sizes:
        advice += f"train a model with a smaller {' or '.join(sizes)}, "
    return f"{advice}end other programs, or choose another --device"

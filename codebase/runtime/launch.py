"""What surrounds the runs of a script: processes, data set, device, lock, signals, exit codes and series of runs."""

import contextlib
import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from codebase.runtime import download, files, options
from codebase.runtime.options import Run
from codebase.runtime.signals import ENDING, handled_signals

# Two OpenMP threads that wait for each other keep their cores busy for so many turns before they sleep. Where another
# process wants the core, the turns are its time lost, and ours: the thread that is waited for may be the one put off.
SPIN_COUNT = "10000"
# What a file system without locks answers: NFS without lockd, some SMB shares.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def launch(kind: type[Run], one_run: Callable[..., dict[str, float]], description: str, argv: list[str] | None) -> int:
    """Do the runs of that kind which a command line asks for, by one_run(run, group) each; return the exit code.

    group: the processes of the run. one_run returns the run's figures; those of several runs are summarised. A failed
    run does not take the others down, but a signal does, and of several processes any failure.
    """
    with usable_streams():
        try:
            with handled_signals(tuple(ENDING), lambda number, _: sys.exit(128 + number)):
                return launch_runs(kind, one_run, description, argv)
        except KeyboardInterrupt as error:  # before the first run, or after the last
            return fail(error, lambda: True)


def launch_runs(
    kind: type[Run], one_run: Callable[..., dict[str, float]], description: str, argv: list[str] | None
) -> int:
    values = options.parse(kind, description, argv)
    wait_briefly()
    resume = how_to_resume(kind, values, argv)
    memory = how_to_need_less_memory(values)
    code, first, count, series = 0, values["run"], values.pop("runs"), {}
    options.content.cache_clear()
    try:
        from codebase.runtime import device, processes, report  # only here: a bad command line is answered before torch

        device.keep_freed_memory()
        with device.no_denormals(), processes.join(values["device"]) as group:
            for number in range(first, first + count):
                seed = number if values["seed"] is None else values["seed"] + number - first
                try:
                    run = resolve(kind, values | {"run": number, "seed": seed}, group)
                    with contextlib.ExitStack() as stack:
                        group.first(lambda stack=stack, run=run: stack.enter_context(hold(run.name)))
                        figures = one_run(run, group)
                    series.setdefault(run.series, (run, {}))[1][number] = figures  # by data set, which auto may change
                except BaseException as error:
                    code = max(code, fail(error, group.first_to_fail, resume, memory))
                    if code > 128 or group.size > 1:
                        return code
            for run, figures in series.values() if count > 1 and group.main else ():
                report.summarise(run, figures)
    except BaseException as error:  # outside of any run: no such device, a signal, a summary that cannot be stored
        of_all = isinstance(error, (files.UsageError, SystemExit))  # every process sees that there is no such device
        code = max(code, fail(error, lambda: not of_all or os.environ.get("RANK", "0") == "0", resume, memory))
    return code


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Inside, what is printed goes somewhere, and no file name is unprintable.

    A program without a console, pythonw, has neither stream; a stream may have been closed.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
                setattr(sys, name, nowhere)
                stack.callback(setattr, sys, name, stream)
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        yield


def wait_briefly() -> None:
    """Have OpenMP's threads spin less, unless the user has decided; it is read when torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def how_to_resume(kind: type[Run], values: dict[str, Any], argv: list[str] | None) -> str:
    """What to type to resume a run that was stopped. With --overwrite the same command would start over."""
    if not values["overwrite"]:
        return "the same command resumes from there"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return "the same command without --overwrite resumes from there"
    script, words = sys.argv[0], sys.argv[1:]
    if argv is not None and argv != words:  # called from a notebook or another program
        script, words = f"run_{kind.model}.py", argv
    kept = [word for word in words if not word.startswith("--overwrite=")]
    while "--overwrite" in kept:
        at = kept.index("--overwrite")
        del kept[at : at + 2]
    return f"to resume: {shlex.join(['python', script, *kept])}"


def how_to_need_less_memory(values: dict[str, Any]) -> str:
    """Which flags of a command line make its run need less memory. The number of --iw's samples is none of them."""
    sizes = [f"--{name}" for name in ("k", "z") if name in values]
    if values["train"]:
        sizes.insert(0, "--batch_size")
        return f"use a smaller {' or '.join(sizes)}"
    smaller = f"train a model with a smaller {' or '.join(sizes)}, " if sizes else ""
    return f"{smaller}end other programs, or choose another --device"


def resolve(kind: type[Run], values: dict[str, Any], group) -> Run:
    """The Run of these flags, its data set and device being those that there are."""
    from codebase.runtime.device import resolve_device

    device = resolve_device(values["device"])
    enough = f"takes at least one image per process, {group.size}, not {values['batch_size']}"
    files.require(values["batch_size"] >= group.size, f"argument --batch_size: {enough}")
    asked = kind(**values)
    real, digits = (asked if asked.own_images else replace(asked, data=data) for data in (kind.real_data, "digits"))
    data = group.first(lambda: download.resolve_data(values["data"], real, digits))
    return replace(real, data=data, device=device)


@contextlib.contextmanager
def hold(name: str) -> Iterator[None]:
    """Be the only process that works on the run, and sweep up what killed ones left half-written.

    Raises UsageError with the other's process id. The dead hold nothing.
    """
    import filelock  # only here: a bad command line is answered before it is loaded

    folder = files.log_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    owner, path = folder / ".owner", folder / ".lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not refuses_locks(path):
            pid = owner.read_text().strip() if owner.exists() else "unknown"
            used = f"{name} is in use by process {pid}: wait for it, or choose another --run"
            raise files.UsageError(used) from None
        warn_of_no_lock(path)
    except NotImplementedError:
        warn_of_no_lock(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            with contextlib.suppress(OSError):  # where it was made just now
                folder.rmdir()
            cure = "delete that file, or make its folder one that you can write to"
            raise files.UsageError(f"{path} cannot be locked ({error.strerror or error}): {cure}") from error
        warn_of_no_lock(path)
    try:
        files.write(owner, f"{os.getpid()}\n")
        for left_over in [*folder.glob(".*.tmp"), *files.state_path(name).parent.glob(".*.tmp")]:
            with contextlib.suppress(OSError):
                left_over.unlink()
        yield
    finally:
        let_go(folder, lock)


def refuses_locks(path: Path) -> bool:
    """Whether the file system of that file has no locks, which not every version of filelock tells apart from busy."""
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


def warn_of_no_lock(path: Path) -> None:
    print(f"warning: {path} cannot be locked here: see to it that no other process works on this run", flush=True)


def let_go(folder: Path, lock: Any) -> None:
    """Give the lock back, and leave nothing of a run that stored nothing. What fails here hides no other error.

    Windows deletes no file that is open, so the lock file goes after the lock there; elsewhere before it, while nobody
    else can have it.
    """
    path = folder / ".lock"
    with contextlib.suppress(OSError):
        (folder / ".owner").unlink()
    unused = [left.name for left in folder.glob("*")] in ([], [".lock"])
    opened = False
    if unused:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            opened = True
    with contextlib.suppress(OSError):
        lock.release()
    if opened:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    if unused:
        with contextlib.suppress(OSError):  # the last of them where there are other runs
            folder.rmdir()
            folder.parent.rmdir()


def fail(error: BaseException, speaks: Callable[[], bool], resume: str = "", memory: str = "") -> int:
    """Say in one line why a run failed, below a traceback where that is a bug of ours; return the exit code.

    resume: how to resume the run; memory: how to make it need less.
    """
    line, code = f"error: {(str(error).strip() or type(error).__name__).splitlines()[0]}", 1
    if isinstance(error, files.RunError) and not error.args:  # another process says why
        return code
    speak = speaks()
    if isinstance(error, files.Stopped):
        line, code = f"{error.args[0]}; {resume}", 128 + error.args[1]
    elif isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 130
    elif isinstance(error, SystemExit):
        line, code = "terminated", error.code
    elif isinstance(error, files.UsageError):
        code = 2
    elif isinstance(error, MemoryError) or "out of memory" in line or "allocate memory" in line:
        line += f": out of memory, {memory}"
    elif isinstance(error, files.Parted):
        line += f"; its last state is stored: {resume}"
    elif isinstance(error, OSError):
        line = f"error: {error.strerror or error}: {error.filename or 'while writing'}; checkpoints are intact"
    elif not isinstance(error, files.RunError) and speak:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    if speak:
        with contextlib.suppress(OSError):  # a closed terminal takes no words
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    return code

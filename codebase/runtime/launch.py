"""What surrounds the runs of a script: processes, data set, device, lock, signals, exit codes and series of runs."""

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from codebase.runtime import download, files, options
from codebase.runtime.options import Run


def launch(kind: type[Run], one_run: Callable[..., dict[str, float]], description: str, argv: list[str] | None) -> int:
    """Do the runs of that kind which a command line asks for, by one_run(run, group) each; return the exit code.

    group: the processes of the run. one_run returns the run's figures; those of several runs are summarised. A failed
    run does not take the others down, but a signal does, and of several processes any failure.
    """
    values = options.parse(kind, description, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
                    code = max(code, fail(error, group.first_to_fail))
                    if code > 128 or group.size > 1:
                        return code
            for run, figures in series.values() if count > 1 and group.main else ():
                report.summarise(run, figures)
    except BaseException as error:  # outside of any run: no such device, a signal, a summary that cannot be stored
        of_all = isinstance(error, (files.UsageError, SystemExit))  # every process sees that there is no such device
        code = max(code, fail(error, lambda: not of_all or os.environ.get("RANK", "0") == "0"))
    return code


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
    owner, lock = folder / ".owner", filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = owner.read_text().strip() if owner.exists() else "unknown"
        raise files.UsageError(f"{name} is in use by process {pid}: wait for it, or choose another --run") from None
    try:
        files.write(owner, f"{os.getpid()}\n")
        for left_over in [*folder.glob(".*.tmp"), *files.state_path(name).parent.glob(".*.tmp")]:
            left_over.unlink()
        yield
    finally:
        owner.unlink(missing_ok=True)
        if [path.name for path in folder.glob("*")] == [".lock"]:  # bad data, or the like: nothing is left of the run
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # of other runs
                folder.parent.rmdir()
        lock.release()


def fail(error: BaseException, speaks: Callable[[], bool]) -> int:
    """Say in one line why a run failed, below a traceback where that is a bug of ours; return the exit code."""
    line, code = f"error: {(str(error).strip() or type(error).__name__).splitlines()[0]}", 1
    if isinstance(error, files.RunError) and not error.args:  # another process says why
        return code
    speak = speaks()
    if isinstance(error, files.Stopped):
        line, code = error.args[0], 128 + error.args[1]
    elif isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 130
    elif isinstance(error, SystemExit):
        line, code = "terminated", error.code
    elif isinstance(error, files.UsageError):
        code = 2
    elif isinstance(error, MemoryError) or "out of memory" in line or "allocate memory" in line:
        line += ": out of memory, use a smaller --batch_size"
    elif isinstance(error, OSError):
        line = f"error: {error.strerror or error}: {error.filename or 'while writing'}; checkpoints are intact"
    elif not isinstance(error, files.RunError) and speak:
        traceback.print_exception(error)
    if speak:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    return code

"""Signals that end a program: Ctrl-C, and what a terminal or a cluster sends.

Imports nothing that takes time: a Ctrl-C may come while a script's modules are imported.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

INTERRUPT = "SIGINT"
END = ["SIGTERM", "SIGHUP"]  # Windows has no SIGHUP, which a terminal sends when it closes


def interrupt_in_one_line() -> None:
    """From here on, a Ctrl-C that nobody catches is one line and exit code 130, no traceback."""
    sys.excepthook = say_interrupted


def say_interrupted(kind, error, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    try:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    finally:
        os._exit(130)  # the interpreter would end itself by the signal


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Inside, Ctrl-C and the signals that end a program are collected in a list instead."""
    caught: list[int] = []
    with handled([INTERRUPT, *END], lambda number, frame: caught.append(number)):
        yield caught


@contextlib.contextmanager
def handled(names: list[str], handler: Callable) -> Iterator[None]:
    """Inside, handler(number, frame) is called on these signals; what was before is put back.

    A hang-up that is ignored stays ignored: that is what nohup is for. Python allows handlers in
    the main thread alone: a run in another thread has none.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            ignored = number is not None and signal.getsignal(number) == signal.SIG_IGN
            if number is not None and not (ignored and name == "SIGHUP"):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) == handler:  # or somebody inside had a reason to change it
                signal.signal(number, signal.SIG_DFL if previous is None else previous)

"""Signals that end a run, handled for a while: nothing of it is left behind."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = [signal.SIGTERM]  # what asks a process to end
if hasattr(signal, "SIGHUP"):
    ENDING.append(signal.SIGHUP)  # a closed ssh or terminal; Windows has no such signal


@contextmanager
def handled_signals(numbers: tuple[int, ...], handler: Callable) -> Iterator[None]:
    """Inside, handler(number, frame) is called on these signals.

    A hang-up that is ignored stays so: that is what nohup is for. Outside of the main thread, which
    alone can handle signals, nothing is changed.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number == getattr(signal, "SIGHUP", None)):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) == handler:  # or somebody inside had reason to change it
                signal.signal(number, signal.SIG_DFL if previous is None else previous)

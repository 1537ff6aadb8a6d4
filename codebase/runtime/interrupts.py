"""A Ctrl-C that comes while a script's modules are imported. Imports nothing that takes time."""

import os
import sys


def in_one_line() -> None:
    """From here on, a Ctrl-C that nobody catches is one line and exit code 130 instead of a traceback."""
    sys.excepthook = _say


def _say(kind, error, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    try:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    finally:
        os._exit(130)  # the interpreter would end itself by the signal

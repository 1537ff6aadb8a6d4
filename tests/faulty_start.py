"""A start of run_vae.py in which something happens when a module is looked for.

python faulty_start.py MODULE SIGNAL [flags] sends SIGNAL then.
"""

import os
import runpy
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
module = sys.argv[1]
number = int(sys.argv[2])


class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == module:
            signal.raise_signal(number)


sys.modules.pop(module, None)
sys.meta_path.insert(0, Finder)
sys.path.insert(0, ROOT)
sys.argv = [os.path.join(ROOT, "run_vae.py"), *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")

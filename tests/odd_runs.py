"""Runs for test_jobs.py: a VAE with slow steps and no pictures, and one that prints much.

python odd_runs.py [flags of run_vae.py]
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_vae
from codebase.runtime.launch import launch


def slow(run, processes) -> dict[str, float]:
    """Each step takes at least $SECONDS_A_STEP; plots are not rendered, evaluations are quick."""
    from matplotlib.figure import Figure

    from codebase import evaluate, train

    evaluate.SAMPLES = 10
    Figure.savefig = lambda self, file, **options: file.write(b"a plot")
    plain_step = train.plain_step

    def slow_plain_step(*args):
        step = plain_step(*args)

        def slow_step(index):
            time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
            return step(index)

        return slow_step

    train.plain_step = slow_plain_step
    return run_vae.one_run(run, processes)


def print_much(run) -> tuple[int, dict[str, float]]:
    """Print two hundred lines in pieces; run 1 dies then."""
    for number in range(200):
        stream = sys.stdout if number % 2 else sys.stderr
        print("line", end=" ", file=stream)
        print(number, file=stream)
    if run.run == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0, {"threads": float(os.environ["OMP_NUM_THREADS"])}


if __name__ == "__main__":
    sys.exit(launch(run_vae.parse, slow, sys.argv[1:]))

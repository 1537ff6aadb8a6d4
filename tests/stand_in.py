"""Stands in for run_vae.py in test_reproduce.py: takes its flags and stores metrics at once.

A file `mode` changes that: fail (run 1 does) or wait (for a signal).
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import time

FIGURES = {"nelbo": 101.0, "kl": 19.0, "rec": 82.0, "active": 10}
BOUNDS = {f"niwae_{m}": 98.0 for m in (1, 10, 100, 1000)}


def end(number, frame):
    pathlib.Path("saved").touch()
    sys.exit(128 + number)


def store(number, args):
    path = pathlib.Path("logs", f"model=vae_z=10_run={number:04d}", "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {**FIGURES, "nelbo": 101 + number / 10}
    if args.train == 0:
        figures.update(BOUNDS)
    content = {"data": "mnist", "test_images": 10_000, "step": 20_000, "figures": figures}
    path.write_text(json.dumps(content))


def main():
    with open("calls", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    mode = ""
    if pathlib.Path("mode").exists():
        mode = pathlib.Path("mode").read_text()
    if mode == "wait":
        signal.signal(signal.SIGTERM, end)
        pathlib.Path("began").write_text(str(os.getsid(0) == os.getpid()))
        time.sleep(60)
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=int)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--train", type=int, default=1)
    args, _ = parser.parse_known_args()
    code = 0
    for number in range(args.run, args.run + args.runs):
        if mode == "fail" and number == 1:
            code = 1
        else:
            store(number, args)
    return code


if __name__ == "__main__":
    sys.exit(main())

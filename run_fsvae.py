#!/usr/bin/env python3
"""Bonus: a fully supervised VAE of SVHN's colour digits, conditioned on the label."""

import sys

if __name__ == "__main__":
    from codebase.runtime import interrupts

    interrupts.in_one_line()  # before the imports that take time

from dataclasses import dataclass
from pathlib import Path

from codebase.runtime import options
from codebase.runtime.launch import launch
from codebase.runtime.options import flag, number


@dataclass(frozen=True, kw_only=True)
class Run(options.Run):
    model = "fsvae"
    real_data = "svhn"
    needs_labels = True
    split: str = flag("extra", ["extra", "train", "test"], "training images", weights=True)
    iter_max: int = flag(1_000_000, number(int, 1, 10**9), "training steps; with --train 0, the checkpoint to load")

    def stem(self) -> str:
        return "fsvae" + (f"_split={self.split}" if self.split != "extra" else "")


def one_run(run: Run, group) -> dict[str, float]:
    import torch  # only here, and what needs it: the command line is checked before it is loaded

    from codebase import data, evaluate, figures, train
    from codebase.models.fsvae import FSVAE
    from codebase.runtime import report

    unseen = run.data != "svhn" or (run.split != "test" and Path(run.data_dir, "test_32x32.mat").exists())
    images = data.load(run, "train") if run.train or not unseen else []
    test = data.load(run, "test") if unseen else images

    def batch(index: torch.Tensor) -> tuple[tuple, tuple]:
        return (images.scaled(index), images.one_hot(index)), ()

    def watch(step: int) -> dict[str, float]:
        figures.of_fsvae(model, f"samples-{step:07d}")
        return evaluate.conditional_bound(model, test, 1000) if unseen else {}

    torch.manual_seed(run.seed)
    model = FSVAE(run.name).to(run.device)
    train.train_or_load(model, batch, len(images), run, group, watch)

    found = evaluate.conditional_bound(model, test)
    report.check(found)
    if group.main:
        evaluated_on = "test split" if unseen else "training images"
        report.results(run, found, figures.of_fsvae(model, "samples"), len(test), evaluated_on=evaluated_on)
        report.bounds(found, "" if unseen else " (on training images)")
    return found


def main(argv: list[str] | None = None) -> int:
    return launch(Run, one_run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

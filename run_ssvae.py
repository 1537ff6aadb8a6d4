#!/usr/bin/env python3
"""Problem 4: classify MNIST from 100 labels with a semi-supervised VAE; --gw 0 trains the classifier alone."""

import sys

if __name__ == "__main__":
    from codebase.runtime import interrupts

    interrupts.in_one_line()  # before the imports that take time

from dataclasses import dataclass

from codebase.runtime import files, options
from codebase.runtime.launch import launch
from codebase.runtime.options import flag, number


@dataclass(frozen=True, kw_only=True)
class Run(options.Run):
    model = "ssvae"
    needs_labels = True
    gw: int = flag(1, number(int, 0, 999_999), "weight of the bound; 0 trains the classifier alone", weights=True)
    cw: int = flag(100, number(int, 0, 999_999), "weight of the classification loss", weights=True)
    labels: int = flag(100, number(int, 10, 50_000), "labelled images, as many of each digit", weights=True)
    iter_max: int = flag(30_000, number(int, 1, 10**9), "training steps; with --train 0, the checkpoint to load")

    def __post_init__(self):
        super().__post_init__()
        files.require(self.gw or self.cw, "argument --cw: takes at least 1 with --gw 0, else nothing is trained")
        files.require(self.labels % 10 == 0, f"argument --labels: takes a multiple of ten, not {self.labels}")

    def stem(self) -> str:
        return f"ssvae_gw={self.gw:03d}_cw={self.cw:03d}" + (f"_labels={self.labels}" if self.labels != 100 else "")


def one_run(run: Run, group) -> dict[str, float]:
    import torch  # only here, and what needs it: the command line is checked before it is loaded

    from codebase import data, evaluate, figures, train
    from codebase.models.ssvae import SSVAE
    from codebase.runtime import report

    test = data.load(run, "test")
    images = data.load(run, "train") if run.train else test
    labelled = data.labelled_set(images, run.labels) if run.train else test
    everyone = torch.arange(run.labels, device=run.device)

    def batch(index: torch.Tensor) -> tuple[tuple, tuple]:
        some = everyone if run.labels <= 100 else torch.randint(run.labels, (100,), device=run.device)
        return (images.binary(index),), (labelled.binary(some), labelled.one_hot(some))

    def watch(step: int) -> dict[str, float]:
        return {"accuracy": evaluate.accuracy(evaluate.confusion(model, test))}

    torch.manual_seed(run.seed)
    model = SSVAE(run.gw, run.cw, run.name).to(run.device)
    train.train_or_load(model, batch, len(images), run, group, watch)

    counts = evaluate.confusion(model, test)
    found = {"accuracy": evaluate.accuracy(counts)}
    report.check(found)
    if group.main:
        of_each_digit = (counts.diag() / counts.sum(1).clamp(min=1)).tolist()
        tables = {"confusion": counts.tolist(), "per_digit_accuracy": of_each_digit}
        report.results(run, found, figures.of_ssvae(model, counts), len(test), **tables)
        report.confusion(counts.tolist())
        print(f"Test set classification accuracy: {found['accuracy']}{report.tested_on(run, len(test))}")
    return found


def main(argv: list[str] | None = None) -> int:
    return launch(Run, one_run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

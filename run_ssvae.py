#!/usr/bin/env python3
"""Problem 4: classify MNIST from 100 labels with a semi-supervised VAE; --gw 0 trains the classifier alone."""

import sys
from dataclasses import dataclass

from codebase.runtime import files, options
from codebase.runtime.launch import launch
from codebase.runtime.options import flag, number


@dataclass(frozen=True, kw_only=True)
class Run(options.Run):
    model = "ssvae"
    gw: int = flag(1, number(int, 0, 999_999), "weight of the bound; 0 trains the classifier alone", weights=True)
    cw: int = flag(100, number(int, 0, 999_999), "weight of the classification loss", weights=True)
    iter_max: int = flag(30_000, number(int, 1, 10**9), "training steps; with --train 0, the checkpoint to load")

    def __post_init__(self):
        super().__post_init__()
        files.require(self.gw or self.cw, "argument --cw: takes at least 1 with --gw 0, else nothing is trained")

    def stem(self) -> str:
        return f"ssvae_gw={self.gw:03d}_cw={self.cw:03d}"


def one_run(run: Run, group) -> dict[str, float]:
    import torch  # only here, and what needs it: the command line is checked before it is loaded

    from codebase import data, evaluate, figures, train
    from codebase.models.ssvae import SSVAE
    from codebase.runtime import report

    test = data.load(run, "test")
    images = data.load(run, "train") if run.train else test
    labelled = data.labelled_set(images) if run.train else test
    y = labelled.one_hot(torch.arange(len(labelled), device=run.device))

    def batch(index: torch.Tensor) -> tuple[tuple, tuple]:
        return (images.binary(index),), (data.binarize(labelled.pixels), y)

    torch.manual_seed(run.seed)
    model = SSVAE(run.gw, run.cw, run.name).to(run.device)
    train.train_or_load(model, batch, len(images), run, group)

    counts = evaluate.confusion(model, test)
    found = {"accuracy": counts.diag().sum().item() / len(test)}
    if group.main:
        tables = {"confusion": counts.tolist(), "per_digit_accuracy": (counts.diag() / counts.sum(1)).tolist()}
        report.results(run, found, figures.of_ssvae(model, counts), **tables)
        report.confusion(counts.tolist())
        print(f"Test set classification accuracy: {found['accuracy']}")
    return found


def main(argv: list[str] | None = None) -> int:
    return launch(Run, one_run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Bonus: a fully supervised VAE of SVHN's colour digits, conditioned on the label."""

import sys

if __name__ == "__main__":  # before the imports that take time
    from codebase.runtime.signals import interrupt_in_one_line

    interrupt_in_one_line()

from collections.abc import Sequence

from codebase.runtime import options
from codebase.runtime.launch import launch


def parse(argv: Sequence[str] | None = None) -> options.Run:
    parser = options.Parser(__doc__, real_data="svhn", iter_max=1_000_000)
    splits = ["extra", "train", "test"]
    parser.data.add_argument("--split", choices=splits, default="extra", help="training images")
    args = parser.parse_args(argv)
    stem = "fsvae"
    if args.split != "extra":
        stem += f"_split={args.split}"
    return parser.make_run(args, stem, fix_weights=["split"], needs_labels=True)


def one_run(run: options.Run, processes) -> dict[str, float]:
    # Imported here, so that a command line is checked before torch is loaded.
    import torch

    from codebase import data, evaluate, plots
    from codebase.models.fsvae import FSVAE
    from codebase.runtime import log
    from codebase.train import train_or_load

    # Data: where there are no test images that were not trained on, training images stand in.
    has_test_set = data.has_test_set(run)
    train_set = data.load(run, "train") if run.train or not has_test_set else []
    test_set = data.load(run, "test") if has_test_set else train_set

    # Model
    torch.manual_seed(run.seed)
    model = FSVAE(run.name).to(run.device)

    # Training
    def batch(index):
        return train_set.scaled(index), train_set.one_hot(index)

    def evaluate_checkpoint(step):
        plots.of_fsvae(model, f"samples-{step:07d}")
        if not has_test_set:
            return {}
        return evaluate.conditional_bound(model, test_set, most=1000)

    train_or_load(model, batch, len(train_set), run, processes, evaluate_checkpoint)

    # Evaluation
    metrics = evaluate.conditional_bound(model, test_set)

    # What is stored, drawn and printed
    if processes.main:
        evaluated_on = "test split" if has_test_set else "training images"
        log.store_results(run, metrics, len(test_set), evaluated_on=evaluated_on)
        log.print_files(run, plots.of_fsvae(model))
        evaluate.print_bounds(metrics, "" if has_test_set else " (on training images)")
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse, one_run, argv)


if __name__ == "__main__":
    sys.exit(main())

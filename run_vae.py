#!/usr/bin/env python3
"""Problem 1: train and evaluate a VAE on binarised MNIST."""

import sys

if __name__ == "__main__":  # before the imports that take time
    from codebase.runtime.signals import interrupt_in_one_line

    interrupt_in_one_line()

from collections.abc import Sequence

from codebase.runtime import options
from codebase.runtime.launch import launch


def parse(argv: Sequence[str] | None = None) -> options.Run:
    parser = options.Parser(__doc__)
    options.add_vae_flags(parser)
    args = parser.parse_args(argv)
    stem = f"vae_z={args.z:02d}{options.loss_name(parser, args)}"
    return parser.make_run(args, stem, fix_weights=["z", "beta", "train_iw"])


def one_run(run: options.Run, processes) -> dict[str, float]:
    # Imported here, so that a command line is checked before torch is loaded.
    import torch

    from codebase import data, evaluate, plots
    from codebase.models.vae import VAE
    from codebase.runtime import log
    from codebase.train import train_or_load

    # Data: bytes in memory, on the device. Training images are binarised afresh in every step.
    test_set = data.load(run, "test")
    train_set = data.load(run, "train") if run.train else test_set
    subset = data.test_subset(test_set)

    # Model
    torch.manual_seed(run.seed)
    model = VAE(run.z, run.name, beta=run.beta, train_iw=run.train_iw).to(run.device)

    # Training
    def batch(index):
        return (train_set.binary(index),)

    def evaluate_checkpoint(step):
        return evaluate.bounds(model, subset, ms=[])

    train_or_load(model, batch, len(train_set), run, processes, evaluate_checkpoint)

    # Evaluation: the bounds of the test images that --test names
    x = data.test_subset(test_set, run.test)
    ms = [] if run.train else run.iw
    metrics = evaluate.bounds(model, x, ms, processes=processes, progress=True)
    metrics.update(evaluate.latent_use(model, test_set))

    # What is stored, drawn and printed
    if processes.main:
        log.store_results(run, metrics, len(test_set), bounded=len(x))
        log.print_files(run, plots.of_vae(model, subset, test_set))
        evaluate.print_bounds(metrics)
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse, one_run, argv)


if __name__ == "__main__":
    sys.exit(main())

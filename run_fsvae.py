#!/usr/bin/env python3
"""Bonus: a fully supervised VAE of SVHN's colour digits, conditioned on the label."""

import sys
from pathlib import Path

from codebase import cli


def one_run(args) -> dict[str, float]:
    from codebase import data, evaluate, experiment, figures
    from codebase.checkpoint import log_dir
    from codebase.models.fsvae import FSVAE

    model = experiment.construct(lambda: FSVAE(args.name), args)
    has_test = args.data == "digits" or Path(args.data_dir, "test_32x32.mat").exists()
    images = data.load(args, "train") if args.train or not has_test else []
    test = data.load(args, "test") if has_test else images

    def batch(index):
        return (images.scaled(index), images.one_hot(index)), ()

    def draw(step: int, name: str | None = None) -> str:
        with evaluate.quietly(model):
            path = log_dir(args.name) / (name or f"samples-{step:07d}.png")
            return figures.style_and_content(model, model.compute_mean_given, path)

    experiment.train_or_load(model, batch, len(images), args, on_save=draw)
    pictures = [draw(args.iter_max, "samples.png")]
    results = evaluate.conditional_bound(model, test)
    experiment.finish(args, results, pictures, evaluated_on="test split" if has_test else "training images")
    experiment.print_bounds(results)
    return results


def main(argv: list[str] | None = None) -> int:
    return cli.launch(cli.parse("fsvae", __doc__, argv), one_run)


if __name__ == "__main__":
    sys.exit(main())

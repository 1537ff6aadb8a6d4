#!/usr/bin/env python3
"""Problem 4: classify MNIST from 100 labels with a semi-supervised VAE; --gw 0 trains the classifier alone."""

import sys

from codebase import cli


def one_run(args) -> dict[str, float]:
    import torch

    from codebase import data, evaluate, experiment, figures
    from codebase.checkpoint import log_dir
    from codebase.models.ssvae import SSVAE

    model = experiment.construct(lambda: SSVAE(args.gw, args.cw, args.name), args)
    test = data.load(args, "test")
    if args.train:
        images = data.load(args, "train")
        labelled = data.labelled_set(images)
        y = labelled.one_hot(torch.arange(len(labelled), device=args.device))

    def batch(index):
        return (images.binary(index),), (data.binarize(labelled.pixels), y)

    experiment.train_or_load(model, batch, len(images) if args.train else 0, args)
    counts = evaluate.confusion(model, test)
    pictures = [figures.confusion(counts, log_dir(args.name) / "confusion.png")]
    if args.gw:
        with evaluate.quietly(model):
            shown = figures.style_and_content(model, model.compute_sigmoid_given, log_dir(args.name) / "styles.png")
        pictures.append(shown)
    per_digit = (counts.diag() / counts.sum(1)).tolist()
    results = {"accuracy": counts.diag().sum().item() / counts.sum().item()}
    experiment.finish(args, results, pictures, per_digit_accuracy=per_digit, confusion=counts.tolist())
    print_confusion(counts.tolist(), per_digit)
    print(f"Test set classification accuracy: {results['accuracy']}")
    return results


def print_confusion(counts: list[list[int]], per_digit: list[float]) -> None:
    """The confusion matrix as a table: rows are true digits, columns assigned ones."""
    print("\ntrue  " + "".join(f"{digit:>6}" for digit in range(10)) + "  accuracy")
    for digit, (row, share) in enumerate(zip(counts, per_digit, strict=True)):
        print(f"{digit:>4}  " + "".join(f"{count:>6}" for count in row) + f"  {share:8.4f}")


def main(argv: list[str] | None = None) -> int:
    return cli.launch(cli.parse("ssvae", __doc__, argv), one_run)


if __name__ == "__main__":
    sys.exit(main())

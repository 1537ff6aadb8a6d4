#!/usr/bin/env python3
"""Problem 4: classify MNIST from 100 labels with a semi-supervised VAE.

--gw 0 trains the classifier alone.
"""

import sys

if __name__ == "__main__":  # before the imports that take time
    from codebase.runtime.signals import interrupt_in_one_line

    interrupt_in_one_line()

from collections.abc import Sequence

from codebase.runtime import options
from codebase.runtime.launch import launch


def parse(argv: Sequence[str] | None = None) -> options.Run:
    parser = options.Parser(__doc__, iter_max=30_000)
    weight = options.whole(0, 999_999)
    text = "weight of the bound in the loss; 0 trains the classifier alone"
    parser.model.add_argument("--gw", type=weight, default=1, help=text)
    text = "weight of the classification loss"
    parser.model.add_argument("--cw", type=weight, default=100, help=text)
    text = "labelled images, a multiple of ten: as many of each digit"
    parser.data.add_argument("--labels", type=options.whole(10, 50_000), default=100, help=text)
    args = parser.parse_args(argv)
    if args.gw == 0 and args.cw == 0:
        parser.error("argument --cw: takes at least 1 with --gw 0, else nothing is trained")
    if args.labels % 10 != 0:
        parser.error(f"argument --labels: takes a multiple of ten, not {args.labels}")
    stem = f"ssvae_gw={args.gw:03d}_cw={args.cw:03d}"
    if args.labels != 100:
        stem += f"_labels={args.labels}"
    return parser.make_run(args, stem, fix_weights=["gw", "cw", "labels"], needs_labels=True)


def one_run(run: options.Run, processes) -> dict[str, float]:
    # Imported here, so that a command line is checked before torch is loaded.
    import torch

    from codebase import data, evaluate, plots
    from codebase.models.ssvae import SSVAE
    from codebase.runtime import log
    from codebase.train import train_or_load

    # Data: every step takes all of 100 labelled images, or 100 of more.
    test_set = data.load(run, "test")
    train_set = data.load(run, "train") if run.train else test_set
    labelled = data.labelled_set(train_set, run.labels) if run.train else test_set

    # Model
    torch.manual_seed(run.seed)
    model = SSVAE(run.gw, run.cw, run.name).to(run.device)

    # Training
    def batch(index):
        chosen = torch.arange(run.labels, device=run.device)
        if run.labels > 100:
            chosen = torch.randint(run.labels, (100,), device=run.device)
        return train_set.binary(index), labelled.binary(chosen), labelled.one_hot(chosen)

    def evaluate_checkpoint(step):
        return {"accuracy": evaluate.accuracy(evaluate.confusion_matrix(model, test_set))}

    train_or_load(model, batch, len(train_set), run, processes, evaluate_checkpoint)

    # Evaluation: the accuracy on the grey images of the test set
    confusion = evaluate.confusion_matrix(model, test_set)
    metrics = {"accuracy": evaluate.accuracy(confusion)}

    # What is stored, drawn and printed
    if processes.main:
        log.store_results(run, metrics, len(test_set), tables=evaluate.tables(confusion))
        log.print_files(run, plots.of_ssvae(model, confusion))
        evaluate.print_confusion(confusion)
        evaluate.print_accuracy(metrics["accuracy"], log.remark_on(run, len(test_set)))
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse, one_run, argv)


if __name__ == "__main__":
    sys.exit(main())

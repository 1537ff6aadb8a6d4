#!/usr/bin/env python3
"""Problem 1: train and evaluate a VAE on binarised MNIST."""

import sys

from codebase import cli


def one_run(args) -> dict[str, float]:
    from codebase import experiment
    from codebase.models.vae import VAE

    return experiment.binary_run(args, lambda: VAE(z_dim=args.z, name=args.name, beta=args.beta))


def main(argv: list[str] | None = None) -> int:
    return cli.launch(cli.parse("vae", __doc__, argv), one_run)


if __name__ == "__main__":
    sys.exit(main())

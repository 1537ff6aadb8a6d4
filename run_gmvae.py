#!/usr/bin/env python3
"""Problem 2: train and evaluate a GMVAE, a VAE with a mixture prior, on binarised MNIST."""

import sys

from codebase import cli


def one_run(args) -> dict[str, float]:
    from codebase import experiment
    from codebase.models.gmvae import GMVAE

    return experiment.binary_run(args, lambda: GMVAE(z_dim=args.z, k=args.k, name=args.name, beta=args.beta))


def main(argv: list[str] | None = None) -> int:
    return cli.launch(cli.parse("gmvae", __doc__, argv), one_run)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Problem 2: train and evaluate a GMVAE, a VAE with a mixture prior, on binarised MNIST."""

import sys

if __name__ == "__main__":
    from codebase.runtime import interrupts

    interrupts.in_one_line()  # before the imports that take time

from dataclasses import dataclass

from codebase.runtime import options
from codebase.runtime.launch import launch
from codebase.runtime.options import flag, number


@dataclass(frozen=True, kw_only=True)
class Run(options.BinaryRun):
    model = "gmvae"
    k: int = flag(500, number(int, 1, 100_000), "components of the mixture prior", weights=True)

    def stem(self) -> str:
        return f"gmvae_z={self.z:02d}_k={self.k:03d}{self.weighted()}"


def one_run(run: Run, group) -> dict[str, float]:
    import torch  # only here, and what needs it: the command line is checked before it is loaded

    from codebase import data, evaluate, figures, train
    from codebase.models.gmvae import GMVAE
    from codebase.runtime import report

    test = data.load(run, "test")
    images = data.load(run, "train") if run.train else test
    subset = data.test_subset(test)

    torch.manual_seed(run.seed)
    model = GMVAE(z_dim=run.z, k=run.k, name=run.name, beta=run.beta, train_iw=run.train_iw).to(run.device)

    def batch(index: torch.Tensor) -> tuple[tuple, tuple]:
        return (images.binary(index),), ()

    def watch(step: int) -> dict[str, float]:
        return evaluate.bounds(model, subset, ())

    train.train_or_load(model, batch, len(images), run, group, watch)

    x = data.test_subset(test, run.test)
    found = evaluate.bounds(model, x, () if run.train else run.iw, group=group, progress=True)
    found |= evaluate.latent_use(model, test)
    report.check(found)
    if group.main:
        report.results(run, found, figures.of_binary_vae(model, subset, test), len(test), len(x))
        report.bounds(found)
    return found


def main(argv: list[str] | None = None) -> int:
    return launch(Run, one_run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

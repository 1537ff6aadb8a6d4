#!/usr/bin/env python3
"""Problem 1: train and evaluate a VAE on binarised MNIST."""

import sys
from dataclasses import dataclass

from codebase.runtime import options
from codebase.runtime.launch import launch
from codebase.runtime.options import flag, number


@dataclass(frozen=True, kw_only=True)
class Run(options.Run):
    model = "vae"
    z: int = flag(10, number(int, 1, 10_000), "dimensions of the latent z", weights=True)
    beta: float = flag(1.0, number(float, 0, 10**6), "weight of the KL term in the training loss", weights=True)
    iw: tuple[int, ...] = flag((1, 10, 100, 1000), number(int, 1, 10**7), "samples m of --train 0's IWAE-m bounds")

    def stem(self) -> str:
        return f"vae_z={self.z:02d}" + (f"_beta={self.beta:g}" if self.beta != 1 else "")


def one_run(run: Run, group) -> dict[str, float]:
    import torch  # only here, and what needs it: the command line is checked before it is loaded

    from codebase import data, evaluate, figures, train
    from codebase.models.vae import VAE
    from codebase.runtime import report

    test = data.load(run, "test")
    images = data.load(run, "train") if run.train else test
    x_test = data.test_subset(test)

    torch.manual_seed(run.seed)
    model = VAE(z_dim=run.z, name=run.name, beta=run.beta).to(run.device)
    train.train_or_load(model, lambda index: ((images.binary(index),), ()), len(images), run, group)

    found = evaluate.bounds(model, x_test, () if run.train else run.iw, group=group)
    found |= evaluate.latent_use(model, test)
    if group.main:
        report.results(run, found, figures.of_binary_vae(model, x_test))
        report.bounds(found)
    return found


def main(argv: list[str] | None = None) -> int:
    return launch(Run, one_run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Models whose weights are fixed by a seed, and noise in the place of images."""

import pytest
import torch
import torch.distributions as td

from codebase import data
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE, BinaryVAE

KINDS = {"vae": VAE, "gmvae": GMVAE, "ssvae": SSVAE, "fsvae": FSVAE}
ALL = pytest.mark.parametrize("kind", KINDS)
BINARY = pytest.mark.parametrize("kind, settings", [("vae", {}), ("gmvae", {"k": 20})])


def made(kind: str, seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    return KINDS[kind](**settings)


def spread_out(model: BinaryVAE) -> BinaryVAE:
    """Give it a decoder that depends on z, so that its bounds have gaps."""
    with torch.no_grad():
        model.dec.net[0].weight.mul_(20)
        model.dec.net[4].weight.mul_(3)
    return model


def prior(model: BinaryVAE) -> td.Distribution:
    """p(z) of a VAE or GMVAE."""
    if isinstance(model, VAE):
        return td.Independent(td.Normal(torch.zeros(model.z_dim), torch.ones(model.z_dim)), 1)
    m, v = (value[0] for value in model.prior())
    return td.MixtureSameFamily(td.Categorical(model.pi), td.Independent(td.Normal(m, v.sqrt()), 1))


def binary(n: int, seed: int = 0) -> torch.Tensor:
    """Images (n, 784) of zeros and ones."""
    return (torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def one_hot(n: int) -> torch.Tensor:
    return torch.eye(10)[torch.arange(n) % 10]


def batch(kind: str, n: int = 6) -> tuple[torch.Tensor, ...]:
    """What the loss of a model takes, for n images."""
    if kind == "fsvae":
        return torch.rand(n, 3072, generator=torch.Generator().manual_seed(0)), one_hot(n)
    if kind == "ssvae":
        return binary(n), binary(10, seed=1), one_hot(10)
    return (binary(n),)


def rows(kind: str, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the loss of a model takes, for these among a hundred images."""
    x, *labelled = batch(kind, 100)
    if kind == "fsvae":
        labelled = [labelled[0][index]]
    return x[index], *labelled


def noise(n: int, size: int = 784, seed: int = 5) -> data.Images:
    """A split of n images of noise, with labels 0, ... 9, 0, ..."""
    stream = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, size), dtype=torch.uint8, generator=stream)
    return data.Images(pixels, torch.arange(n) % 10)

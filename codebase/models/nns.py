"""What models share: networks of three layers, the checks of their inputs, and a normal prior.

The keys of a network are `net.{0,2,4}.{weight,bias}`.

A network takes net(x) or net(x, y); x and y may broadcast against each other, and what depends on x alone is then
computed once per row of x, e.g. x (batch, 784) with y (10, 1, 10) gives (10, batch, out).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codebase import utils


class JointLinear(nn.Linear):
    """W [x, y] + b of two inputs that may broadcast: as W_x x + W_y y + b then, so that neither is repeated."""

    def __init__(self, x_dim: int, y_dim: int, out_dim: int):
        super().__init__(x_dim + y_dim, out_dim)
        self.sizes = [x_dim, y_dim]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None or x.shape[:-1] == y.shape[:-1]:
            return super().forward(x if y is None else torch.cat([x, y], -1))
        w_x, w_y = self.weight.split(self.sizes, 1)
        return F.linear(x, w_x, self.bias) + F.linear(y, w_y)


class Network(nn.Module):
    """(x_dim + y_dim) - hidden - hidden - out_dim, with an activation after the first two layers."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int, out_dim: int, activation: type[nn.Module] = nn.ELU):
        super().__init__()
        first, middle, last = JointLinear(x_dim, y_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_dim)
        self.net = nn.Sequential(first, activation(), middle, activation(), last)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (..., x_dim); y: (..., y_dim), where the network has one. Returns (..., out_dim)."""
        first, *rest = self.net
        h = first(x, y)
        for layer in rest:
            h = layer(h)
        return h

    def classify(self, x: Tensor) -> Tensor:
        """The course's name of calling a classifier."""
        return self(x)


class Encoder(Network):
    """q(z | x) or q(z | x, y): a diagonal Gaussian over z."""

    def __init__(self, z_dim: int, y_dim: int = 0, x_dim: int = 784, hidden: int = 300):
        super().__init__(x_dim, y_dim, hidden, 2 * z_dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and variance of z, (..., z_dim) each."""
        return utils.gaussian_parameters(super().forward(x, y))

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The course's name of calling an encoder."""
        return self(x, y)


class Decoder(Network):
    """p(x | z) or p(x | z, y): the logits (binary pixels) or the means (Gaussian pixels) of x."""

    def __init__(self, z_dim: int, y_dim: int = 0, x_dim: int = 784, hidden: int = 300):
        super().__init__(z_dim, y_dim, hidden, x_dim)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The course's name of calling a decoder."""
        return self(z, y)


def check_pixels(x: Tensor) -> None:
    """Warn of pixels outside [0, 1], where a Bernoulli has no density and a loss falls for ever.

    Only tensors on the CPU are looked at: on a GPU the program would wait for it at every step.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        low, high = x.aminmax()
        inside = bool((low >= 0) & (high <= 1))
    except RuntimeError:  # inside torch.func.vmap a tensor has no values to look at
        return
    if not inside:
        warnings.warn(
            "pixels outside [0, 1]: a bound of binary pixels means nothing there;"
            " divide bytes by 255, and do not normalise",
            stacklevel=3,
        )


def check_labels(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y are one-hot labels of the images x, an axis of ten as the last."""
    if y.dim() < x.dim() or y.shape[-1] != 10:
        raise ValueError(
            f"y must be one-hot labels of shape (batch, 10), not {tuple(y.shape)};"
            " torch.nn.functional.one_hot(labels, 10).float() makes them"
        )


class LatentModel(nn.Module):
    """A model with a loss and a latent z, whose prior p(z) is N(0, I) where a subclass brings no other one."""

    def __init__(self, name: str, z_dim: int):
        super().__init__()
        self.name, self.z_dim = name, z_dim
        self.register_buffer("z_prior_m", torch.zeros(1))
        self.register_buffer("z_prior_v", torch.ones(1))

    def sample_z(self, batch: int) -> Tensor:
        """Draw from the prior: (batch, z_dim)."""
        return utils.sample_gaussian(self.z_prior_m.expand(batch, self.z_dim), self.z_prior_v)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(*inputs)

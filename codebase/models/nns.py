"""What models share: networks of three linear layers, with keys `net.{0,2,4}.{weight,bias}`, and a normal prior.

A network takes net(x) or net(x, y); x and y may broadcast against each other, and what depends on x alone is then
computed once per row of x, e.g. x (batch, 784) with y (10, 1, 10) gives (10, batch, out).
"""

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


class Encoder(Network):
    """q(z | x) or q(z | x, y): a diagonal Gaussian over z."""

    def __init__(self, z_dim: int, y_dim: int = 0, x_dim: int = 784, hidden: int = 300):
        super().__init__(x_dim, y_dim, hidden, 2 * z_dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and variance of z, (..., z_dim) each."""
        return utils.gaussian_parameters(super().forward(x, y))


class Decoder(Network):
    """p(x | z) or p(x | z, y): the logits (binary pixels) or the means (Gaussian pixels) of x."""

    def __init__(self, z_dim: int, y_dim: int = 0, x_dim: int = 784, hidden: int = 300):
        super().__init__(z_dim, y_dim, hidden, x_dim)


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

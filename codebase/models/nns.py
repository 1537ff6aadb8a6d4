"""What models share: networks of three layers, the checks of their inputs, and a normal prior.

To add a model: a class with a name, whose loss(*batch) returns the loss, a scalar, and its terms
by name (a base class here makes calling it compute the loss); a script beside run_vae.py, whose
batch(index) returns what the loss takes, and whose stem begins with the model's name. Terms
become columns of metrics.csv by train.COLUMNS and are drawn by plots.TERMS; the names of further
plots belong into checkpoint.WRITTEN_LOGS, or --overwrite 1 leaves them there.

A network takes net(x) or net(x, y). x and y may broadcast against each other; what depends on x
alone is then computed once per row of x: x (batch, 784) with y (10, 1, 10) gives (10, batch, out).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codebase import utils


class JointLinear(nn.Linear):
    """W [x, y] + b of two inputs, which is W_x x + W_y y + b: neither is repeated to broadcast."""

    def __init__(self, x_dim: int, y_dim: int, out_dim: int):
        super().__init__(x_dim + y_dim, out_dim)
        self.sizes = [x_dim, y_dim]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return super().forward(x)
        if x.shape[:-1] == y.shape[:-1]:
            return super().forward(torch.cat([x, y], -1))
        w_x, w_y = self.weight.split(self.sizes, 1)
        return F.linear(x, w_x, self.bias) + F.linear(y, w_y)


class Network(nn.Module):
    """(x_dim + y_dim) - hidden - hidden - out_dim, with an activation after the first two layers.

    The keys of its weights are net.{0,2,4}.{weight,bias}.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: int,
        out_dim: int,
        activation: type[nn.Module] = nn.ELU,
    ):
        super().__init__()
        self.net = nn.Sequential(
            JointLinear(x_dim, y_dim, hidden),
            activation(),
            nn.Linear(hidden, hidden),
            activation(),
            nn.Linear(hidden, out_dim),
        )

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


class LatentModel(nn.Module):
    """A model with a latent z of z_dim dimensions; calling it computes its loss."""

    def __init__(self, name: str, z_dim: int):
        super().__init__()
        self.name = name
        self.z_dim = z_dim

    def forward(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(*inputs)


class NormalPriorModel(LatentModel):
    """A model whose prior p(z) is N(0, I): mean and variance are constants among its weights."""

    def __init__(self, name: str, z_dim: int):
        super().__init__(name, z_dim)
        self.register_buffer("z_prior_m", torch.zeros(1))
        self.register_buffer("z_prior_v", torch.ones(1))

    def sample_z(self, batch: int) -> Tensor:
        """Draw from the prior: (batch, z_dim)."""
        return utils.sample_gaussian(self.z_prior_m.expand(batch, self.z_dim), self.z_prior_v)


def check_pixels(x: Tensor) -> None:
    """Warn of pixels outside [0, 1], where a Bernoulli has no density and a loss falls for ever.

    Only tensors on the CPU are looked at: on a GPU the program would wait for it at every step.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        low, high = x.aminmax()
        inside = bool((low >= 0) & (high <= 1))
    except RuntimeError:  # of no images, or inside torch.func.vmap, where there are no values
        return
    if not inside:
        message = "pixels outside [0, 1]: a bound of binary pixels means nothing there; "
        message += "divide bytes by 255, and do not normalise"
        warnings.warn(message, stacklevel=3)


def check_labels(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y has the shape of one-hot labels of x: (batch, 10)."""
    if y.shape != (*x.shape[:-1], 10):
        message = f"y must be one-hot labels of shape (batch, 10), not {tuple(y.shape)}, "
        message += f"beside images x of shape {tuple(x.shape)}; "
        message += "torch.nn.functional.one_hot(labels, 10).float() makes them"
        raise ValueError(message)

"""The networks of the models: three linear layers each, weights and keys as `net.{0,2,4}.{weight,bias}`.

A network takes net(x) or net(x, y); x and y may broadcast against each other, and what depends on x alone is then
computed once per row of x, e.g. x (batch, 784) with y (10, 1, 10) gives (10, batch, out).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from codebase import utils

# oneDNN's matrix product in float32; on CPUs without a tuned BLAS it is about twice as fast as torch's default.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias in float32 on the CPU; a: (rows, in), b: (out, in). By oneDNN, unless the matrices are small."""
    if _onednn is None or a.numel() * len(b) < 1 << 20:
        return F.linear(a, b, bias)
    a, b = (t if t.is_contiguous() or t.T.is_contiguous() else t.contiguous() for t in (a, b))  # slices are slow
    return _onednn(a, b, bias, "none", [], "")


class _CPULayers(torch.autograd.Function):
    """`layers` written out, in as few operations as forward and backward pass can do with."""

    @staticmethod
    def forward(ctx, x, relu, activated, *parameters):
        ctx.shape, ctx.relu, ctx.activated, saved = x.shape, relu, activated, []
        h = x.reshape(-1, x.shape[-1])
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            if activated or saved:
                h = h.clamp(min=0) if relu else _elu(h)
            saved += [h, weight]
            h = product(h, weight, bias)
        ctx.save_for_backward(*saved)
        return h.view(*x.shape[:-1], h.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, found, grad = ctx.saved_tensors, [], grad.reshape(-1, grad.shape[-1])
        for layer in range(len(saved) - 2, -1, -2):
            h, weight = saved[layer : layer + 2]
            needs_weight, needs_bias = ctx.needs_input_grad[3 + layer : 5 + layer]
            found[:0] = product(grad.T, h.T) if needs_weight else None, grad.sum(0) if needs_bias else None
            if layer == 0 and not ctx.needs_input_grad[0]:
                return None, None, None, *found
            grad = product(grad, weight.T)
            if layer or ctx.activated:
                grad = grad.mul_(h > 0) if ctx.relu else torch.ops.aten.elu_backward(grad, 1, 1, 1, True, h)
        return grad.view(ctx.shape), None, None, *found


def _elu(x: Tensor) -> Tensor:
    """ELU with exp(x) - 1 in place of expm1: 5 times faster on CPUs, exact to a rounding of 1."""
    below = x.clamp(max=0).exp_().sub_(1)
    return torch.maximum(x, below, out=below)


def layers(x: Tensor, activation: nn.Module, activated: bool, *parameters: Tensor | None) -> Tensor:
    """Linear layers with an activation, ELU or ReLU, between them; (..., in) to (..., out).

    activated: whether x, too, goes through the activation first. parameters: weight, bias, weight, bias, ...
    """
    if x.device.type == "cpu" and x.dtype == parameters[0].dtype == torch.float32:
        return _CPULayers.apply(x, isinstance(activation, nn.ReLU), activated, *parameters)
    for number, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        x = F.linear(activation(x) if activated or number else x, weight, bias)
    return x


class Network(nn.Module):
    """(x_dim + y_dim) - hidden - hidden - out_dim, with an activation after the first two layers.

    The modules in net hold the weights; what they compute, `layers` computes at once, so hooks on them are not called.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int, out_dim: int, activation: type[nn.Module] = nn.ELU):
        super().__init__()
        self.x_dim, self.y_dim = x_dim, y_dim
        self.net = nn.Sequential(
            nn.Linear(x_dim + y_dim, hidden),
            activation(),
            nn.Linear(hidden, hidden),
            activation(),
            nn.Linear(hidden, out_dim),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (..., x_dim); y: (..., y_dim), where the network has one. Returns (..., out_dim)."""
        first, act, *rest = self.net
        after = [value for linear in rest[::2] for value in (linear.weight, linear.bias)]
        if y is None or x.shape[:-1] == y.shape[:-1]:
            return layers(x if y is None else torch.cat([x, y], -1), act, False, first.weight, first.bias, *after)
        w_x, w_y = first.weight.split([self.x_dim, self.y_dim], 1)  # W [x, y] = W_x x + W_y y, so neither is repeated
        h = layers(x, act, False, w_x, first.bias) + layers(y, act, False, w_y, None)
        return layers(h, act, True, *after)


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


class Classifier(Network):
    """q(y | x): the logits of the label."""

    def __init__(self, y_dim: int = 10, x_dim: int = 784, hidden: int = 300):
        super().__init__(x_dim, 0, hidden, y_dim, activation=nn.ReLU)

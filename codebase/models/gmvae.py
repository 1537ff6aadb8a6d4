"""The GMVAE of problem 2: a VAE whose prior is a learned mixture of k Gaussians."""

import math

import torch
from torch import Tensor, nn

from codebase import utils
from codebase.models.vae import BinaryVAE


class GMVAE(BinaryVAE):
    """p(z) = (1/k) sum_i N(z; mu_i, diag v_i), learned; its KL has no closed form and is sampled."""

    def __init__(self, z_dim: int = 10, k: int = 500, name: str = "gmvae", beta: float = 1.0, train_iw: int = 1):
        super().__init__(z_dim, name, beta, train_iw)
        del self.z_prior_m, self.z_prior_v  # the mixture stands in their place
        self.k = k
        self.z_pre = nn.Parameter(torch.randn(1, 2 * k, z_dim) / math.sqrt(k * z_dim))
        self.register_buffer("pi", torch.ones(k) / k)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Means and variances of the components, (1, k, z_dim) each."""
        return utils.gaussian_parameters(self.z_pre, dim=1)

    def log_prior(self, z: Tensor) -> Tensor:
        return utils.log_normal_mixture(z, *self.prior())

    def kl(self, qm: Tensor, qv: Tensor, z: Tensor) -> Tensor:
        return utils.log_normal(z, qm, qv) - self.log_prior(z)

    def sample_z(self, batch: int) -> Tensor:
        m, v = self.prior()
        component = torch.multinomial(self.pi, batch, replacement=True)
        return utils.sample_gaussian(m[0, component], v[0, component])

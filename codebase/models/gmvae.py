"""The GMVAE of problem 2: a VAE whose prior is a learned mixture of k Gaussians."""

import math

import torch
from torch import Tensor

from codebase import utils
from codebase.models.vae import BinaryVAE


class GMVAE(BinaryVAE):
    """A BinaryVAE with a learned prior p(z) = (1/k) sum_i N(z; mu_i, diag v_i).

    Its KL has no closed form and is estimated at the sample of z.
    """

    def __init__(
        self,
        z_dim: int = 10,
        k: int = 500,
        name: str = "gmvae",
        beta: float = 1.0,
        train_iw: int = 1,
        *,
        nn: str = "v1",
    ):
        """nn: the course's choice of networks, of which there is one; ignored."""
        super().__init__(z_dim, name, beta, train_iw)
        self.k = k
        self.z_pre = torch.nn.Parameter(torch.randn(1, 2 * k, z_dim) / math.sqrt(k * z_dim))
        self.register_buffer("pi", torch.ones(k) / k)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Means and variances of the components, (1, k, z_dim) each."""
        return utils.gaussian_parameters(self.z_pre, dim=1)

    def log_components(self, z: Tensor) -> Tensor:
        """log N(z; mu_i, diag v_i) of every component i in nats: z (..., z_dim) gives (..., k)."""
        m, v = self.prior()
        return utils.log_normal_pairwise(z, m[0], v[0])

    def log_prior(self, z: Tensor) -> Tensor:
        return utils.log_mean_exp(self.log_components(z), -1)

    def kl(self, qm: Tensor, qv: Tensor, z: Tensor) -> Tensor:
        return utils.log_normal(z, qm, qv) - self.log_prior(z)

    def sample_z(self, batch: int) -> Tensor:
        m, v = self.prior()
        if batch == 0:  # torch.multinomial draws at least one
            return m[0, :0]
        component = torch.multinomial(self.pi, batch, replacement=True)
        return utils.sample_gaussian(m[0, component], v[0, component])

"""The VAE of problem 1, and what it shares with the GMVAE: a binary decoder, the ELBO and the IWAE bound."""

import torch
from torch import Tensor, nn

from codebase import utils
from codebase.models import nns


class BinaryVAE(nn.Module):
    """p(z) p(x | z) on binary pixels with q(z | x) a diagonal Gaussian; a subclass brings the prior p(z).

    Images x are (batch, 784) with values in {0, 1}; all bounds are scalars in nats, averaged over the batch.
    """

    def __init__(self, z_dim: int, name: str, beta: float):
        super().__init__()
        self.name, self.z_dim, self.beta = name, z_dim, beta
        self.enc = nns.Encoder(z_dim)
        self.dec = nns.Decoder(z_dim)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z): (..., z_dim) to (...)."""
        raise NotImplementedError

    def log_ratio(self, z: Tensor, qm: Tensor, qv: Tensor) -> Tensor:
        """log q(z | x) - log p(z) per example: KL(q(z | x) || p(z)) by Monte Carlo, at z ~ q."""
        return utils.log_normal(z, qm, qv) - self.log_prior(z)

    def closed_kl(self, qm: Tensor, qv: Tensor) -> Tensor | None:
        """KL(q(z | x) || p(z)) per example, where it has a closed form."""
        return None

    def sample_z(self, batch: int) -> Tensor:
        """Draw from the prior: (batch, z_dim)."""
        raise NotImplementedError

    def negative_elbo_bound(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-ELBO(x) = KL(q(z | x) || p(z)) - E_q log p(x | z), with one sample of z per image.

        Returns nelbo, kl, rec, with nelbo = kl + rec whatever beta is. Source: Kingma & Welling 2014, equation 3.
        """
        qm, qv = self.enc(x)
        z = utils.sample_gaussian(qm, qv)
        closed = self.closed_kl(qm, qv)
        kl = (self.log_ratio(z, qm, qv) if closed is None else closed).mean()
        rec = -utils.log_bernoulli_with_logits(x, self.dec(z)).mean()
        return kl + rec, kl, rec

    def importance(self, x: Tensor, iw: int) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the bounds at iw samples z ~ q(z | x) of each image, x being encoded once.

        Returns log_w = log p(x, z) - log q(z | x), kl as the ELBO has it and rec = -log p(x | z), each (iw, batch).
        Raises ValueError for iw < 1.
        """
        if not isinstance(iw, int) or iw < 1:
            raise ValueError(f"iw must be a whole number of samples, at least 1, not {iw!r}")
        qm, qv = self.enc(x)
        z = utils.sample_gaussian(qm.expand(iw, *qm.shape), qv)
        rec = -utils.log_bernoulli_with_logits(x, self.dec(z))
        log_ratio, closed = self.log_ratio(z, qm, qv), self.closed_kl(qm, qv)
        return -log_ratio - rec, log_ratio if closed is None else closed.expand_as(rec), rec

    def negative_iwae_bound(self, x: Tensor, iw: int) -> tuple[Tensor, Tensor, Tensor]:
        """-L_iw(x) = -E log (1/iw) sum_i p(x, z_i) / q(z_i | x), differentiable through the weights.

        Returns niwae, kl, rec; kl + rec is the sampled -ELBO of the same z, equal to niwae at iw = 1, never below.
        Raises ValueError for iw < 1. Source: Burda et al. 2016, equation 8.
        """
        log_w, _, rec = self.importance(x, iw)
        return -utils.log_mean_exp(log_w, 0).mean(), -(log_w + rec).mean(), rec.mean()

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss rec + beta * kl (Higgins et al. 2017) and the terms of the true bound, by name."""
        nelbo, kl, rec = self.negative_elbo_bound(x)
        loss = nelbo if self.beta == 1 else rec + self.beta * kl
        return loss, {"train/loss": loss, "gen/elbo": -nelbo, "gen/kl_z": kl, "gen/rec": rec}

    def compute_sigmoid_given(self, z: Tensor) -> Tensor:
        """E[x | z]: pixel probabilities, (batch, 784)."""
        return torch.sigmoid(self.dec(z))

    def sample_sigmoid(self, batch: int) -> Tensor:
        """Pixel probabilities E[x | z] at z from the prior, (batch, 784)."""
        return self.compute_sigmoid_given(self.sample_z(batch))

    def sample_x_given(self, z: Tensor) -> Tensor:
        """Draw binary images from p(x | z), (batch, 784)."""
        return torch.bernoulli(self.compute_sigmoid_given(z))

    def sample_x(self, batch: int) -> Tensor:
        """Draw binary images from the model, (batch, 784)."""
        return self.sample_x_given(self.sample_z(batch))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixel probabilities at the posterior mean of z, (batch, 784)."""
        return self.compute_sigmoid_given(self.enc(x)[0])


class VAE(BinaryVAE):
    """Standard normal prior."""

    def __init__(self, z_dim: int = 10, name: str = "vae", beta: float = 1.0):
        super().__init__(z_dim, name, beta)
        self.register_buffer("z_prior_m", torch.zeros(1))
        self.register_buffer("z_prior_v", torch.ones(1))

    def log_prior(self, z: Tensor) -> Tensor:
        return utils.log_normal(z, self.z_prior_m, self.z_prior_v)

    def closed_kl(self, qm: Tensor, qv: Tensor) -> Tensor:
        return utils.kl_normal(qm, qv, self.z_prior_m, self.z_prior_v)

    def sample_z(self, batch: int) -> Tensor:
        m = self.z_prior_m.expand(batch, self.z_dim)
        return utils.sample_gaussian(m, self.z_prior_v)

"""The VAE of problem 1, and what it shares with the GMVAE: binary pixels, the ELBO and IWAE."""

import operator

import torch
from torch import Tensor

from codebase import utils
from codebase.models import nns


class BinaryVAE(nns.LatentModel):
    """p(z) p(x | z) on binary pixels, with q(z | x) a diagonal Gaussian.

    A subclass brings the prior p(z):
        log_prior(z)     log p(z) in nats, of z (..., z_dim)
        kl(qm, qv, z)    KL(q(z | x) || p(z)) per image, in closed form or estimated at z ~ q
        sample_z(batch)  draws from the prior, (batch, z_dim)

    Images x are (batch, 784) with values in {0, 1}; all bounds are scalars in nats, averaged over
    the batch.
    """

    def __init__(
        self,
        z_dim: int = 10,
        name: str = "vae",
        beta: float = 1.0,
        train_iw: int = 1,
        *,
        nn: str = "v1",
    ):
        """nn: the course's choice of networks, of which there is one; ignored."""
        super().__init__(name, z_dim)
        self.beta = beta
        self.train_iw = train_iw
        self.enc = nns.Encoder(z_dim)
        self.dec = nns.Decoder(z_dim)

    def negative_elbo_bound(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-ELBO(x) = KL(q(z | x) || p(z)) - E_q log p(x | z), with one sample of z per image.

        Returns nelbo, kl, rec, with nelbo = kl + rec whatever beta is.
        Source: Kingma & Welling 2014, equation 3.
        """
        nns.check_pixels(x)
        qm, qv = self.enc(x)
        z = utils.sample_gaussian(qm, qv)
        kl = self.kl(qm, qv, z)  # (batch,)
        rec = -utils.log_bernoulli_with_logits(x, self.dec(z))  # (batch,)
        return (kl + rec).mean(), kl.mean(), rec.mean()

    def log_densities(
        self, x: Tensor, qm: Tensor, qv: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x | z), log p(z) and log q(z | x) in nats, (iw, batch) each.

        z: (iw, batch, z_dim), samples of q = N(qm, diag qv). The logarithm of a sample's importance
        weight is log_p_x + log_p_z - log_q_z. Source: Burda et al. 2016, equation 8.
        """
        log_p_x = utils.log_bernoulli_with_logits(x, self.dec(z))
        return log_p_x, self.log_prior(z), utils.log_normal(z, qm, qv)

    def negative_iwae_bound(self, x: Tensor, iw: int) -> tuple[Tensor, Tensor, Tensor]:
        """-L_iw(x) = -E log (1/iw) sum_i p(x, z_i) / q(z_i | x), differentiable.

        Returns niwae, kl, rec: kl + rec is the sampled -ELBO of the same z, equal to niwae at
        iw = 1 and never below it. Raises ValueError where iw is no whole number or below 1.
        Source: Burda et al. 2016, equation 8.
        """
        try:
            samples = operator.index(iw)
        except TypeError:
            samples = 0
        if samples < 1:
            raise ValueError(f"iw must be a whole number of samples, at least 1, not {iw!r}")
        nns.check_pixels(x)
        qm, qv = self.enc(x)
        z = utils.sample_gaussian(qm.expand(samples, *qm.shape), qv)
        log_p_x, log_p_z, log_q_z = self.log_densities(x, qm, qv, z)
        niwae = -utils.log_mean_exp(log_p_x + log_p_z - log_q_z, 0)  # (batch,)
        return niwae.mean(), (log_q_z - log_p_z).mean(), -log_p_x.mean()

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and the terms of the ELBO by name.

        The loss is rec + beta * kl (Higgins et al. 2017), or with train_iw > 1 the bound
        -L_train_iw (Burda et al. 2016).
        """
        if self.train_iw > 1:
            loss, kl, rec = self.negative_iwae_bound(x, self.train_iw)
            nelbo = kl + rec
        else:
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


class VAE(BinaryVAE, nns.NormalPriorModel):
    """A BinaryVAE whose prior is N(0, I), so that its KL has a closed form.

    As the second base, NormalPriorModel is what super().__init__ in BinaryVAE calls.
    """

    def log_prior(self, z: Tensor) -> Tensor:
        return utils.log_normal(z, self.z_prior_m, self.z_prior_v)

    def kl(self, qm: Tensor, qv: Tensor, z: Tensor) -> Tensor:
        return utils.kl_normal(qm, qv, self.z_prior_m, self.z_prior_v)

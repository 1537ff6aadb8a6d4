"""The FSVAE of the bonus problem: a VAE of colour images, conditioned on their label."""

from torch import Tensor

from codebase import utils
from codebase.models import nns


class FSVAE(nns.NormalPriorModel):
    """p(z) p(x | z, y) with Gaussian pixels of variance 1/10 and q(z | x, y) a diagonal Gaussian.

    Images x are (batch, 3072), channel-major, with values in [0, 1]; labels y one-hot (batch, 10).
    """

    x_var = 0.1

    def __init__(self, name: str = "fsvae", *, nn: str = "v1"):
        """nn: the course's choice of networks, of which there is one; ignored."""
        super().__init__(name, z_dim=10)
        self.y_dim = 10
        self.enc = nns.Encoder(self.z_dim, self.y_dim, x_dim=3072, hidden=500)
        self.dec = nns.Decoder(self.z_dim, self.y_dim, x_dim=3072, hidden=500)

    def negative_elbo_bound(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-ELBO(x | y) = KL(q(z | x, y) || p(z)) - E_q log N(x; dec(z, y), 1/10 I).

        One sample of z is drawn per image. Returns nelbo, kl_z, rec: scalars in nats, averaged
        over the batch, with nelbo = kl_z + rec. rec carries the normalising constant
        3072/2 log(2 pi / 10) and so may be negative.
        Raises ValueError unless y has the shape of one-hot labels, (batch, 10).
        """
        nns.check_labels(x, y)
        qm, qv = self.enc(x, y)
        z = utils.sample_gaussian(qm, qv)
        kl_z = utils.kl_normal(qm, qv, self.z_prior_m, self.z_prior_v)  # (batch,)
        rec = -utils.log_normal(x, self.dec(z, y), x.new_full((), self.x_var))  # (batch,)
        return (kl_z + rec).mean(), kl_z.mean(), rec.mean()

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, -ELBO, and its terms by name."""
        nelbo, kl_z, rec = self.negative_elbo_bound(x, y)
        return nelbo, {"train/loss": nelbo, "gen/elbo": -nelbo, "gen/kl_z": kl_z, "gen/rec": rec}

    def compute_mean_given(self, z: Tensor, y: Tensor) -> Tensor:
        """E[x | z, y], (batch, 3072); a network's output, so clip it to [0, 1] to look at it."""
        return self.dec(z, y)

    def reconstruct(self, x: Tensor, y: Tensor, new_y: Tensor | None = None) -> Tensor:
        """Decode the posterior mean of z given x, y: (batch, 3072).

        With new_y, draw the style of x on another label.
        """
        z = self.enc(x, y)[0]
        if new_y is None:
            return self.compute_mean_given(z, y)
        return self.compute_mean_given(z, new_y)

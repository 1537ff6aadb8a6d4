"""The SSVAE of problem 4: semi-supervised classification with the label summed out exactly."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from codebase import utils
from codebase.models import nns


class SSVAE(nns.NormalPriorModel):
    """p(y) p(z) p(x | z, y) on binary pixels, y uniform over ten labels, with q(y | x) q(z | x, y).

    Images x are (batch, 784) with values in {0, 1}, labels y one-hot (batch, 10).
    """

    def __init__(
        self,
        gen_weight: float = 1,
        class_weight: float = 100,
        name: str = "ssvae",
        *,
        nn: str = "v1",
    ):
        """nn: the course's choice of networks, of which there is one; ignored."""
        super().__init__(name, z_dim=64)
        self.gen_weight = gen_weight
        self.class_weight = class_weight
        self.y_dim = 10
        self.enc = nns.Encoder(self.z_dim, self.y_dim)
        self.dec = nns.Decoder(self.z_dim, self.y_dim)
        # q(y | x): the logits of the label
        self.cls = nns.Network(784, 0, 300, self.y_dim, activation=torch.nn.ReLU)

    def negative_elbo_bound(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-ELBO(x) = KL(q(y|x) || p(y)) + E_q(y|x)[KL(q(z|x,y) || p(z)) - E_q(z|x,y) log p(x|z,y)].

        The expectation over y is exact, that over z takes one sample per image and label.
        Returns nelbo, kl_z, kl_y, rec: scalars in nats, averaged over the batch, with
        nelbo = kl_z + kl_y + rec.
        Source: Kingma et al. 2014, equation 7, with q(y | x) as the handout has it.
        """
        nns.check_pixels(x)
        log_q_y = F.log_softmax(self.cls(x), -1)
        q_y = log_q_y.exp()  # (batch, 10)
        log_p_y = torch.full_like(log_q_y, -math.log(self.y_dim))
        kl_y = utils.kl_cat(q_y, log_q_y, log_p_y)  # (batch,)

        # Every image with every label, the label first: (10, 1, 10) against (batch, 784)
        y = torch.eye(self.y_dim, dtype=x.dtype, device=x.device).unsqueeze(1)
        qm, qv = self.enc(x, y)  # (10, batch, z_dim)
        z = utils.sample_gaussian(qm, qv)
        kl_z_given_y = utils.kl_normal(qm, qv, self.z_prior_m, self.z_prior_v)  # (10, batch)
        log_p_x = utils.log_bernoulli_with_logits(x, self.dec(z, y))  # (10, batch)

        # Contiguous: a transposed q_y would give the gradients of all pixels its transposed layout.
        weights = q_y.T.contiguous()  # (10, batch)
        kl_z = (weights * kl_z_given_y).sum(0)  # (batch,)
        rec = -(weights * log_p_x).sum(0)  # (batch,)
        return (kl_y + kl_z + rec).mean(), kl_z.mean(), kl_y.mean(), rec.mean()

    def classification_cross_entropy(self, x: Tensor, y: Tensor) -> Tensor:
        """-log q(y | x) in nats, averaged over the batch.

        Raises ValueError unless y has the shape of one-hot labels, (batch, 10).
        """
        nns.check_labels(x, y)
        return F.cross_entropy(self.cls(x), y.argmax(-1))

    def loss(self, x: Tensor, xl: Tensor, yl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """gen_weight * nelbo(x) + class_weight * cross-entropy on the labelled (xl, yl).

        Returns the loss and its terms by name; with gen_weight = 0 the bound is not computed and
        its terms read 0. Raises ValueError unless yl has the shape of one-hot labels, (batch, 10).
        """
        nns.check_labels(xl, yl)
        logits = self.cls(xl)
        labels = yl.argmax(-1)
        ce = F.cross_entropy(logits, labels)
        acc = (logits.argmax(-1) == labels).to(ce.dtype).mean()
        if self.gen_weight:
            nelbo, kl_z, kl_y, rec = self.negative_elbo_bound(x)
        else:
            nelbo, kl_z, kl_y, rec = torch.zeros_like(ce).expand(4)
        loss = self.gen_weight * nelbo + self.class_weight * ce
        terms = {
            "train/loss": loss,
            "gen/elbo": -nelbo,
            "gen/kl_z": kl_z,
            "gen/kl_y": kl_y,
            "gen/rec": rec,
            "class/ce": ce,
            "class/acc": acc,
        }
        return loss, terms

    def compute_sigmoid_given(self, z: Tensor, y: Tensor) -> Tensor:
        """E[x | z, y]: pixel probabilities, (batch, 784)."""
        return torch.sigmoid(self.dec(z, y))

    def sample_x_given(self, z: Tensor, y: Tensor) -> Tensor:
        """Draw binary images from p(x | z, y), (batch, 784)."""
        return torch.bernoulli(self.compute_sigmoid_given(z, y))

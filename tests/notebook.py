"""What a notebook of the course does, in the terms of the course's own package alone."""

import torch

from codebase import utils as ut
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.train import train  # noqa: F401 (some notebooks import it and never call it)

device = torch.device("cpu")
train_loader, labeled_subset, test_set = ut.get_mnist_data(device, use_test_subset=True)
vae = VAE(z_dim=10, name="model=vae_z=10_run=0000").to(device)
ut.load_model_by_name(vae, global_step=20000, device=device)
ut.evaluate_lower_bound(vae, labeled_subset, run_iwae=False)
ssvae = SSVAE(gen_weight=1, class_weight=100, name="model=ssvae_gw=001_cw=100_run=0000").to(device)
ut.load_model_by_name(ssvae, global_step=30000, device=device)
ut.evaluate_classifier(ssvae, test_set)

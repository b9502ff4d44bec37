"""REINFORCE++-baseline on the embedded default (`embedded.py`), a little KL (k2) in the loss."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="reinforce_pp_baseline", kl_coefficient=1e-3))

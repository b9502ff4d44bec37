"""REINFORCE++ on the embedded default (`embedded.py`), a little KL in every token's reward."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="reinforce_pp", kl_coefficient=1e-3))

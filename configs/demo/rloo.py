"""RLOO as published on the embedded default (`embedded.py`): no KL, hence no reference model in memory."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="rloo"))

"""GSPO on the embedded default (`embedded.py`): one ratio for a whole completion."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="gspo"), minibatches=2)

"""CISPO on the embedded default (`embedded.py`): the ratio is clipped as a weight and no token loses its gradient."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="cispo"), minibatches=2)

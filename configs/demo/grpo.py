"""GRPO as published on the embedded default (`embedded.py`), its KL (k3) in the loss with DeepSeekMath's weight."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="grpo", kl_coefficient=0.04))

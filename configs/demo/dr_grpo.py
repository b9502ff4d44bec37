"""Dr. GRPO on the embedded default (`embedded.py`): divided neither by a group's deviation nor by a completion's
length."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="dr_grpo"))

"""DAPO on the embedded default (`embedded.py`): room above for the ratio, groups that differ, a price on length."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

# A whole answer has 17 of at most 20 tokens: only the last two cost something.
config = embedded(AlgorithmConfig(name="dapo", overlong_share=0.1), minibatches=2)

"""RLOO as LMM-R1 computes it on the embedded default (`embedded.py`): advantages normalised over all tokens."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig

config = embedded(AlgorithmConfig(name="rloo_lmm_r1"))

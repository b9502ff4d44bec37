"""Reinforcement learning with rule-based rewards for Qwen2, Qwen2-VL and Qwen2.5-VL in JAX."""

from lmmr1_jax.runtime.versions import check_versions

check_versions()  # by package metadata alone: verifier processes import this package and must stay free of jax

"""Groups with rewards, and resolved configs, for the tests of this folder."""

import numpy as np

from lmmr1_jax.algorithms.registry import resolved
from lmmr1_jax.config.schema import AlgorithmConfig, RolloutConfig, TrainConfig
from lmmr1_jax.types.records import Completion, EncodedPrompt, Prompt, Reward, Rollout


def group(rewards, lengths, name="p"):
    prompt = Prompt([], None, name, "test", "file", 0)
    encoded = EncodedPrompt(prompt, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), (), np.zeros(0, np.int32), 1)
    completions = tuple(
        Completion(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), "stop", np.zeros(n, np.int32))
        for n in lengths
    )
    return Rollout(encoded, completions, tuple(Reward(r, {}) for r in rewards))


def settings(name="rloo", limit=8, **fields):
    """The algorithm's config with its own values filled in."""
    config = TrainConfig(algorithm=AlgorithmConfig(name=name, **fields), rollout=RolloutConfig(max_new_tokens=limit))
    return resolved(config).algorithm

"""In bfloat16 the built-in sampler's log-probs are the learner's: both run the same layers, with the same rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import packed_cases as cases
import pytest
import random_checkpoint

from lmmr1_jax.config.schema import LearnerConfig, MeshConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import build
from lmmr1_jax.models.packed_forward import SamplingDistribution, micro_batch, response_log_probs
from lmmr1_jax.packing.pack import gather, pack, plan_shapes
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
from lmmr1_jax.rollout.sampler import SamplingSettings, sample
from lmmr1_jax.tasks.shapes import shape_prompts
from lmmr1_jax.types.records import Rollout
from weights_bridge.config_json import read_architecture
from weights_bridge.load import load

NEW_TOKENS = 24


def shipped(tmp_path):
    """The tiny model that ships with the package, and prompts with an image each."""
    processor = Processor(TINY_MODEL)
    prompts = [processor.encode(prompt) for prompt in shape_prompts("heldout", 8)]
    assert all(prompt.images for prompt in prompts)
    return TINY_MODEL, prompts, processor.patches, processor.banned_ids, processor.end_ids


def random_text_model(tmp_path):
    """A random checkpoint whose weights have the size of trained ones, and prompts of text."""
    config = random_checkpoint.config_of("qwen2", True, vocab_size=cases.VOCABULARY)
    tensors = {
        name: 1 + 0.1 * tensor if "norm" in name else 0.2 * tensor
        for name, tensor in random_checkpoint.random_tensors(config).items()
    }
    folder = random_checkpoint.write_checkpoint(tmp_path / "random", config, tensors)
    prompts = [cases.encoded_prompt(read_architecture(folder), name, 5 + 9 * name) for name in range(4)]
    return folder, prompts, cases.patches_of, cases.BANNED, (3,)


@pytest.mark.parametrize("setting", [shipped, random_text_model])
def test_the_gap_at_equal_weights_is_rounding(setting, tmp_path):
    folder, prompts, patches_of, banned, ends = setting(tmp_path)
    network = build(read_architecture(folder), jnp.bfloat16)
    params, vision = load(folder), network.config.vision
    sampler = JaxSampler(network, banned_ids=banned, end_ids=ends, patches_of=patches_of)
    sampler.load(params, 0)
    groups = sample(sampler, prompts, 4, SamplingSettings(max_new_tokens=NEW_TOKENS, key=sampling_key(0, 0)))
    rollouts = [Rollout(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    shapes = plan_shapes(
        rollouts, learner=LearnerConfig(), max_new_tokens=NEW_TOKENS, vision=vision, tokens_per_device=1 << 14
    )
    batch = pack(rollouts, shapes, vision, patches_of)
    assert int(batch.micro_batches) == 1
    never = np.isin(np.arange(network.config.text.vocab_size), banned)
    policy = SamplingDistribution(never, temperature=1.0, chunk=1024)

    @jax.jit
    def learners(params, batch):
        micro = micro_batch(batch, 0)
        return response_log_probs(network, params, micro, policy, make_mesh(MeshConfig(1, 1, 1)))[0]

    log_probs = np.zeros(batch.mask.shape, np.float32)
    log_probs[0] = learners(params, batch)
    completions = [completion for group in groups for completion in group]
    own = np.concatenate(gather(log_probs, batch, len(completions)))
    gap = np.abs(own - np.concatenate([completion.log_probs for completion in completions]))
    assert own.std() > 0.1 and gap.mean() < 0.01

"""The embedded default with rollouts by vLLM, on the CPU: `configs/demo/rloo.py` with one engine beside the learner."""

import dataclasses

from rloo import config as rloo

from lmmr1_jax.config import VllmConfig

config = dataclasses.replace(
    rloo,
    run=dataclasses.replace(rloo.run, dir="runs/demo/rloo_vllm"),
    rollout=dataclasses.replace(rloo.rollout, sampler="vllm"),
    # The data's limits, of a model that knows 4,096 positions.
    data=dataclasses.replace(rloo.data, max_prompt_tokens=1024),
    vllm=VllmConfig(num_engines=1, cpus=2, max_num_seqs=256, kv_cache_gib=0.25, max_images=1),
)

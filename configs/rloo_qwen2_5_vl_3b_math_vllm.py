"""LMM-R1's first experiment on one machine with eight GPUs: the learner on four of them, an engine on each other one.

    CUDA_VISIBLE_DEVICES=0,1,2,3 python -m lmmr1_jax.train --config configs/rloo_qwen2_5_vl_3b_math_vllm.py ...

`CUDA_VISIBLE_DEVICES` is the learner's share, `--ray.devices` the engines'. (JAX 0.10 does not read
`JAX_CUDA_VISIBLE_DEVICES` from the environment.) Model and data as in `configs/rloo_qwen2_5_vl_3b_math.py`. Needs the
extras `cuda` and `vllm`. Not run yet: no machine with GPUs was at hand.
"""

import dataclasses

from rloo_qwen2_5_vl_3b_math import config as math

from lmmr1_jax.config import RayConfig, VllmConfig

config = dataclasses.replace(
    math,
    run=dataclasses.replace(math.run, dir="runs/rloo_qwen2_5_vl_3b_math_vllm"),
    rollout=dataclasses.replace(math.rollout, sampler="vllm"),
    vllm=VllmConfig(num_engines=4, device="gpu", max_images=1),
    ray=RayConfig(devices="4,5,6,7"),
)

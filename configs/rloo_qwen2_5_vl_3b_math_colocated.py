"""LMM-R1's first experiment on one machine with eight GPUs, all of which learn and sample in turn.

    python -m lmmr1_jax.train --config configs/rloo_qwen2_5_vl_3b_math_colocated.py --model.path ... --data.path ...

Engines sleep while the learner works: their weights and keys leave the GPU, and the next sync wakes them. JAX gives
nothing back, so each GPU is divided: `vllm.gpu_memory_utilization` of it is the engine's, the rest, but for 5 %, the
learner's.
Not run yet: no machine with GPUs was at hand.
"""

import dataclasses

from rloo_qwen2_5_vl_3b_math import config as math

from lmmr1_jax.config import VllmConfig

config = dataclasses.replace(
    math,
    run=dataclasses.replace(math.run, dir="runs/rloo_qwen2_5_vl_3b_math_colocated"),
    rollout=dataclasses.replace(math.rollout, sampler="vllm"),
    vllm=VllmConfig(num_engines=8, device="gpu", colocate=True, gpu_memory_utilization=0.4, max_images=1),
)

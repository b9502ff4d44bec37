"""LMM-R1's first experiment with the learner on a TPU host and engines on the GPUs of other machines.

    scripts/ray_head.sh 10.0.0.1                    on the TPU host, by the address that the others reach
    scripts/ray_sampler.sh 10.0.0.1:6379            on every machine with GPUs
    python -m lmmr1_jax.train --config configs/rloo_qwen2_5_vl_3b_math_tpu.py ...      on the TPU host again

The TPU host needs the extra `tpu` and Ray, no vLLM; the samplers what requirements-sampler.txt lists, no JAX. Model and
data as in `configs/rloo_qwen2_5_vl_3b_math.py`. Not run yet: neither a TPU nor a GPU was at hand.
"""

import dataclasses

from rloo_qwen2_5_vl_3b_math import config as math

from lmmr1_jax.config import RayConfig, VllmConfig

config = dataclasses.replace(
    math,
    run=dataclasses.replace(math.run, dir="runs/rloo_qwen2_5_vl_3b_math_tpu"),
    # The engines sample the next batch while this one is learned from; the loss weighs tokens by importance.
    rollout=dataclasses.replace(math.rollout, sampler="vllm", staleness=1),
    # `--vllm.label pool=h100` would choose among machines that were started with `--labels pool=h100`.
    vllm=VllmConfig(num_engines=8, device="gpu", resource="sampler", max_images=1),
    # `auto`: the cluster that this machine is a node of. The samplers may take a while to come.
    ray=RayConfig(address="auto", timeout=600.0),
)

"""LMM-R1's first experiment: RLOO on text-only mathematics lifts Qwen2.5-VL-3B-Instruct on problems with images.

Bring two things:
  --model.path  the folder of Qwen/Qwen2.5-VL-3B-Instruct (config.json, safetensors, tokenizer).
  --data.path   the about 8,000 problems of MATH's levels 3 to 5, one JSON object a line:
                {"message": "[{\\"role\\": \\"system\\", \\"content\\": ...}, {\\"role\\": \\"user\\", ...}]",
                 "answer": "$\\\\boxed{60}$"}
                with LMM-R1's system prompt (README.md quotes it) as the first message.

The numbers are those of `train_rloo_qwenvl2_5_math.sh` in LMM-R1's first release. LMM-R1 counts completions where
this project counts prompts: its batches of 128 completions out of 256 prompts x 16 are 32 minibatches here.
"""

from lmmr1_jax.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)

config = TrainConfig(
    run=RunConfig(dir="runs/rloo_qwen2_5_vl_3b_math", seed=42),
    data=DataConfig(epochs=30, max_prompt_tokens=1024),
    rollout=RolloutConfig(prompts=256, completions=16, max_new_tokens=3000, temperature=1.0),
    # Their rules, flaws included, so that rewards can be compared with their curves.
    rewards=RewardsConfig(variant="lmm-r1"),
    # Rewards normalised over all tokens of a rollout batch; no KL, hence no reference model in memory.
    algorithm=AlgorithmConfig(name="rloo_lmm_r1", kl_coefficient=0.0),
    learner=LearnerConfig(learning_rate=1e-6, minibatches=32, remat="full"),
    eval=EvalConfig(every=20),
    checkpoint=CheckpointConfig(every=20),
)

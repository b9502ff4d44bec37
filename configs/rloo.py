"""RLOO on a model and problems of one's own.

    python -m lmmr1_jax.train --config configs/rloo.py --model.path DIR --data.path FILE --run.dir runs/NAME

Needs a Hugging Face folder of Qwen2, Qwen2-VL or Qwen2.5-VL and a file of problems (README.md, "Train a real model").
The numbers are a start for models of billions of parameters; `--rollout.max-new-tokens` bounds what a step costs most.
Seen to run on CPUs alone so far, with small models.
"""

from lmmr1_jax.config import AlgorithmConfig, LearnerConfig, RolloutConfig, RunConfig, TrainConfig

config = TrainConfig(
    run=RunConfig(dir="runs/rloo"),
    rollout=RolloutConfig(prompts=32, completions=8, max_new_tokens=1024),
    algorithm=AlgorithmConfig(name="rloo"),  # no KL, hence no reference model in memory
    learner=LearnerConfig(learning_rate=1e-6),
)

"""What the presets share: the embedded task, in which a tiny Qwen2.5-VL learns to count the coloured shapes it sees.

Runs as it stands on two CPU cores; `--model.path` and `--data.path` point it at anything else, with a learning rate
of the order of 1e-6 for a model of billions of parameters (`configs/rloo_qwen2_5_vl_3b_math.py`).
"""

from lmmr1_jax.config import (
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    EvalConfig,
    LearnerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)


def embedded(
    algorithm: AlgorithmConfig, *, minibatches: int = 1, critic: CriticConfig | None = None
) -> TrainConfig:
    """The embedded task by an algorithm; with several minibatches a step has as many updates, and ratios move."""
    return TrainConfig(
        run=RunConfig(dir=f"runs/{algorithm.name}", steps=100),
        # An answer is 17 tokens long; one that rambles is cut.
        rollout=RolloutConfig(prompts=32, completions=8, max_new_tokens=20),
        algorithm=algorithm,
        critic=critic or CriticConfig(),
        # A model of half a million parameters moves at rates that would ruin a large one. Its activations are small:
        # nothing is worth computing twice.
        learner=LearnerConfig(learning_rate=1e-4, warmup_ratio=0.05, remat="none", minibatches=minibatches),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=50),
    )

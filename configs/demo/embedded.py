"""What the demos share: the embedded task, in which a tiny Qwen2.5-VL learns to count the coloured shapes it sees.

    python -m lmmr1_jax.train --config configs/demo/rloo.py

Each runs as it stands on two CPU cores, in one to three minutes: docs/algorithms.md has what they were seen to reach.
`configs/rloo.py` is the start for a model and problems of one's own.
"""

from lmmr1_jax.config import (
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)


def embedded(
    algorithm: AlgorithmConfig, *, minibatches: int = 1, critic: CriticConfig | None = None
) -> TrainConfig:
    """The embedded task by an algorithm; with several minibatches a step has as many updates, and ratios move."""
    return TrainConfig(
        run=RunConfig(dir=f"runs/demo/{algorithm.name}", steps=100),
        model=ModelConfig(path="embedded:tiny"),
        data=DataConfig(path="embedded:shapes"),
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

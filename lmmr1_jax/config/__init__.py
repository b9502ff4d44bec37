"""What a config file imports: the dataclasses of `schema.py`."""

from lmmr1_jax.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    MeshConfig,
    ModelConfig,
    RayConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    VllmConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "LearnerConfig",
    "MeshConfig",
    "ModelConfig",
    "RayConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "VllmConfig",
]

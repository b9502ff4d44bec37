"""PPO on the embedded default (`embedded.py`): a critic of its own, which sees the images, for a baseline."""

from embedded import embedded

from lmmr1_jax.config import AlgorithmConfig, CriticConfig

config = embedded(AlgorithmConfig(name="ppo"), critic=CriticConfig(freeze_vision=True, learning_rate=1e-3))

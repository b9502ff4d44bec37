"""PPO's critic from its config: what it is made of, and the parameters that it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.compatibility import check_fit
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.learner.objectives.value import Critic, initial_head, own_critic, shared_critic
from lmmr1_jax.models.network import Network, Params, build
from lmmr1_jax.parallel.sharding import activation_constraint, sharding_of
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.architecture import num_heads_by_axis
from weights_bridge.config_json import read_architecture
from weights_bridge.errors import CheckpointError
from weights_bridge.load import has_score, load
from weights_bridge.tensor_table import layout, logical_axes


def build_critic(config: TrainConfig, processor: Processor, policy: Network, source: Path, mesh: Mesh) -> Critic:
    """The critic of a policy, without parameters.

    Args:
      config: reads `critic` and `learner.remat`.
      processor: the policy's, whose tokens and patches the critic reads.
      policy: the policy's network.
      source: the folder that the policy comes from.
      mesh: the learner's.

    Raises:
      UserError: the critic's model can't read what the policy reads.
    """
    if config.critic.backbone == "shared":
        return shared_critic(policy)
    folder = _folder(config, source)
    if config.critic.path:
        _check_reads_the_same(folder, processor)
    model = read_architecture(folder)
    # Tied, so that there is no head over the vocabulary.
    body = dataclasses.replace(model, text=dataclasses.replace(model.text, tie_word_embeddings=True))
    backbone = build(
        body, policy.compute_dtype, config.learner.remat, activation_constraint(mesh), policy.attention
    )
    return own_critic(backbone, logical_axes(layout(model, "score")))


def load_critic(config: TrainConfig, width: int, source: Path, mesh: Mesh) -> Params:
    """The parameters that the critic starts from, float32.

    A reward model brings its score as the value head; else the head starts near 0.

    Args:
      config: reads `critic` and `run.seed`.
      width: of the hidden states that the head reads.
      source, mesh: as in `build_critic`.

    Raises:
      CheckpointError: the weights are not whole.
    """
    head = initial_head(config.run.seed, width)
    if config.critic.backbone == "shared":
        return head
    folder = _folder(config, source)
    shardings = sharding_of(mesh, num_heads=num_heads_by_axis(read_architecture(folder)))
    if has_score(folder):
        return load(folder, shardings, head="score")
    params = load(folder, shardings)
    params["language"].pop("head", None)
    return params | head


def _folder(config: TrainConfig, source: Path) -> Path:
    return Path(config.critic.path) if config.critic.path else source


def _check_reads_the_same(folder: Path, processor: Processor) -> None:
    """Raises UserError unless the model can read the policy's tokens and patches as they are packed."""
    try:
        takes = check_fit(folder, processor)
        own, policy = read_architecture(folder).vision, processor.config.vision
        if policy is not None and own is None:
            raise UserError(f"{folder}: a model of text, which would not see the policy's images")
        if policy is not None and (own.window_size, own.in_channels) != (policy.window_size, policy.in_channels):
            raise UserError(
                f"{folder}: its images have other windows than the policy's; it must be a "
                f"{processor.config.model_type}"
            )
        if takes != (processor.format if policy is not None else None):
            raise UserError(f"{folder}: its preprocessor_config.json sizes or normalises images in another way")
    except (UserError, CheckpointError) as error:
        raise UserError(f"critic.path: {error}") from None


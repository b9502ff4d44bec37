"""Reward models: what a network with one number for a head says of a prompt with its completion.

Qwen2, Qwen2-VL and Qwen2.5-VL from Hugging Face folders, each its base model's checkpoint with `score.weight
[1, hidden]`; for text that is what transformers' `Qwen2ForSequenceClassification` writes. The score is read at the last
token that is not padding, of exactly the token ids that the policy saw and sampled, so a reward model must have the
policy's tokenizer.

Groups are packed as the learner packs them: a prompt stands once in a row, images included, and its completions
follow. Micro-batches of one static shape go through the devices one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.data.images import ImageFormat, patchify
from lmmr1_jax.models.network import Network, build
from lmmr1_jax.models.packed_forward import hidden_states, micro_batch
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.packing.layout import PackShapes, group_sizes, lay_out
from lmmr1_jax.packing.pack import gather, pack
from lmmr1_jax.packing.shapes import grow, plan_shapes, tokens_per_device
from lmmr1_jax.parallel.sharding import activation_constraint, put_batch, row_shards, sharding_of
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import Image, Rollout
from weights_bridge.architecture import num_heads_by_axis
from weights_bridge.config_json import read_architecture
from weights_bridge.load import load


class RewardModel:
    """A reward model on its devices.

    Attributes:
      config: what its folder says.
      params: the weights, in the compute dtype.
      shapes: of the packed batches; planned at the first groups and part of a run's state from then on, because
        padding can change the last bit of a sum.
    """

    def __init__(
        self,
        folder: str | Path,
        mesh: Mesh,
        *,
        compute_dtype: Any,
        image_format: ImageFormat | None,
        learner: LearnerConfig,
        max_new_tokens: int,
        attention: str = "xla",
    ):
        """Reads the folder and puts its weights, in the compute dtype, on the mesh.

        Args:
          folder: a Hugging Face folder.
          mesh: the learner's.
          compute_dtype: of matrix products.
          image_format: how images become patches; None where the model takes none.
          learner: reads `share_prompts` and `pack`; sizes are chosen anew, for they may be fixed for the policy.
          max_new_tokens: no completion is longer.
          attention: name of the attention backend.

        Raises:
          CheckpointError: the config can't be read or asks for something unsupported, or the weights are not whole or
            not a reward model's.
        """
        self.config = read_architecture(folder)
        self.shapes: PackShapes | None = None
        self._mesh, self._format, self._max_new_tokens = mesh, image_format, max_new_tokens
        self._learner = dataclasses.replace(learner, row_length=0, rows=0, image_rows=0)
        self._pad = self.config.pad_token_id
        # Tied, so that there is no head over the vocabulary.
        body = dataclasses.replace(self.config, text=dataclasses.replace(self.config.text, tie_word_embeddings=True))
        network = build(body, compute_dtype, constrain=activation_constraint(mesh), attention=attention)
        shardings = sharding_of(mesh, num_heads=num_heads_by_axis(self.config))
        self.params = load(folder, shardings, network.compute_dtype, head="score")
        whole = NamedSharding(mesh, PartitionSpec())
        self._scores = jax.jit(functools.partial(_scores, network, mesh), out_shardings=whole)

    def score(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The score of every completion of every group. Which groups come together changes no score."""
        groups = [self._prepared(rollout) for rollout in rollouts]
        self._fit_shapes(groups)
        vision = self.config.vision
        needed = len(lay_out(group_sizes(groups, vision), self.shapes))
        batch = pack(groups, dataclasses.replace(self.shapes, micro_batches=needed), vision, self._patches)
        parts = [np.asarray(self._scores(self.params, put_batch(_part(batch, i), self._mesh))) for i in range(needed)]
        after = iter(gather(np.stack(parts), batch, int(batch.completions_total)))
        return [
            [float(next(after)[_last(completion.token_ids, self._pad)]) for completion in rollout.completions]
            for rollout in rollouts
        ]

    def state_dict(self) -> dict[str, Any] | None:
        """The shapes: what a resumed run must go on with."""
        return None if self.shapes is None else dataclasses.asdict(self.shapes)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Back to `state`; on another number of devices rows are planned anew."""
        is_same = state is not None and state["row_devices"] == row_shards(self._mesh)
        self.shapes = PackShapes(**state) if is_same else None

    def _prepared(self, rollout: Rollout) -> Rollout:
        """The group as this model sees it, each completion longer by one token.

        A response slot stands for the hidden state before its token. So slot t has what the model knows after t
        completion tokens, and one more slot, whose token nobody reads, has what it knows after the last.
        """
        encoded, vision = rollout.encoded, self.config.vision
        images = () if vision is None else encoded.images
        positions, following = prompt_positions(
            encoded.token_ids, [image.grid_thw for image in images], self.config
        )
        encoded = dataclasses.replace(
            encoded,
            positions=positions,
            next_position=following,
            images=images,
            image_slots=encoded.image_slots if images else encoded.image_slots[:0],
        )
        longer = tuple(
            dataclasses.replace(
                completion,
                token_ids=np.append(completion.token_ids, 0).astype(np.int32),
                log_probs=np.zeros(len(completion.token_ids) + 1, np.float32),
            )
            for completion in rollout.completions
        )
        return Rollout(encoded, longer)

    def _fit_shapes(self, groups: Sequence[Rollout]) -> None:
        if self.shapes is None:
            self.shapes = plan_shapes(
                groups,
                learner=self._learner,
                max_new_tokens=self._max_new_tokens + 1,
                vision=self.config.vision,
                row_devices=row_shards(self._mesh),
                tokens_per_device=tokens_per_device(),
            )
        self.shapes = grow(self.shapes, groups, self.config.vision)

    def _patches(self, image: Image) -> np.ndarray:
        return patchify(image.pixels, self._format)


def _scores(network: Network, mesh: Mesh, params: dict[str, Any], batch: PackedBatch) -> Float[Array, "rows slots"]:
    """What the head says before each response slot's token."""
    micro = micro_batch(batch, 0)
    hidden = hidden_states(network.bind({k: v for k, v in params.items() if k != "score"}), micro, mesh)
    # In[B, L, D_fsdp] . W[D_fsdp, 1]: one number a token, in float32 whatever the layers computed in.
    scores = jnp.matmul(
        hidden.astype(jnp.float32), params["score"]["kernel"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.take_along_axis(scores[..., 0], micro.source, 1)


def _part(batch: PackedBatch, index: int) -> PackedBatch:
    """Micro-batch `index` of a batch on the host, alone."""
    return jax.tree.map(lambda array: array[index : index + 1] if array.ndim else array, batch)


def _last(token_ids: Int[np.ndarray, " tokens"], pad: int | None) -> int:
    """How many tokens of a completion are read: all up to the last that is not padding."""
    read = np.flatnonzero(np.asarray(token_ids) != (-1 if pad is None else pad))
    return int(read[-1]) + 1 if len(read) else 0

"""Model log-probs of completions that somebody else wrote."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.models.log_probs import token_log_probs
from lmmr1_jax.models.network import Network
from lmmr1_jax.rollout.local.prompt_batch import PatchesOf, PromptBatch, PromptShapes, batch_prompts, round_up
from lmmr1_jax.types.records import EncodedPrompt

LOGITS_CHUNK = 1024


class Scorer:
    """Scores completions with one set of weights; keeps its compiled programs.

    Attributes:
      shapes: the padded shapes in use.
    """

    def __init__(self, network: Network, params: Mapping[str, Any], patches_of: PatchesOf, *, rows: int = 8):
        """`rows` sequences are scored at a time; `patches_of` is `Processor.patches`."""
        self.shapes = PromptShapes()
        self._vision = network.config.vision
        self._params = params
        self._patches_of = patches_of
        self._rows = rows
        self._targets = 0
        self._score = jax.jit(functools.partial(_score, network=network))

    def score(
        self, pairs: Sequence[tuple[EncodedPrompt, Int[np.ndarray, " tokens"]]]
    ) -> list[Float[np.ndarray, " tokens"]]:
        """float32 log softmax(logits) of each completion's tokens after its prompt; nothing banned, temperature 1."""
        return [scored for at in range(0, len(pairs), self._rows) for scored in self._part(pairs[at : at + self._rows])]

    def _part(self, pairs):
        joined = [_join(encoded, completion) for encoded, completion in pairs]
        self.shapes = self.shapes.grown([joined], self._vision)
        self._targets = max(self._targets, round_up(max(len(completion) for _, completion in pairs)), 1)
        batch = batch_prompts(joined, self.shapes, self._vision, self._patches_of, rows=self._rows)
        source = np.zeros((self._rows, self._targets), np.int32)
        targets = np.zeros((self._rows, self._targets), np.int32)
        for row, (encoded, completion) in enumerate(pairs):
            source[row, : len(completion)] = len(encoded.token_ids) - 1 + np.arange(len(completion))
            targets[row, : len(completion)] = completion
        log_probs = np.asarray(self._score(self._params, batch, source, targets))
        return [log_probs[row, : len(completion)].copy() for row, (_, completion) in enumerate(pairs)]


def _join(encoded: EncodedPrompt, completion: Int[np.ndarray, " tokens"]) -> EncodedPrompt:
    """The prompt with the completion behind it; a completion's positions are equal in all three rows."""
    positions = np.broadcast_to(encoded.next_position + np.arange(len(completion)), (3, len(completion)))
    return dataclasses.replace(
        encoded,
        token_ids=np.concatenate([encoded.token_ids, completion]).astype(np.int32),
        positions=np.concatenate([encoded.positions, positions], 1).astype(np.int32),
        next_position=encoded.next_position + len(completion),
    )


def _score(params, batch: PromptBatch, source, targets, *, network: Network):
    model = network.bind(params)
    features = None if batch.vision is None else model.encode_images(batch.vision)
    x = model.embed(batch.tokens, batch.image_slots, features)
    hidden = model.hidden(x, batch.positions, causal_intervals(batch.lengths, batch.tokens.shape[1]))
    predicting = jnp.take_along_axis(hidden, source[..., None], 1)
    return token_log_probs(
        predicting, model.head_embedding(), targets, banned=None, temperature=1.0, chunk=LOGITS_CHUNK
    )[0]

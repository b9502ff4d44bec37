"""The built-in sampler: completions by the learner's own network, on the learner's own devices.

    sampler = JaxSampler(network, banned_ids=..., end_ids=..., patches_of=processor.patches)
    sampler.load(params, version=step)
    groups = sample(sampler, prompts, 8, SamplingSettings(max_new_tokens=256, key=sampling_key(seed, step)))

A prompt is read once, images included, whatever the number of its completions. What is sampled for a completion
depends on the key, the prompt's id and the completion's number, not on what else is in the batch (but for rounding).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.models.network import Network
from lmmr1_jax.rollout.local.decode import DecoderWeights, Request, decode, unstack_layers
from lmmr1_jax.rollout.local.prompt_batch import PatchesOf, PromptBatch, PromptShapes, batch_prompts
from lmmr1_jax.rollout.sampler import Progress, SamplerLimits, SamplingSettings, no_progress
from lmmr1_jax.types.records import FINISH_LENGTH, FINISH_STOP, Completion, EncodedPrompt

MAX_SEQUENCES = 256
MAX_PREFILL_TOKENS = 1 << 16

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which prompts are split."""


def sampling_key(seed: int, step: int) -> Array:
    """The random key of a step: a function of the run's seed and the step's number alone."""
    return jax.random.fold_in(jax.random.key(seed % 2**32), step)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What `submit` was asked for."""

    prompts: Sequence[EncodedPrompt]
    n: int
    settings: SamplingSettings


class JaxSampler:
    """A `Sampler` that works while it is collected from: nothing here could sample while the learner learns.

    Attributes:
      limits: none.
      shapes: the padded shapes in use. They grow with the prompts; set them to what a checkpoint holds to resume with
        the same last bits.
      version: of the loaded weights, None before.
    """

    def __init__(
        self,
        network: Network,
        *,
        banned_ids: Sequence[int],
        end_ids: Sequence[int],
        patches_of: PatchesOf,
        mesh: Mesh | None = None,
        max_num_seqs: int = MAX_SEQUENCES,
        shapes: PromptShapes | None = None,
    ):
        """Builds nothing yet: programs are compiled when first used.

        Args:
          network: the model.
          banned_ids: ids that are never sampled.
          end_ids: ids that end a completion.
          patches_of: `Processor.patches`.
          mesh: the devices over which prompts are split; the decoder's weights are copied to each of them. None, or a
            mesh of one device: where the parameters are.
          max_num_seqs: completions that are sampled at a time.
          shapes: to begin with.
        """
        self.limits = SamplerLimits()
        self.network = network
        self.shapes = shapes or PromptShapes()
        self.version: int | None = None
        self._banned = np.asarray(sorted(banned_ids), np.int32)
        self._ends = np.asarray(sorted(end_ids), np.int32)
        self._patches_of = patches_of
        self._max_sequences = max_num_seqs
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._row_multiple = 1
        if self._mesh is not None:
            self._row_multiple = int(np.prod([self._mesh.shape[axis] for axis in ROW_AXES]))
        # One jitted function per sampler: a network is no hashable argument.
        self._prefill = jax.jit(functools.partial(_prefill, network=network))
        self._params: Mapping[str, Any] | None = None
        self._weights: DecoderWeights | None = None

    def load(self, params: Mapping[str, Any], version: int = 0, *, in_flight: bool = False) -> None:
        """Takes the weights: they are used where they lie, so load again after an update that donates them.

        Args:
          params: the network's parameters, float32.
          version: how many updates they have seen; completions carry it.
          in_flight: of no meaning here, where nothing is ever sampled meanwhile.
        """
        language = params["language"]
        dtype = self.network.compute_dtype
        replicated = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        embedding = _table(language["embed"]["embedding"], dtype, replicated)
        head = embedding if "head" not in language else _table(language["head"]["embedding"], dtype, replicated)
        layers = _unstack(language["layers"], config=self.network.config.text, dtype=dtype)
        norm = language["norm"]["scale"]
        if replicated is not None:
            layers, norm = jax.device_put((layers, norm), replicated)
        self._params, self._weights, self.version = params, DecoderWeights(embedding, head, norm, layers), version

    def release_params(self) -> None:
        """Reads the parameters no more: an update is about to donate their memory."""
        self._params = None

    def sleep(self) -> None:
        """Drops its own copies of the weights until the next `load`."""
        self._params = self._weights = None

    def state_dict(self) -> dict[str, Any]:
        """The shapes in use, which a resumed run must go on with to sample the same last bits."""
        return dataclasses.asdict(self.shapes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to `state`."""
        self.shapes = PromptShapes(**state)

    def submit(self, prompts: Sequence[EncodedPrompt], n: int, settings: SamplingSettings) -> _Request:
        """Notes what is wanted; `collect` samples it."""
        return _Request(prompts, n, settings)

    def collect(self, handle: _Request, progress: Progress = no_progress) -> list[tuple[Completion, ...]]:
        """Samples what `submit` noted, with the weights that are loaded now.

        Args:
          handle: of `submit`.
          progress: called after each part: some of the prompts, and as many completions of each as fit.

        Raises:
          RuntimeError: there are no weights, because none were loaded yet, or none since `sleep` or `release_params`.
          ValueError: a temperature without a key.
        """
        encoded, n, settings = handle.prompts, handle.n, handle.settings
        if self._params is None or self._weights is None:
            raise RuntimeError("the sampler has no weights: load them before sampling, and again after it slept")
        if not encoded:
            return []
        if settings.key is None and settings.temperature > 0:
            raise ValueError("the built-in sampler draws from SamplingSettings.key: give it one, or temperature 0")
        key = sampling_key(0, 0) if settings.key is None else settings.key
        multiple, vision = self._row_multiple, self.network.config.vision
        group = min(n, self._max_sequences)
        parts = self._parts(encoded, group)
        self.shapes = self.shapes.grown(parts, vision, multiple=multiple)
        rows = len(parts[0])
        done, all_parts = 0, len(parts) * -(-n // group)
        hashes = np.array_split(_prompt_hashes(encoded), np.arange(rows, len(encoded), rows))
        padded = -(-rows // multiple) * multiple
        completions: list[tuple[Completion, ...]] = []
        for part, part_hashes in zip(parts, hashes, strict=True):
            batch = batch_prompts(part, self.shapes, vision, self._patches_of, rows=padded)
            prompt = self._prefill(self._params, self._put(batch))
            keys = _completion_keys(key, np.resize(part_hashes, padded), n)
            drawn = []
            for at in range(0, n, group):
                part_keys = keys[:, at : at + group]
                drawn.append(self._sample_group(prompt, batch, part_keys, len(part), settings=settings, group=group))
                done += 1
                progress(done, all_parts)
            completions += [sum(of_prompt, ()) for of_prompt in zip(*drawn, strict=True)]
        return completions

    def _parts(self, encoded: Sequence[EncodedPrompt], group: int) -> list[Sequence[EncodedPrompt]]:
        """The prompts in as few parts of nearly equal size as the limits allow."""
        longest = max(len(prompt.token_ids) for prompt in encoded)
        most = max(1, min(self._max_sequences // group, MAX_PREFILL_TOKENS // longest))
        rows = -(-len(encoded) // -(-len(encoded) // most))
        return [encoded[start : start + rows] for start in range(0, len(encoded), rows)]

    def _sample_group(
        self, prompt, batch: PromptBatch, keys, prompts: int, *, settings: SamplingSettings, group: int
    ) -> list[tuple[Completion, ...]]:
        """Up to `group` completions of each of the first `prompts` prompts of a prefilled batch."""
        temperature, top_p, top_k = float(settings.temperature), float(settings.top_p), int(settings.top_k)
        rows, wanted_group = keys.shape
        wanted = np.zeros((rows, group), bool)
        wanted[:prompts, :wanted_group] = True
        request = Request(
            keys=keys if wanted_group == group else keys[:, np.arange(group) % wanted_group],
            wanted=wanted,
            temperature=np.float32(temperature or 1.0),
            banned=self._banned,
            ends=self._ends[:0] if settings.ignore_ends else self._ends,
            limit=np.int32(settings.max_new_tokens),
            top_p=np.float32(top_p) if top_p < 1 else None,
            top_k=np.int32(top_k) if top_k > 0 else None,
        )
        drawn = _decode(
            self._weights,
            *prompt,
            batch.lengths,
            batch.next_positions,
            request,
            config=self.network.config.text,
            new_tokens=settings.max_new_tokens,
            greedy=temperature == 0,
        )
        tokens, log_probs, lengths = (np.asarray(array) for array in drawn)
        return [
            tuple(
                self._completion(tokens[row, i], log_probs[row, i], lengths[row, i], settings.ignore_ends)
                for i in range(wanted_group)
            )
            for row in range(prompts)
        ]

    def _completion(self, tokens, log_probs, length: int, ignore_ends: bool) -> Completion:
        tokens = tokens[:length].copy()
        ended = not ignore_ends and tokens[-1] in self._ends
        return Completion(
            token_ids=tokens,
            log_probs=log_probs[:length].copy(),
            finish_reason=FINISH_STOP if ended else FINISH_LENGTH,
            policy_version=np.full(length, self.version, np.int32),
        )

    def _put(self, batch: PromptBatch) -> PromptBatch:
        """The batch with its rows split over the mesh."""
        if self._mesh is None:
            return batch
        over_rows = NamedSharding(self._mesh, PartitionSpec(ROW_AXES))
        positions = jax.device_put(batch.positions, NamedSharding(self._mesh, PartitionSpec(None, ROW_AXES)))
        others = {name: value for name, value in vars(batch).items() if name != "positions"}
        return PromptBatch(positions=positions, **jax.device_put(others, over_rows))


def _prompt_hashes(encoded: Sequence[EncodedPrompt]) -> np.ndarray:
    """A number per prompt, from its id and, where an id comes again, how often it came before."""
    seen: collections.Counter[str] = collections.Counter()
    hashes = []
    for prompt in encoded:
        name = prompt.prompt.prompt_id
        hashes.append(zlib.crc32(f"{name}\0{seen[name]}".encode()))
        seen[name] += 1
    return np.asarray(hashes, np.uint32)


@functools.partial(jax.jit, static_argnames="n")
def _completion_keys(key: Array, hashes, n: int) -> Array:
    """Keys `[P, n]`."""
    of_completion = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda number: of_completion(jax.random.fold_in(key, number), jnp.arange(n)))(hashes)


def _table(table: Array, dtype, replicated: NamedSharding | None) -> Array:
    """The embedding in `dtype` on every device; the very same array where it is that already."""
    table = table if table.dtype == dtype else table.astype(dtype)
    return table if replicated is None else jax.device_put(table, replicated)


_unstack = jax.jit(unstack_layers, static_argnames=("config", "dtype"))


def _prefill(params, batch: PromptBatch, *, network: Network):
    """The last token's hidden state `[P, D]`, and keys and values `[N, P, L, K, d]`."""
    model = network.bind(params)
    features = None if batch.vision is None else model.encode_images(batch.vision)
    x = model.embed(batch.tokens, batch.image_slots, features)
    hidden, keys, values = model.prefill(x, batch.positions, causal_intervals(batch.lengths, batch.tokens.shape[1]))
    last = jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], 1)[:, 0]
    return last, keys, values


_decode = jax.jit(decode, static_argnames=("config", "new_tokens", "greedy"))

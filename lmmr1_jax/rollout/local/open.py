"""The built-in sampler, from a config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.rollout.loaded_model import LoadedModel
from lmmr1_jax.rollout.local.sampler import MAX_SEQUENCES, JaxSampler


@contextlib.contextmanager
def open_local(
    config: TrainConfig, load_model: Callable[[], LoadedModel], *, max_num_seqs: int | None = None, **_
) -> Iterator[tuple[LoadedModel, JaxSampler]]:
    """The model with its sampler; arguments as in `sampler_registry.OpenSampler`."""
    model = load_model()
    yield model, local_sampler(model, max_num_seqs)


def local_sampler(model: LoadedModel, max_num_seqs: int | None = None) -> JaxSampler:
    """The built-in sampler of a model, on the model's devices; it has no weights yet."""
    return JaxSampler(
        model.network,
        banned_ids=model.processor.banned_ids,
        end_ids=model.processor.end_ids,
        patches_of=model.processor.patches,
        mesh=model.mesh,
        max_num_seqs=max_num_seqs or MAX_SEQUENCES,
    )

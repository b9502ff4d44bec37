"""Whether a second model (a reward model, a critic) can read the very tokens and images of the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from lmmr1_jax.data.images import ImageFormat
from lmmr1_jax.data.model_folder import read_image_format, read_tokenizer
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.architecture import Architecture
from weights_bridge.config_json import read_architecture


def check_fit(folder: str | Path, policy: Processor) -> ImageFormat | None:
    """How the reward model (or critic) in `folder` takes the policy's images; None where one of the two takes none.

    Raises:
      CheckpointError: its `config.json` can't be read or asks for something unsupported.
      UserError: another tokenizer, too small a table, or images of other patches than the policy's.
    """
    folder = Path(folder)
    config = read_architecture(folder)
    vocabulary = read_tokenizer(folder).get_vocab()
    _check_vocabulary(folder, vocabulary, policy.tokenizer.get_vocab())
    size, last = config.text.vocab_size, max(vocabulary.values())
    if size <= last:
        raise UserError(f"{folder}: the model has {size} embeddings (vocab_size), its tokenizer tokens up to {last}")
    if config.vision is None or policy.config.vision is None:
        return None
    _check_images(folder, config, policy.config)
    return read_image_format(folder, config, policy.format.min_pixels, policy.format.max_pixels)


def _check_vocabulary(folder: Path, own: Mapping[str, int], policys: Mapping[str, int]) -> None:
    if own == policys:
        return
    different = [token for token in {**policys, **own} if own.get(token) != policys.get(token)]
    example = min(different, key=lambda token: min(v.get(token, math.inf) for v in (own, policys)))
    here, there = (f"id {v[example]}" if example in v else "missing" for v in (own, policys))
    raise UserError(
        f"{folder}: its tokenizer is another than the policy's: {len(different)} tokens differ, {example!r} is {here} "
        f"there and {there} in the policy's; it must have been trained with the policy's tokenizer"
    )


def _check_images(folder: Path, config: Architecture, policy: Architecture) -> None:
    if config.image_token_id != policy.image_token_id:
        raise UserError(
            f"{folder}: image_token_id is {config.image_token_id}, the policy's is {policy.image_token_id}"
        )
    for field in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        own, wanted = getattr(config.vision, field), getattr(policy.vision, field)
        if own != wanted:
            raise UserError(f"{folder}: its {field} is {own}, the policy's is {wanted}; images would be other tokens")

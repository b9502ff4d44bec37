"""The only place where text becomes tokens and images become patches, for both samplers and the learner.

    processor = Processor(folder, max_pixels=1_003_520)
    encoded = processor.encode(prompt)              # tokens, positions, images
    patches = processor.patches(encoded.images[0])    # float32 [n, 1176]

Everything comes from the model's folder: tokenizer, chat template, normalisation, end tokens. Code in the folder is
never run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float, Int

from lmmr1_jax.data.faults import (
    IMAGE_IN_TEXT_MODEL,
    PROMPT_TOO_LONG,
    TEMPLATE_FAILED,
    TOO_MANY_IMAGES,
    SkipPrompt,
)
from lmmr1_jax.data.fetch import FetchPolicy
from lmmr1_jax.data.images import load_image, patchify
from lmmr1_jax.data.messages import Message, image_references, refuse_special_tokens
from lmmr1_jax.data.model_folder import read_chat_template, read_end_ids, read_image_format, read_tokenizer
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import EncodedPrompt, Image, Prompt
from weights_bridge.architecture import Architecture
from weights_bridge.config_json import read_architecture

BANNED_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Processor:
    """Encodes prompts for one model. Safe to use from several threads.

    Attributes:
      config: the model's.
      tokenizer: transformers' tokenizer of the folder.
      banned_ids: ids that are never sampled, ascending.
      end_ids: ids that end a completion.
      special_tokens: strings that no prompt's text may hold.
      format: how images are sized and normalised; None for a model without vision.
      max_prompt_tokens, max_images: prompts with more are skipped; `rollout.sampler.apply_limits` lowers them.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        min_pixels: int = 3136,
        max_pixels: int = 1_003_520,
        max_prompt_tokens: int = 4096,
        allow_http: bool = False,
        image_root: str | Path | None = None,
    ):
        """Reads the folder. An empty `image_root` means that images may be read from anywhere.

        Raises:
          CheckpointError: `config.json` is missing or broken, or asks for something unsupported.
          UserError: another file of the folder is, or a limit makes no sense.
        """
        folder = Path(model_folder)
        self.config: Architecture = read_architecture(folder)
        self.tokenizer = read_tokenizer(folder)
        self._template = read_chat_template(folder, self.tokenizer)
        self._lock = threading.Lock()  # fast tokenizers must not be changed and used at once
        self.max_prompt_tokens = max_prompt_tokens
        self.max_images: int | None = None
        vocabulary = self.tokenizer.get_vocab()
        self.banned_ids = tuple(sorted(vocabulary[token] for token in BANNED_TOKENS if token in vocabulary))
        self.end_ids = read_end_ids(folder, self.config, self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_tokens = tuple(sorted({*BANNED_TOKENS, *(token.content for token in added if token.special)}))
        self._image_id = self.config.image_token_id
        self.format = None
        if self.config.vision is not None:
            if vocabulary.get("<|image_pad|>") != self._image_id:
                raise UserError(f"{folder}: the tokenizer's <|image_pad|> is not the config's image_token_id")
            self.format = read_image_format(folder, self.config, min_pixels, max_pixels)
        root = Path(image_root) if image_root else None
        if root is not None and not root.is_dir():
            raise UserError(f"data.image_root: {root} is not a folder")
        self._policy = FetchPolicy(root=root, allow_http=allow_http)
        # PIL warns about images of more than 89 million pixels; they are refused from 64 million on.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """The prompt as the models see it, its images fetched.

        Raises:
          SkipPrompt: it cannot be used; a `ImageFault` where an image is the cause.
        """
        refuse_special_tokens(prompt.messages, self.special_tokens)
        references = image_references(prompt.messages)
        if references and self.format is None:
            raise SkipPrompt(IMAGE_IN_TEXT_MODEL, f"the model ({self.config.model_type}) takes no images")
        if self.max_images is not None and len(references) > self.max_images:
            raise SkipPrompt(TOO_MANY_IMAGES, f"{len(references)} images, the sampler takes {self.max_images}")
        ids = self._template_ids(prompt.messages)
        at = np.flatnonzero(ids == self._image_id) if references else np.zeros(0, np.int64)
        if len(at) != len(references):
            raise UserError(f"the chat template gives {len(at)} places for {len(references)} images")
        self._refuse_length(len(ids))  # before any image is fetched
        base = Path(prompt.file).parent
        images = tuple(load_image(reference, base, self._policy, self.format) for reference in references)
        merged = [int(np.prod(p.grid_thw)) // self.format.merge_size**2 for p in images]
        self._refuse_length(len(ids) + sum(merged) - len(merged))
        repeats = np.ones(len(ids), np.int64)
        repeats[at] = merged
        ids = np.repeat(ids, repeats).astype(np.int32)
        positions, next_position = prompt_positions(ids, [p.grid_thw for p in images], self.config)
        slots = np.flatnonzero(ids == self._image_id) if references else np.zeros(0, np.int64)
        return EncodedPrompt(
            prompt=prompt,
            token_ids=ids,
            positions=positions.astype(np.int32),
            images=images,
            image_slots=slots.astype(np.int32),
            next_position=int(next_position),
        )

    def patches(self, image: Image) -> Float[np.ndarray, "patches values"]:
        """The image's normalised patches, float32 `[n, 1176]`, in Hugging Face's order."""
        return patchify(image.pixels, self.format)

    def encode_text(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Token ids of a text as it stands, int32, nothing added."""
        with self._lock:
            # Not verbose: `max_prompt_tokens` decides what is too long, not the tokenizer's warning on stderr.
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, np.int32)

    def decode(self, token_ids: Sequence[int] | Int[np.ndarray, " tokens"], *, special: bool = False) -> str:
        """The text of a completion, special tokens left out unless `special` asks for them."""
        with self._lock:
            return self.tokenizer.decode(
                [int(i) for i in token_ids], skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )

    def _template_ids(self, messages: Sequence[Message]) -> Int[np.ndarray, " tokens"]:
        with self._lock:
            try:
                text = self.tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may refuse roles or their order; it is a program of its own
                raise SkipPrompt(TEMPLATE_FAILED, f"the chat template refuses the messages: {error}") from None
        return self.encode_text(text).astype(np.int64)

    def _refuse_length(self, tokens: int) -> None:
        if tokens > self.max_prompt_tokens:
            raise SkipPrompt(PROMPT_TOO_LONG, f"{tokens} tokens, the limit is {self.max_prompt_tokens}")



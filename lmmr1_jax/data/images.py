"""An image from its bytes to patches: decoded to RGB, resized once to its final size, cut into patches.

The numbers are those of transformers' `Qwen2VLImageProcessorPil`. Images are kept as pixels at their final size
and become patches when a model needs them.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from lmmr1_jax.data.faults import BROKEN_IMAGE, EXTREME_IMAGE, ImageFault
from lmmr1_jax.data.fetch import FetchPolicy, open_reference, shown
from lmmr1_jax.types.records import Image

MAX_DECODED_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
# PIL also opens formats that start other programs (EPS); these are the ones that images on the web and in data
# sets come in.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """How a model wants its images; the defaults are Qwen2-VL's and Qwen2.5-VL's.

    Attributes:
      min_pixels, max_pixels: limits of an image's area at its final size.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames in a patch; an image's one frame is repeated.
      merge_size: patches along the side of a merged token.
      mean, std, rescale: of the normalisation (value * rescale - mean) / std, per channel.
    """

    min_pixels: int = 3136
    max_pixels: int = 1_003_520
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @property
    def factor(self) -> int:
        """Side of a merged token in pixels."""
        return self.patch_size * self.merge_size


def load_image(reference: str, base: Path, policy: FetchPolicy, form: ImageFormat) -> Image:
    """Fetches, decodes and resizes an image.

    Args:
      reference: the image's address; see `fetch.open_reference`.
      base: the folder that relative paths start from.
      policy: from where images may come.
      form: the limits and sizes of the model.

    Raises:
      ImageFault: `missing_image`, `forbidden_path`, `broken_image` or `extreme_image`.
    """
    with open_reference(reference, base, policy) as file:
        opened, animated = decode_image(file, shown(reference))
    height, width = final_size(opened.height, opened.width, form.min_pixels, form.max_pixels, form.factor)
    if (height, width) != (opened.height, opened.width):
        opened = opened.resize((width, height), PIL.Image.Resampling.BICUBIC)
    grid = (1, height // form.patch_size, width // form.patch_size)
    return Image(pixels=np.array(opened, np.uint8), grid_thw=grid, animated=animated)


def decode_image(file: io.IOBase, name: str) -> tuple[PIL.Image.Image, bool]:
    """The first frame as an RGB opened, and whether there are more frames. Rotation in EXIF is ignored.

    Raises:
      ImageFault: `broken_image`, or `extreme_image` for too many pixels or too long a side.
    """
    try:
        opened = PIL.Image.open(file, formats=FORMATS)
        _refuse_extremes(opened, name)
        opened.load()
        rgb = to_rgb(opened)
        # The further images of a camera's MPO file are previews and depth maps, no frames.
        return rgb, opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
    except ImageFault:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):  # warnings may be errors
        raise ImageFault(EXTREME_IMAGE, f"{name}: more than {MAX_DECODED_PIXELS:,} pixels") from None
    except Exception as error:  # on broken bytes PIL's decoders raise nearly anything
        # PIL names the stream by its address in memory, which would differ from run to run.
        reason = re.sub(r"<_io\.\w+ .*?>", "it", str(error)) or type(error).__name__
        raise ImageFault(BROKEN_IMAGE, f"{name}: {reason}") from None


def _refuse_extremes(opened: PIL.Image.Image, name: str) -> None:
    width, height = opened.size
    if min(width, height) < 1:
        raise ImageFault(BROKEN_IMAGE, f"{name}: {width}x{height} pixels")
    if width * height > MAX_DECODED_PIXELS:
        raise ImageFault(EXTREME_IMAGE, f"{name}: {width}x{height}, more than {MAX_DECODED_PIXELS:,} pixels")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ImageFault(EXTREME_IMAGE, f"{name}: {width}x{height}, an aspect ratio above {MAX_ASPECT_RATIO}")


def to_rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode to RGB; what is transparent shows white. 16-bit grey keeps its upper byte (PIL alone would clip it)."""
    if opened.mode.startswith("I;16"):
        return PIL.Image.fromarray((np.asarray(opened).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in opened.getbands() or "a" in opened.getbands() or opened.info.get("transparency") is not None:
        opened = opened.convert("RGBA")
        white = PIL.Image.new("RGBA", opened.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, opened).convert("RGB")
    return opened.convert("RGB")


def final_size(height: int, width: int, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of `factor` that keep the aspect ratio and the limits of area.

    The formula is `smart_resize` of transformers' and Qwen's own processors.
    """
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def patchify(pixels: UInt8[np.ndarray, "height width 3"], form: ImageFormat) -> Float[np.ndarray, "patches values"]:
    """Normalised patches, float32 `[patches, 3 * temporal * patch * patch]`, in Hugging Face's order.

    Patches that merge into one token follow each other; within a patch the order is channel, frame, row, column.
    """
    height, width, channels = pixels.shape
    size, merge = form.patch_size, form.merge_size
    # A byte has 256 values: normalise those, in transformers' own precision and order, and look the pixels up.
    levels = (np.arange(256, dtype=np.float64) * form.rescale).astype(np.float32)[:, None]
    table = (levels - np.asarray(form.mean, np.float32)) / np.asarray(form.std, np.float32)
    down, across = height // (size * merge), width // (size * merge)
    cut = pixels.reshape(down, merge, size, across, merge, size, channels).transpose(0, 3, 1, 4, 6, 2, 5)
    values = np.empty((down, across, merge, merge, channels, form.temporal_patch_size, size, size), np.float32)
    for channel in range(channels):
        values[:, :, :, :, channel] = table[cut[:, :, :, :, channel], channel][:, :, :, :, None]
    return values.reshape(down * across * merge * merge, -1)

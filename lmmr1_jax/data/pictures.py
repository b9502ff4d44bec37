"""A picture from its bytes to patches: decoded to RGB, resized once to its final size, cut into patches.

The numbers are those of transformers' `Qwen2VLImageProcessorPil`. Pictures are kept as pixels at their final size
and become patches when a model needs them.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lmmr1_jax.data.faults import BROKEN_PICTURE, EXTREME_PICTURE, PictureFault
from lmmr1_jax.data.fetch import FetchPolicy, open_reference, shown
from lmmr1_jax.types.records import Picture

MAX_DECODED_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
# PIL also opens formats that start other programs (EPS); these are the ones that pictures on the web and in data
# sets come in.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")


@dataclasses.dataclass(frozen=True)
class PictureFormat:
    """How a model wants its pictures; the defaults are Qwen2-VL's and Qwen2.5-VL's.

    Attributes:
      min_pixels, max_pixels: limits of a picture's area at its final size.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames in a patch; a picture's one frame is repeated.
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


def load_picture(reference: str, base: Path, policy: FetchPolicy, form: PictureFormat) -> Picture:
    """Fetches, decodes and resizes a picture.

    Args:
      reference: the picture's address; see `fetch.open_reference`.
      base: the folder that relative paths start from.
      policy: from where pictures may come.
      form: the limits and sizes of the model.

    Raises:
      PictureFault: `missing_picture`, `forbidden_path`, `broken_picture` or `extreme_picture`.
    """
    with open_reference(reference, base, policy) as file:
        image, animated = decode_picture(file, shown(reference))
    height, width = final_size(image.height, image.width, form.min_pixels, form.max_pixels, form.factor)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    grid = (1, height // form.patch_size, width // form.patch_size)
    return Picture(pixels=np.array(image, np.uint8), grid_thw=grid, animated=animated)


def decode_picture(file: io.IOBase, name: str) -> tuple[Image.Image, bool]:
    """The first frame as an RGB image, and whether there are more frames. Rotation in EXIF is ignored.

    Raises:
      PictureFault: `broken_picture`, or `extreme_picture` for too many pixels or too long a side.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        _refuse_extremes(image, name)
        image.load()
        rgb = to_rgb(image)
        # The further pictures of a camera's MPO file are previews and depth maps, no frames.
        return rgb, image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except PictureFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # a warning where warnings are errors
        raise PictureFault(EXTREME_PICTURE, f"{name}: more than {MAX_DECODED_PIXELS:,} pixels") from None
    except Exception as error:  # on broken bytes PIL's decoders raise nearly anything
        # PIL names the stream by its address in memory, which would differ from run to run.
        reason = re.sub(r"<_io\.\w+ .*?>", "it", str(error)) or type(error).__name__
        raise PictureFault(BROKEN_PICTURE, f"{name}: {reason}") from None


def _refuse_extremes(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise PictureFault(BROKEN_PICTURE, f"{name}: {width}x{height} pixels")
    if width * height > MAX_DECODED_PIXELS:
        raise PictureFault(EXTREME_PICTURE, f"{name}: {width}x{height}, more than {MAX_DECODED_PIXELS:,} pixels")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise PictureFault(EXTREME_PICTURE, f"{name}: {width}x{height}, an aspect ratio above {MAX_ASPECT_RATIO}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent shows white. 16-bit grey keeps its upper byte (PIL alone would clip it)."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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


def patchify(pixels: UInt8[np.ndarray, "height width 3"], form: PictureFormat) -> Float[np.ndarray, "patches values"]:
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

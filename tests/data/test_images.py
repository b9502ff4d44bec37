"""Any image becomes what transformers' PIL processor would make of it, or a fault with its reason."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lmmr1_jax.data.faults import ImageFault
from lmmr1_jax.data.fetch import FetchPolicy
from lmmr1_jax.data.images import ImageFormat, final_size, load_image, patchify

FORM, ANYWHERE = ImageFormat(), FetchPolicy()


def scene(height, width, seed=0):
    """An RGB image with coarse and fine structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(height // 9, 1), max(width // 9, 1), 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height)), np.int16) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def load(path, policy=ANYWHERE, form=FORM):
    return load_image(str(path), path.parent, policy, form)


def reason(reference, base, policy=ANYWHERE, form=FORM):
    with pytest.raises(ImageFault) as caught:
        load_image(str(reference), base, policy, form)
    assert "\n" not in caught.value.detail and caught.value.detail
    return caught.value.reason


SIZES = [(1, 1), (28, 28), (57, 91), (84, 84), (300, 400), (1, 150), (1300, 900), (1003, 2001), (30, 3000)]


@pytest.mark.parametrize("height, width", SIZES)
def test_pixels_and_patches_are_those_of_transformers(tmp_path, height, width):
    oracle = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    opened = scene(height, width)
    opened.save(tmp_path / "a.png")
    size = {"shortest_edge": FORM.min_pixels, "longest_edge": FORM.max_pixels}
    expected = oracle.Qwen2VLImageProcessorPil(size=size)(images=[opened], return_tensors="np")
    image = load(tmp_path / "a.png")
    assert image.grid_thw == tuple(expected["image_grid_thw"][0])
    patches = patchify(image.pixels, FORM)
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "transparent palette", "transparent RGB"])
def test_every_mode_becomes_what_transformers_makes_of_it(tmp_path, mode):
    oracle = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    opened, name = scene(90, 60), "a.png"
    if mode == "RGBA":
        opened.putalpha(scene(90, 60, 1).convert("L"))
    elif mode == "LA":
        opened = opened.convert("L")
        opened.putalpha(scene(90, 60, 1).convert("L"))
    elif mode == "CMYK":
        opened, name = opened.convert("CMYK"), "a.jpg"
    elif mode == "transparent palette":
        opened = opened.convert("P")
        opened.info["transparency"] = 3
    elif mode == "transparent RGB":
        opened.info["transparency"] = opened.getpixel((0, 0))
    else:
        opened = opened.convert(mode)
    opened.save(tmp_path / name, **({"transparency": opened.info["transparency"]} if "transparent" in mode else {}))
    opened = Image.open(tmp_path / name)
    if mode == "RGBA" or mode == "LA" or "transparent" in mode:
        # On white, as newer releases of transformers have it; older ones show what lies under the transparency.
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB")
    expected = oracle.Qwen2VLImageProcessorPil()(images=[opened], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(patchify(load(tmp_path / name).pixels, FORM), expected, rtol=0, atol=2e-7)


def test_what_is_transparent_shows_white(tmp_path):
    Image.new("RGBA", (56, 56), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load(tmp_path / "clear.png").pixels == 255).all()


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 56 * 56).reshape(56, 56).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = load(tmp_path / "deep.png").pixels
    assert (pixels == (ramp >> 8).astype(np.uint8)[:, :, None]).all()


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animated_image_the_first_frame_is_used_and_it_is_marked(tmp_path, kind):
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    image = load(tmp_path / f"a.{kind}")
    assert image.animated and (image.pixels == (255, 0, 0)).all()
    frames[0].save(tmp_path / f"b.{kind}")
    assert not load(tmp_path / f"b.{kind}").animated


def test_rotation_in_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(56, 84).save(tmp_path / "a.jpg", exif=exif)
    assert load(tmp_path / "a.jpg").pixels.shape == (56, 84, 3)


def test_one_pixel_is_enlarged_to_the_lower_limit(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    image = load(tmp_path / "dot.png")
    assert image.pixels.shape == (56, 56, 3) and image.grid_thw == (1, 4, 4)


def test_the_limits_of_area_are_kept():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 4000, (200, 2)):
        new_height, new_width = final_size(int(height), int(width), 3136, 1_003_520, 28)
        assert new_height % 28 == new_width % 28 == 0
        assert 3136 <= new_height * new_width <= 1_003_520


def png_header(width, height):
    """A PNG that says it is so large, with nothing in it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "width, height, expected",
    [
        (30_000, 30_000, "extreme_image"),
        (9_000, 10_000, "extreme_image"),
        (8_001, 8_000, "extreme_image"),
        (30_000, 100, "extreme_image"),
        (1, 201, "extreme_image"),
        (8_000, 8_000, "broken_image"),
    ],
)
def test_too_many_pixels_or_too_long_a_side_is_found_before_decoding(tmp_path, width, height, expected):
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    assert reason("a.png", tmp_path) == expected


def test_an_image_30_000_pixels_wide_is_reduced_while_its_aspect_ratio_allows(tmp_path):
    Image.new("L", (30_000, 151)).save(tmp_path / "wide.png")
    image = load(tmp_path / "wide.png", form=ImageFormat(max_pixels=100_000))
    assert image.pixels.shape[0] * image.pixels.shape[1] <= 200_000


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_a_truncated_image_is_broken(tmp_path, kind, kept):
    opened = scene(200, 200)
    opened.save(tmp_path / f"a.{kind}")
    whole = (tmp_path / f"a.{kind}").read_bytes()
    (tmp_path / f"a.{kind}").write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert reason(f"a.{kind}", tmp_path) == "broken_image"


def test_bytes_that_are_no_image_are_broken(tmp_path):
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    scene(60, 60).save(whole, "PNG")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "vector.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert reason("text.png", tmp_path) == reason("vector.png", tmp_path) == "broken_image"
    for _ in range(50):  # whatever is wrong with the bytes, it is a fault or an image, never another error
        spoilt = bytearray(whole.getvalue())
        for at in rng.integers(0, len(spoilt), 5):
            spoilt[at] = rng.integers(0, 256)
        (tmp_path / "spoilt.png").write_bytes(spoilt)
        try:
            load(tmp_path / "spoilt.png")
        except ImageFault as fault:
            assert fault.reason in ("broken_image", "extreme_image")


def test_paths_may_be_relative_absolute_or_file_addresses(tmp_path):
    (tmp_path / "images of a b").mkdir()
    path = tmp_path / "images of a b" / "c d.png"
    scene(56, 56).save(path)
    elsewhere = tmp_path / "images of a b"
    expected = load(path).pixels
    for reference, base in [
        ("images of a b/c d.png", tmp_path),
        (str(path), elsewhere),
        (f"file://{path}", elsewhere),
        (path.as_uri(), elsewhere),
        (f"file://localhost{path}", elsewhere),
    ]:
        assert (load_image(reference, base, ANYWHERE, FORM).pixels == expected).all()


def test_data_uris_hold_the_image_itself(tmp_path):
    made = io.BytesIO()
    scene(56, 56).save(made, "PNG")
    text = base64.b64encode(made.getvalue()).decode()
    for uri in (f"data:image/png;base64,{text}", f"data:;base64,{text.rstrip('=')}", f"DATA:image/png;BASE64,{text}"):
        assert (load_image(uri, tmp_path, ANYWHERE, FORM).pixels == np.asarray(scene(56, 56))).all()
    assert reason("data:image/png;base64,@@@", tmp_path) == "broken_image"
    assert reason("data:image/png;base64", tmp_path) == "broken_image"
    assert reason(f"data:image/png;base64,{text[: len(text) // 2]}", tmp_path) == "broken_image"


def test_what_is_no_readable_file_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    for reference in ("none.png", ".", "pipe.png", "loop.png", "a\0b.png", "x" * 5000, "/dev/zero"):
        assert reason(reference, tmp_path) == "missing_image", reference


def test_images_below_the_root_alone_are_read_links_followed(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    scene(56, 56).save(inside / "a.png")
    scene(56, 56).save(outside / "secret.png")
    os.symlink(outside / "secret.png", inside / "link.png")
    os.symlink(inside / "a.png", outside / "back.png")
    policy = FetchPolicy(root=inside)
    for reference in ("a.png", str(inside / "a.png"), "../outside/back.png"):
        load_image(reference, inside, policy, FORM)
    for reference in ("../outside/secret.png", "link.png", f"file://{outside}/secret.png", "../outside/none.png"):
        assert reason(reference, inside, policy) == "forbidden_path"


def test_other_schemes_and_other_hosts_are_forbidden(tmp_path):
    for reference in ("http://localhost/a.png", "HTTPS://localhost/a.png", "ftp://localhost/a", "file://host/a.png"):
        assert reason(reference, tmp_path) == "forbidden_path"

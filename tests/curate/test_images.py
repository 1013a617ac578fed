import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curate.images import ImageFolder, decode, to_thumbnail


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def noise(mode="RGB", size=(20, 10)):
    random = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = random.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8).squeeze()
    return (
        Image.fromarray(pixels, mode)
        if mode not in ("LA",)
        else Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in range(2)])
    )


def png(width, height, *, bits=8, colour=0, rows=b""):
    """A PNG whose header claims any size."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_decode_to_rgb(fmt):
    found = decode(encode(noise(), fmt))
    assert (found.status, found.detail) == ("ok", "")
    assert found.image.mode == "RGB" and found.image.size == (20, 10)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_modes_match_open_clip(mode):
    data = encode(noise(mode))
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(data).image), np.asarray(expected))


def test_cmyk_jpeg():
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = np.asarray(decode(data).image)[4, 4]
    assert red > 200 and green < 50 and blue < 50


def test_bilevel():
    image = Image.new("1", (4, 4), 1)
    assert np.asarray(decode(encode(image)).image).min() == 255


def test_palette_with_transparency_gives_no_warning():
    image = noise().quantize(8)
    data = encode(image, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    found = decode(data)  # the test configuration turns warnings into errors
    assert found.status == "ok"


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    data = encode(Image.fromarray(grey))
    assert np.asarray(decode(data).image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_tiff():
    values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    data = encode(Image.fromarray(values), "TIFF")
    assert np.asarray(decode(data).image)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_exif_rotation_is_not_applied_and_dropped():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(encode(noise(), "JPEG", exif=exif))
    assert found.image.size == (20, 10) and found.image.info == {}


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data).image)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"<html>404</html>", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0 EPSF"]
)
def test_rubbish_is_a_value(data):
    found = decode(data)
    assert found.status == "decode_failed" and found.image is None
    assert found.detail and "0x" not in found.detail


def test_truncated_jpeg():
    data = encode(noise(size=(200, 200)), "JPEG")
    assert decode(data[: len(data) // 2]).status == "decode_failed"


def test_none_is_missing():
    assert decode(None).status == "missing"


def test_hundred_megapixels_are_refused_before_decoding():
    row = b"\0" * 10_001
    bomb = png(10_000, 10_000, rows=row * 10)
    found = decode(bomb)
    assert found.status == "too_large" and "10000 x 10000" in found.detail


def test_absurd_size_is_refused():
    assert decode(png(2_000_000_000, 2_000_000_000)).status == "too_large"


def test_limits_are_exact():
    data = encode(noise())
    assert decode(data, max_pixels=200).status == "ok"
    assert decode(data, max_pixels=199).status == "too_large"
    assert decode(data, max_bytes=len(data)).status == "ok"
    assert decode(data, max_bytes=len(data) - 1).status == "too_large"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_raise(data):
    fmt = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    raw = bytearray(encode(noise(), fmt))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    found = decode(bytes(raw[:cut]), max_pixels=1_000_000)
    assert (found.image is None) == (found.status != "ok")


def test_threads_leave_the_warning_filters_as_they_were():
    data = encode(noise().quantize(8), transparency=bytes([0, 128] + [255] * 6))
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_thumbnail():
    image = noise(size=(300, 150))
    image.info["comment"] = b"secret"
    first, second = to_thumbnail(image, 64), to_thumbnail(image, 64)
    assert first == second and b"secret" not in first
    assert Image.open(io.BytesIO(first)).size == (64, 32)
    assert image.size == (300, 150)
    with pytest.raises(ValueError, match="at least 1"):
        to_thumbnail(image, 0)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"a")
    (root / "sub/b.jpg").write_bytes(b"b")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "in.jpg").symlink_to(root / "a.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    return ImageFolder(str(root))


def test_folder_reads_what_lies_inside(folder):
    assert folder.read("a.jpg") == (b"a", "")
    assert folder.read("sub/../sub/b.jpg") == (b"b", "")
    assert folder.read(str(Path(folder.root) / "a.jpg")) == (b"a", "")
    assert folder.read("in.jpg") == (b"a", "")


@pytest.mark.parametrize(
    "path", ["../secret.jpg", "/etc/passwd", "sub/../../secret.jpg", "out.jpg", ".."]
)
def test_folder_reads_nothing_outside(folder, path):
    data, detail = folder.read(path)
    assert data is None and "outside the image root" in detail


@pytest.mark.parametrize(
    "path", ["no.jpg", "a\0.jpg", "x" * 5000, "loop.jpg", "pipe.jpg", "sub", ".", "\ud800"]
)
def test_folder_tells_why_not(folder, path):
    data, detail = folder.read(path)
    assert data is None and detail


def test_folder_bounds_the_size(folder):
    assert folder.read("a.jpg", max_bytes=1)[0] == b"a"
    data, detail = folder.read("a.jpg", max_bytes=0)
    assert data is None and "limit is 0" in detail

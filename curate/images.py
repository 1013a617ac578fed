"""Image bytes: where they are read from, and what they decode to; a bad image is a value."""

from __future__ import annotations

import io
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

Status = Literal["ok", "missing", "decode_failed", "too_large"]

#: Pillow's own limit: a larger image is more often an attack than a photograph.
MAX_PIXELS = 89_478_485
#: A larger file is not read, whatever it claims to be.
MAX_BYTES = 256 << 20

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's decoders have been seen to raise on damaged or hostile files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Decoded:
    """An image, or why there is none.

    Attributes
    ----------
    image : PIL.Image.Image or None
        RGB; None unless the status is ``"ok"``.
    status : {"ok", "missing", "decode_failed", "too_large"}
        What became of the bytes.
    detail : str
        The reason in words, empty for ``"ok"``.
    """

    image: Image.Image | None
    status: Status
    detail: str = ""


class _Quiet:
    """Hold back Pillow's warnings while any thread decodes.

    `warnings.catch_warnings` swaps a global list, so overlapping uses in two threads can leave
    the wrong one behind; here the first thread in enters it and the last one out leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._held = warnings.catch_warnings()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._held = warnings.catch_warnings()
                self._held.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._held.__exit__(None, None, None)


_quiet = _Quiet()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB; 16-bit and float greys are scaled, where Pillow would clip."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        grey_float = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        top = grey_float.max(initial=0.0)
        # The range is not in the file: take the smallest usual one that holds the values.
        full = 1.0 if image.mode == "F" and top <= 1 else 255.0 if top <= 255 else 65535.0
        scaled = np.clip(np.rint(grey_float * (255.0 / full)), 0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    return image.convert("RGB")


def _too_large(detail: str) -> Decoded:
    return Decoded(None, "too_large", detail)


def _decode(data: bytes, max_pixels: int) -> Decoded:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        # Only the header is read so far: this comes before any pixel is.
        width, height = image.size
        if width * height > max_pixels:
            return _too_large(f"{width} x {height} pixels, the limit is {max_pixels}")
        image.load()
        rgb = _to_rgb(image)
        # What is left in `info` (EXIF, profiles, comments) is no part of the picture.
        rgb.info = {}
        return Decoded(rgb, "ok")


def decode(
    data: bytes | None, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Decoded:
    """Decode an image file of untrusted origin; a bad one is a value, never an exception.

    The pixels are those of open_clip's own pipeline, ``Image.open(...).convert("RGB")``: alpha is
    dropped, not blended, and the EXIF rotation is not applied. The first frame of an animation is
    taken. Greys of 16 bits are scaled to 8, where Pillow's `convert` would clip them to white.

    Parameters
    ----------
    data : bytes or None
        The file; JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.
    max_pixels : int
        Larger images are not decoded (``"too_large"``); the header is looked at first. Pillow
        refuses more than 178,956,970 pixels whatever is given here.
    max_bytes : int
        Larger files are not looked at.

    Returns
    -------
    Decoded

    Examples
    --------
    >>> decode(None).status, decode(b"<html>404</html>").status
    ('missing', 'decode_failed')
    """
    if data is None:
        return Decoded(None, "missing", "no image")
    if not data:
        return Decoded(None, "decode_failed", "the image has 0 bytes")
    if len(data) > max_bytes:
        return _too_large(f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        with _quiet():
            return _decode(data, max_pixels)
    except Image.DecompressionBombError as error:
        return _too_large(str(error))
    except UnidentifiedImageError:
        return Decoded(None, "decode_failed", f"not one of {', '.join(_FORMATS)}")
    except _DECODER_ERRORS as error:
        return Decoded(None, "decode_failed", f"{type(error).__name__}: {error}"[:200])


def to_thumbnail(image: Image.Image, size: int) -> bytes:
    """Return a JPEG of at most ``size`` x ``size`` pixels, the same bytes every time.

    Parameters
    ----------
    image : PIL.Image.Image
        Any mode that converts to RGB.
    size : int
        The longer side in pixels; a smaller image keeps its size.

    Returns
    -------
    bytes
        JPEG, quality 80, without metadata.

    Raises
    ------
    ValueError
        If the size is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


@dataclass(frozen=True)
class ImageFolder:
    """The folder that holds a pool's image files; nothing outside it is ever read.

    Attributes
    ----------
    root : str
        The folder.
    """

    root: str

    def read(self, path: str, *, max_bytes: int = MAX_BYTES) -> tuple[bytes | None, str]:
        """Read the image of a path that the pool names.

        Parameters
        ----------
        path : str
            Relative to the root, or absolute; links are followed. Untrusted.
        max_bytes : int
            A larger file is not read.

        Returns
        -------
        bytes or None
            The file's bytes; None if there is none to be had.
        str
            The reason if there is none, otherwise empty.
        """
        try:
            root = Path(self.root).resolve()
            file = (root / path).resolve()
            if not file.is_relative_to(root):
                return None, f"{path[:200]!r} is outside the image root {self.root}"
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                return None, f"{path[:200]!r} is not a file"
            if found.st_size > max_bytes:
                return None, f"{path[:200]!r} has {found.st_size} bytes, the limit is {max_bytes}"
            return file.read_bytes(), ""
        except FileNotFoundError:
            return None, f"{path[:200]!r} is not in the image root {self.root}"
        except (OSError, ValueError, RuntimeError) as error:
            # A NUL in the name, a name too long, a loop of links, no permission.
            return None, f"{path[:200]!r} cannot be read: {type(error).__name__}"

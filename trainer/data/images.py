"""Images of records: a sample carries a reference (path or encoded bytes); pixels exist only where a batch is made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from trainer.retry import retried

_PATH, _BYTES = b"p", b"b"  # first byte of a reference
_ORIENTATION = 0x0112  # tag of EXIF


def resolved(value: Any, folder: Path) -> Any:
    """Images of a record (one, or a list) with paths that are relative to ``folder``, the data file's, made whole."""
    if isinstance(value, list):
        return [resolved(item, folder) for item in value]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return str(folder / value) if isinstance(value, str) and value else value


def reference(value: Any) -> np.ndarray | str:
    """An image of a record as a uint8 array, after it has been decoded once; or what is wrong with it.

    Args:
        value: a path, encoded bytes, or {"bytes", "path"} as Hugging Face datasets store images.
    """
    value = resolved(value, Path())
    if isinstance(value, str) and value:
        found = _PATH + value.encode()
    elif isinstance(value, bytes | bytearray | memoryview):
        found = _BYTES + bytes(value)
    else:
        return f"image is {type(value).__name__}, expected a path relative to the data file, or an encoded image"
    array = np.frombuffer(found, dtype=np.uint8)
    problem = _problem(array)
    return array if problem is None else problem


def _problem(image: np.ndarray) -> str | None:
    """What is wrong with an image, found by decoding all of it (JPEG at an eighth of its size, which costs little)."""
    from PIL import Image, UnidentifiedImageError

    path = _path(image)
    name = "image" if path is None else f"image {path}"
    try:
        with Image.open(_body(image)) as opened:
            opened.draft("RGB", (max(opened.width // 8, 1), max(opened.height // 8, 1)))
            opened.load()
            if opened.mode[0] in "IF":  # RGB would have 255 wherever there is more
                return f"{name}: its pixels have more than 8 bits (mode {opened.mode}): convert it to 8"
    except FileNotFoundError:
        return f"{name}: there is no such file (paths of images are relative to the data file)"
    except UnidentifiedImageError:
        return f"{name}: not an image of a format that Pillow reads"
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        return f"{name}: cannot be decoded: {error}"
    return None


def decode(image: np.ndarray) -> Any:
    """The PIL image of a reference: RGB, turned as its EXIF data says (as transformers' pipelines load images)."""
    from PIL import Image

    with Image.open(_body(image)) as opened:
        return _turned(opened).convert("RGB")


def _turned(image: Any) -> Any:
    """As the image's EXIF data says, where it can be read.

    `ImageOps.exif_transpose` also writes it anew, which fails on what some cameras write.
    """
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a format's reader raises what it likes
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _path(image: np.ndarray) -> Path | None:
    """Where an image lies; None: the reference holds it."""
    return Path(image[1:].tobytes().decode()) if image[:1].tobytes() == _PATH else None


def _body(image: np.ndarray) -> io.BytesIO:
    """The encoded image; reads that fail for a moment are tried again."""
    path = _path(image)
    return io.BytesIO(image[1:].tobytes() if path is None else retried(path.read_bytes, str(path)))

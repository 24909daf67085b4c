"""Small pictures that a record keeps: what a method was shown, and what it made of it.

A task hands back :class:`methodbench.protocols.Shown`; the worker writes each as two PNG files of a fixed palette into
the record's facts, under :data:`FACT`. Records come from strangers: :func:`checked` takes exactly the form that
:func:`encoded` writes and nothing else, so that what a page shows was looked at to the last byte. Nothing here imports
more than NumPy.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from methodbench.protocols import Shown

#: Where a record's facts hold its pictures.
FACT = "pictures"
#: Pictures that a record keeps, and pixels of their longer side.
MOST, SIDE = 4, 96
#: Bytes of a file, and characters of a picture's name.
MOST_BYTES, MOST_NAME = 16_384, 80

#: Colours of a map from 0 to 1, dark to bright so that they are told apart without colour as well.
SHADES = ((28, 28, 84), (96, 30, 130), (170, 42, 118), (226, 84, 76), (250, 150, 50), (254, 226, 120))

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Levels of the map and of the grey picture below it in an overlay; levels of red, green and blue in a picture.
_LEVELS, _GREYS, _CUBE = 16, 15, (6, 7, 6)
#: How much of an overlay is the map.
_WEIGHT = 0.6


def facts_of(shown: Iterable[Shown]) -> list[dict[str, str]]:
    """Return the first pictures as a record keeps them: name, picture and overlay as base64 of PNG files."""
    kept = []
    for one in list(shown)[:MOST]:
        picture, values = _fitting(np.asarray(one.picture)), _fitting(np.asarray(one.map, dtype=np.float64))
        if picture.shape[:2] != values.shape:
            raise ValueError(f"a map of {values.shape} does not lie on a picture of {picture.shape[:2]}")
        files = {"picture": picture_png(picture), "overlay": overlay_png(picture, values)}
        kept.append(
            {"name": one.name[:MOST_NAME]}
            | {key: base64.b64encode(data).decode("ascii") for key, data in files.items()}
        )
    return kept


def picture_png(picture: np.ndarray) -> bytes:
    """Return a PNG of RGB uint8 [H, W, 3] in a palette of 252 colours."""
    index = np.zeros(picture.shape[:2], dtype=np.int64)
    for channel, levels in enumerate(_CUBE):
        index = index * levels + np.rint(picture[..., channel] / 255 * (levels - 1)).astype(np.int64)
    axes = [np.rint(np.linspace(0, 255, levels)) for levels in _CUBE]
    palette = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return encoded(index.astype(np.uint8), palette.astype(np.uint8))


def overlay_png(picture: np.ndarray, values: np.ndarray) -> bytes:
    """Return a PNG of a map [H, W] in [0, 1] in colours, over RGB uint8 [H, W, 3] in grey."""
    grey = np.rint(picture.astype(np.float64).mean(-1) / 255 * (_GREYS - 1)).astype(np.int64)
    level = np.rint(np.clip(np.nan_to_num(values), 0, 1) * (_LEVELS - 1)).astype(np.int64)
    place = np.linspace(0, len(SHADES) - 1, _LEVELS)
    colours = np.stack(
        [np.interp(place, np.arange(len(SHADES)), np.array(SHADES)[:, channel]) for channel in range(3)],
        axis=-1,
    )
    below = np.linspace(0, 255, _GREYS)[None, :, None]
    palette = _WEIGHT * colours[:, None] + (1 - _WEIGHT) * below
    return encoded((level * _GREYS + grey).astype(np.uint8), np.rint(palette).astype(np.uint8).reshape(-1, 3))


def encoded(index: np.ndarray, palette: np.ndarray) -> bytes:
    """Return a PNG of palette indices uint8 [H, W] and colours uint8 [n, 3]."""
    height, width = index.shape
    rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), index], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", head),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def checked(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG in the one form that :func:`encoded` writes.

    Raises:
        ValueError: anything else: another kind of PNG, too large, a wrong checksum, bytes before, between or after.
    """
    if len(data) > MOST_BYTES or not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG, or too large")
    at, chunks = len(_SIGNATURE), []
    while at < len(data):
        if at + 12 > len(data):
            raise ValueError("a chunk is cut off")
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        end = at + 12 + length
        if end > len(data) or struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(body):
            raise ValueError("a chunk is cut off or damaged")
        chunks.append((body[:4], body[4:]))
        at = end
    if [name for name, _ in chunks] != [b"IHDR", b"PLTE", b"IDAT", b"IEND"] or len(chunks[0][1]) != 13:
        raise ValueError("not the chunks of a small palette picture")
    (_, head), (_, palette), (_, packed), (_, tail) = chunks
    width, height, *form = struct.unpack(">IIBBBBB", head)
    if form != [8, 3, 0, 0, 0] or not (0 < width <= SIDE and 0 < height <= SIDE) or tail:
        raise ValueError("not a small palette picture")
    if len(palette) % 3 or not 3 <= len(palette) <= 768:
        raise ValueError("a palette of no colours")
    size = height * (width + 1)
    unpacker = zlib.decompressobj()
    try:
        rows = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        raise ValueError("pixels that cannot be unpacked") from error
    if len(rows) != size or not unpacker.eof or unpacker.unused_data:
        raise ValueError("more or fewer pixels than the picture has")
    pixels = np.frombuffer(rows, dtype=np.uint8).reshape(height, width + 1)
    if pixels[:, 0].any() or int(pixels[:, 1:].max()) >= len(palette) // 3:
        raise ValueError("pixels outside of the palette")
    return width, height


def read(kept: Any) -> list[tuple[str, bytes, bytes]]:
    """Return name, picture and overlay of what a record keeps; whatever is malformed is left out."""
    found = []
    for one in kept[:MOST] if isinstance(kept, list) else ():
        if not isinstance(one, Mapping) or not all(
            isinstance(one.get(k), str) for k in ("name", "picture", "overlay")
        ):
            continue
        try:
            files = [base64.b64decode(one[key], validate=True) for key in ("picture", "overlay")]
            if checked(files[0]) != checked(files[1]):
                continue
        except (ValueError, binascii.Error):
            continue
        found.append((one["name"][:MOST_NAME], files[0], files[1]))
    return found


def _fitting(values: np.ndarray) -> np.ndarray:
    """Return an array [H, W, ...] averaged in squares until no side exceeds :data:`SIDE`."""
    factor = -(-max(values.shape[:2]) // SIDE)
    if factor == 1:
        return values
    height, width = (side // factor for side in values.shape[:2])
    cut = values[: height * factor, : width * factor].astype(np.float64)
    cut = cut.reshape(height, factor, width, factor, *values.shape[2:]).mean((1, 3))
    return cut.astype(values.dtype)

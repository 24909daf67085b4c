"""Pictures of records: written in one form, and nothing else is taken for one."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methodbench.pictures import (
    MOST,
    MOST_BYTES,
    SIDE,
    checked,
    encoded,
    facts_of,
    overlay_png,
    picture_png,
    read,
)
from methodbench.protocols import Shown


def picture(height: int = 12, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shown(name: str = "one", height: int = 12, width: int = 10) -> Shown:
    return Shown(name, picture(height, width), np.linspace(0, 1, height * width).reshape(height, width))


@given(st.integers(1, SIDE), st.integers(1, SIDE), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_taken_and_small(height: int, width: int, seed: int) -> None:
    rgb = picture(height, width, seed)
    files = picture_png(rgb), overlay_png(rgb, rgb[..., 0] / 255)
    for data in files:
        assert checked(data) == (width, height)
        assert len(data) <= MOST_BYTES
    assert files == (picture_png(rgb), overlay_png(rgb, rgb[..., 0] / 255))


def test_the_picture_looks_like_itself() -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    rgb = picture()
    with image.open(io.BytesIO(picture_png(rgb))) as opened:
        again = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(again - rgb).max() <= 26


@given(st.binary(max_size=60), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_any_change_of_a_file_is_noticed(noise: bytes, at: int) -> None:
    data = picture_png(picture())
    at %= len(data)
    changed = data[:at] + noise + data[at + len(noise) :]
    if changed != data:
        with pytest.raises(ValueError, match=r"\w"):
            checked(changed)
    with pytest.raises(ValueError, match=r"\w"):
        checked(noise)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def assembled(*, width: int = 2, height: int = 2, form: tuple[int, ...] = (8, 3, 0, 0, 0), rows: bytes = b"\0\0\0" * 2,
              extra: bytes = b"", after: bytes = b"", palette: bytes = b"\0\0\0") -> bytes:  # fmt: skip
    head = struct.pack(">IIBBBBB", width, height, *form)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"PLTE", palette)
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"") + after
    )  # fmt: skip


def test_the_smallest_file_is_taken() -> None:
    assert checked(assembled()) == (2, 2)


@pytest.mark.parametrize(
    "data",
    [
        assembled(width=SIDE + 1),
        assembled(width=0),
        assembled(form=(8, 2, 0, 0, 0)),
        assembled(form=(8, 3, 0, 0, 1)),
        assembled(rows=b"\0" * 50_000_000),
        assembled(rows=b"\0"),
        assembled(rows=b"\5\0\0\0\0\0"),
        assembled(rows=b"\0\1\0\0\0\0"),
        assembled(palette=b""),
        assembled(palette=b"\0\0"),
        assembled(extra=chunk(b"tEXt", b"comment\0<script>")),
        assembled(after=b"<script>alert(1)</script>"),
        assembled() + assembled(),
        b"GIF89a",
        b"",
    ],
)
def test_pictures_of_any_other_form_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        checked(data)


def test_records_keep_the_first_pictures_and_read_them_again() -> None:
    kept = facts_of([shown(str(number), 200, 150) for number in range(MOST + 2)])
    assert len(kept) == MOST
    found = read(kept)
    assert [name for name, _, _ in found] == ["0", "1", "2", "3"]
    assert checked(found[0][1]) == (50, 66)


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "pictures",
        [None],
        [{"name": "x"}],
        [{"name": 1, "picture": "", "overlay": ""}],
        [{"name": "x", "picture": "@@", "overlay": "@@"}],
        [{"name": "x", "picture": base64.b64encode(b"<svg onload=alert(1)>").decode(), "overlay": ""}],
        [
            {
                "name": "x",
                "picture": base64.b64encode(picture_png(picture(4, 4))).decode(),
                "overlay": base64.b64encode(picture_png(picture(5, 4))).decode(),
            }
        ],
    ],
)
def test_malformed_records_have_no_pictures(kept: object) -> None:
    assert read(kept) == []


def test_a_map_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not lie on"):
        facts_of([Shown("x", picture(4, 4), np.zeros((5, 5)))])


def test_a_map_that_is_no_number_is_dark() -> None:
    rgb = picture(4, 4)
    assert overlay_png(rgb, np.full((4, 4), np.nan)) == overlay_png(rgb, np.zeros((4, 4)))
    assert checked(encoded(np.zeros((1, 1), dtype=np.uint8), np.zeros((1, 3), dtype=np.uint8))) == (1, 1)

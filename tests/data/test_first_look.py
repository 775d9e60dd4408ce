"""What is said before a run of images that would spoil it without an error."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysl.data import first_look as module
from raysl.data.decode import Flaw
from raysl.data.first_look import first_look
from raysl.sources.open import open_source
from raysl.sources.pixels import Bits
from raysl.sources.source import ArraySource, DataConfig, Source


def encoded(kind: str, pixels: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def source(root: Path, images: dict[str, bytes], **settings: Any) -> Source:
    root.mkdir()
    for name, data in images.items():
        (root / name).write_bytes(data)
    config = DataConfig(source=str(root), **settings)
    return open_source(config, data=config)


GOOD = encoded("JPEG", np.zeros((9, 9, 3), np.uint8))
DARK = encoded("PNG", np.linspace(0, 4000, 81).reshape(9, 9).astype(np.uint16))


def test_says_nothing_of_sound_images(tmp_path: Path) -> None:
    images = {f"{n}.jpg": GOOD for n in range(20)} | {"cut.jpg": b""}
    assert first_look(source(tmp_path / "a", images)) == []
    assert first_look(ArraySource("x", np.zeros((50, 8, 8), np.uint8))) == []


def test_says_that_twelve_bits_in_sixteen_come_out_dark(tmp_path: Path) -> None:
    images = {f"{n}.png": DARK for n in range(40)}
    (line,) = first_look(source(tmp_path / "a", images))
    assert "32 of 32 images" in line
    assert "dark" in line
    assert "data.intensity={bits: 12}" in line
    assert first_look(source(tmp_path / "b", images, intensity=Bits(bits=12))) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    # As Parquet, which takes any bytes: a folder may leave such a file out.
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [GOOD, GOOD, GOOD, heic]}), path)
    config = DataConfig(source=str(path))
    (line,) = first_look(open_source(config, data=config))
    assert line.startswith("1 of 4 images looked at in ")
    assert line.endswith(Flaw.NEEDS_HEIF.reason)


def test_pages_are_named_until_they_are_chosen(tmp_path: Path) -> None:
    grey = np.zeros((9, 9), np.uint8)
    stack = encoded("TIFF", grey, save_all=True, append_images=[Image.fromarray(grey)])
    images = {"a.tif": stack, "b.jpg": GOOD, "c.jpg": GOOD}
    (line,) = first_look(source(tmp_path / "a", images))
    assert "data.pages" in line
    assert first_look(source(tmp_path / "b", images, pages="first")) == []


def test_a_source_of_which_most_is_bad_says_why(tmp_path: Path) -> None:
    images = {"a.jpg": b"<html></html>", "b.jpg": b"<html></html>", "c.jpg": GOOD}
    (line,) = first_look(source(tmp_path / "a", images))
    assert line.startswith("2 of 3 images looked at in ")
    assert f"{Flaw.WEB_PAGE.reason} (2)" in line


def test_of_a_grouped_source_two_groups_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [DARK] * 400}), path, row_group_size=20)
    config = DataConfig(source=str(path), shuffle_window_mib=1)
    opened = open_source(config, data=config)
    read: list[int] = []
    whole = opened.read
    opened.read = lambda rows: (read.extend(np.asarray(rows).tolist()), whole(rows))[1]  # type: ignore[method-assign]
    assert opened.window_size is not None
    assert len(first_look(opened)) == 1
    assert len(read) == 32
    assert len({row // 20 for row in read}) == 2


def test_decodes_nothing_of_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(sys.modules["raysl.data.first_look"], "decode_or_flaw", never)
    tiff = encoded("TIFF", np.zeros((9, 9, 3), np.uint8))
    images = {"a.jpg": GOOD, "b.png": encoded("PNG", np.zeros((9, 9), np.uint8)), "c.tif": tiff}
    assert first_look(source(tmp_path / "a", images)) == []

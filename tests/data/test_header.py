"""Headers of files that OpenCV and Pillow wrote, and of damaged ones."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from raysl.data.header import read_header

_MODES = {
    ("jpeg", "L"): "grey",
    ("jpeg", "RGB"): "rgb",
    ("jpeg", "CMYK"): "cmyk",
    ("png", "L"): "grey",
    ("png", "RGB"): "rgb",
    ("png", "RGBA"): "rgb alpha",
    ("png", "LA"): "grey alpha",
    ("png", "P"): "palette",
    ("webp", "RGB"): "rgb",
    ("webp", "RGBA"): "rgb alpha",
    ("tiff", "L"): "grey",
    ("tiff", "RGB"): "rgb",
    ("tiff", "RGBA"): "rgb alpha",
    ("tiff", "CMYK"): "cmyk",
    ("bmp", "RGB"): "rgb",
    ("gif", "P"): "palette",
}


def written(kind: str, mode: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (31, 17)).save(stream, kind, **options)
    return stream.getvalue()


class TestReadHeader:
    @pytest.mark.parametrize(("kind", "mode"), _MODES)
    def test_knows_format_size_and_colours(self, kind: str, mode: str) -> None:
        header = read_header(written(kind, mode))
        assert header[:5] == (kind, 31, 17, _MODES[kind, mode], 8)

    @pytest.mark.parametrize("lossless", [True, False])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_knows_the_three_kinds_of_webp(self, mode: str, lossless: bool) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (17, 31, len(mode)), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels, mode).save(stream, "webp", lossless=lossless)
        header = read_header(stream.getvalue())
        assert header[:4] == ("webp", 31, 17, "rgb alpha" if mode == "RGBA" else "rgb")

    @pytest.mark.parametrize("suffix", [".png", ".tiff"])
    def test_knows_sixteen_bits(self, suffix: str) -> None:
        data = cv2.imencode(suffix, np.zeros((17, 31, 3), np.uint16))[1].tobytes()
        assert read_header(data)[1:5] == (31, 17, "rgb", 16)

    @pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_knows_the_exif_turn(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[274] = orientation
        header = read_header(written(kind, "RGB", exif=exif))
        assert (header.orientation, header.width) == (orientation, 31)

    def test_knows_progressive_and_transparent_palettes(self) -> None:
        assert read_header(written("jpeg", "RGB", progressive=True)).progressive
        assert not read_header(written("jpeg", "RGB")).progressive
        assert read_header(written("png", "P", transparency=0)).color == "palette alpha"

    @pytest.mark.parametrize("data", [b"", b"\0", b"<html>", b"%PDF-1.4", bytes(100)])
    def test_what_is_no_image_is_unknown(self, data: bytes) -> None:
        assert read_header(data) == ("unknown", 0, 0, "", 8, 1, False, False, 1, b"")

    @pytest.mark.parametrize(("kind", "mode"), _MODES)
    def test_a_file_cut_anywhere_is_no_error(self, kind: str, mode: str) -> None:
        data = written(kind, mode)
        assert {read_header(data[:n]).format for n in range(16, len(data))} == {kind}

    def test_random_bytes_behind_a_signature_are_no_error(self) -> None:
        rng = np.random.default_rng(0)
        for kind, mode in _MODES:
            begin = written(kind, mode)[:16]
            for _ in range(50):
                assert read_header(begin + rng.bytes(200)).format == kind

import io
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image as PILImage
from PIL import ImageOps

from raysl.augment.crop import Image
from raysl.data.decode import Flaw, decode, decode_or_flaw
from raysl.errors import DataError, DecodeError
from raysl.sources.pixels import PLAIN


def _picture() -> Image:
    """Make a smooth 24 x 32 picture with a different colour in each corner."""
    corners = np.array([[[250, 20, 30], [10, 240, 60]], [[30, 40, 230], [200, 190, 10]]], np.uint8)
    return cv2.resize(corners, (32, 24), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def _encode(picture: PILImage.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _pil(mode: str = "RGB") -> PILImage.Image:
    return PILImage.fromarray(_picture()).convert(mode)


def _apart(one: Image, other: np.ndarray) -> int:
    assert one.shape == other.shape
    assert one.dtype == np.uint8
    return int(np.abs(one.astype(int) - other).max())


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("PNG", {}),
            ("BMP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("WEBP", {"lossless": True}),
        ],
    )
    def test_lossless_ones_give_the_pixels_in_rgb_order(
        self, kind: str, options: dict[str, Any]
    ) -> None:
        image = decode(_encode(_pil(), kind, **options), where="x")
        np.testing.assert_array_equal(image, _picture())

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
    def test_lossy_ones_give_what_pillow_gives_within_a_few_levels(self, kind: str) -> None:
        encoded = _encode(_pil(), kind, quality=95)
        pillows = np.array(PILImage.open(io.BytesIO(encoded)).convert("RGB"))
        assert _apart(decode(encoded, where="x"), pillows) <= 3
        assert _apart(decode(encoded, where="x"), _picture()) <= 20

    def test_a_progressive_jpeg_is_read(self) -> None:
        plain = decode(_encode(_pil(), "JPEG", quality=95), where="x")
        progressive = decode(_encode(_pil(), "JPEG", quality=95, progressive=True), where="x")
        assert _apart(progressive, plain) <= 1

    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
    def test_grey_gets_three_equal_channels(self, kind: str) -> None:
        grey = _pil("L")
        expected = np.repeat(np.array(grey)[..., None], 3, axis=2)
        np.testing.assert_array_equal(decode(_encode(grey, kind), where="x"), expected)

    @pytest.mark.parametrize("mode", ["P", "1"])
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
    def test_palettes_and_single_bits_become_their_colours(self, mode: str, kind: str) -> None:
        picture = _pil(mode)
        image = decode(_encode(picture, kind), where="x")
        np.testing.assert_array_equal(image, np.array(picture.convert("RGB")))

    @pytest.mark.parametrize(
        ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]
    )
    def test_alpha_is_dropped_and_the_colour_below_kept(
        self, kind: str, options: dict[str, Any]
    ) -> None:
        alpha = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
        picture = PILImage.fromarray(np.dstack([_picture(), alpha]))
        image = decode(_encode(picture, kind, **options), where="x")
        np.testing.assert_array_equal(image, _picture())

    def test_grey_with_alpha_and_a_palette_with_a_transparent_entry_are_read(self) -> None:
        grey = np.array(_pil("L"))
        image = decode(_encode(_pil("LA"), "PNG"), where="x")
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
        palette = _pil().quantize(16)
        image = decode(_encode(palette, "PNG", transparency=0), where="x")
        np.testing.assert_array_equal(image, np.array(palette.convert("RGB")))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_keep_the_upper_eight(self, kind: str) -> None:
        levels = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
        image = decode(_encode(PILImage.fromarray(levels), kind), where="x")
        np.testing.assert_array_equal(image, np.repeat((levels >> 8)[..., None], 3, axis=2))

    def test_sixteen_bits_in_colour_keep_the_upper_eight(self) -> None:
        deep = _picture().astype(np.uint16) * 257
        _, encoded = cv2.imencode(".png", cv2.cvtColor(deep, cv2.COLOR_RGB2BGR))
        np.testing.assert_array_equal(decode(encoded.tobytes(), where="x"), _picture())

    def test_a_cmyk_jpeg_has_the_colours_that_pillow_gives(self) -> None:
        encoded = _encode(_pil("CMYK"), "JPEG", quality=95)
        pillows = np.array(PILImage.open(io.BytesIO(encoded)).convert("RGB"))
        assert _apart(decode(encoded, where="x"), pillows) <= 3

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_is_turned_as_exif_says(self, kind: str, orientation: int) -> None:
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        # For JPEG the quality counts, for WebP also that nothing is lost; PNG ignores both.
        encoded = _encode(_pil(), kind, exif=exif, quality=95, lossless=True)
        turned = ImageOps.exif_transpose(PILImage.open(io.BytesIO(encoded)))
        assert _apart(decode(encoded, where="x"), np.array(turned.convert("RGB"))) <= 3
        assert turned.size == ((32, 24) if orientation < 5 else (24, 32))


class TestInputs:
    def test_a_memoryview_is_read_like_bytes(self) -> None:
        encoded = _encode(_pil(), "PNG")
        np.testing.assert_array_equal(decode(memoryview(encoded), where="x"), _picture())

    def test_pixels_pass_through_untouched(self) -> None:
        picture = _picture()
        assert decode(picture, where="x") is picture

    def test_grey_pixels_get_three_equal_channels(self) -> None:
        grey = _picture()[..., 0].copy()
        np.testing.assert_array_equal(
            decode(grey, where="x"), np.repeat(grey[..., None], 3, axis=2)
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("encoded", "says"),
        [
            (b"", r"\(0 bytes, begins with nothing\): no bytes; remove"),
            (b"\xff", r"\(1 bytes, begins with ff\): not an image"),
            (b"<html>not found</html>", r"\(22 bytes, begins with 3c68746d\): a web page"),
            (bytes(12_480), r"\(12,480 bytes, begins with 00000000\): not an image"),
        ],
    )
    def test_bytes_that_are_no_image_name_it_their_size_and_their_beginning(
        self, encoded: bytes, says: str
    ) -> None:
        with pytest.raises(DecodeError, match=rf"^cats/007\.jpg {says}"):
            decode(encoded, where="cats/007.jpg")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_a_file_cut_in_half_is_named(self, kind: str) -> None:
        encoded = _encode(_pil(), kind)
        with pytest.raises(DecodeError, match=r"^half\.x \("):
            decode(encoded[: len(encoded) // 2], where="half.x")

    def test_is_a_data_error_too(self) -> None:
        with pytest.raises(DataError):
            decode(b"", where="x")


def _large(**options: Any) -> bytes:
    """A photograph-like picture that is large enough for the coarse way with colour."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = cv2.resize(noise, (400, 300), interpolation=cv2.INTER_CUBIC)
    return _encode(PILImage.fromarray(smooth), "JPEG", **options)


class TestJpeg:
    def test_a_large_one_has_pillows_luma_and_nearly_its_colour(self) -> None:
        encoded = _large(quality=90)
        found = decode(encoded, where="x").astype(int)
        pillows = np.array(PILImage.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
        assert np.abs(found - pillows).mean() < 2.5
        luma = np.array([0.299, 0.587, 0.114])
        assert np.abs((found - pillows) @ luma).mean() < 0.7

    @pytest.mark.parametrize("endian", ["<", ">"])
    def test_an_exif_block_of_either_byte_order_is_read(self, endian: str) -> None:
        exif = PILImage.Exif()
        exif.endian = endian
        exif[0x010F] = "a maker"  # a tag before the orientation
        exif[0x0112] = 6
        assert decode(_encode(_pil(), "JPEG", exif=exif.tobytes()), where="x").shape == (32, 24, 3)

    def test_an_exif_block_that_is_no_such_thing_leaves_the_image_upright(self) -> None:
        encoded = _large()
        block = b"Exif\0\0" + b"II*\0" + b"\xff" * 40
        marker = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big")
        assert decode(encoded[:2] + marker + block + encoded[2:], where="x").shape == (300, 400, 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_turned_one_is_shrunk_by_its_upright_size(self, orientation: int) -> None:
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        encoded = _large(exif=exif, quality=95)
        asked: list[tuple[int, int]] = []
        found = decode_or_flaw(encoded, PLAIN, shrink=lambda h, w: asked.append((h, w)) or 4)
        assert asked == [(300, 400) if orientation < 5 else (400, 300)]
        turned = ImageOps.exif_transpose(PILImage.open(io.BytesIO(encoded)))
        small = np.asarray(turned.convert("RGB").reduce(4))
        assert isinstance(found, np.ndarray)
        assert found.shape == small.shape
        assert np.abs(found.astype(int) - small).mean() < 3

    def test_one_that_libjpeg_turbo_refuses_has_the_size_that_was_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise ValueError("no such kind")

        encoded = _large(quality=95)
        expected = decode_or_flaw(encoded, PLAIN, shrink=lambda *_: 2)
        monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
        found = decode_or_flaw(encoded, PLAIN, shrink=lambda *_: 2)
        assert isinstance(found, np.ndarray)
        assert isinstance(expected, np.ndarray)
        assert found.shape == expected.shape == (150, 200, 3)
        assert np.abs(found.astype(int) - expected).mean() < 3

    @pytest.mark.parametrize("size", [5_000, 60_000])
    @pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xFE])
    def test_exif_is_found_behind_other_segments(self, size: int, marker: int) -> None:
        exif = PILImage.Exif()
        exif[0x0112] = 6
        encoded = _encode(_pil(), "JPEG", exif=exif)
        segment = bytes([0xFF, marker]) + (size + 2).to_bytes(2, "big") + b"x" * size
        assert decode(encoded[:2] + segment + encoded[2:], where="x").shape == (32, 24, 3)


class TestFlaws:
    @pytest.mark.parametrize(
        ("encoded", "flaw"),
        [
            (b"", Flaw.EMPTY),
            (b"hello, world", Flaw.NOT_AN_IMAGE),
            (b"\xff\xd8\xff\xe0 and no more", Flaw.DAMAGED),
            (_large()[: len(_large()) // 2], Flaw.DAMAGED),
            (_large()[:-2], Flaw.DAMAGED),
            (_large()[:600] + bytes(400) + _large()[1000:], Flaw.DAMAGED),
            (_large(progressive=True)[:-500], Flaw.DAMAGED),
            (_encode(_pil(), "PNG")[:-40], Flaw.DAMAGED),
        ],
    )
    def test_are_told_apart(self, encoded: bytes, flaw: Flaw) -> None:
        assert decode_or_flaw(encoded, PLAIN) is flaw

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
    def test_an_image_of_too_many_pixels_is_not_decoded(self, kind: str) -> None:
        encoded = _encode(_pil(), kind)
        assert decode_or_flaw(encoded, PLAIN, max_pixels=24 * 32 - 1) is Flaw.TOO_LARGE
        assert isinstance(decode_or_flaw(encoded, PLAIN, max_pixels=24 * 32), np.ndarray)

    def test_a_bomb_is_told_by_its_header(self) -> None:
        bomb = bytearray(_encode(_pil(), "PNG"))
        bomb[16:24] = (60_000).to_bytes(4, "big") * 2
        crc = zlib.crc32(bomb[12:29])
        bomb[29:33] = crc.to_bytes(4, "big")
        assert decode_or_flaw(bytes(bomb), PLAIN, max_pixels=1e8) is Flaw.TOO_LARGE

    def test_each_has_words_for_a_person(self) -> None:
        assert len({flaw.reason for flaw in Flaw}) == len(Flaw)


def test_a_gif_is_read() -> None:
    picture = _pil().quantize(16)
    found = decode(_encode(picture, "GIF"), where="x")
    np.testing.assert_array_equal(found, np.array(picture.convert("RGB")))

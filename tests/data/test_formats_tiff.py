"""Each row of docs/formats.md's table of TIFF, and what its settings do."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from raysl.data.decode import Flaw, decode_or_flaw
from raysl.data.header import read_header
from raysl.sources.pixels import PLAIN, Bits, Decoding, Pages, Percentiles

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def rows_of(heading: str) -> list[str]:
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    return [row for row in rows if not row.startswith(("Kind", "-"))]


def _smooth(channels: int) -> Any:
    small = np.random.default_rng(1).integers(20, 236, (5, 7, channels), dtype=np.uint8)
    return cv2.resize(small, (48, 32), interpolation=cv2.INTER_CUBIC)


RGBA = _smooth(4)
RGB = np.ascontiguousarray(RGBA[..., :3])
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
CHANNELS = [RGB[..., n].copy() for n in range(3)]
DEEP = RGB.astype(np.uint16) * 257
PLANES = np.moveaxis(RGB, -1, 0).copy()
CMYK = np.asarray(Image.fromarray(RGB).convert("CMYK"))


def three(grey: Any) -> Any:
    return np.repeat(grey[..., None], 3, axis=2)


def tiff(values: Any, photometric: str = "rgb", **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=photometric, **options)
    return file.getvalue()


def by_pillow(picture: Any = RGB, **options: Any) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    file = io.BytesIO()
    picture.save(file, "TIFF", **options)
    return file.getvalue()


def pages(*images: Any, photometric: str = "minisblack", **options: Any) -> bytes:
    """Write each image as a page of its own; of a pair, the second are its options."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for image in images:
            values, more = image if isinstance(image, tuple) else (image, {})
            writer.write(values, photometric=photometric, metadata=None, **options, **more)
    return file.getvalue()


def _multiplied(values: Any) -> Any:
    """Return 16-bit colours multiplied by an alpha that is never nothing."""
    alpha = 32768 + values[..., :1] // 2
    return np.dstack([(values.astype(np.float64) * alpha / 65535).round(), alpha]).astype(np.uint16)


def _turned() -> bytes:
    return tiff(RGB, extratags=[(274, 3, 1, 6, True)])


def _ome() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.stack(CHANNELS), ome=True, metadata={"axes": "CYX"})
    return file.getvalue()


def _raw() -> bytes:
    """Write what a DNG begins with: a preview, and the version of the format."""
    return tiff(RGB, extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])


class Row(NamedTuple):
    make: Callable[[], bytes]
    picture: Any = RGB
    levels: int = 0


EXTRA = {"planarconfig": "contig"}
ROWS = {
    "8 bits, strips or tiles": Row(lambda: tiff(RGB, tile=(16, 16))),
    "LZW, Deflate, PackBits": Row(lambda: by_pillow(compression="tiff_lzw")),
    "JPEG inside, YCbCr": Row(lambda: by_pillow(compression="jpeg", quality=97), levels=40),
    "BigTIFF": Row(lambda: tiff(RGB, bigtiff=True)),
    "Planes of 8 bits": Row(lambda: tiff(PLANES, planarconfig="separate")),
    "Big-endian": Row(lambda: tiff(DEEP, byteorder=">")),
    "Grey, black or white is zero": Row(lambda: tiff(255 - GREY, "miniswhite"), three(GREY)),
    "1 bit": Row(
        lambda: by_pillow(Image.fromarray(GREY).convert("1", dither=0), compression="group4"),
        three(np.where(GREY > 127, 255, 0)),
    ),
    "Palette": Row(
        lambda: by_pillow(Image.fromarray(RGB).quantize(16)),
        np.asarray(Image.fromarray(RGB).quantize(16).convert("RGB")),
    ),
    "CMYK": Row(
        lambda: tiff(CMYK, "separated"), np.asarray(Image.fromarray(CMYK, "CMYK").convert("RGB")), 1
    ),
    "CIELab": Row(lambda: by_pillow(_lab()), levels=24),
    "Orientation": Row(_turned, np.rot90(RGB, -1)),
    "Plain alpha": Row(lambda: tiff(RGBA, extrasamples=["unassalpha"])),
    "Multiplied alpha": Row(lambda: tiff(_multiplied(DEEP), extrasamples=["assocalpha"]), levels=1),
    "Colours and more channels": Row(lambda: tiff(np.dstack([DEEP, DEEP[..., :1]]), **EXTRA)),
    "16 bits": Row(lambda: tiff(DEEP)),
    "32 and 64 bits": Row(lambda: tiff(RGB.astype(np.uint32) << 24)),
    "Signed integers": Row(
        lambda: tiff((GREY.astype(np.int32) * 256 - 32768).astype(np.int16), "minisblack"),
        three(GREY),
    ),
    "16 bits, white is zero": Row(
        lambda: tiff(65535 - DEEP[..., 0], "miniswhite"), three(RGB[..., 0])
    ),
    "Planes of 16 bits or more": Row(
        lambda: tiff(np.moveaxis(DEEP, -1, 0).copy(), planarconfig="separate")
    ),
    "Floating point in 0 to 1": Row(lambda: tiff((RGB / 255).astype(np.float32))),
    "Doubles in 0 to 1": Row(lambda: tiff(GREY / 255, "minisblack"), three(GREY)),
    "Half floats in 0 to 1": Row(lambda: tiff((RGB / 255).astype(np.float16))),
    "Floating point elsewhere": Row(lambda: tiff(RGB.astype(np.float32)), Flaw.FLOAT_RANGE),
    "Smaller copies beside the page": Row(
        lambda: pages((GREY[::2, ::2], {"subfiletype": 1}), GREY), three(GREY)
    ),
    "Several pages, OME-TIFF": Row(_ome, Flaw.PAGES),
    "Channels that are not colours": Row(
        lambda: tiff(np.dstack([DEEP, DEEP[..., :2]]), "minisblack", **EXTRA), Flaw.CHANNELS
    ),
    "Camera raw (DNG, NEF, CR2, ARW)": Row(_raw, Flaw.CAMERA_RAW),
}


def _lab() -> Any:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(RGB), srgb, lab, outputMode="LAB")


@pytest.mark.parametrize("name", ROWS)
def test_each_row_comes_out_as_its_picture(name: str) -> None:
    row = ROWS[name]
    found = decode_or_flaw(row.make(), PLAIN)
    if isinstance(row.picture, Flaw):
        assert found is row.picture
        return
    assert isinstance(found, np.ndarray), found.reason
    assert found.shape == row.picture.shape
    assert np.abs(found.astype(int) - row.picture).max() <= row.levels


def test_the_docs_have_a_row_for_each_and_no_other() -> None:
    assert rows_of("TIFF") == list(ROWS)


class TestPages:
    def read(self, encoded: bytes, pages: Pages) -> Any:
        return decode_or_flaw(encoded, Decoding(pages=pages))

    def test_three_pages_are_red_green_and_blue_if_asked(self) -> None:
        np.testing.assert_array_equal(self.read(_ome(), "channels"), RGB)

    def test_of_two_blue_is_black_and_of_four_the_last_is_left_out(self) -> None:
        two = self.read(pages(*CHANNELS[:2]), "channels")
        np.testing.assert_array_equal(two, np.dstack([*CHANNELS[:2], np.zeros_like(GREY)]))
        np.testing.assert_array_equal(self.read(pages(*CHANNELS, GREY), "channels"), RGB)

    def test_the_first_page_is_grey_if_asked(self) -> None:
        np.testing.assert_array_equal(self.read(_ome(), "first"), three(CHANNELS[0]))

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    @pytest.mark.parametrize("kind", [np.uint8, np.uint16])
    def test_channels_of_one_page_are_colours_or_the_first_is_grey(
        self, planar: str, kind: Any
    ) -> None:
        scale = 257 if kind == np.uint16 else 1
        values = np.dstack([RGB, GREY, GREY]).astype(kind) * kind(scale)
        if planar == "separate":
            values = np.moveaxis(values, -1, 0).copy()
        encoded = tiff(values, "minisblack", planarconfig=planar)
        np.testing.assert_array_equal(self.read(encoded, "channels"), RGB)
        np.testing.assert_array_equal(self.read(encoded, "first"), three(CHANNELS[0]))

    def test_pages_of_different_sizes_are_no_channels(self) -> None:
        assert self.read(pages(GREY, GREY[:9]), "channels") is Flaw.PAGES

    def test_colour_pages_are_no_channels_and_the_first_is_taken(self) -> None:
        encoded = pages(RGB, RGB[::-1], photometric="rgb")
        assert self.read(encoded, "refuse") is Flaw.PAGES
        np.testing.assert_array_equal(self.read(encoded, "channels"), RGB)

    def test_a_header_counts_no_smaller_copies(self) -> None:
        assert read_header(pages(GREY, GREY, (GREY[::2], {"subfiletype": 1}))).pages == 2

    def test_directories_in_a_circle_end(self) -> None:
        encoded = bytearray(tiff(GREY, "minisblack", metadata=None))
        first = int.from_bytes(encoded[4:8], "little")
        count = int.from_bytes(encoded[first : first + 2], "little")
        at = first + 2 + 12 * count
        encoded[at : at + 4] = first.to_bytes(4, "little")
        np.testing.assert_array_equal(decode_or_flaw(bytes(encoded), PLAIN), three(GREY))


class TestIntensity:
    twelve = (GREY.astype(np.uint32) * 4095 // 255).astype(np.uint16)

    @pytest.mark.parametrize("write", [tiff, "png", "pgm"])
    def test_twelve_bits_in_sixteen_span_all_levels_if_asked(self, write: Any) -> None:
        encoded = (
            tiff(self.twelve, "minisblack")
            if write is tiff
            else cv2.imencode(f".{write}", self.twelve)[1].tobytes()
        )
        dark = decode_or_flaw(encoded, PLAIN)
        assert isinstance(dark, np.ndarray)
        assert dark.max() < 16
        for intensity in (Bits(bits=12), (0.0, 4095.0)):
            found = decode_or_flaw(encoded, Decoding(intensity))
            assert isinstance(found, np.ndarray)
            assert np.abs(found.astype(int) - three(GREY)).max() <= 1

    def test_is_rounded_and_clipped(self) -> None:
        values = np.array([[0, 99, 100, 101, 149, 200, 60000]], dtype=np.uint16)
        found = decode_or_flaw(tiff(values, "minisblack"), Decoding((100.0, 200.0)))
        assert isinstance(found, np.ndarray)
        # 2.55 a step: 1 -> 3, 49 -> 124.95 -> 125.
        assert found[0, :, 0].tolist() == [0, 0, 0, 3, 125, 255, 255]

    def test_percentiles_are_of_each_image_and_no_number_is_black(self) -> None:
        values = np.linspace(-3, 7, 101, dtype=np.float32)[None].repeat(4, axis=0)
        values[1, 5] = np.nan
        how = Decoding(Percentiles(percentile=(10.0, 90.0)))
        found = decode_or_flaw(tiff(values, "minisblack"), how)
        assert isinstance(found, np.ndarray)
        assert found[1, 5].tolist() == [0, 0, 0]
        assert found[0, :10].max() == 0
        assert found[0, 91:].min() == 255
        assert abs(int(found[0, 50, 0]) - 127) <= 1

    def test_percentiles_of_channels_are_their_own_and_of_colours_are_common(self) -> None:
        how = Decoding(Percentiles(percentile=(0.0, 100.0)), pages="channels")
        faint = [
            plane // factor
            for plane, factor in zip(np.moveaxis(DEEP, -1, 0), (1, 9, 99), strict=True)
        ]
        found = decode_or_flaw(pages(*faint), how)
        assert isinstance(found, np.ndarray)
        assert found.max(axis=(0, 1)).tolist() == [255, 255, 255]
        colours = decode_or_flaw(tiff(np.dstack(faint)), how)
        assert isinstance(colours, np.ndarray)
        assert colours.max(axis=(0, 1))[2] < 9

    def test_eight_bits_stay_as_they_are(self) -> None:
        found = decode_or_flaw(tiff(RGB), Decoding((0.0, 10.0)))
        np.testing.assert_array_equal(found, RGB)

    def test_narrow_ranges_far_from_zero_keep_their_levels(self) -> None:
        values = (10**9 + np.arange(256, dtype=np.uint32))[None]
        how = Decoding((1e9, 1e9 + 255))
        found = decode_or_flaw(tiff(values, "minisblack"), how)
        assert isinstance(found, np.ndarray)
        assert found[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("values", [RGB, DEEP, GREY.astype(np.float32) / 255])
def test_a_file_cut_short_is_damaged(values: Any) -> None:
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    encoded = tiff(values, photometric)
    assert decode_or_flaw(encoded[: len(encoded) * 3 // 4], PLAIN) is Flaw.DAMAGED


@pytest.mark.parametrize("library", ["tifffile", "pillow_heif", "pillow_jxl"])
def test_a_missing_library_is_named_with_its_format(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = {
        "tifffile": tiff(np.moveaxis(DEEP, -1, 0).copy(), planarconfig="separate"),
        "pillow_heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "pillow_jxl": b"\xff\x0a" + bytes(100),
    }[library]
    monkeypatch.setitem(sys.modules, library, None)
    found = decode_or_flaw(encoded, PLAIN)
    assert isinstance(found, Flaw)
    assert "pip install 'raysl[formats]'" in found.reason
    assert {"tifffile": "TIFF", "pillow_heif": "HEIC", "pillow_jxl": "JPEG XL"}[
        library
    ] in found.reason

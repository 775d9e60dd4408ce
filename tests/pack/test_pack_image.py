"""What becomes of one image: kept to the byte, shrunk, encoded anew, or bad."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from raysl.data.decode import decode
from raysl.data.header import read_header
from raysl.pack.config import PackConfig
from raysl.pack.image import pack_image
from raysl.sources.pixels import Bits

Pixels = npt.NDArray[np.uint8]


def smooth(height: int, width: int) -> Pixels:
    """Return pixels that JPEG keeps well: red grows to the right, green downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * columns / width, 255 * rows / height
    return np.stack([red, green, np.full_like(red, 128)], axis=-1).astype(np.uint8)


def encode(pixels: Pixels, suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def turned(jpeg: bytes, orientation: int) -> bytes:
    """Return a JPEG with an EXIF orientation."""
    entry = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + b"\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def config(**settings: Any) -> PackConfig:
    return PackConfig(source="x", **settings)


class TestKeptToTheByte:
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
    @pytest.mark.parametrize("verify", [True, False])
    def test_formats_that_every_decoder_reads(self, suffix: str, verify: bool) -> None:
        given = encode(smooth(20, 30), suffix)
        packed = pack_image(given, config(short_side_px=20, verify=verify))
        assert packed == (given, 30, 20, len(given), "")

    @pytest.mark.parametrize("verify", [True, False])
    def test_a_turned_jpeg_and_its_size_is_the_upright_one(self, verify: bool) -> None:
        given = turned(encode(smooth(20, 30), ".jpg"), 6)
        packed = pack_image(given, config(verify=verify))
        assert packed == (given, 20, 30, len(given), "")


class TestMadeAnew:
    def test_a_long_short_side_is_shrunk_to_what_is_asked_and_the_shape_stays(self) -> None:
        packed = pack_image(encode(smooth(200, 300), ".jpg"), config(short_side_px=50))
        image = decode(packed.image, where="x")
        assert image.shape == (50, 75, 3)
        assert (packed.width, packed.height) == (75, 50)
        assert np.abs(image.astype(int) - smooth(50, 75)).max() < 12

    def test_shrinking_averages_what_would_alias(self) -> None:
        stripes = np.zeros((256, 256, 3), np.uint8)
        stripes[:, ::2] = 200
        packed = pack_image(encode(stripes, ".png"), config(short_side_px=64))
        assert np.abs(decode(packed.image, where="x").astype(int) - 100).max() <= 2

    @pytest.mark.parametrize("orientation", [3, 6, 8])
    def test_a_turned_jpeg_is_upright_in_its_pixels(self, orientation: int) -> None:
        given = turned(encode(smooth(200, 300), ".jpg"), orientation)
        packed = pack_image(given, config(short_side_px=50))
        assert read_header(packed.image).orientation == 1
        image, expected = decode(packed.image, where="x"), decode(given, where="x")
        assert image.shape[:2] == (packed.height, packed.width)
        small = cv2.resize(expected, (packed.width, packed.height), interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(int) - small).max() < 12

    @pytest.mark.parametrize("suffix", [".tiff", ".bmp"])
    def test_other_formats_become_a_jpeg_of_the_same_size(self, suffix: str) -> None:
        packed = pack_image(encode(smooth(40, 60), suffix), config())
        assert read_header(packed.image).format == "jpeg"
        image = decode(packed.image, where="x")
        assert np.abs(image.astype(int) - smooth(40, 60)).max() < 12

    def test_what_is_encoded_anew_is_in_srgb_and_what_is_kept_keeps_its_profile(self) -> None:
        stream = io.BytesIO()
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        Image.fromarray(smooth(40, 60)).save(stream, "PNG", icc_profile=profile)
        kept = pack_image(stream.getvalue(), config())
        assert read_header(kept.image).profile == profile
        anew = pack_image(stream.getvalue(), config(short_side_px=20))
        assert read_header(anew.image).profile == b""

    def test_the_settings_of_the_source_are_followed_and_last(self) -> None:
        deep = smooth(40, 60)[..., 0].astype(np.uint16) * 16
        given = cv2.imencode(".png", deep)[1].tobytes()
        settings = config(intensity=Bits(bits=12), re_encode="png")
        image = decode(pack_image(given, settings).image, where="x")
        assert np.abs(image[..., 0].astype(int) - smooth(40, 60)[..., 0]).max() <= 1
        changed = {"intensity", "color_profile", "pages"}
        assert changed <= settings.lasting().keys()
        assert settings.lasting()["intensity"] == {"bits": 12}

    def test_pages_that_are_channels_stay_in_colour(self) -> None:
        stream = io.BytesIO()
        planes = [Image.fromarray(smooth(40, 60)[..., n].copy()) for n in range(3)]
        planes[0].save(stream, "TIFF", save_all=True, append_images=planes[1:])
        assert pack_image(stream.getvalue(), config()).flaw.startswith("a TIFF with several pages")
        packed = pack_image(stream.getvalue(), config(pages="channels", re_encode="png"))
        assert np.array_equal(decode(packed.image, where="x"), smooth(40, 60))

    def test_sixteen_bits_become_eight(self) -> None:
        deep = smooth(40, 60).astype(np.uint16) * 257
        packed = pack_image(cv2.imencode(".png", deep)[1].tobytes(), config())
        assert read_header(packed.image)[:5] == ("jpeg", 60, 40, "rgb", 8)

    def test_grey_stays_grey(self) -> None:
        given = cv2.imencode(".png", smooth(80, 90)[..., 0])[1].tobytes()
        packed = pack_image(given, config(short_side_px=40))
        assert read_header(packed.image).color == "grey"

    def test_bare_pixels_are_kept_exactly(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        packed = pack_image(pixels, config())
        assert read_header(packed.image).format == "png"
        assert np.array_equal(decode(packed.image, where="x"), pixels)
        assert packed.bytes_in == pixels.nbytes

    @pytest.mark.parametrize("kind", ["jpeg", "png"])
    def test_every_image_if_asked(self, kind: Any) -> None:
        for given in (encode(smooth(20, 30), ".jpg"), smooth(20, 30)):
            packed = pack_image(given, config(re_encode=kind))
            assert read_header(packed.image).format == kind

    def test_a_lower_quality_makes_smaller_files(self) -> None:
        sizes = [
            len(pack_image(smooth(64, 64), config(re_encode="jpeg", quality=q)).image)
            for q in (50, 95)
        ]
        assert sizes[0] < sizes[1]

    def test_what_is_too_long_for_a_jpeg_becomes_a_png(self) -> None:
        packed = pack_image(np.zeros((1, 70_000, 3), np.uint8), config(re_encode="jpeg"))
        assert read_header(packed.image)[:3] == ("png", 70_000, 1)


class TestBad:
    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (b"", "no bytes"),
            (b"<html></html>", "a web page"),
            (b"hello, world", "not an image"),
            (encode(smooth(64, 64), ".jpg")[:-300], "damaged"),
        ],
    )
    def test_broken_bytes_are_bad(self, given: bytes, reason: str) -> None:
        packed = pack_image(given, config())
        assert packed.flaw.startswith(reason)
        assert packed.image == b""

    @pytest.mark.parametrize("verify", [True, False])
    def test_so_are_too_many_pixels(self, verify: bool) -> None:
        given = encode(smooth(20, 30), ".png")
        packed = pack_image(given, config(max_megapixels=5e-4, verify=verify))
        assert packed.flaw == "more pixels than max_megapixels"

    def test_a_cut_image_is_not_noticed_without_verify(self) -> None:
        given = encode(smooth(64, 64), ".jpg")[:-300]
        assert pack_image(given, config(verify=False)).image == given

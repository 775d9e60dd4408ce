"""The reasons why an image can be bad, with a message for each.

Files that are not images, such as videos and archives, are recognised by their first bytes.
"""

import enum

import numpy as np

from raysl.errors import RayslError
from raysl.sources.source import Source, Unreadable


class Flaw(enum.IntEnum):
    """The reason why an image is bad. Values stay below 256: a block stores one byte per image."""

    EMPTY = 1
    NOT_AN_IMAGE = 2
    DAMAGED = 3
    TOO_LARGE = 4
    UNREADABLE = 5
    NEEDS_HEIF = 6
    NEEDS_JXL = 7
    NEEDS_TIFFFILE = 8
    NEEDS_CODECS = 9
    PAGES = 10
    CHANNELS = 11
    FLOAT_RANGE = 12
    JPEG_KIND = 13
    TIFF_KIND = 14
    DICOM = 20
    CAMERA_RAW = 21
    SVG = 22
    PDF = 23
    WEB_PAGE = 24
    GIT_LFS = 25
    VIDEO = 26
    NUMPY = 27
    ARCHIVE = 28
    HIGH_RANGE = 29
    JSON = 30

    @property
    def reason(self) -> str:
        """The reason in words."""
        return _REASONS[self]


_CONVERT_FIRST = "convert it to an image format first"
_INSTALL_EXTRA = "install it with: pip install 'raysl[formats]'"
_REASONS = {
    Flaw.EMPTY: "no bytes",
    Flaw.NOT_AN_IMAGE: "not an image of a known format",
    Flaw.DAMAGED: "damaged: cut short, or its data cannot be decoded",
    Flaw.TOO_LARGE: "more pixels than data.bad_images.max_megapixels allows",
    Flaw.UNREADABLE: "cannot be read",
    Flaw.NEEDS_HEIF: f"HEIC, which needs the package pillow-heif; {_INSTALL_EXTRA}",
    Flaw.NEEDS_JXL: f"JPEG XL, which needs the package pillow-jxl-plugin; {_INSTALL_EXTRA}",
    Flaw.NEEDS_TIFFFILE: f"a kind of TIFF that needs the package tifffile; {_INSTALL_EXTRA}",
    Flaw.NEEDS_CODECS: "a TIFF with a compression that needs the package imagecodecs; install it "
    "with: pip install imagecodecs",
    Flaw.PAGES: "a TIFF with several pages; set data.pages to first or channels",
    Flaw.CHANNELS: "a TIFF with channels that are not colours; set data.pages to first or channels",
    Flaw.FLOAT_RANGE: "floating point values outside 0 to 1; set data.intensity to the values that "
    "become black and white",
    Flaw.JPEG_KIND: "an unsupported kind of JPEG: more than 8 bits, or JPEG-LS",
    Flaw.TIFF_KIND: "an unsupported kind of TIFF",
    Flaw.DICOM: f"DICOM; {_CONVERT_FIRST}",
    Flaw.CAMERA_RAW: f"a camera's raw file; {_CONVERT_FIRST}",
    Flaw.SVG: f"SVG, a drawing; {_CONVERT_FIRST}",
    Flaw.PDF: f"PDF or PostScript; {_CONVERT_FIRST}",
    Flaw.WEB_PAGE: "a web page, which a server sent instead of an image",
    Flaw.GIT_LFS: "a git-lfs pointer in place of the image; run: git lfs pull",
    Flaw.VIDEO: "a video",
    Flaw.NUMPY: f"a NumPy, HDF5 or NIfTI array; {_CONVERT_FIRST}",
    Flaw.ARCHIVE: "an archive or compressed file",
    Flaw.HIGH_RANGE: f"OpenEXR or Radiance HDR; {_CONVERT_FIRST}",
    Flaw.JSON: "JSON text, which a server sent instead of an image",
}


def reason_of(source: Source, row: int, flaw: Flaw) -> str:
    """Return the reason why a row is bad, as a sentence fragment.

    A block stores a flaw as one byte, without the operating system's error message. To get that
    message, a file that cannot be read is opened once more; such files are rare.
    """
    if flaw != Flaw.UNREADABLE:
        return flaw.reason
    try:
        (reread_bytes,) = source.read(np.array([row], dtype=np.int64))
    except RayslError:
        return flaw.reason
    return reread_bytes.reason if isinstance(reread_bytes, Unreadable) else flaw.reason


_SIGNATURES = (
    (b"%PDF", Flaw.PDF),
    (b"%!PS", Flaw.PDF),  # PostScript
    (b"\xc5\xd0\xd3\xc6", Flaw.PDF),  # EPS with a preview image
    (b"version https://git-lfs", Flaw.GIT_LFS),
    (b"\x93NUMPY", Flaw.NUMPY),
    (b"\x89HDF\r\n\x1a\n", Flaw.NUMPY),  # HDF5
    (b"\x5c\x01\0\0", Flaw.NUMPY),  # NIfTI-1: the size of its header, 348
    (b"PK\x03\x04", Flaw.ARCHIVE),  # zip
    (b"\x1f\x8b", Flaw.ARCHIVE),  # gzip
    (b"Rar!", Flaw.ARCHIVE),
    (b"7z\xbc\xaf", Flaw.ARCHIVE),
    (b"\x28\xb5\x2f\xfd", Flaw.ARCHIVE),  # zstandard
    (b"\x76\x2f\x31\x01", Flaw.HIGH_RANGE),  # OpenEXR
    (b"#?RADIANCE", Flaw.HIGH_RANGE),
    (b"#?RGBE", Flaw.HIGH_RANGE),
    (b"FUJIFILMCCD-RAW", Flaw.CAMERA_RAW),  # Fujifilm RAF
    (b"IIRO", Flaw.CAMERA_RAW),  # Olympus ORF, also the next two
    (b"IIRS", Flaw.CAMERA_RAW),
    (b"MMOR", Flaw.CAMERA_RAW),
    (b"IIU\0", Flaw.CAMERA_RAW),  # Panasonic RW2
    (b"FOVb", Flaw.CAMERA_RAW),  # Sigma X3F
    (b"\0MRM", Flaw.CAMERA_RAW),  # Minolta MRW
    (b"\x1a\x45\xdf\xa3", Flaw.VIDEO),  # Matroska, WebM
)
# Brands of ISO 14496-12 containers: videos, and Canon's raw format CR3 ("crx ").
_BRANDS = {b"crx ": Flaw.CAMERA_RAW} | dict.fromkeys(
    (b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"qt  ", b"M4V ", b"3gp4", b"3gp5"), Flaw.VIDEO
)
_HEAD_BYTES = 1024


def flaw_of_other_file(data: bytes | memoryview) -> Flaw:
    """Return the flaw of a file without an image signature; ``NOT_AN_IMAGE`` if unrecognised."""
    head = bytes(data[:_HEAD_BYTES])
    for signature, flaw in _SIGNATURES:
        if head.startswith(signature):
            return flaw
    if head[128:132] == b"DICM":
        return Flaw.DICOM
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], Flaw.NOT_AN_IMAGE)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return Flaw.VIDEO
    return _flaw_of_text(head.removeprefix(b"\xef\xbb\xbf").lstrip().lower())


def _flaw_of_text(text: bytes) -> Flaw:
    if text[:1] == b"<":
        if b"<svg" in text:
            return Flaw.SVG
        if b"<html" in text or text.startswith((b"<!doctype html", b"<head", b"<body")):
            return Flaw.WEB_PAGE
    return Flaw.JSON if text[:2] in (b'{"', b"{\n", b"{\r", b"[{") else Flaw.NOT_AN_IMAGE

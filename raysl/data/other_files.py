"""Recognise files that are not images, such as videos and archives, by their first bytes."""

from raysl.data.flaw import Flaw

_AT_START = (
    (b"%PDF", Flaw.PDF),
    (b"%!PS", Flaw.PDF),
    (b"\xc5\xd0\xd3\xc6", Flaw.PDF),
    (b"version https://git-lfs", Flaw.GIT_LFS),
    (b"\x93NUMPY", Flaw.NUMPY),
    (b"\x89HDF\r\n\x1a\n", Flaw.NUMPY),
    (b"\x5c\x01\0\0", Flaw.NUMPY),  # NIfTI-1: the 348 bytes of its header
    (b"PK\x03\x04", Flaw.ARCHIVE),
    (b"\x1f\x8b", Flaw.ARCHIVE),
    (b"Rar!", Flaw.ARCHIVE),
    (b"7z\xbc\xaf", Flaw.ARCHIVE),
    (b"\x28\xb5\x2f\xfd", Flaw.ARCHIVE),
    (b"\x76\x2f\x31\x01", Flaw.HIGH_RANGE),
    (b"#?RADIANCE", Flaw.HIGH_RANGE),
    (b"#?RGBE", Flaw.HIGH_RANGE),
    (b"FUJIFILMCCD-RAW", Flaw.CAMERA_RAW),
    (b"IIRO", Flaw.CAMERA_RAW),
    (b"IIRS", Flaw.CAMERA_RAW),
    (b"MMOR", Flaw.CAMERA_RAW),
    (b"IIU\0", Flaw.CAMERA_RAW),
    (b"FOVb", Flaw.CAMERA_RAW),
    (b"\0MRM", Flaw.CAMERA_RAW),
    (b"\x1a\x45\xdf\xa3", Flaw.VIDEO),
)
# ISO 14496-12 brands of videos; Canon's CR3 is such a file too.
_BRANDS = {b"crx ": Flaw.CAMERA_RAW} | dict.fromkeys(
    (b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"qt  ", b"M4V ", b"3gp4", b"3gp5"), Flaw.VIDEO
)
_LOOKED_AT = 1024


def kind_of_other_file(data: bytes | memoryview) -> Flaw:
    """Return the kind of a file without an image signature."""
    head = bytes(data[:_LOOKED_AT])
    for start, flaw in _AT_START:
        if head.startswith(start):
            return flaw
    if head[128:132] == b"DICM":
        return Flaw.DICOM
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], Flaw.NOT_AN_IMAGE)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return Flaw.VIDEO
    return _kind_of_text(head.removeprefix(b"\xef\xbb\xbf").lstrip().lower())


def _kind_of_text(text: bytes) -> Flaw:
    if text[:1] == b"<":
        if b"<svg" in text:
            return Flaw.SVG
        if b"<html" in text or text.startswith((b"<!doctype html", b"<head", b"<body")):
            return Flaw.WEB_PAGE
    return Flaw.JSON if text[:2] in (b'{"', b"{\n", b"{\r", b"[{") else Flaw.NOT_AN_IMAGE

"""List the reasons why an image can be bad, with a message for each."""

import enum


class Flaw(enum.IntEnum):
    """The reason why an image is bad. Values stay below 256: a block stores one byte an image."""

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


_OTHERWISE = "to be converted to a format of images first"
_EXTRA = "install it with: pip install 'raysl[formats]'"
_REASONS = {
    Flaw.EMPTY: "no bytes",
    Flaw.NOT_AN_IMAGE: "not an image of a known format",
    Flaw.DAMAGED: "damaged: cut short, or its data do not decode",
    Flaw.TOO_LARGE: "more pixels than data.bad_images.max_megapixels",
    Flaw.UNREADABLE: "cannot be read",
    Flaw.NEEDS_HEIF: f"HEIC, which the package pillow-heif reads; {_EXTRA}",
    Flaw.NEEDS_JXL: f"JPEG XL, which the package pillow-jxl-plugin reads; {_EXTRA}",
    Flaw.NEEDS_TIFFFILE: f"a TIFF of a kind that the package tifffile reads; {_EXTRA}",
    Flaw.NEEDS_CODECS: "a TIFF whose compression the package imagecodecs reads; install it with: "
    "pip install imagecodecs",
    Flaw.PAGES: "a TIFF of several pages; set data.pages to first or channels",
    Flaw.CHANNELS: "a TIFF of channels that are no colours; set data.pages to first or channels",
    Flaw.FLOAT_RANGE: "floating point values outside 0 to 1; set data.intensity to the values that "
    "become black and white",
    Flaw.JPEG_KIND: "a JPEG of a kind that is not read: more than 8 bits, or JPEG-LS",
    Flaw.TIFF_KIND: "a TIFF of a kind that is not read",
    Flaw.DICOM: f"DICOM, {_OTHERWISE}",
    Flaw.CAMERA_RAW: f"a camera's raw file, {_OTHERWISE}",
    Flaw.SVG: f"SVG, a drawing {_OTHERWISE}",
    Flaw.PDF: f"PDF or PostScript, {_OTHERWISE}",
    Flaw.WEB_PAGE: "a web page, as servers send instead of an image",
    Flaw.GIT_LFS: "a pointer of git-lfs in place of the image; run: git lfs pull",
    Flaw.VIDEO: "a video",
    Flaw.NUMPY: f"a NumPy, HDF5 or NIfTI array, {_OTHERWISE}",
    Flaw.ARCHIVE: "an archive or compressed file",
    Flaw.HIGH_RANGE: f"OpenEXR or Radiance HDR, {_OTHERWISE}",
    Flaw.JSON: "a text in JSON, as servers send instead of an image",
}

"""Classify files by suffix: images, shards, and unsupported formats."""

import importlib.util

PLAIN_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm"),
    *(".psd", ".tga", ".pcx", ".sgi", ".dds", ".qoi", ".ico"),
)
# Formats that need a library of raysl[formats]: its module, and the format's common name.
OPTIONAL_SUFFIXES = {
    ".heic": ("pillow_heif", "HEIC"),
    ".heif": ("pillow_heif", "HEIC"),
    ".hif": ("pillow_heif", "HEIC"),
    ".jxl": ("pillow_jxl", "JPEG XL"),
}
IMAGE_SUFFIXES = (*PLAIN_SUFFIXES, *OPTIONAL_SUFFIXES)
PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIXES = (".tar",)
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_RAW = "raw files of cameras; develop them to JPEG or TIFF first"
_VIDEO = "videos; write their frames as JPEG first"
_RECORDS = "records of another library; write them as Parquet or tar shards first"
_ARCHIVE = "archives; unpack them first"
_ARRAYS = "arrays; write them as PNG or TIFF first"
# Unsupported formats that may hold images, by suffix: what the files are and what to do.
_OTHERS = {
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".srw"), _RAW),
    **dict.fromkeys((".dcm", ".dicom"), "DICOM; write them as PNG or TIFF first"),
    **dict.fromkeys((".nii", ".nii.gz", ".mha", ".nrrd", ".czi", ".nd2", ".lif", ".svs"), _ARRAYS),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5", ".zarr", ".mat"), _ARRAYS),
    **dict.fromkeys((".svg", ".eps", ".ai", ".pdf"), "drawings; write them as PNG first"),
    **dict.fromkeys((".exr", ".hdr"), "write them as PNG first"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"), _VIDEO),
    **dict.fromkeys((".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"), _ARCHIVE),
    ".arrow": "Arrow files of datasets.save_to_disk; write them with Dataset.to_parquet first",
    **dict.fromkeys(
        (".tfrecord", ".tfrecords", ".lmdb", ".mdb", ".mds", ".beton", ".rec"), _RECORDS
    ),
}


def missing_package(suffix: str) -> str | None:
    """Return the common name of a suffix's format if its library is missing, else None."""
    module, name = OPTIONAL_SUFFIXES.get(suffix.lower(), ("", ""))
    return name if module and importlib.util.find_spec(module) is None else None


def advice_on_suffix(suffix: str) -> str | None:
    """Return what files of an unsupported format are and what to do; None for other suffixes."""
    return _OTHERS.get(suffix.lower())


def suffix_of(name: str) -> str:
    """Return the suffix in lower case, such as .png or .tar.gz; "" without one."""
    base = name.rpartition("/")[2].lower()
    stem, dot, end = base.rpartition(".")
    if not dot or not stem:
        return ""
    double = f".{stem.rpartition('.')[2]}.{end}"
    return double if double in COMPRESSED_SUFFIXES or double in _OTHERS else f".{end}"

"""Measure what a source of many files costs before its first image.

    python docs/studies/source_index.py

Writes Parquet files, tar shards and the manifest of a packed folder, with tiny images, opens each,
and prints the seconds of CPU and the bytes that are sent to a worker, per file and per image, to be
multiplied for a large source.
"""

import argparse
import io
import pickle
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.sources.manifest import MANIFEST_NAME, Manifest, ManifestFile, write_manifest
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig

IMAGE = b"\xff\xd8\xff" + bytes(97)


def write_parquet(folder: Path, number: int, rows: int) -> int:
    """Write one file of one row group; return its size in bytes."""
    path = folder / f"{number:06}.parquet"
    images = pa.array([{"bytes": IMAGE, "path": None}] * rows)
    pq.write_table(pa.table({"image": images}), path, row_group_size=rows)
    return path.stat().st_size


def write_tar(folder: Path, number: int, rows: int) -> None:
    """Write one shard."""
    with tarfile.open(folder / f"{number:06}.tar", "w") as tar:
        for row in range(rows):
            member = tarfile.TarInfo(f"{number:06}_{row:06}.jpg")
            member.size = len(IMAGE)
            tar.addfile(member, io.BytesIO(IMAGE))


def write_packed(folder: Path, files: int, rows: int) -> None:
    """Write files and their manifest, as `raysl pack` does."""
    sizes = [write_parquet(folder, number, rows) for number in range(files)]
    listed = tuple(
        ManifestFile(f"{number:06}.parquet", size, (rows,), (rows * len(IMAGE),))
        for number, size in enumerate(sizes)
    )
    total = files * rows
    manifest = Manifest(total, total * len(IMAGE), "0" * 16, "image", None, (), listed, {})
    write_manifest(pafs.LocalFileSystem(), str(folder), manifest)
    print(f"  manifest: {(folder / MANIFEST_NAME).stat().st_size / files:.0f} bytes per file")


def main() -> None:
    """Write and open the three kinds of source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="images of each file")
    options = parser.parse_args()
    files, rows = options.files, options.rows
    for kind in ("parquet", "webdataset", "packed"):
        print(f"{kind}: {files:,} files of {rows:,} images")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if kind == "packed":
                write_packed(folder, files, rows)
            for number in range(files if kind != "packed" else 0):
                (write_parquet if kind == "parquet" else write_tar)(folder, number, rows)
            config = DataConfig.model_validate({"source": str(folder)})
            began = time.process_time()
            source = open_source(config, data=config)
            seconds = time.process_time() - began
        size = len(pickle.dumps(source))
        print(
            f"  opening: {1e3 * seconds / files:.2f} ms of CPU per file; sent to a worker: "
            f"{size / files:.1f} bytes per file, {size / files / rows:.3f} per image",
            flush=True,
        )


if __name__ == "__main__":
    main()

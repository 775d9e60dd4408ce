"""Sources that hold no images, or broken files: each is refused by its name, or opened.

An image that cannot be decoded is no error of opening: a run counts bad images. The other bad
inputs: tests/run/test_bad_inputs.py.
"""

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.data.first_look import first_look
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig

Refused = Callable[..., dict[str, str | None]]

NUMBER = 12


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def with_size(content: bytes, octal: bytes) -> bytes:
    """Return an archive whose first member claims another size."""
    return content[:124] + octal + content[136:]


def all_named(content: bytes, suffix: str) -> dict[str, bytes]:
    return {f"{n}{suffix}": content for n in range(NUMBER)}


@pytest.fixture
def png(draw_images: Callable[..., Path], tmp_path: Path) -> bytes:
    return next(draw_images(tmp_path / "drawn", range(1)).iterdir()).read_bytes()


def refused_folders(png: bytes) -> dict[str, dict[str, bytes]]:
    whole, archive = parquet(image=[png] * NUMBER), tar(all_named(png, ".png"))
    empty = pa.array([], pa.binary())
    return {
        "empty": {}, "text": {"a.txt": b"x"}, "folders": {"1.png/x.txt": b"", "2.png/x.txt": b""},
        "parquet of nothing": {"a.parquet": b""}, "parquet of text": {"a.parquet": b"hello"},
        "parquet cut": {"a.parquet": whole[: len(whole) // 2]},
        "parquet end": {"a.parquet": whole[-200:]},
        "parquet zeros": {"a.parquet": bytes(len(whole))},
        "parquet footer": {"a.parquet": whole[:-60] + b"x" * 52 + whole[-8:]},
        "no rows": {"a.parquet": parquet(image=empty)}, "no columns": {"a.parquet": parquet()},
        "no images": {"a.parquet": parquet(x=[1] * NUMBER)},
        "numbers": {"a.parquet": parquet(image=[1] * NUMBER)},
        "two schemas": {"a.parquet": whole, "b.parquet": parquet(x=[1])},
        "one is broken": {"a.parquet": whole, "b.parquet": b"xx"},
        "tar of nothing": {"a.tar": b""}, "tar of text": {"a.tar": b"hello" * 300},
        "tar cut": {"a.tar": archive[:700]}, "tar empty": {"a.tar": tar({})},
        "tar without images": {"a.tar": tar({"a.txt": b"x"})},
        "tar of a huge member": {"a.tar": with_size(archive, b"77777777777\0")},
        "tar of a negative member": {"a.tar": with_size(archive, b"-0000000001\0")},
        "gzip": {"a.tar.gz": b"\x1f\x8b\x08\x00bad"}, "csv": {"a.csv": b"a,b\n1,2\n"},
        "csv of bytes": {"a.csv": b"\xff\xfe\0"}, "csv of paths": {"a.csv": b"path\nnothing.png\n"},
        "json lines": {"a.jsonl": b"{bad\n"}, "array": {"a.npy": b"\x93NUMPY\x01\x00"},
        "arrays": {"a.npz": b"PK"}, "delta": {"_delta_log/00000000000000000000.json": b"{bad"},
        "delta empty": {"_delta_log/00000000000000000000.json": b""},
        "iceberg": {"metadata/v1.metadata.json": b"{"},
    }  # fmt: skip


def other_folders(png: bytes) -> dict[str, dict[str, bytes]]:
    """Folders whose images, labels or names are broken: a run counts them, or uses the rest."""
    labels = all_named(png, ".png") | all_named(b"\xff\xfe", ".cls")
    return {
        "empty images": all_named(b"", ".png"), "text as images": all_named(b"hello", ".jpg"),
        **{f"cut {suffix}": all_named(png[:30], suffix) for suffix in (
            ".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp", ".heic", ".avif", ".jxl", ".jp2",
            ".ppm", ".ico",
        )},
        "nulls": {"a.parquet": parquet(image=pa.array([None] * NUMBER, pa.binary()))},
        "paths": {"a.parquet": parquet(image=["nothing.png"] * NUMBER)},
        "lists of labels": {"a.parquet": parquet(image=[png] * NUMBER, label=[["a"]] * NUMBER)},
        "labels of bytes": {"a.tar": tar(labels)},
        "labels no JSON": {"a.tar": tar(all_named(png, ".png") | all_named(b"{", ".json"))},
        "names that lead out": {"a.tar": tar({f"/../{n}.png": png for n in range(NUMBER)})},
        "lines in names": {f"a\n{n}.png": png for n in range(NUMBER)},
    }  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def look_into(place: Path | str) -> None:
    config = DataConfig(source=str(place), views={"recipe": "simclr"})  # type: ignore[arg-type]
    first_look(open_source(config, data=config))


def test_sources_without_images_and_broken_files_are_named(
    tmp_path: Path, png: bytes, refused: Refused
) -> None:
    cases = {}
    for name, files in refused_folders(png).items():
        place = write(tmp_path / "in" / name, files)
        cases[name] = (place, [name])
        for file in files if len(files) == 1 else ():
            cases[f"file of {name}"] = (place / file, [name])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("dangling.png", "circle", "pipe.parquet", "nothing", "in"):
        cases[name] = (tmp_path / name, [name])
    for address in ("s3://", "foo://x", "file:///nothing", "cifar11", "http://x:y/z", "~nobody/x"):
        cases[address] = (address, [address.partition(":")[0], "/nothing", "nobody"])
    found = refused(look_into, cases)
    assert [name for name, text in found.items() if text is None] == []


def test_broken_images_labels_and_names_end_nothing(
    tmp_path: Path, png: bytes, refused: Refused
) -> None:
    cases = {}
    for name, files in other_folders(png).items():
        cases[name] = (write(tmp_path / "in" / name, files), [name])
    refused(look_into, cases)


def test_a_pipe_among_images_is_not_read(
    tmp_path: Path, draw_images: Callable[..., Path], refused: Refused
) -> None:
    """Opening it would wait for a writer for ever."""
    folder = draw_images(tmp_path / "images", range(3))
    os.mkfifo(folder / "003.png")
    refused(look_into, {"images": (folder, ["003.png"])})

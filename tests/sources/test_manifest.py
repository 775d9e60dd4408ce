import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.sources.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestFile,
    read_manifest,
    write_manifest,
)
from raysl.sources.open import open_source
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import DataConfig

LOCAL = pafs.LocalFileSystem()


def _manifest(**settings: Any) -> Manifest:
    file = ManifestFile("a.parquet", 100, (1, 2), (10, 20))
    return Manifest(3, 30, "0123456789abcdef", "image", None, (), (file,), {})._replace(**settings)


def _pack(root: Path, *counts: int) -> Manifest:
    """Write shards of so many rows, in groups of four, and their manifest."""
    files, start = [], 0
    for number, count in enumerate(counts):
        path = root / f"part-{number:05}.parquet"
        rows = range(start, start + count)
        columns = {"image": [b"image %03d" % row for row in rows], "label": [r % 2 for r in rows]}
        pq.write_table(pa.table(columns), path, row_group_size=4)
        groups = pq.ParquetFile(path).metadata
        sizes = tuple(groups.row_group(n).num_rows for n in range(groups.num_row_groups))
        encoded = tuple(9 * size for size in sizes)
        files.append(ManifestFile(path.name, path.stat().st_size, sizes, encoded))
        start += count
    manifest = _manifest(
        images=start,
        bytes=9 * start,
        label_column="label",
        class_names=("cat", "dog"),
        files=tuple(files),
        packed={"source": "x"},
    )
    write_manifest(LOCAL, str(root), manifest)
    return manifest


def _open(root: Path | str, **settings: Any) -> ParquetSource:
    config = DataConfig(source=str(root), **settings)
    source = open_source(config, data=config)
    assert isinstance(source, ParquetSource)
    return source


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        manifest = _manifest(label_column="label", class_names=("a", "b"), packed={"x": [1, None]})
        write_manifest(LOCAL, str(tmp_path), manifest)
        assert read_manifest(LOCAL, f"{tmp_path}/") == manifest
        values = json.loads((tmp_path / MANIFEST_NAME).read_text())
        assert (values["version"], values["files"][0]["rows"]) == (1, [1, 2])

    def test_a_folder_without_one_has_none(self, tmp_path: Path) -> None:
        assert read_manifest(LOCAL, str(tmp_path)) is None

    def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_manifest(LOCAL, str(tmp_path), _manifest())

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"manifest\.json: cannot be written: .*No space left"):
            write_manifest(LOCAL, str(tmp_path), _manifest(packed={"new": True}))
        assert read_manifest(LOCAL, str(tmp_path)) == _manifest()
        assert os.listdir(tmp_path) == [MANIFEST_NAME]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[:50], "damaged .not JSON"),
            (lambda text: "[]", "damaged .no version"),
            (lambda text: text.replace('"version":1', '"version":2'), "has version 2; .*reads"),
            (
                lambda text: text.replace('"images":3', '"images":4'),
                "4 images, .*row groups hold 3",
            ),
            (lambda text: text.replace("[1,2]", "[3]"), "a.parquet: rows and bytes .* not match"),
            (
                lambda text: text.replace("[1,2]", "[4,-1]"),
                "a.parquet: rows and bytes .* not match",
            ),
            (lambda text: text.replace("[1,2]", '"many"'), "damaged .ValueError"),
            (lambda text: text.replace("a.parquet", "../a.parquet"), "is not a path below"),
            (lambda text: text.replace("a.parquet", "/a.parquet"), "is not a path below"),
            (lambda text: text.replace("0123456789abcdef", "0123"), "not 16 hex digits"),
            (
                lambda text: text.replace('"size_bytes"', '"size"'),
                "damaged .KeyError: 'size_bytes'",
            ),
        ],
    )
    def test_a_damaged_one_is_an_error_that_says_what_is_wrong(
        self, change: Any, message: str, tmp_path: Path
    ) -> None:
        write_manifest(LOCAL, str(tmp_path), _manifest())
        path = tmp_path / MANIFEST_NAME
        path.write_text(change(path.read_text()))
        with pytest.raises(DataError, match=rf"^{path}: .*{message}"):
            read_manifest(LOCAL, str(tmp_path))


class TestOpening:
    def test_reads_no_footer_and_gives_the_same_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = _pack(tmp_path, 10, 7)
        by_footers = _open(f"{tmp_path}/*.parquet")
        monkeypatch.setattr("raysl.sources.footers.open_parquet", None)
        source = _open(tmp_path)
        monkeypatch.undo()
        assert source.group_sizes.tolist() == by_footers.group_sizes.tolist() == [4, 4, 2, 4, 3]
        assert source.fingerprint == manifest.fingerprint
        assert source.read(range(17)) == by_footers.read(range(17))
        assert source.where(12) == by_footers.where(12)
        assert source.window_size == 512 * (1 << 20) // 9

    def test_labels_have_the_names_of_the_manifest(self, tmp_path: Path) -> None:
        _pack(tmp_path, 5)
        source = _open(tmp_path)
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [0, 1, 0, 1, 0]
        assert source.class_names == ["cat", "dog"]

    def test_filter_and_limit_hold_and_change_the_fingerprint(self, tmp_path: Path) -> None:
        manifest = _pack(tmp_path, 10, 7)
        source = _open(tmp_path, filter=(("label", "==", 1),), limit=6)
        assert source.read([0, 5]) == [b"image 001", b"image 015"]
        assert source.group_sizes.tolist() == [1, 1, 1, 2, 1]
        assert source.row_id(5) == "part-00001.parquet:5"
        assert source.where(5) == f"{tmp_path}/part-00001.parquet row 5 (row group 1)"
        seen = {
            manifest.fingerprint,
            source.fingerprint,
            _open(tmp_path, limit=6).fingerprint,
            _open(tmp_path, filter=(("label", "==", 1),)).fingerprint,
        }
        assert len(seen) == 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda root: (root / "part-00001.parquet").unlink(), "part-00001.*: is missing"),
            (
                lambda root: (root / "part-00001.parquet").write_bytes(b"PAR1"),
                r"part-00001.*: has 4 bytes, but [\d,]+ in manifest\.json",
            ),
            (
                lambda root: (root / "more.parquet").write_bytes(b"PAR1"),
                r"more\.parquet: is not in manifest\.json",
            ),
        ],
        ids=["missing", "changed", "more"],
    )
    def test_a_folder_that_differs_from_it_is_an_error(
        self, change: Any, message: str, tmp_path: Path
    ) -> None:
        _pack(tmp_path, 4, 4)
        change(tmp_path)
        with pytest.raises(DataError, match=rf"^{tmp_path}/{message}.*Run raysl pack again"):
            _open(tmp_path)

    def test_another_image_column_is_looked_for_in_the_footers(self, tmp_path: Path) -> None:
        _pack(tmp_path, 4)
        with pytest.raises(DataError, match=r"called 'thumb'; binary columns: image"):
            _open(tmp_path, image_column="thumb")

    def test_another_label_column_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        _pack(tmp_path, 4)
        with pytest.raises(DataError, match=r"no column 'fine' for the labels; columns: image, la"):
            _open(tmp_path, label_column="fine").labels()

    def test_a_hundred_thousand_row_groups_are_small_to_send(self, tmp_path: Path) -> None:
        shards = 100
        files = tuple(
            ManifestFile(f"part-{n:05}.parquet", 4, (64,) * 1000, (6400,) * 1000)
            for n in range(shards)
        )
        for file in files:
            (tmp_path / file.path).write_bytes(b"PAR1")
        images = 64_000 * shards
        write_manifest(LOCAL, str(tmp_path), _manifest(images=images, files=files))
        source = _open(tmp_path)
        assert len(source.group_sizes) == 100_000
        # 4 bytes for the file, 4 for the number in it, 8 for the rows.
        assert len(pickle.dumps(source)) < 17 * 100_000
        copy = pickle.loads(pickle.dumps(source))
        assert copy.where(images - 1) == source.where(images - 1)

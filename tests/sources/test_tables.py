"""Tables whose log says which of their files are current, written by their own libraries."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source
from raysl.sources.storage import resolve
from raysl.sources.tables import current_files, table_kind

LOCAL = pafs.LocalFileSystem()


def _rows(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "image": [b"image %03d" % number for number in numbers],
            "label": [("cat", "a dog / 50%")[number % 2] for number in numbers],
            "n": list(numbers),
        }
    )


def _open(root: Path | str, **settings: Any) -> Source:
    config = DataConfig(source=str(root), **settings)
    return open_source(config, data=config)


def _numbers(source: Source) -> list[int]:
    images = source.read(range(int(source.group_sizes.sum())))
    return sorted(int(image.split()[1]) for image in images)  # type: ignore[union-attr]


class TestDelta:
    @pytest.fixture
    def deltalake(self) -> Any:
        return pytest.importorskip("deltalake", reason="the group tables installs it")

    @pytest.fixture
    def table(self, deltalake: Any, tmp_path: Path) -> Path:
        """Twenty rows that ten others replace, of which then one is deleted."""
        deltalake.write_deltalake(tmp_path / "t", _rows(0, 20))
        deltalake.write_deltalake(tmp_path / "t", _rows(20, 10), mode="overwrite")
        deltalake.DeltaTable(tmp_path / "t").delete("n = 23")
        return tmp_path / "t"

    def test_only_rows_of_now_are_read(self, table: Path) -> None:
        assert table_kind(LOCAL, str(table)) == "delta"
        assert len(list(table.glob("*.parquet"))) == 3
        source = _open(table)
        assert _numbers(source) == [*range(20, 23), *range(24, 30)]
        assert source.class_names == ["a dog / 50%", "cat"]
        assert "/" not in source.row_id(0)

    def test_partitions_with_signs_in_their_names_are_read(
        self, deltalake: Any, tmp_path: Path
    ) -> None:
        root = tmp_path / "a table"
        deltalake.write_deltalake(root, _rows(0, 20), partition_by=["label"])
        deltalake.DeltaTable(root).delete("n < 4")
        assert _numbers(_open(root)) == list(range(4, 20))

    def test_partitions_as_spark_names_them_are_read(self, deltalake: Any, tmp_path: Path) -> None:
        # Spark leaves a space in a folder's name as it is, and encodes it in the log alone.
        root = tmp_path / "t"
        rows = _rows(0, 4).set_column(1, "label", pa.array(["a b"] * 4))
        deltalake.write_deltalake(root, rows, partition_by=["label"])
        (root / "label=a%20b").rename(root / "label=a b")
        log = root / "_delta_log" / f"{0:020}.json"
        log.write_text(log.read_text().replace("a%2520b", "a%20b"))
        assert _numbers(_open(root)) == list(range(4))

    def test_a_log_with_a_checkpoint_and_compacted_files_is_read(
        self, deltalake: Any, table: Path
    ) -> None:
        deltalake.DeltaTable(table).optimize.compact()
        deltalake.DeltaTable(table).create_checkpoint()
        assert _numbers(_open(table)) == [*range(20, 23), *range(24, 30)]

    def test_deletion_vectors_are_refused_by_name(self, deltalake: Any, table: Path) -> None:
        _delete_second_row_by_vector(table, deltalake)
        with pytest.raises(
            DataError, match=r"is a Delta table.*deletion vectors: .*\.parquet.*PURG"
        ):
            _open(table)

    def test_a_table_that_may_have_them_and_has_none_is_read(
        self, deltalake: Any, table: Path
    ) -> None:
        features = deltalake.TableFeatures.DeletionVectors
        deltalake.DeltaTable(table).alter.add_feature(
            features, allow_protocol_versions_increase=True
        )
        assert "deletionVectors" in deltalake.DeltaTable(table).protocol().reader_features
        assert len(_numbers(_open(table))) == 9

    def test_columns_of_other_names_in_the_files_are_refused(
        self, deltalake: Any, tmp_path: Path
    ) -> None:
        deltalake.write_deltalake(tmp_path / "t", _rows(0, 4))
        _rename_column(tmp_path / "t", "n", "number")
        with pytest.raises(DataError, match=r"column mapping: 'number' is 'n' there"):
            _open(tmp_path / "t")

    def test_an_empty_table_says_so(self, deltalake: Any, table: Path) -> None:
        deltalake.DeltaTable(table).delete()
        with pytest.raises(DataError, match="the Delta table holds no rows"):
            _open(table)

    def test_a_log_that_cannot_be_read_is_named(self, table: Path) -> None:
        for entry in (table / "_delta_log").iterdir():
            entry.write_text("{")
        with pytest.raises(DataError, match=r"is a Delta table.*deltalake cannot read its log"):
            _open(table)

    def test_a_glob_of_its_files_says_that_they_may_be_old(self, table: Path) -> None:
        source = _open(f"{table}/*.parquet")
        assert len(_numbers(source)) == 39
        assert len(source.notes) == 1
        assert source.notes[0].startswith(f"the files belong to a Delta table ({table})")

    def test_a_folder_that_holds_tables_names_one(self, table: Path) -> None:
        with pytest.raises(DataError, match=rf"t in it is a Delta table.*data\.source={table}\)"):
            _open(table.parent)

    def test_a_pickled_source_needs_no_log(self, table: Path) -> None:
        source = _open(table)
        shutil.rmtree(table / "_delta_log")
        assert len(_numbers(source)) == 9


def _delete_second_row_by_vector(table: Path, deltalake: Any) -> None:
    """Write the log entry by which Spark deletes the second row of a file and leaves the file.

    Source: the Delta protocol, "Deletion Vectors": an inline one, base85 of a 64-bit roaring
    bitmap: its magic number, one part of 32 bits, and in it the container of row 1.
    """
    log = table / "_delta_log"
    entries = [json.loads(line) for path in sorted(log.glob("*.json")) for line in path.open()]
    current = Path(deltalake.DeltaTable(table).file_uris()[0]).name
    add = next(e["add"] for e in entries if e.get("add", {}).get("path") == current)
    add = {key: value for key, value in add.items() if value is not None}
    vector = {
        "storageType": "i",
        "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000005c8Xg0rr91",
        "sizeInBytes": 34,
        "cardinality": 1,
    }
    features = ["deletionVectors"]
    actions = [
        {
            "protocol": {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": features,
                "writerFeatures": features,
            }
        },
        {"remove": {"path": current, "deletionTimestamp": 1, "dataChange": True}},
        {"add": {**add, "deletionVector": vector}},
    ]
    text = "\n".join(map(json.dumps, actions))
    (log / f"{len(list(log.glob('*.json'))):020}.json").write_text(text)


def _rename_column(table: Path, old: str, new: str) -> None:
    """Give a column another name in the log alone, as ALTER TABLE ... RENAME COLUMN does."""
    log = table / "_delta_log" / f"{0:020}.json"
    entries = [json.loads(line) for line in log.open()]
    for entry in entries:
        if "protocol" in entry:
            entry["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if data := entry.get("metaData"):
            schema = json.loads(data["schemaString"])
            for number, field in enumerate(schema["fields"]):
                field["metadata"] = {
                    "delta.columnMapping.id": number + 1,
                    "delta.columnMapping.physicalName": field["name"],
                }
                field["name"] = new if field["name"] == old else field["name"]
            data["schemaString"] = json.dumps(schema)
            data["configuration"] = {
                "delta.columnMapping.mode": "name",
                "delta.columnMapping.maxColumnId": str(len(schema["fields"])),
            }
    log.write_text("\n".join(map(json.dumps, entries)))


class TestIceberg:
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Any:
        sql = pytest.importorskip("pyiceberg.catalog.sql", reason="the group tables installs it")
        catalog = sql.SqlCatalog(
            "c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}"
        )
        catalog.create_namespace("lake")
        return catalog

    @pytest.fixture
    def table(self, catalog: Any, tmp_path: Path) -> Path:
        made = catalog.create_table("lake.t", schema=_rows(0, 1).schema)
        made.append(_rows(0, 20))
        made.overwrite(_rows(20, 10))
        made.delete("n = 23")
        return tmp_path / "lake" / "t"

    def test_only_rows_of_now_are_read(self, table: Path) -> None:
        assert table_kind(LOCAL, str(table)) == "iceberg"
        assert len(list(table.rglob("*.parquet"))) == 3
        source = _open(table)
        assert _numbers(source) == [*range(20, 23), *range(24, 30)]
        assert source.row_id(0).startswith("data/")

    def test_a_table_without_a_catalog_says_which_state_is_current(
        self, catalog: Any, table: Path
    ) -> None:
        catalog.load_table("lake.t").append(_rows(30, 1))
        newest = max(int(p.name.split("-")[0]) for p in table.glob("metadata/*.metadata.json"))
        (table / "metadata" / "version-hint.text").write_text(str(newest - 1))
        assert 30 not in _numbers(_open(table))

    def test_two_states_of_one_version_are_refused(self, table: Path) -> None:
        newest = max(table.glob("metadata/*.metadata.json"))
        shutil.copy(newest, newest.with_name(f"{newest.name.split('-')[0]}-x.metadata.json"))
        with pytest.raises(DataError, match=r"is an? Iceberg table.*Only its catalog knows"):
            _open(table)

    def test_a_copy_is_refused_whose_log_names_the_files_of_the_original(
        self, table: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(table, tmp_path / "copy")
        with pytest.raises(DataError, match=r"names files in another folder .*copied or moved"):
            _open(tmp_path / "copy")

    def test_delete_files_are_refused_by_name(
        self, table: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # No library from Python writes them; Spark and Flink do.
        library = pytest.importorskip("pyiceberg.table")
        whole = library.DataScan.plan_files

        def with_deletes(self: Any) -> Any:
            for task in whole(self):
                task.delete_files = {task.file}
                yield task

        monkeypatch.setattr(library.DataScan, "plan_files", with_deletes)
        with pytest.raises(DataError, match=r"is an? Iceberg table.*delete files: .*rewrite_data"):
            _open(table)

    def test_a_folder_called_metadata_makes_no_table(self, tmp_path: Path) -> None:
        (tmp_path / "metadata").mkdir()
        (tmp_path / "metadata" / "about.json").write_text("{}")
        pq.write_table(_rows(0, 3), tmp_path / "a.parquet")
        assert table_kind(LOCAL, str(tmp_path)) is None
        assert _numbers(_open(tmp_path)) == [0, 1, 2]


class TestInAStore:
    """In a real object store: moto's server, which speaks S3, on the loopback."""

    @pytest.fixture
    def bucket(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        moto = pytest.importorskip("moto.server", reason="the group store installs it")
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        try:
            filesystem = pafs.S3FileSystem(
                endpoint_override=f"http://{host}:{port}",
                allow_bucket_creation=True,
                region="us-east-1",
            )
            filesystem.create_dir("lake")
            yield "lake"
        finally:
            server.stop()

    def test_delta_is_read(self, bucket: str, tmp_path: Path) -> None:
        deltalake = pytest.importorskip("deltalake")
        deltalake.write_deltalake(tmp_path, _rows(0, 20), partition_by=["label"])
        deltalake.write_deltalake(tmp_path, _rows(20, 6), mode="overwrite")
        filesystem, root = resolve(f"s3://{bucket}/a table")
        pafs.copy_files(str(tmp_path), root, destination_filesystem=filesystem)
        assert _numbers(_open(f"s3://{bucket}/a table")) == list(range(20, 26))

    @pytest.mark.slow
    def test_iceberg_is_read(self, bucket: str, tmp_path: Path) -> None:
        sql = pytest.importorskip("pyiceberg.catalog.sql")
        catalog = sql.SqlCatalog(
            "c",
            uri=f"sqlite:///{tmp_path}/c.db",
            warehouse=f"s3://{bucket}/ice",
            **{"s3.endpoint": os.environ["AWS_ENDPOINT_URL"]},
        )
        catalog.create_namespace("n")
        made = catalog.create_table("n.t", schema=_rows(0, 1).schema)
        made.append(_rows(0, 20))
        made.overwrite(_rows(20, 6))
        assert _numbers(_open(f"s3://{bucket}/ice/n/t")) == list(range(20, 26))


class TestWithoutLibrary:
    @pytest.mark.parametrize(
        ("mark", "library", "name"),
        [
            ("_delta_log/0.json", "deltalake", "Delta"),
            ("metadata/00001-a.metadata.json", "pyiceberg", "Iceberg"),
        ],
    )
    def test_a_table_is_refused_with_what_to_install(
        self, mark: str, library: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, library, None)
        (tmp_path / mark).parent.mkdir()
        (tmp_path / mark).write_text("{}")
        pq.write_table(_rows(0, 3), tmp_path / "a.parquet")
        with pytest.raises(
            DataError,
            match=rf"{name} table, whose files also hold removed rows.*pip install 'raysl\[tab",
        ):
            _open(tmp_path)

    def test_hudi_is_refused_by_name(self, tmp_path: Path) -> None:
        (tmp_path / ".hoodie").mkdir()
        pq.write_table(_rows(0, 3), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"is a Hudi table.*Write its current rows"):
            _open(tmp_path)

    def test_a_store_that_is_not_asked_is_named(self) -> None:
        fsspec = pytest.importorskip("fsspec")
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
        with pytest.raises(DataError, match=r"is a Delta table.*from local disks and from s3://"):
            current_files(filesystem, "bucket/t", "delta", DataConfig(source="gs://bucket/t"))

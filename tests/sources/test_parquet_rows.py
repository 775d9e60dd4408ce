"""What a row of Parquet is called, and what becomes of rows that cannot be read."""

import errno
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.sources import parquet, row_group, storage
from raysl.sources.lasting import is_lasting
from raysl.sources.linked import Link, read_links
from raysl.sources.open import open_source
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import DataConfig, SourceConfig, Unreadable

LOCAL = pafs.LocalFileSystem()


def _image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(3000)


def _write(path: Path, start: int, count: int, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = range(start, start + count)
    columns = {"image": [_image(row) for row in rows], "n": list(rows), **more}
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Ten and seven images, numbered on, in row groups of four."""
    return [
        str(_write(tmp_path / "x" / "0.parquet", 0, 10)),
        str(_write(tmp_path / "y" / "1.parquet", 10, 7)),
    ]


def _open(files: list[str], *conditions: Any, root: str = "", **settings: Any) -> ParquetSource:
    config = SourceConfig(source="toy", filter=conditions, **settings)
    return ParquetSource(config, LOCAL, files, window_mib=1, root=root)


def _count(source: ParquetSource) -> int:
    return int(source.group_sizes.sum())


def _ids(source: ParquetSource) -> list[str]:
    return [source.row_id(row) for row in range(_count(source))]


class TestRowId:
    def test_is_the_file_below_the_root_and_the_row_in_it(self, files: list[str]) -> None:
        expected = [f"x/0.parquet:{row}" for row in range(10)]
        expected += [f"y/1.parquet:{row}" for row in range(7)]
        assert _ids(_open(files)) == expected
        assert _ids(pickle.loads(pickle.dumps(_open(files)))) == expected
        assert _open(files[:1]).row_id(9) == "0.parquet:9"
        above = str(Path(files[0]).parents[2])
        assert _open(files, root=above).row_id(9).endswith("/x/0.parquet:9")

    def test_stays_the_same_whatever_is_left_out_around_it(self, files: list[str]) -> None:
        whole = _open(files)
        of = {_image(n): row_id for n, row_id in enumerate(_ids(whole))}
        for source in (
            _open(files, ("n", "in", (5, 9, 12, 16))),
            _open(files, ("n", ">", 5), limit=5),
            _open(files, limit=3),
        ):
            images = source.read(range(_count(source)))
            assert [of[image] for image in images] == _ids(source)  # type: ignore[index]

    def test_is_that_of_the_folder_by_whatever_name_it_is_opened(self, files: list[str]) -> None:
        folder = Path(files[0]).parents[1]
        for name in (f"{folder}", f"{folder}/", f"{folder}/*.parquet", f"file://{folder}"):
            config = DataConfig(source=name)
            source = open_source(config, data=config)
            assert source.row_id(16) == "y/1.parquet:6"

    @pytest.mark.parametrize(
        ("comparison", "value", "kept"),
        [
            ("==", "y/1.parquet:2", [12]),
            ("in", ("y/1.parquet:2", "x/0.parquet:9", "z/2.parquet:0"), [9, 12]),
            ("not in", tuple(f"x/0.parquet:{row}" for row in range(9)), list(range(9, 17))),
            ("matches", "*:1", [1, 11]),
            ("matches", "y/*", list(range(10, 17))),
        ],
        ids=["equal", "in", "not in", "rows", "files"],
    )
    def test_is_a_column_of_filters(
        self, comparison: str, value: Any, kept: list[int], files: list[str]
    ) -> None:
        source = _open(files, ("row_id", comparison, value))
        assert source.read(range(_count(source))) == [_image(n) for n in kept]

    @pytest.mark.parametrize("comparison", ["in file", "not in file"])
    def test_is_a_column_of_filters_by_a_file(
        self, comparison: str, files: list[str], tmp_path: Path
    ) -> None:
        names = tmp_path / "names.txt"
        names.write_text("x/0.parquet:3\ny/1.parquet:0\n")
        source = _open(files, ("row_id", comparison, str(names)), ("n", "<", 12))
        kept = [3, 10] if comparison == "in file" else [0, 1, 2, 4, 5, 6, 7, 8, 9, 11]
        assert source.read(range(_count(source))) == [_image(n) for n in kept]

    def test_wins_over_a_column_of_that_name(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", 0, 5, row_id=["x"] * 5)
        assert _count(_open([str(path)], ("row_id", "==", "a.parquet:4"))) == 1
        assert _count(_open([str(path)], ("row_id", "!=", "x"), ("n", ">", 0))) == 4

    def test_is_named_among_the_columns_there_are(self, files: list[str]) -> None:
        with pytest.raises(DataError, match=r"no column 'm'; there are image, n, row_id"):
            _open(files, ("m", "==", 1), ("row_id", "==", "a"))


def _damage(path: str, group: int) -> None:
    begins = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = begins.dictionary_page_offset or begins.data_page_offset
    data = bytearray(Path(path).read_bytes())
    data[start : start + 40] = b"\xff" * 40
    Path(path).write_bytes(data)


class TestUnreadable:
    @pytest.fixture
    def attempts(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Row groups that were asked for."""
        asked: list[int] = []
        read = row_group.read_images

        def spy(filesystem: Any, file: Any, number: int, columns: Any) -> Any:
            asked.append(number)
            return read(filesystem, file, number, columns)

        monkeypatch.setattr(parquet, "read_images", spy)
        return asked

    def test_a_damaged_row_group_is_bad_images_among_others_and_read_once(
        self, files: list[str], attempts: list[int]
    ) -> None:
        source = _open(files)
        _damage(files[0], 1)
        for _ in range(3):
            read = source.read([0, 4, 7, 8])
            assert [read[0], read[3]] == [_image(0), _image(8)]
            for image in read[1:3]:
                assert isinstance(image, Unreadable)
                assert image.reason.startswith(f"{files[0]} row group 1 cannot be read: ")
        assert attempts == [0, 1, 2]

    def test_a_file_that_is_gone_or_cut_is_bad_images(self, files: list[str]) -> None:
        source = _open(files)
        Path(files[0]).unlink()
        Path(files[1]).write_bytes(Path(files[1]).read_bytes()[:200])
        for row in (0, 9, 16):
            assert isinstance(source.read([row])[0], Unreadable)

    def test_a_file_that_is_cut_after_its_footer_was_read_is_bad_images(
        self, files: list[str]
    ) -> None:
        source = _open(files)
        assert source.read([0]) == [_image(0)]
        Path(files[0]).write_bytes(Path(files[0]).read_bytes()[:13_000])
        assert isinstance(source.read([5])[0], Unreadable)

    def test_another_file_of_fewer_rows_is_an_error(self, files: list[str]) -> None:
        source = _open(files)
        _write(Path(files[0]), 0, 2)
        with pytest.raises(DataError, match=r"row group 0: has changed since the source"):
            source.read([3])
        with pytest.raises(DataError, match=r"row group 2: has changed since the source"):
            source.read([9])

    def test_want_of_file_handles_is_an_error(
        self, files: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = _open(files)

        def too_many(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(parquet, "open_parquet_raw", too_many)
        with pytest.raises(DataError, match=r"row group 0: cannot be read: .*Too many open files"):
            source.read([0])


class TestDamagedAtOpening:
    def test_all_files_are_named_at_once(self, tmp_path: Path) -> None:
        paths = [str(_write(tmp_path / f"{n}.parquet", n, 1)) for n in range(9)]
        for number in (1, 2, 4, 5, 6, 7):
            Path(paths[number]).write_bytes(b"" if number % 2 else b"half of a file, in truth")
        with pytest.raises(DataError, match=r"^6 of 9 files are damaged:\n") as caught:
            _open(paths)
        lines = str(caught.value).splitlines()
        assert len(lines) == 7
        assert lines[1].startswith(f"  {paths[1]}: cannot be read as Parquet: ")
        assert lines[1].endswith("; copy it again, or exclude it from the folder or glob")
        assert lines[-1] == "  and 1 more"

    def test_one_that_a_limit_looks_at_is_an_error_too(self, tmp_path: Path) -> None:
        paths = [str(_write(tmp_path / f"{n}.parquet", n, 5)) for n in range(3)]
        Path(paths[1]).write_bytes(b"")
        with pytest.raises(DataError, match=r"1\.parquet: cannot be read as Parquet"):
            _open(paths, limit=3)

    def test_one_that_is_not_there_is_an_error_without_that_advice(self, files: list[str]) -> None:
        with pytest.raises(DataError, match=r"2\.parquet: cannot be read as .*o such file[^;]*$"):
            _open([*files, files[1].replace("1.par", "2.par")])


class _Store(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A store in memory that fails when it is told to."""

    protocol = "failing"
    cacheable = False
    down = False

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if self.down and mode == "rb":
            raise OSError("connection reset by peer")
        return super()._open(path, mode, **settings)


class TestStore:
    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Store]:
        monkeypatch.setattr(storage, "_PAUSES_S", (0.0, 0.0))
        store = _Store()
        yield store
        store.down = False
        store.rm("/bucket", recursive=True)

    @pytest.fixture
    def filesystem(self, store: _Store, files: list[str]) -> pafs.FileSystem:
        for name in files:
            store.pipe_file(f"/bucket/data/{Path(name).name}", Path(name).read_bytes())
        store.pipe_file("/bucket/images/0.jpg", b"the first")
        return pafs.PyFileSystem(pafs.FSSpecHandler(store))

    def _open(self, filesystem: pafs.FileSystem) -> ParquetSource:
        names = ["/bucket/data/0.parquet", "/bucket/data/1.parquet"]
        return ParquetSource(SourceConfig(source="toy"), filesystem, names, window_mib=1)

    def test_that_does_not_answer_is_an_error_and_no_bad_image(
        self, filesystem: pafs.FileSystem, store: _Store
    ) -> None:
        source = self._open(filesystem)
        store.down = True
        with pytest.raises(DataError, match=r"row group 1: cannot be read: .*connection reset"):
            source.read([4])
        store.down = False
        assert source.read([4]) == [_image(4)]

    def test_damage_in_it_is_bad_images(
        self, filesystem: pafs.FileSystem, store: _Store, files: list[str]
    ) -> None:
        source = self._open(filesystem)
        _damage(files[0], 1)
        store.pipe_file("/bucket/data/0.parquet", Path(files[0]).read_bytes())
        read = source.read([0, 5, 16])
        assert [read[0], read[2]] == [_image(0), _image(16)]
        assert isinstance(read[1], Unreadable)

    def test_paths_are_relative_and_stay_in_it(self, filesystem: pafs.FileSystem) -> None:
        folder = "bucket/data"
        links = [
            Link(folder, path) for path in ("../images/0.jpg", "../images/1.jpg", "/etc/hosts")
        ]
        read = read_links(filesystem, [*links, Link(folder, "../../other/x.jpg")])
        assert read[0] == b"the first"
        reasons = [image.reason for image in read[1:] if isinstance(image, Unreadable)]
        assert reasons[0].startswith("bucket/images/1.jpg: no such file (the path '../images/1.j")
        assert "is absolute; in a store" in reasons[1]
        assert reasons[2] == "its path '../../other/x.jpg' leads out of the store"

    def test_paths_in_one_that_does_not_answer_are_an_error(
        self, filesystem: pafs.FileSystem, store: _Store
    ) -> None:
        store.down = True
        with pytest.raises(DataError, match=r"bucket/images/0\.jpg: cannot be read: .*reset"):
            read_links(filesystem, [Link("bucket/data", "../images/0.jpg")])

    def test_no_right_to_an_object_lasts(self, filesystem: pafs.FileSystem) -> None:
        denied = OSError("AWS Error ACCESS_DENIED during GetObject operation")
        assert is_lasting(filesystem, denied, "bucket/images/0.jpg")
        assert is_lasting(filesystem, PermissionError(), "bucket/images/0.jpg")
        assert not is_lasting(filesystem, MemoryError(), "bucket/images/0.jpg")

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.config.load import validate
from raysl.errors import ConfigError, DataError
from raysl.sources.filter import RowFilter, columns_of, describe_filter
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import SourceConfig

TABLE = pa.table({"n": [1, 2, None, 4], "name": ["cat", "dog", "cow", None]})


class TestKeep:
    @pytest.mark.parametrize(
        ("condition", "rows"),
        [
            (("n", "==", 2), [1]),
            (("n", "!=", 2), [0, 3]),
            (("n", "<", 2), [0]),
            (("n", "<=", 2), [0, 1]),
            (("n", ">", 1.5), [1, 3]),
            (("n", ">=", 4), [3]),
            (("n", "in", (1, 4, 9)), [0, 3]),
            (("n", "not in", (1, 4)), [1]),
            (("name", "==", "dog"), [1]),
            (("name", "matches", "c*"), [0, 2]),
            (("name", "matches", "?o?"), [1, 2]),
            (("name", "in", ("cat", "cow")), [0, 2]),
        ],
    )
    def test_a_row_without_a_value_never_matches(self, condition: Any, rows: list[int]) -> None:
        assert np.flatnonzero(RowFilter([condition], where="x").keep(TABLE)).tolist() == rows

    def test_a_list_may_stand_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text("cat\ncow\n")
        (tmp_path / "numbers.txt").write_text("1\n4\n")

        def kept(*condition: Any) -> list[int]:
            return np.flatnonzero(RowFilter([condition], where="x").keep(TABLE)).tolist()

        assert kept("name", "in file", str(tmp_path / "names.txt")) == [0, 2]
        assert kept("name", "not in file", str(tmp_path / "names.txt")) == [1]
        assert kept("n", "in file", str(tmp_path / "numbers.txt")) == [0, 3]
        with pytest.raises(DataError, match="does not compare"):
            kept("n", "in file", str(tmp_path / "names.txt"))
        with pytest.raises(DataError, match="cannot be read"):
            kept("n", "in file", str(tmp_path / "none.txt"))

    def test_all_conditions_must_hold_and_none_keeps_all(self) -> None:
        both = [("n", "<", 3), ("name", "matches", "*o*")]
        assert RowFilter(both, where="x").keep(TABLE).tolist() == [False, True, False, False]  # type: ignore[arg-type]
        assert RowFilter([], where="x").keep(TABLE).all()

    @pytest.mark.parametrize(
        ("condition", "message"),
        [
            (("size", ">", 3), r"^x: data\.filter .*: no column 'size'; there are n, name$"),
            (("name", ">", 3), r"^x: data\.filter .*: the column holds string, which does not"),
            (("n", "in", 3), r"'in' takes a list of values"),
            (("n", "==", (3, 4)), r"takes one value; a list goes with 'in'"),
        ],
    )
    def test_what_does_not_fit_is_named(self, condition: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            RowFilter([condition], where="x").keep(TABLE)

    def test_columns_are_named_once(self) -> None:
        assert columns_of([("a", ">", 1), ("b", "<", 2), ("a", "<", 3)]) == ["a", "b"]

    def test_a_comparison_that_is_not_known_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="filter"):
            validate(SourceConfig, {"source": "a", "filter": [["n", "=", 3]]}, where="x")


class TestListFiles:
    def kept(self, path: Path, how: str, *tables: pa.Table) -> tuple[list[int], tuple[str, ...]]:
        rows = RowFilter([("row_id", how, str(path))], where="x")  # type: ignore[list-item]
        return [int(rows.keep(table).sum()) for table in tables], rows.notes()

    @pytest.fixture
    def parts(self) -> list[pa.Table]:
        names = ["a/0.jpg", "a/1.jpg"], ["b/0.jpg", "b/1.jpg", "b/2.jpg"]
        return [pa.table({"row_id": part}) for part in names]

    def test_lines_may_be_found_in_any_part(self, parts: list[pa.Table], tmp_path: Path) -> None:
        (path := tmp_path / "drop.txt").write_text("a/1.jpg\nb/0.jpg\n\n")
        counts, notes = self.kept(path, "not in file", *parts)
        assert counts == [1, 2]
        assert notes == ("2 of 5 images are left out by data.filter",)

    def test_a_list_that_names_nothing_is_said(self, parts: list[pa.Table], tmp_path: Path) -> None:
        (path := tmp_path / "drop.txt").write_text("001.tar image at byte 20992\nother\n")
        counts, notes = self.kept(path, "not in file", *parts)
        assert counts == [2, 3]
        assert notes == (
            f"none of the 2 lines of {path} is a row_id of this source; they look like "
            f"'001.tar image at byte 20992', those of the images like 'a/0.jpg'",
        )

    def test_some_lines_that_name_nothing_are_counted(
        self, parts: list[pa.Table], tmp_path: Path
    ) -> None:
        (path := tmp_path / "drop.txt").write_text("a/0.jpg\nc/0.jpg\n")
        _, notes = self.kept(path, "not in file", *parts)
        assert notes[1:] == (
            f"1 of the 2 lines of {path} is not a row_id of this source, such as 'c/0.jpg'",
        )

    def test_an_empty_list_drops_nothing_and_says_so_but_cannot_keep_any(
        self, parts: list[pa.Table], tmp_path: Path
    ) -> None:
        (path := tmp_path / "drop.txt").write_text("\n")
        counts, notes = self.kept(path, "not in file", *parts)
        assert counts == [2, 3]
        assert notes == (f"{path} has no lines: data.filter 'not in file' drops nothing",)
        with pytest.raises(DataError, match="the file has no lines, so no image would be left"):
            self.kept(path, "in file", *parts)

    def test_nothing_left_says_why(self, parts: list[pa.Table], tmp_path: Path) -> None:
        (path := tmp_path / "keep.txt").write_text("0.jpg\n")
        rows = RowFilter([("row_id", "in file", str(path))], where="data.source=p")
        assert not any(rows.keep(part).any() for part in parts)
        wanted = "^data.source=p: data.filter leaves no image: the line of .* is not a row_id"
        with pytest.raises(DataError, match=wanted):
            raise rows.nothing_left()

    def test_windows_line_ends_and_marks_are_no_part_of_a_line(
        self, parts: list[pa.Table], tmp_path: Path
    ) -> None:
        (path := tmp_path / "keep.txt").write_bytes(b"\xef\xbb\xbfa/0.jpg\r\nb/2.jpg\r\n")
        assert self.kept(path, "in file", *parts)[0] == [1, 1]

    def test_a_filter_is_known_by_what_its_lists_hold_not_by_where_they_lie(
        self, tmp_path: Path
    ) -> None:
        for name, text in (("a.txt", "1\n2\n"), ("b.txt", "1\n2"), ("c.txt", "1\n")):
            (tmp_path / name).write_text(text)
        a, b, c = (
            describe_filter([("n", "in file", str(tmp_path / f"{name}.txt")), ("m", "==", 1)])
            for name in "abc"
        )
        assert a == b != c


class TestParquet:
    """Eleven images, 0 to 10, in row groups of three, in two files; n is the number."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        paths = []
        for number, rows in enumerate([range(7), range(7, 11)]):
            columns = {
                "image": [b"image %d" % row for row in rows],
                "label": [row % 2 for row in rows],
                "n": list(rows),
            }
            paths.append(str(tmp_path / f"{number}.parquet"))
            pq.write_table(pa.table(columns), paths[-1], row_group_size=3)
        return paths

    def _open(self, files: list[str], *conditions: Any, **settings: Any) -> ParquetSource:
        config = SourceConfig(source="toy", filter=conditions, **settings)
        return ParquetSource(config, pafs.LocalFileSystem(), files, window_mib=1)

    def _numbers(self, source: ParquetSource) -> list[int]:
        rows = np.arange(source.group_sizes.sum())
        return [int(data.split()[1]) for data in source.read(rows)]  # type: ignore[union-attr]

    def test_rows_labels_and_names_stay_together(self, files: list[str]) -> None:
        source = self._open(files, ("n", "in", (0, 2, 6, 8, 9)))
        assert source.group_sizes.tolist() == [2, 1, 2]  # the second group of each is empty
        assert self._numbers(source) == [0, 2, 6, 8, 9]
        assert source.read([4, 0]) == [b"image 9", b"image 0"]
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [0, 0, 0, 0, 1]
        assert source.where(1) == f"{files[0]} row 2 (row group 0)"
        assert source.where(4) == f"{files[1]} row 2 (row group 0)"

    def test_a_limit_counts_kept_rows(self, files: list[str]) -> None:
        source = self._open(files, ("n", ">=", 2), limit=6)
        assert self._numbers(source) == [2, 3, 6, 7, 8, 10]  # of 2, 3 4 5, 6, 7 8 9 and 10
        assert source.group_sizes.tolist() == [1, 1, 1, 2, 1]
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [0, 1, 0, 1, 0, 0]
        assert source.row_id(2) == "0.parquet:6"
        assert source.row_id(5) == "1.parquet:3"

    def test_fingerprint_changes_with_filter_limit_and_what_is_kept(self, files: list[str]) -> None:
        seen = [
            self._open(files).fingerprint,
            self._open(files, ("n", ">", 2)).fingerprint,
            self._open(files, ("n", ">", 3)).fingerprint,
            self._open(files, ("n", ">", 3), limit=2).fingerprint,
        ]
        assert len(set(seen)) == 4
        assert self._open(files, ("n", ">", 2)).fingerprint == seen[1]

    def test_images_are_not_read_to_filter(
        self, files: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = pq.ParquetFile.read
        asked = []

        def spy(self: Any, **settings: Any) -> Any:
            asked.append(settings["columns"])
            return read(self, **settings)

        monkeypatch.setattr(pq.ParquetFile, "read", spy)
        self._open(files, ("n", ">", 2), ("label", "==", 1))
        assert asked == [["n", "label"]] * 2

    def test_that_leaves_nothing_or_asks_for_another_column_is_an_error(
        self, files: list[str]
    ) -> None:
        with pytest.raises(DataError, match=r"data\.filter leaves no image"):
            self._open(files, ("n", ">", 99))
        with pytest.raises(DataError, match=r"no column 'm'; there are image, label, n"):
            self._open(files, ("m", ">", 99))

"""How a limit is spread over the files, the row groups and the rows of a source of Parquet."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.sources import footers
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import SourceConfig, reading_order


def _write(root: Path, files: Sequence[int], *, per_group: int, per_class: int) -> list[str]:
    """Write files of so many rows; row n of all is image n, and of class n // per_class."""
    paths, start = [], 0
    for number, count in enumerate(files):
        rows = range(start, start + count)
        columns = {
            "image": pa.array([b"%d" % row for row in rows], pa.binary()),
            "label": pa.array([row // per_class for row in rows], pa.int64()),
        }
        paths.append(str(root / f"{number:05}.parquet"))
        pq.write_table(pa.table(columns), paths[-1], row_group_size=per_group)
        start += count
    return paths


def _open(files: list[str], *conditions: Any, **settings: Any) -> ParquetSource:
    config = SourceConfig(source="toy", filter=conditions, **settings)
    return ParquetSource(config, pafs.LocalFileSystem(), files, window_mib=1)


def _rows(source: ParquetSource) -> list[int]:
    images = source.read(np.arange(int(source.group_sizes.sum())))
    return [int(image) for image in images]  # type: ignore[arg-type]


def _classes(source: ParquetSource) -> list[int]:
    labels = source.labels()
    assert labels is not None
    return [int(source.class_names[label]) for label in labels]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose footers were read."""
    names: list[str] = []
    read = footers.open_parquet_raw

    def spy(filesystem: Any, path: str, metadata: Any = None) -> Any:
        names.append(Path(path).name)
        return read(filesystem, path, metadata)

    monkeypatch.setattr(footers, "open_parquet_raw", spy)
    return names


class TestLimit:
    @pytest.mark.parametrize("limit", [1, 2, 5, 16, 17, 100, 333, 999, 1000, 1001])
    @pytest.mark.parametrize(
        "files",
        [[1000], [10] * 100, [1, 0, 500, 3, 496], [250, 250, 250, 250]],
        ids=["one file", "many files", "uneven files", "four files"],
    )
    def test_is_met_exactly_with_rows_in_their_order_and_with_their_labels(
        self, files: list[int], limit: int, tmp_path: Path
    ) -> None:
        source = _open(_write(tmp_path, files, per_group=7, per_class=10), limit=limit)
        rows = _rows(source)
        assert len(rows) == min(limit, 1000)
        assert rows == sorted(set(rows))
        assert _classes(source) == [row // 10 for row in rows]
        starts = np.concatenate([[0], np.cumsum(files)])
        for place in (0, len(rows) - 1):
            file = int(np.searchsorted(starts, rows[place], side="right")) - 1
            assert source.row_id(place) == f"{file:05}.parquet:{rows[place] - starts[file]}"

    @pytest.mark.parametrize(
        ("files", "per_group"),
        [([400], 400), ([400], 10), ([20] * 20, 20), ([400] + [0] * 19, 400)],
        ids=["one group", "many groups", "many files", "one file among empty ones"],
    )
    def test_files_sorted_by_class_give_all_classes(
        self, files: list[int], per_group: int, tmp_path: Path
    ) -> None:
        paths = _write(tmp_path, files, per_group=per_group, per_class=100)
        counts = np.bincount(_classes(_open(paths, limit=40)))
        assert counts.tolist() == pytest.approx([10] * 4, abs=3)

    def test_reads_few_row_groups_far_apart(self, tmp_path: Path) -> None:
        paths = _write(tmp_path, [1000] * 4, per_group=10, per_class=1)
        assert _open(paths, limit=16).group_sizes.tolist() == [1] * 16
        assert sorted(_open(paths, limit=60).group_sizes.tolist()) == [3] * 4 + [4] * 12
        assert _open(paths, limit=1000).group_sizes.tolist() == [10] * 100
        rows = np.array(_rows(_open(paths, limit=1000)))
        assert np.diff(rows).max() == 31

    def test_reads_few_footers_of_many_files(self, tmp_path: Path, opened: list[str]) -> None:
        paths = _write(tmp_path, [10] * 300, per_group=10, per_class=1)
        source = _open(paths, limit=20)
        assert len(opened) == 16
        assert np.diff(sorted(int(name[:5]) for name in opened)).max() <= 19
        assert len(_rows(source)) == 20
        opened.clear()
        assert len(_rows(_open(paths, limit=1500))) == 1500
        assert len(opened) < 300

    def test_of_kept_rows_takes_those_far_apart(self, tmp_path: Path) -> None:
        paths = _write(tmp_path, [100] * 4, per_group=100, per_class=4)
        whole = _rows(_open(paths, ("label", "in", tuple(range(0, 100, 2)))))
        source = _open(paths, ("label", "in", tuple(range(0, 100, 2))), limit=40)
        rows = _rows(source)
        assert len(rows) == 40
        assert set(rows) < set(whole)
        assert np.diff(rows).max() <= 15
        assert source.group_sizes.tolist() == [10] * 4
        assert source.row_id(39) == f"00003.parquet:{rows[39] - 300}"
        assert source.where(39) == f"{paths[3]} row {rows[39] - 300} (row group 0)"

    def test_a_filter_that_keeps_little_is_looked_for_until_the_limit_is_met(
        self, tmp_path: Path
    ) -> None:
        paths = _write(tmp_path, [10] * 60, per_group=10, per_class=1)
        wanted = (11, 12, 405, 590)
        assert _rows(_open(paths, ("label", "in", wanted), limit=4)) == list(wanted)
        assert len(_rows(_open(paths, ("label", "in", wanted), limit=3))) == 3

    def test_is_the_same_every_time_and_after_pickling(self, tmp_path: Path) -> None:
        paths = _write(tmp_path, [50] * 30, per_group=5, per_class=1)
        first, second = _open(paths, limit=77), _open(paths, limit=77)
        copy = pickle.loads(pickle.dumps(first))
        assert _rows(first) == _rows(second) == _rows(copy)
        assert first.fingerprint == second.fingerprint
        assert copy.row_id(76) == first.row_id(76)

    def test_without_effect_gives_all_rows(self, tmp_path: Path) -> None:
        paths = _write(tmp_path, [50] * 3, per_group=7, per_class=1)
        assert _open(paths, limit=150).group_sizes.tolist() == _open(paths).group_sizes.tolist()


class TestReadingOrder:
    @pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 100, 1000])
    def test_names_each_file_once(self, count: int) -> None:
        assert sorted(reading_order(count, 5)) == list(range(count))
        assert reading_order(count, None) == list(range(count))

    @pytest.mark.parametrize("first", [2, 4, 7, 16])
    def test_the_first_few_are_far_apart(self, first: int) -> None:
        gaps = np.diff(sorted(reading_order(1000, 5)[:first]))
        assert gaps.min() >= 1000 / first / 2 - 1
        assert gaps.max() <= 2000 / first + 1

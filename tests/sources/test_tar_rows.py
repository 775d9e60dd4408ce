"""How rows of tar shards are called, filtered by that name, and cut to a limit."""

import io
import pickle
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raysl.errors import DataError
from raysl.sources import tar, tar_choice
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig
from raysl.sources.tar import TarSource
from raysl.sources.tar_index import ShardIndex, index_shard


def _write(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name in names:
            member = tarfile.TarInfo(name)
            content = name.encode(errors="surrogateescape")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def _open(source: Path | str, **settings: Any) -> TarSource:
    config = DataConfig(source=str(source), **settings)
    opened = open_source(config, data=config)
    assert isinstance(opened, TarSource)
    return opened


def _num_images(source: TarSource) -> int:
    return int(source.group_sizes.sum())


def _ids(source: TarSource) -> list[str]:
    return [source.row_id(row) for row in range(_num_images(source))]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard's headers are read."""
    counts: Counter[str] = Counter()

    def count(filesystem: pafs.FileSystem, path: str, *args: Any, **settings: Any) -> ShardIndex:
        counts[Path(path).name] += 1
        return index_shard(filesystem, path, *args, **settings)

    for room in (tar, tar_choice):
        monkeypatch.setattr(room, "index_shard", count)
    return counts


class TestRowId:
    def test_is_the_shard_below_the_folder_and_the_member(self, tmp_path: Path) -> None:
        _write(tmp_path / "x" / "0.tar", ["cat/1.jpg", "./dog/1.jpg"])
        _write(tmp_path / "y" / "0.tar", ["cat/1.jpg", "b\udcff.jpg"])
        source = _open(tmp_path)
        ids = ["x/0.tar/cat/1.jpg", "x/0.tar/dog/1.jpg", "y/0.tar/cat/1.jpg", "y/0.tar/b\\xff.jpg"]
        assert _ids(source) == ids
        assert len(set(ids)) == _num_images(source)
        assert _ids(_open(tmp_path / "y" / "0.tar")) == ["0.tar/cat/1.jpg", "0.tar/b\\xff.jpg"]

    def test_without_a_root_it_begins_below_the_folder_that_holds_all(self, tmp_path: Path) -> None:
        files = [str(_write(tmp_path / place, ["1.jpg"])) for place in ("x/0.tar", "y/z/1.tar")]
        config = DataConfig(source="given")
        source = TarSource(config, pafs.LocalFileSystem(), files, window_mib=1)
        assert _ids(source) == ["x/0.tar/1.jpg", "y/z/1.tar/1.jpg"]
        root = str(tmp_path.parent)
        source = TarSource(config, pafs.LocalFileSystem(), files, window_mib=1, root=root)
        assert source.row_id(0) == f"{tmp_path.name}/x/0.tar/1.jpg"

    def test_names_are_read_once_a_shard_and_are_not_kept_with_the_source(
        self, tmp_path: Path, opened: Counter[str]
    ) -> None:
        for shard in range(3):
            name = f"{shard}-a-long-name-" * 6
            _write(tmp_path / f"{shard}.tar", [f"{name}{n:04}.jpg" for n in range(300)])
        source = _open(tmp_path)
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(source.row_id, range(900)))
        assert len(set(ids)) == 900
        assert set(opened.values()) == {2}
        stored = pickle.dumps(source)
        assert len(stored) < 900 * 17 + 3000
        assert pickle.loads(stored).row_id(899) == ids[899]

    def test_the_names_of_a_few_shards_are_held_at_most(
        self, tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tar, "_NAMES_BYTES", 600)
        for shard in range(3):
            _write(tmp_path / f"{shard}.tar", [f"{n:04}.jpg" for n in range(20)])
        source = _open(tmp_path)
        _ids(source)
        assert opened == {f"{shard}.tar": 2 for shard in range(3)}
        source.row_id(0)
        assert opened["0.tar"] == 3


class TestFilter:
    def test_takes_ids_as_path_and_as_row_id(self, tmp_path: Path) -> None:
        for shard in "ab":
            _write(tmp_path / f"{shard}.tar", [f"{n}.jpg" for n in range(4)])
        dropped = [_open(tmp_path).row_id(row) for row in (1, 6)]
        (tmp_path / "drop.txt").write_text("\n".join(dropped) + "\n")
        for column in ("path", "row_id"):
            kept = _open(tmp_path, filter=((column, "not in file", str(tmp_path / "drop.txt")),))
            assert _ids(kept) == [row for row in _ids(_open(tmp_path)) if row not in dropped]
        with pytest.raises(DataError, match=r"there are path, row_id, bytes"):
            _open(tmp_path, filter=(("size", ">", 1),))

    def test_patterns_look_into_the_whole_name(self, tmp_path: Path) -> None:
        _write(tmp_path / "a.tar", ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"])
        assert _ids(_open(tmp_path, filter=(("path", "matches", "*cat/*"),))) == ["a.tar/cat/1.jpg"]

    def test_another_list_under_the_same_name_is_another_source(self, tmp_path: Path) -> None:
        _write(tmp_path / "a.tar", ["1.jpg", "2.jpg", "3.jpg"])
        seen = set()
        for dropped in ("a.tar/1.jpg", "a.tar/2.jpg"):
            (tmp_path / "drop.txt").write_text(dropped)
            condition = ("path", "not in file", str(tmp_path / "drop.txt"))
            seen.add(_open(tmp_path, filter=(condition,)).fingerprint)
        assert len(seen) == 2


class TestLimit:
    @pytest.fixture
    def many(self, tmp_path: Path) -> Path:
        """A hundred shards of ten images, each of a class of its own."""
        for shard in range(100):
            _write(tmp_path / f"{shard:03}.tar", [f"c{shard}/{n}.jpg" for n in range(10)])
        return tmp_path

    @pytest.mark.parametrize("limit", [1, 2, 7, 16, 40, 159, 161, 555, 999, 1000, 2000])
    def test_is_met_exactly_in_order_and_far_apart(self, limit: int, many: Path) -> None:
        source = _open(many, limit=limit)
        ids = _ids(source)
        assert len(ids) == min(limit, 1000)
        assert ids == sorted(ids)
        shards = Counter(row.split("/")[0] for row in ids)
        assert len(shards) >= min(limit, 16)
        assert max(shards.values()) - min(shards.values()) <= 1
        if limit >= 16:
            halves = Counter(int(shard[:3]) // 50 for shard in shards)
            assert abs(halves[0] - halves[1]) <= 16

    def test_reads_few_shards(self, many: Path, opened: Counter[str]) -> None:
        assert _num_images(_open(many, limit=100)) == 100
        assert len(opened) == 16

    def test_takes_the_same_rows_each_time_and_counts_what_the_filter_leaves(
        self, many: Path
    ) -> None:
        settings: dict[str, Any] = {"limit": 30, "filter": (("path", "matches", "*/c?[05]/*"),)}
        ids = _ids(_open(many, **settings))
        assert len(ids) == 30
        assert ids == _ids(_open(many, **settings))
        assert {row[2] for row in ids} == {"0", "5"}
        assert len({row.split("/")[0] for row in ids}) == 16

    def test_notes_are_of_the_shards_that_were_looked_at(self, many: Path) -> None:
        for shard in range(4, 100, 8):
            (many / f"{shard:03}.tar").write_bytes(b"")
        (many / "001.tar").write_bytes(b"")
        assert _open(many, limit=20).notes == (
            "2 of 18 tar shards left out: 0 bytes: 012.tar, 068.tar",
        )

"""Tar shards that are empty, damaged or cut short, or cannot be read, before opening and after."""

import gzip
import io
import os
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raysl.errors import DataError
from raysl.sources import lasting, tar
from raysl.sources.lasting import Failures
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Encoded, Unreadable
from raysl.sources.tar import TarSource


def _tar(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 600
            shard.addfile(member, io.BytesIO(name.ljust(600).encode()))
    return file.getvalue()


def _open(source: Path | str, **settings: Any) -> TarSource:
    config = DataConfig(source=str(source), **settings)
    opened = open_source(config, data=config)
    assert isinstance(opened, TarSource)
    return opened


def _names(source: TarSource) -> list[str]:
    images = source.read(range(int(source.group_sizes.sum())))
    return [image.decode().strip() for image in images if isinstance(image, bytes)]


def _reasons(found: list[Encoded]) -> list[str]:
    return [each.reason for each in found if isinstance(each, Unreadable)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of three images each: a header, two blocks, ..., and the closing blocks."""
    for shard in "abc":
        (tmp_path / f"{shard}.tar").write_bytes(_tar([f"{shard}{n}.jpg" for n in range(3)]))
    return tmp_path


_MEMBER_BYTES = 3 * 512
_OF_B = ["b0.jpg", "b1.jpg", "b2.jpg"]


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


class TestOpening:
    @pytest.mark.parametrize(
        ("damage", "left", "note"),
        [
            (lambda b: b"", 0, "left out: 0 bytes"),
            (lambda b: b"x" * 2000, 0, "left out: not tar files"),
            (lambda b: b[:300], 0, "left out: not tar files"),
            (gzip.compress, 0, r"left out: compressed \(gzip\); unpack them to \.tar"),
            (lambda b: b[: 3 * _MEMBER_BYTES], 3, "without the blocks that close a tar file, "),
            (lambda b: b[: 2 * _MEMBER_BYTES], 2, "without the blocks that close a tar file, "),
            # The last image's bytes are there, the filling of its last block is not.
            (lambda b: b[: 2 * _MEMBER_BYTES - 300], 2, "without the blocks that close a tar file"),
            (lambda b: b[: 2 * _MEMBER_BYTES - 600], 1, "cut short, read up to there"),
            (lambda b: b[: 2 * _MEMBER_BYTES + 100], 2, "cut short, read up to there"),
            (lambda b: _flip(b, _MEMBER_BYTES + 9), 1, "damaged, read up to there"),
            (lambda b: b + b, 3, r"with data after the closing blocks, which are not read \(tar "),
            (lambda b: _tar([]), 0, "without an image"),
            (lambda b: _tar(["b0.txt"]), 0, "without an image"),
        ],
    )
    def test_what_is_whole_is_read_and_the_rest_is_counted_and_named(
        self, damage: Any, left: int, note: str, folder: Path
    ) -> None:
        path = folder / "b.tar"
        path.write_bytes(damage(path.read_bytes()))
        source = _open(folder)
        found = [name for name in _names(source) if name.startswith("b")]
        assert found == _OF_B[:left]
        assert len(_names(source)) == 6 + left
        first = source.notes[0]
        assert first.startswith("1 of 3 tar shards ")
        assert first.endswith(": b.tar")
        assert re.match(f"1 of 3 tar shards {note}", first)

    def test_whole_shards_have_no_notes(self, folder: Path) -> None:
        assert _open(folder).notes == ()

    def test_closing_blocks_may_be_followed_by_any_number_of_zeros(self, folder: Path) -> None:
        with (folder / "b.tar").open("ab") as file:
            file.write(bytes(1 << 20))  # as tar --blocking-factor=2048 writes
        assert _open(folder).notes == ()

    def test_many_are_counted_and_the_first_are_named(self, folder: Path) -> None:
        for number in range(5):
            (folder / f"x{number}.tar").write_bytes(b"")
        assert _open(folder).notes == (
            "5 of 8 tar shards left out: 0 bytes: x0.tar, x1.tar, x2.tar and 2 more",
        )

    def test_if_nothing_is_left_the_first_is_an_error(self, folder: Path) -> None:
        for shard in "abc":
            (folder / f"{shard}.tar").write_bytes(b"")
        message = r"a\.tar: the file has 0 bytes\. Copy it again\. 2 other shards cannot be read "
        with pytest.raises(DataError, match=message):
            _open(folder)
        with pytest.raises(DataError, match=rf"^{folder}/b\.tar: the file has 0 bytes"):
            _open(folder / "b.tar")

    def test_one_that_cannot_be_read_is_named_with_the_systems_reason(self, folder: Path) -> None:
        (folder / "b.tar").unlink()
        (folder / "b.tar").mkdir()
        source = _open(folder / "{a,b,c}.tar")
        assert len(_names(source)) == 6
        (note,) = source.notes
        assert note.startswith("1 of 3 tar shards that cannot be read, or not to the end (")
        assert note.endswith("): b.tar")

    def test_a_shard_of_a_range_that_is_missing_is_an_error(self, folder: Path) -> None:
        with pytest.raises(DataError, match=rf"^{folder}/d\.tar: cannot be read: no such file"):
            _open(folder / "{a,b,c,d}.tar")

    def test_a_size_that_is_no_number_is_damage(self, folder: Path) -> None:
        member = tarfile.TarInfo("b0.jpg")
        member.pax_headers = {"size": "many"}
        data = member.tobuf(tarfile.PAX_FORMAT) + bytes(2048)
        (folder / "b.tar").write_bytes(data)
        assert _open(folder).notes == ("1 of 3 tar shards damaged, read up to there: b.tar",)


class TestAfterOpening:
    def test_images_of_a_missing_shard_are_unreadable_and_others_are_not(
        self, folder: Path
    ) -> None:
        source = _open(folder)
        (folder / "b.tar").unlink()
        found = source.read(range(9))
        assert [isinstance(each, Unreadable) for each in found] == [False] * 3 + [True] * 3 + [
            False
        ] * 3
        assert all("cannot be read: " in reason for reason in _reasons(found))

    def test_images_of_one_that_was_cut_short_are_unreadable(self, folder: Path) -> None:
        source = _open(folder)
        os.truncate(folder / "b.tar", 1200)
        (reason,) = _reasons(source.read([4]))
        assert reason == "cut short since the shard was opened: 1,200 bytes, not 4,184"

    def test_a_bad_place_is_tried_again_after_a_while_and_not_for_each_row(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(lasting.time, "monotonic", lambda: now[0])
        tries = []

        def count(self: TarSource, group: int) -> tuple[bytes, int]:
            tries.append(group)
            return read(self, group)

        read = TarSource._read_group
        monkeypatch.setattr(TarSource, "_read_group", count)
        source = _open(folder)
        hidden = (folder / "b.tar").rename(folder / "hidden")
        for row in (3, 4, 5, 3):
            assert len(_reasons(source.read([row]))) == 1
        assert tries == [1]
        hidden.rename(folder / "b.tar")
        assert len(_reasons(source.read([3]))) == 1
        now[0] += 61
        assert source.read([3]) == [b"b0.jpg".ljust(600)]
        assert tries == [1, 1]

    def test_a_store_that_does_not_answer_is_no_bad_image(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = _open(folder)

        def no_answer(*_: Any) -> Any:
            raise OSError("Timeout was reached")

        monkeypatch.setattr(tar, "is_lasting", lambda *_, **__: False)
        monkeypatch.setattr(tar, "with_retries", no_answer)
        with pytest.raises(DataError, match=r"a\.tar: cannot be read at byte 512: Timeout was"):
            source.read([0])

    def test_a_store_that_does_not_answer_is_no_flaw_of_a_shard(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysl.sources.tar_index.is_lasting", lambda *_: False)
        with pytest.raises(DataError, match=r"d\.tar: cannot be read"):
            TarSource(
                DataConfig(source="x"), pafs.LocalFileSystem(), [f"{folder}/d.tar"], window_mib=1
            )

    def test_rows_of_a_shard_that_is_gone_or_changed_still_have_names(self, folder: Path) -> None:
        source = _open(folder)
        (folder / "a.tar").unlink()
        (folder / "b.tar").write_bytes(_tar(["b0.jpg"]))
        ids = [source.row_id(row) for row in range(9)]
        places = [512, 2048, 3584]
        assert ids[:3] == [f"a.tar/byte {place}" for place in places]
        assert ids[3:6] == ["b.tar/b0.jpg", "b.tar/byte 2048", "b.tar/byte 3584"]
        assert ids[6:] == [f"c.tar/c{n}.jpg" for n in range(3)]


class TestFailures:
    def test_are_forgotten_and_not_pickled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [5.0]
        monkeypatch.setattr(lasting.time, "monotonic", lambda: now[0])
        failed = Failures(10.0)
        failed.add(3, "broken")
        assert (failed.get(3), failed.get(4)) == ("broken", None)
        copy = pickle.loads(pickle.dumps(failed))
        assert (copy.get(3), copy.seconds) == (None, 10.0)
        now[0] += 10
        assert failed.get(3) is None


def test_a_damaged_shard_changes_the_fingerprint(folder: Path) -> None:
    whole = _open(folder).fingerprint
    os.truncate(folder / "b.tar", 2 * _MEMBER_BYTES)
    assert _open(folder).fingerprint != whole

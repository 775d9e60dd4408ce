import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.errors import DataError
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Unreadable
from raysl.sources.tar import TarSource, expand_braces
from raysl.sources.tar_index import _ReadAhead

LONG = "a-folder-with-a-long-name/" * 6 + "b" * 120


def _write(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def _open(source: Path | str, **settings: Any) -> TarSource:
    config = DataConfig(source=str(source), **settings)
    opened = open_source(config, data=config)
    assert isinstance(opened, TarSource)
    return opened


def _all(source: TarSource) -> list[bytes]:
    return [bytes(data) for data in source.read(range(int(source.group_sizes.sum())))]


def _labels(source: TarSource) -> list[int]:
    labels = source.labels()
    assert labels is not None
    assert labels.dtype == np.int64
    return [int(label) for label in labels]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five images and their classes in two shards."""
    for number, rows in enumerate([range(3), range(3, 5)]):
        members = {}
        for row in rows:
            members[f"{row:04}.cls"] = str(row % 2).encode()
            members[f"{row:04}.jpg"] = b"image %d" % row
            members[f"{row:04}.json"] = json.dumps({"caption": "x", "kind": f"k{row}"}).encode()
        _write(tmp_path / f"data-{number:03}.tar", members)
    return tmp_path


class TestReading:
    @pytest.mark.parametrize("path", ["", "*.tar", "data-{000..001}.tar", "data-00[01].tar"])
    def test_opens_a_folder_a_glob_and_a_range(self, path: str, shards: Path) -> None:
        source = _open(f"{shards}/{path}")
        assert _all(source) == [b"image %d" % row for row in range(5)]
        assert source.group_sizes.tolist() == [3, 2]

    def test_opens_a_single_shard_and_by_file_uri(self, shards: Path) -> None:
        assert _all(_open(shards / "data-001.tar")) == [b"image 3", b"image 4"]
        assert _all(_open(f"file://{shards}/data-001.tar")) == [b"image 3", b"image 4"]

    def test_gives_the_rows_in_the_order_asked_for(self, shards: Path) -> None:
        assert _open(shards).read(np.array([4, 0, 4, 2])) == [
            b"image 4",
            b"image 0",
            b"image 4",
            b"image 2",
        ]

    @pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_every_tar_format_gives_what_tarfile_gives(self, kind: int, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        names = ["a.jpg", "b/c.png", "x" * 90 + "/" + "y" * 60 + ".webp"]
        if kind != tarfile.USTAR_FORMAT:
            names += [f"{LONG}.jpg", "\u00fcber/\u732b.jpg"]
        members = {name: rng.bytes(int(rng.integers(0, 3000))) for name in names}
        path = _write(tmp_path / "a.tar", members, kind)
        source = _open(path)
        assert _all(source) == list(members.values())
        with tarfile.open(path) as shard:
            places = [member.offset_data for member in shard]
        assert [source.where(n) for n in range(len(names))] == [
            f"{path} image at byte {place}" for place in places
        ]
        assert [source.row_id(n) for n in range(len(names))] == [f"a.tar/{n}" for n in names]
        kept = _open(path, filter=(("path", "in", tuple(f"a.tar/{n}" for n in names)),))
        assert _all(kept) == list(members.values())

    def test_folders_links_hidden_and_other_files_are_no_images(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            for name, kind in (
                ("d.jpg", tarfile.DIRTYPE),
                ("l.jpg", tarfile.SYMTYPE),
                ("._x.jpg", tarfile.REGTYPE),
                ("notes.txt", tarfile.REGTYPE),
                ("d.jpg/x.JPG", tarfile.REGTYPE),
                ("README", tarfile.REGTYPE),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "x.jpg"
                member.size = len(name) if kind == tarfile.REGTYPE else 0
                shard.addfile(member, io.BytesIO(name.encode()))
        assert _all(_open(tmp_path / "a.tar")) == [b"d.jpg/x.JPG"]

    def test_runs_of_a_few_mib_are_read_at_once_and_kept(self, tmp_path: Path) -> None:
        images = {f"{n:03}.jpg": bytes([n]) * ((1 << 20) - 512) for n in range(40)}
        path = _write(tmp_path / "a.tar", images)
        source = _open(path, shuffle_window_mib=8)
        assert source.group_sizes.tolist() == [8] * 5
        assert source.window_size == 8
        assert [data[0] for data in source.read([39, 0, 17])] == [39, 0, 17]
        # Two windows are kept, which are two runs: those of 17 and of 39.
        path.unlink()
        assert [data[0] for data in source.read([32, 23])] == [32, 23]
        assert isinstance(source.read([0])[0], Unreadable)

    def test_a_shard_is_not_read_to_find_its_images(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _write(tmp_path / "a.tar", {f"{n}.jpg": bytes(1 << 20) for n in range(8)})
        asked = []
        read = _ReadAhead.at

        def spy(self: _ReadAhead, start: int, count: int) -> bytes:
            found = read(self, start, count)
            asked.append(len(self._buffer))
            return found

        monkeypatch.setattr(_ReadAhead, "at", spy)
        assert int(_open(tmp_path / "a.tar").group_sizes.sum()) == 8
        # Eight headers, and what follows the last image.
        assert sum(asked) <= 10 * (8 << 10)

    def test_survives_pickling_small(self, tmp_path: Path) -> None:
        _write(tmp_path / "a.tar", {f"{n:06}.jpg": b"%d" % n for n in range(2000)})
        source = _open(tmp_path / "a.tar")
        source.read(range(2000))
        stored = pickle.dumps(source)
        assert len(stored) < 2000 * 17 + 2000
        copy = pickle.loads(stored)
        assert copy.read([1999, 3]) == [b"1999", b"3"]
        assert (copy.fingerprint, copy.where(7)) == (source.fingerprint, source.where(7))


class TestChoice:
    def test_a_limit_takes_even_distances_and_a_filter_by_path_and_size_comes_before(
        self, shards: Path
    ) -> None:
        assert _all(_open(shards, limit=4)) == [b"image %d" % row for row in range(4)]
        assert _all(_open(shards, limit=2)) == [b"image 0", b"image 2"]
        condition = ("path", "!=", "data-000.tar/0001.jpg")
        kept = _open(shards, filter=(condition, ("bytes", "<", 8)), limit=3)
        assert _all(kept) == [b"image 0", b"image 2", b"image 3"]
        assert _labels(kept) == [0, 0, 1]
        with pytest.raises(DataError, match=r"data\.filter leaves no .*such as data-000\.tar/0001"):
            _open(shards, filter=(("bytes", ">", 8),))

    def test_fingerprint_changes_with_images_names_limit_and_filter(self, tmp_path: Path) -> None:
        def fingerprint(members: dict[str, bytes], **settings: Any) -> str:
            return _open(_write(tmp_path / "a.tar", members), **settings).fingerprint

        two = {"a.jpg": b"12", "b.jpg": b"3"}
        seen = [
            fingerprint(two),
            fingerprint(two, limit=1),
            fingerprint(two, filter=(("bytes", ">", 0),)),
            fingerprint({"a.jpg": b"12", "c.jpg": b"3"}),
            fingerprint({"a.jpg": b"1", "b.jpg": b"23"}),
            fingerprint(two, filter=(("bytes", ">", 1),)),
        ]
        assert len(set(seen)) == 6
        assert fingerprint(two) == seen[0]


class TestLabels:
    def test_cls_members_are_numbers_or_names(self, shards: Path, tmp_path: Path) -> None:
        source = _open(shards)
        assert _labels(source) == [0, 1, 0, 1, 0]
        assert source.class_names == ["0", "1"]
        named = {"1.jpg": b"", "1.cls": b"dog\n", "2.jpg": b"", "2.cls": b"cat", "3.jpg": b""}
        source = _open(_write(tmp_path / "named" / "a.tar", named))
        assert _labels(source) == [1, 0, -1]
        assert source.class_names == ["cat", "dog"]

    def test_a_key_of_the_json_can_be_named(self, shards: Path) -> None:
        source = _open(shards, label_column="kind")
        assert _labels(source) == [0, 1, 2, 3, 4]
        assert source.class_names == ["k0", "k1", "k2", "k3", "k4"]

    def test_label_is_the_usual_key_and_broken_json_is_no_label(self, tmp_path: Path) -> None:
        members = {
            "1.json": b'{"label": 3}',
            "1.jpg": b"",
            "2.jpg": b"",
            "2.json": b"{",
            "3.jpg": b"",
            "3.json": b'{"label": null}',
        }
        source = _open(_write(tmp_path / "a.tar", members))
        assert _labels(source) == [0, -1, -1]
        assert source.class_names == ["3"]
        assert source.notes == ("1 .json member without a label: not JSON",)

    def test_without_any_there_are_none(self, tmp_path: Path) -> None:
        source = _open(_write(tmp_path / "a.tar", {"1.jpg": b"", "2.jpg": b""}))
        assert source.labels() is None
        assert source.class_names == []


class TestErrors:
    @pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
    @pytest.mark.parametrize("whole_folder", [False, True])
    def test_a_compressed_one_says_what_to_do(
        self, name: str, whole_folder: bool, shards: Path
    ) -> None:
        packed = gzip.compress((shards / "data-000.tar").read_bytes())
        (shards / "packed").mkdir()
        (shards / "packed" / name).write_bytes(packed)
        path = "packed" if whole_folder else f"packed/{name}"
        with pytest.raises(DataError, match=r"is compressed .*Unpack it to \.tar, .*raysl pack"):
            _open(shards / path)

    def test_something_else_is_no_tar_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(b"x" * 2000)
        with pytest.raises(DataError, match=r"a\.tar: not a tar file"):
            _open(tmp_path / "a.tar")

    def test_a_shard_of_a_range_that_is_missing_is_named(self, shards: Path) -> None:
        with pytest.raises(DataError, match=rf"^{shards}/data-002\.tar: cannot be read"):
            _open(shards / "data-{000..002}.tar")


class TestBraces:
    @pytest.mark.parametrize(
        ("pattern", "paths"),
        [
            ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
            ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
            ("plain.tar", ["plain.tar"]),
            ("{odd}.tar", ["{odd}.tar"]),
        ],
    )
    def test_stand_for_what_a_shell_makes_of_them(self, pattern: str, paths: list[str]) -> None:
        assert expand_braces(pattern) == paths

    @pytest.mark.parametrize("pattern", ["{5..3}", "{0..99999999}", "{0..9999}{0..9999}"])
    def test_an_empty_or_endless_range_is_an_error(self, pattern: str) -> None:
        with pytest.raises(DataError, match=r"^data\.source="):
            expand_braces(pattern)

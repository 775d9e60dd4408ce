import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.fs as pafs
import pytest

from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.sources.contents import list_by_kind
from raysl.sources.folder import FolderSource
from raysl.sources.source import SourceConfig, Unreadable


def _image(number: int) -> np.ndarray:
    return np.full((3, 4, 3), 10 * number, dtype=np.uint8)


def _write(root: Path, *names: str) -> None:
    """Write images whose grey level is ten times their place in the list."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _, encoded = cv2.imencode(".png", _image(number))
        path.write_bytes(encoded.tobytes())


def _open(root: Path, **settings: Any) -> FolderSource:
    filesystem = pafs.LocalFileSystem()
    config = SourceConfig(source=str(root), **settings)
    return FolderSource(config, filesystem, list_by_kind(filesystem, str(root)).images, str(root))


def _files(source: FolderSource) -> list[str]:
    count = int(source.group_sizes.sum())
    return [source.where(index).removeprefix(source.root + "/") for index in range(count)]


class TestListing:
    def test_is_sorted_by_path_whatever_the_order_of_writing(self, tmp_path: Path) -> None:
        _write(tmp_path, "b/2.png", "a/1.png", "b/10.png", "a.png")
        assert _files(_open(tmp_path)) == ["a.png", "a/1.png", "b/10.png", "b/2.png"]

    def test_takes_images_only_by_their_suffix_in_any_case(self, tmp_path: Path) -> None:
        names = ["a.JPG", "b.jpeg", "c.png", "d.WebP", "e.bmp", "f.tif", "g.tiff", "h.gif"]
        names += ["k.jfif", "l.jpe", "m.pgm", "n.PPM", "o.jp2", "p.avif"]
        _write(tmp_path, *names, "notes.txt", "png", "i.png.part", "j.svg")
        assert _files(_open(tmp_path)) == names

    def test_leaves_hidden_files_and_folders_out(self, tmp_path: Path) -> None:
        _write(tmp_path, "a/1.png", "a/._1.png", ".cache/a/2.png", "a/.thumbs/3.png")
        assert _files(_open(tmp_path)) == ["a/1.png"]

    def test_a_hidden_folder_above_hides_nothing(self, tmp_path: Path) -> None:
        _write(tmp_path / ".cache", "a/1.png", "b/2.png")
        assert _files(_open(tmp_path / ".cache")) == ["a/1.png", "b/2.png"]

    def test_a_folder_named_like_an_image_is_no_image(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png/1.png")
        assert _files(_open(tmp_path)) == ["a.png/1.png"]

    def test_a_name_that_is_not_utf8_is_read_and_shown(self, tmp_path: Path) -> None:
        name = os.fsencode(tmp_path) + b"/\xe9t\xe9.png"
        _write(tmp_path, "a.png")
        os.rename(tmp_path / "a.png", name)
        source = pickle.loads(pickle.dumps(_open(tmp_path)))
        assert source.where(0) == f"{tmp_path}/\\xe9t\\xe9.png"
        np.testing.assert_array_equal(decode(source.read([0])[0], where="x"), _image(0))
        kept = _open(tmp_path, filter=(("path", "matches", "*t*.png"),))
        assert kept.group_sizes.tolist() == [1]

    def test_follows_links_and_no_circle_of_them(self, tmp_path: Path) -> None:
        _write(tmp_path / "elsewhere", "1.png")
        _write(tmp_path / "here", "a/2.png")
        (tmp_path / "here" / "b").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "here" / "a" / "up").symlink_to(tmp_path / "here")
        (tmp_path / "elsewhere" / "across").symlink_to(tmp_path / "here" / "b")
        (tmp_path / "here" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        source = _open(tmp_path / "here")
        assert _files(source) == ["a/2.png", "b/1.png", "gone.png"]
        assert source.read([2]) == [Unreadable("cannot be read: No such file or directory")]

    def test_a_folder_that_may_not_be_read_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _write(tmp_path, "a/1.png", "b/2.png")
        scan = os.scandir

        def forbid(path: bytes) -> Any:  # chmod does not stop root
            if path.endswith(b"/b"):
                raise PermissionError(13, "Permission denied")
            return scan(path)

        monkeypatch.setattr(os, "scandir", forbid)
        with pytest.raises(DataError, match=rf"^{tmp_path}/b: cannot be listed: Permission denied"):
            _open(tmp_path)


class TestLabels:
    def _labels(self, source: FolderSource) -> list[int]:
        labels = source.labels()
        assert labels is not None
        assert labels.dtype == np.int64
        return [int(label) for label in labels]

    def test_the_first_folder_level_names_the_class(self, tmp_path: Path) -> None:
        _write(tmp_path, "dog/1.png", "cat/1.png", "dog/2.png", "ape/x/y/1.png", "ape/z/1.png")
        source = _open(tmp_path)
        assert source.class_names == ["ape", "cat", "dog"]
        assert self._labels(source) == [0, 0, 1, 2, 2]

    def test_without_folders_there_are_no_labels(self, tmp_path: Path) -> None:
        _write(tmp_path, "1.png", "2.png")
        source = _open(tmp_path)
        assert source.labels() is None
        assert (source.class_names, source.notes) == ([], ())

    def test_an_image_beside_the_class_folders_has_none_and_is_counted(
        self, tmp_path: Path
    ) -> None:
        _write(tmp_path, "cat/1.png", "cover.png", "dog/1.png")
        source = _open(tmp_path)
        assert self._labels(source) == [0, -1, 1]
        assert source.notes == ("1 image beside the class folders, without a label",)

    def test_one_folder_is_one_class(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/1.png", "cat/2.png")
        source = _open(tmp_path)
        assert (source.class_names, self._labels(source)) == (["cat"], [0, 0])

    def test_a_limit_is_spread_over_the_classes(self, tmp_path: Path) -> None:
        _write(tmp_path, *(f"{name}/{number}.png" for name in "abc" for number in range(4)))
        source = _open(tmp_path, limit=3)
        assert _files(source) == ["a/0.png", "b/0.png", "c/0.png"]
        assert self._labels(source) == [0, 1, 2]

    @pytest.mark.parametrize("name", ["image_column", "label_column"])
    def test_a_setting_for_columns_is_refused(self, name: str, tmp_path: Path) -> None:
        _write(tmp_path, "a/1.png", "b/1.png")
        wanted = f"data.{name}=x does nothing, as a folder of image files has no columns; drop"
        with pytest.raises(DataError, match=wanted):
            _open(tmp_path, **{name: "x"})


class TestReading:
    def test_gives_the_bytes_of_the_rows_in_the_order_asked_for(self, tmp_path: Path) -> None:
        _write(tmp_path, "0.png", "1.png", "2.png")
        source = _open(tmp_path)
        for index, encoded in zip([2, 0, 2], source.read([2, 0, 2]), strict=True):
            np.testing.assert_array_equal(decode(encoded, where="x"), _image(index))

    def test_gives_the_same_from_a_file_system_that_is_not_local(self, tmp_path: Path) -> None:
        names = [f"{number:02}.png" for number in range(20)]
        _write(tmp_path / "bucket", *names)
        filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        config = SourceConfig(source="remote")
        remote = FolderSource(
            config, filesystem, list_by_kind(filesystem, "bucket").images, "bucket"
        )
        order = np.random.default_rng(0).permutation(20)
        assert remote.read(order) == _open(tmp_path / "bucket").read(order)
        assert remote.where(0) == "bucket/00.png"

    def test_a_limit_keeps_files_at_even_distances(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png", "b.png", "c.png", "d.png")
        assert _files(_open(tmp_path, limit=2)) == ["a.png", "c.png"]
        assert _files(_open(tmp_path, limit=9)) == ["a.png", "b.png", "c.png", "d.png"]

    def test_a_file_that_has_gone_is_one_unreadable_image(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png", "b.png", "c.png")
        source = _open(tmp_path)
        (tmp_path / "b.png").unlink()
        first, second, third = source.read([0, 1, 2])
        assert second == Unreadable("cannot be read: No such file or directory")
        assert isinstance(first, bytes)
        assert isinstance(third, bytes)

    def test_a_store_that_does_not_answer_is_an_error_and_no_bad_image(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _write(tmp_path / "bucket", "a.png")
        filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        source = FolderSource(
            SourceConfig(source="remote"),
            filesystem,
            list_by_kind(filesystem, "bucket").images,
            "bucket",
        )

        def time_out(*_: Any) -> bytes:
            raise OSError("AWS Error NETWORK_CONNECTION: timed out")

        monkeypatch.setattr("raysl.sources.folder.read_bytes", time_out)
        monkeypatch.setattr("raysl.sources.folder.is_lasting", lambda *_: False)
        with pytest.raises(DataError, match=r"^bucket/a\.png: cannot be read: AWS Error"):
            source.read([0])

    def test_a_row_is_known_by_its_path_below_the_folder(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/0.png", "dog/1.png")
        assert _open(tmp_path, limit=1, filter=(("path", "!=", "cat/0.png"),)).row_id(0) == (
            "dog/1.png"
        )
        kept = _open(tmp_path, filter=(("row_id", "not in", ("cat/0.png",)),))
        assert _files(kept) == ["dog/1.png"]

    def test_survives_pickling(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/0.png", "dog/1.png")
        source = _open(tmp_path)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.read([1, 0]) == source.read([1, 0])
        assert copy.where(1) == f"{tmp_path}/dog/1.png"
        assert copy.labels().tolist() == [0, 1]
        assert (copy.fingerprint, copy.class_names) == (source.fingerprint, ["cat", "dog"])

    def test_is_one_group_without_a_window(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png", "b.png")
        assert _open(tmp_path).group_sizes.tolist() == [2]
        assert _open(tmp_path).window_size is None

    def test_takes_few_bytes_a_file_on_the_way_to_a_worker(self, tmp_path: Path) -> None:
        for folder in ("ape", "cat"):
            (tmp_path / folder).mkdir()
            for number in range(1000):
                (tmp_path / folder / f"{number:06}.jpg").touch()
        # 14 bytes of path, 8 of its place, 1 of its label.
        assert len(pickle.dumps(_open(tmp_path))) < 2000 * 24 + 2000


class TestFilter:
    def test_by_path_and_size(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/1.png", "dog/2.png", "dog/3.png")
        (tmp_path / "dog" / "3.png").write_bytes(b"")
        _files_of = _open(tmp_path, filter=(("path", "matches", "dog/*"), ("bytes", ">", 0)))
        assert _files(_files_of) == ["dog/2.png"]
        assert _files_of.fingerprint != _open(tmp_path).fingerprint

    def test_comes_before_the_limit(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png", "b.png", "c.png")
        assert _files(_open(tmp_path, filter=(("path", "!=", "a.png"),), limit=1)) == ["b.png"]

    def test_that_leaves_nothing_says_so(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png")
        with pytest.raises(DataError, match=r"data\.filter leaves no image$"):
            _open(tmp_path, filter=(("bytes", ">", 10**9),))

    def test_of_something_else_lists_what_there_is(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png")
        with pytest.raises(DataError, match=r"no column 'width'; there are path, bytes, row_id$"):
            _open(tmp_path, filter=(("width", ">", 3),))


class TestFingerprint:
    def test_is_the_same_for_the_same_files_elsewhere(self, tmp_path: Path) -> None:
        for place in ("here", "there"):
            _write(tmp_path / place, "a/1.png", "b/2.png")
        assert _open(tmp_path / "here").fingerprint == _open(tmp_path / "there").fingerprint

    def test_changes_with_the_size_the_name_and_the_number_of_files(self, tmp_path: Path) -> None:
        _write(tmp_path, "a.png", "b.png")
        seen = {_open(tmp_path).fingerprint, _open(tmp_path, limit=1).fingerprint}
        (tmp_path / "a.png").write_bytes(b"longer than before" * 50)
        seen.add(_open(tmp_path).fingerprint)
        (tmp_path / "b.png").rename(tmp_path / "c.png")
        seen.add(_open(tmp_path).fingerprint)
        (tmp_path / "c.png").unlink()
        seen.add(_open(tmp_path).fingerprint)
        assert len(seen) == 5

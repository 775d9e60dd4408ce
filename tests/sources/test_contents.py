from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raysl.sources import contents, formats
from raysl.sources.contents import count_suffixes, list_by_kind, sort_by_kind
from raysl.sources.formats import suffix_of
from raysl.sources.storage import file_table


def _names(table: object) -> list[str]:
    return [path.decode() for path in table.column("path").to_pylist()]  # type: ignore[attr-defined]


class TestKinds:
    def test_are_told_by_the_ends_of_names_in_any_case(self) -> None:
        found = sort_by_kind(
            file_table(["a.JPG", "b/c.jfif", "d.PARQUET", "e.tar", "f.tar.gz", "g.TGZ", "h.pq"])
        )
        assert _names(found.images) == ["a.JPG", "b/c.jfif"]
        assert _names(found.parquet) == ["d.PARQUET", "h.pq"]
        assert _names(found.tars) == ["e.tar"]
        assert _names(found.compressed) == ["f.tar.gz", "g.TGZ"]
        assert found.notes == ()

    def test_what_tools_leave_beside_shards_is_no_shard(self) -> None:
        found = sort_by_kind(file_table(["_temporary/0.parquet", "a/_x.tar", "_a.jpg"]))
        assert (found.parquet.num_rows, found.tars.num_rows) == (0, 0)
        assert _names(found.images) == ["_a.jpg"]


class TestNotes:
    def test_name_what_may_hold_images_and_say_what_to_do(self) -> None:
        notes = sort_by_kind(
            file_table(["a.dcm", "b.dcm", "c.CR2", "d.mp4", "e.arrow", "f.nii.gz", "g.jpg"])
        ).notes
        text = "\n".join(notes)
        assert len(notes) == 5
        assert "2 files (.dcm 2) left out: DICOM" in text
        for part in (".cr2 1", ".mp4 1", ".nii.gz 1", "Dataset.to_parquet"):
            assert part in text

    def test_count_all_else_in_one_line(self) -> None:
        (note,) = sort_by_kind(
            file_table(["a.json", "b.json", "README", "c.txt", ".x/d.e", "LICENSE"])
        ).notes
        assert note == (
            "6 files (no suffix 2, .json 2, .e 1, .txt 1) left out: not named like images"
        )

    def test_name_images_whose_library_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nothing(suffix: str) -> str | None:
            return formats.OPTIONAL_SUFFIXES.get(suffix, (None, None))[1]

        monkeypatch.setattr(contents, "missing_package", nothing)
        found = sort_by_kind(file_table(["IMG_1.HEIC", "IMG_2.heif", "a.jxl", "b.jpg"]))
        assert _names(found.images) == ["b.jpg"]
        assert found.notes == (
            "2 HEIC images left out: pip install 'raysl[formats]' installs their library",
            "1 JPEG XL image left out: pip install 'raysl[formats]' installs their library",
        )

    def test_of_a_library_that_is_there_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contents, "missing_package", lambda _: None)
        found = sort_by_kind(file_table(["IMG_1.HEIC", "a.jxl"]))
        assert (found.images.num_rows, found.notes) == (2, ())


def test_a_folder_is_listed_to_any_depth_without_hidden_names(tmp_path: Path) -> None:
    for name in ("a/b/1.png", ".git/2.png", "3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list_by_kind(pafs.LocalFileSystem(), str(tmp_path))
    assert _names(found.images) == ["a/b/1.png"]
    assert found.notes == ("1 file (.txt 1) left out: not named like images",)


def test_ends_are_counted_the_most_frequent_first() -> None:
    counts = count_suffixes(file_table(["a.b.txt", "c.txt", "x.tar.gz", "y.2020.JSON", "z"]))
    assert list(counts.items()) == [(".txt", 2), ("", 1), (".json", 1), (".tar.gz", 1)]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a/b.JPG", ".jpg"), ("x.tar.gz", ".tar.gz"), ("v1.2", ".2"), ("a.b/c", ""), (".x", "")],
)
def test_the_end_of_a_name(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix

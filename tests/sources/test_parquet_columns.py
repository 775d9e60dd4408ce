"""The kinds of columns that hold images, their paths, or labels, as other programs write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import SourceConfig, Unreadable

IMAGES = [b"\x89PNG one", b"\xff\xd8 two", b"three", b"", b"five, the last"]


def _write(path: Path, columns: Any, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=2, **settings)
    return path


def _open(*paths: Path, **settings: Any) -> ParquetSource:
    config = SourceConfig(source="toy", **settings)
    return ParquetSource(config, pafs.LocalFileSystem(), [str(p) for p in paths], window_mib=1)


def _struct(encoded: pa.Array, paths: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([encoded, paths], ["bytes", "path"])


def _reason(source: ParquetSource, index: int) -> str:
    image = source.read([index])[0]
    assert isinstance(image, Unreadable)
    return image.reason


def _lists(kind: pa.DataType) -> pa.Array:
    view = np.int8 if pa.types.is_int8(kind.value_type) else np.uint8
    return pa.array([np.frombuffer(image, view) for image in IMAGES], kind)


class TestKinds:
    @pytest.mark.parametrize("in_struct", [False, True], ids=["plain", "struct"])
    @pytest.mark.parametrize(
        "column",
        [
            pa.array(IMAGES, pa.binary()),
            pa.array(IMAGES, pa.large_binary()),
            pa.array(IMAGES).dictionary_encode(),
            pa.array(IMAGES, pa.large_binary()).dictionary_encode(),
            _lists(pa.list_(pa.uint8())),
            _lists(pa.list_(pa.int8())),  # Spark's bytes have a sign
            _lists(pa.large_list(pa.uint8())),
            _lists(pa.list_view(pa.uint8())),
        ],
        ids=lambda array: str(array.type),
    )
    def test_of_images_are_read(self, column: pa.Array, in_struct: bool, tmp_path: Path) -> None:
        if in_struct:
            column = _struct(column, pa.array(["x.png"] * 5))
        source = _open(_write(tmp_path / "a.parquet", {"image": column, "label": list("abcab")}))
        assert source.read([4, 0, 3, 2, 1]) == [IMAGES[n] for n in (4, 0, 3, 2, 1)]
        assert all(type(image) is bytes for image in source.read(range(5)))
        assert source.notes == ()

    def test_views_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        columns = {
            "image": pa.array(IMAGES, pa.binary_view()),
            "label": pa.array(list("abcab"), pa.string_view()),
        }
        # One row group: pyarrow cannot yet cut views into several.
        pq.write_table(pa.table(columns), path)
        source = _open(path)
        assert pq.read_schema(path).field("image").type == pa.binary_view()
        assert source.read([4, 0]) == [IMAGES[4], IMAGES[0]]
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [0, 1, 2, 0, 1]

    def test_of_one_length_are_read(self, tmp_path: Path) -> None:
        column = pa.array([b"one", b"two", None], pa.binary(3))
        for name, image in (("a", column), ("b", _struct(column, pa.array([None] * 3)))):
            source = _open(_write(tmp_path / f"{name}.parquet", {"image": image}))
            assert source.read([1, 0]) == [b"two", b"one"]
            assert "null in the column" in _reason(source, 2)

    @pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.list_(pa.int8())], ids=str)
    def test_a_null_among_lists_is_none(self, kind: pa.DataType, tmp_path: Path) -> None:
        column = pa.array([[1, 2], None, [], [127]], kind)
        source = _open(_write(tmp_path / "a.parquet", {"image": column}))
        assert source.read([0, 2, 3]) == [b"\x01\x02", b"", b"\x7f"]
        assert "null in the column 'image'" in _reason(source, 1)

    def test_lists_that_are_no_images_give_way_to_binary_columns(self, tmp_path: Path) -> None:
        columns = {"jpg": IMAGES, "tags": _lists(pa.list_(pa.uint8()))}
        assert _open(_write(tmp_path / "a.parquet", columns)).read([0]) == [IMAGES[0]]

    def test_a_column_whose_name_goes_on_behind_a_dot_is_not_mixed_up(self, tmp_path: Path) -> None:
        columns = {"image.path": ["x"] * 5, "image": IMAGES, "image.bytes": [b"y"] * 5}
        source = _open(_write(tmp_path / "a.parquet", columns), image_column="image")
        assert source.read([0]) == [IMAGES[0]]

    def test_labels_of_dictionaries_are_read(self, tmp_path: Path) -> None:
        labels = pa.array(["b", "a", None, "b", "a"]).dictionary_encode()
        source = _open(_write(tmp_path / "a.parquet", {"image": IMAGES, "label": labels}))
        assert source.class_names == ["a", "b"]


def test_a_column_of_several_images_a_row_is_named_with_a_cure_that_helps(tmp_path: Path) -> None:
    images = pa.array([[{"bytes": b"a"}], []], pa.list_(pa.struct([("bytes", pa.binary())])))
    with pytest.raises(DataError, match=r"images holds several images per row: write a row for"):
        _open(_write(tmp_path / "0.parquet", {"images": images}))


class TestPaths:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Images beside a table's folder, in it and below it."""
        for name in ("top.jpg", "data/0.jpg", "data/sub folder/\u00fc%20.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(f"bytes of {name}".encode())
        return tmp_path

    def test_stand_for_images_that_are_null(self, root: Path) -> None:
        paths = ["0.jpg", "not read.jpg", "sub folder/\u00fc%20.jpg", "../top.jpg"]
        image = _struct(pa.array([None, b"here", None, None]), pa.array(paths))
        source = _open(_write(root / "data" / "a.parquet", {"image": image}))
        assert source.read([3, 2, 1, 0]) == [
            b"bytes of top.jpg",
            "bytes of data/sub folder/\u00fc%20.jpg".encode(),
            b"here",
            b"bytes of data/0.jpg",
        ]
        assert source.notes == (
            "3 of 4 rows are null in 'image.bytes': their images are read from the files that "
            "'image.path' names, relative to the folder of the Parquet file",
        )

    def test_of_nothing_but_nulls_are_read_too(self, root: Path) -> None:
        # As Hugging Face's datasets write images that they were given as files.
        image = pa.array(
            [{"bytes": None, "path": "data/0.jpg"}, {"bytes": None, "path": "top.jpg"}]
        )
        path = _write(root / "a.parquet", {"image": image, "label": [0, 1]})
        source = _open(path)
        assert source.read([1, 0]) == [b"bytes of top.jpg", b"bytes of data/0.jpg"]
        assert source.notes[0].startswith("2 of 2 rows are null in 'image.bytes'")

    def test_are_relative_to_each_file(self, root: Path) -> None:
        (root / "other").mkdir()
        (root / "other" / "0.jpg").write_bytes(b"another one")
        files = [
            _write(root / folder / "a.parquet", {"path": ["0.jpg"]}) for folder in ("data", "other")
        ]
        assert _open(*files).read([0, 1]) == [b"bytes of data/0.jpg", b"another one"]

    def test_may_be_absolute_on_a_disk(self, root: Path) -> None:
        path = _write(root / "a.parquet", {"path": [f"{root}/data/0.jpg"]})
        assert _open(path).read([0]) == [b"bytes of data/0.jpg"]

    @pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.large_string()], ids=str)
    @pytest.mark.parametrize("name", ["image", "path", "file_name"])
    def test_in_a_column_of_their_own_are_read_and_said(
        self, name: str, kind: pa.DataType, root: Path
    ) -> None:
        path = root / "data" / "a.parquet"
        pq.write_table(pa.table({name: pa.array(["0.jpg", None], kind), "label": ["a", "b"]}), path)
        source = _open(path)
        assert source.read([0]) == [b"bytes of data/0.jpg"]
        assert "null" in _reason(source, 1)
        assert source.notes == (
            f"the column {name!r} holds paths, not images; the files are read, relative to "
            f"the folder of the Parquet file that names them",
        )

    def test_of_another_name_are_taken_if_named(self, root: Path) -> None:
        path = _write(root / "data" / "a.parquet", {"where": ["0.jpg"], "image": [b"thumb"]})
        assert _open(path, image_column="where").read([0]) == [b"bytes of data/0.jpg"]

    def test_of_two_columns_none_is_guessed(self, root: Path) -> None:
        path = _write(root / "a.parquet", {"path": ["top.jpg"], "file_name": ["top.jpg"]})
        with pytest.raises(DataError, match=r"no single column of encoded images; .*data\.image_c"):
            _open(path)

    @pytest.mark.parametrize(
        ("path", "why"),
        [
            ("missing.jpg", r"missing\.jpg: no such file"),
            ("data", r"data: not a file"),
            ("top.jpg/x.jpg", r"top\.jpg/x\.jpg: Not a directory"),
            ("a\0b", "null byte|null character"),
            ("x" * 5000, "too long"),
            ("", "is empty"),
            ("https://example.org/a.jpg", "is a URL; .*download"),
            ("../" * 40 + "nowhere.jpg", "no such file"),
            ("/dev/zero", "/dev/zero: not a file"),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_that_lead_nowhere_are_bad_images_among_others(
        self, path: str, why: str, root: Path
    ) -> None:
        image = _struct(pa.array([None, b"fine"]), pa.array([path, ""]))
        source = _open(_write(root / "a.parquet", {"image": image}))
        with pytest.raises(AssertionError, match=why):  # the reason
            raise AssertionError(_reason(source, 0))
        assert source.read([1]) == [b"fine"]


class TestNulls:
    def test_without_a_path_are_counted_and_say_so(self, tmp_path: Path) -> None:
        source = _open(_write(tmp_path / "a.parquet", {"image": [b"x", None, None]}))
        assert _reason(source, 2) == "null in the column 'image': no image"
        assert source.notes[0].startswith("2 of 3 rows are null in the column 'image'")

    @pytest.mark.parametrize("kind", [pa.binary(), pa.null()], ids=str)
    def test_alone_in_a_struct_without_paths_are_counted(
        self, kind: pa.DataType, tmp_path: Path
    ) -> None:
        image = pa.StructArray.from_arrays([pa.nulls(3, kind)], ["bytes"])
        source = _open(_write(tmp_path / "a.parquet", {"image": image}))
        assert "null in the column 'image.bytes'" in _reason(source, 0)
        assert source.notes[0].startswith("3 of 3 rows are null in the column 'image.bytes'")

    def test_of_bytes_and_path_say_both(self, tmp_path: Path) -> None:
        rows = [{"bytes": b"x", "path": ""}, {"bytes": None, "path": None}, None]
        source = _open(_write(tmp_path / "a.parquet", {"image": pa.array(rows)}))
        for row in (1, 2):
            assert _reason(source, row) == "null in the column 'image.bytes' and no path: no image"

    def test_are_not_counted_where_the_footer_does_not_count_them(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": [b"x", None]}, write_statistics=False)
        source = _open(path)
        assert source.notes == ()
        assert "null" in _reason(source, 1)


def _hugging_face(path: Path, columns: dict[str, Any], **features: Any) -> Path:
    table = pa.table(columns)
    text = json.dumps({"info": {"features": features}})
    return _write(path, table.replace_schema_metadata({"huggingface": text}))


class TestClassLabels:
    LABEL = {"names": ["ape", "bee", "cat"], "_type": "ClassLabel"}  # noqa: RUF012

    def test_of_hugging_face_have_their_names(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [2, 0, 2, -1, 0]}
        source = _open(_hugging_face(tmp_path / "a.parquet", columns, label=self.LABEL))
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [1, 0, 1, -1, 0]
        assert source.class_names == ["ape", "cat"]

    def test_are_those_of_the_column_in_use(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [0] * 5, "fine": [0, 1, 0, 1, 5]}
        fine = {"names": ["x", "y"], "_type": "ClassLabel"}
        path = _hugging_face(tmp_path / "a.parquet", columns, label=self.LABEL, fine=fine)
        assert _open(path, label_column="fine").class_names == ["x", "y", "5"]

    def test_that_differ_between_files_are_an_error(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [0, 1, 0, 1, 0]}
        other = {"names": ["bee", "ape", "cat"], "_type": "ClassLabel"}
        first = _hugging_face(tmp_path / "0.parquet", columns, label=self.LABEL)
        with pytest.raises(DataError, match=r"1\.parquet: the classes of 'label' have other names"):
            _open(first, _hugging_face(tmp_path / "1.parquet", columns, label=other))

    def test_may_be_missing_in_some_files(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [0, 1, 0, 1, 0]}
        first = _write(tmp_path / "0.parquet", columns)
        second = _hugging_face(tmp_path / "1.parquet", columns, label=self.LABEL)
        assert _open(first, second).class_names == ["ape", "bee"]

    @pytest.mark.parametrize("text", [b"{", b"[]", b'{"info": null}', b'{"info":{"features":{}}}'])
    def test_that_cannot_be_read_are_numbers(self, text: bytes, tmp_path: Path) -> None:
        table = pa.table({"image": IMAGES, "label": [0, 1, 0, 1, 0]})
        path = _write(tmp_path / "a.parquet", table.replace_schema_metadata({"huggingface": text}))
        assert _open(path).class_names == ["0", "1"]


class TestNoClasses:
    @pytest.mark.parametrize(
        ("column", "what"),
        [
            (pa.array([[0, 2], [1], [], [1], None]), "several labels per image"),
            (pa.array([["a", "b"]] * 5), "several labels per image"),
            (pa.array([[0, 1, 0]] * 5), "3 zeros and ones per image .one-hot."),
            (pa.array([[0.0, 1.0]] * 5, pa.list_(pa.float32(), 2)), "2 zeros and ones .*one-hot"),
            (pa.array([[1, 1, 0]] * 5), "3 zeros and ones per image .several labels per image."),
            (pa.array([[0.2, 0.8]] * 5), "several labels per image"),
            (pa.array([[True, False]] * 5, pa.list_(pa.bool_(), 2)), "2 zeros and ones"),
        ],
        ids=["numbers", "names", "one-hot", "fixed", "multi-hot", "shares", "bools"],
    )
    @pytest.mark.parametrize("name", [None, "tags"])
    def test_lists_give_no_labels_and_say_so_at_opening(
        self, name: str | None, column: pa.Array, what: str, tmp_path: Path
    ) -> None:
        columns = {"image": IMAGES, name or "label": column, "kind": list("abcab")}
        source = _open(_write(tmp_path / "a.parquet", columns), label_column=name)
        with pytest.raises(
            AssertionError, match=rf"^the column '{name or 'label'}' holds .*{what}"
        ):
            raise AssertionError(source.notes[0])
        assert source.notes[0].endswith("(data.label_column selects another column)")
        assert source.labels() is None
        assert source.class_names == []
        assert len(source.notes) == 1
        assert source.label_advice == "set data.label_column to a column of classes: kind"

    def test_measurements_say_so_once_they_are_read(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [0.5, 1.0, 2.0, 3.0, 4.0]}
        source = _open(_write(tmp_path / "a.parquet", columns))
        assert source.labels() is None
        assert source.notes == (
            "the column 'label' holds measurements (0.5), not classes; no accuracy is measured "
            "with it (data.label_column selects another column)",
        )

    def test_whole_numbers_beside_nulls_are_classes(self, tmp_path: Path) -> None:
        columns = {"image": IMAGES, "label": [3.0, None, 1.0, float("nan"), 3.0]}
        source = _open(_write(tmp_path / "a.parquet", columns))
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [1, -1, 0, -1, 1]
        assert source.notes == ()

    def test_the_advice_names_the_columns_that_could_be_classes(self, tmp_path: Path) -> None:
        columns = {
            "image": IMAGES,
            "n": range(5),
            "name": list("abcab"),
            "good": [True] * 5,
            "score": [0.5] * 5,
            "box": [[1]] * 5,
            "kind": pa.array(list("abcab")).dictionary_encode(),
        }
        columns["n"] = pa.array(range(5))
        source = _open(_write(tmp_path / "a.parquet", columns))
        assert source.label_advice.endswith("a column of classes: n, name, good, kind")
        bare = _open(_write(tmp_path / "b.parquet", {"image": IMAGES, "score": [0.5] * 5}))
        assert bare.label_advice.endswith("these files have the columns image, score")


class TestPartitions:
    """Columns that stand in the names of folders, as Spark, Hive, DuckDB and Delta write them."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        folders = ["label=cat/year=2024", "label=a%20%2F dog/year=2025", "label=cat/year=2025"]
        folders.append("label=__HIVE_DEFAULT_PARTITION__/year=2023")
        return [
            _write(tmp_path / folder / "0.parquet", {"image": IMAGES, "n": list(range(5))})
            for folder in folders
        ]

    def test_are_labels(self, files: list[Path]) -> None:
        source = _open(*files)
        labels = source.labels()
        assert labels is not None
        assert source.class_names == ["a / dog", "cat"]
        assert labels.tolist() == [1] * 5 + [0] * 5 + [1] * 5 + [-1] * 5
        assert source.label_advice.endswith("a column of classes: n, year")
        assert source.row_id(5) == "label=a%20%2F dog/year=2025/0.parquet:0"

    def test_are_labels_of_kept_rows_and_numbers(self, files: list[Path]) -> None:
        source = _open(*files, label_column="year", filter=(("n", "<", 2),), limit=4)
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [1, 2, 2, 0]
        assert source.class_names == ["2023", "2024", "2025"]

    def test_are_columns_of_filters(self, files: list[Path]) -> None:
        source = _open(
            *files, filter=(("year", ">=", 2024), ("label", "==", "cat"), ("n", "==", 1))
        )
        assert [source.row_id(row) for row in range(2)] == [
            "label=cat/year=2024/0.parquet:1",
            "label=cat/year=2025/0.parquet:1",
        ]
        with pytest.raises(DataError, match=r"there are image, n, label, year, row_id$"):
            _open(*files, filter=(("month", "==", 1),))

    def test_give_way_to_columns_of_the_files(self, tmp_path: Path) -> None:
        files = [
            _write(tmp_path / f"label={name}" / "0.parquet", {"image": IMAGES, "label": [7] * 5})
            for name in ("a", "b")
        ]
        assert _open(*files).class_names == ["7"]
        assert int(_open(*files, filter=(("label", "==", 7),)).group_sizes.sum()) == 10

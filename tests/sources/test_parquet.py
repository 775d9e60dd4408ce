import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import SourceConfig, Unreadable


def _image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def _png(number: int) -> bytes:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(_image(number), cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def _pngs(start: int, stop: int) -> list[bytes]:
    return [_png(number) for number in range(start, stop)]


def _write(path: Path, columns: dict[str, Any], rows_per_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def _open(*paths: Path, window_mib: int = 1, **settings: Any) -> ParquetSource:
    config = SourceConfig(source="toy", **settings)
    files = [str(path) for path in paths]
    return ParquetSource(config, pafs.LocalFileSystem(), files, window_mib=window_mib)


def _labels(source: ParquetSource) -> list[int]:
    labels = source.labels()
    assert labels is not None
    assert labels.dtype == np.int64
    return [int(label) for label in labels]


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as can be, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    """Ten and seven images, numbered on, in row groups of four."""
    return [
        _write(tmp_path / "0.parquet", {"image": _pngs(0, 10), "label": list(range(10))}),
        _write(tmp_path / "1.parquet", {"image": _pngs(10, 17), "label": list(range(10, 17))}),
    ]


class TestReading:
    def test_groups_are_the_row_groups_in_the_order_of_the_files(
        self, two_files: list[Path]
    ) -> None:
        assert _open(*two_files).group_sizes.tolist() == [4, 4, 2, 4, 3]

    def test_gives_the_rows_in_the_order_asked_for(self, two_files: list[Path]) -> None:
        order = [16, 0, 9, 10, 0, 3, 4, 13]
        for index, encoded in zip(order, _open(*two_files).read(order), strict=True):
            np.testing.assert_array_equal(decode(encoded, where="x"), _image(index))

    def test_takes_an_array_of_rows_and_gives_bytes(self, two_files: list[Path]) -> None:
        read = _open(*two_files).read(np.array([5, 11]))
        assert read == [_png(5), _png(11)]
        assert type(read[0]) is bytes

    @pytest.mark.usefixtures("_hasty_threads")
    def test_gives_the_same_from_several_threads_that_crowd_the_cache(self, tmp_path: Path) -> None:
        images = [bytes([number]) * ((1 << 19) - 999) for number in range(12)]  # four fit
        source = _open(_write(tmp_path / "a.parquet", {"image": images}, rows_per_group=1))
        orders = [np.random.default_rng(seed).integers(0, 12, 3) for seed in range(200)]
        with ThreadPoolExecutor(6) as pool:
            for order, read in zip(orders, pool.map(source.read, orders), strict=True):
                assert [data[0] for data in read] == order.tolist()

    @pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
    def test_takes_either_kind_of_binary_column(self, kind: pa.DataType, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": pa.array(_pngs(0, 5), kind)})
        assert _open(path).read([4, 0]) == [_png(4), _png(0)]

    def test_takes_the_struct_column_of_hugging_face(self, tmp_path: Path) -> None:
        rows = [{"bytes": png, "path": f"{n}.png"} for n, png in enumerate(_pngs(0, 9))]
        path = _write(tmp_path / "a.parquet", {"image": pa.array(rows), "label": [0, 1, 2] * 3})
        source = _open(path)
        assert source.read([8, 3]) == [_png(8), _png(3)]
        assert _labels(source) == [0, 1, 2] * 3
        plain = _open(_write(tmp_path / "b.parquet", {"image": _pngs(0, 9)}))
        assert source.window_size == plain.window_size

    def test_takes_a_column_with_a_dot_in_its_name_from_several_files(self, tmp_path: Path) -> None:
        paths = [
            _write(tmp_path / f"{n}.parquet", {"img.png": _pngs(3 * n, 3 * n + 3)}) for n in (0, 1)
        ]
        assert _open(*paths).read([1, 5]) == [_png(1), _png(5)]

    def test_names_a_row_by_file_and_place(self, two_files: list[Path]) -> None:
        source = _open(*two_files)
        assert source.where(0) == f"{two_files[0]} row 0 (row group 0)"
        assert source.where(9) == f"{two_files[0]} row 9 (row group 2)"
        assert source.where(16) == f"{two_files[1]} row 6 (row group 1)"

    def test_survives_pickling_after_use_and_leaves_what_it_read_behind(
        self, two_files: list[Path]
    ) -> None:
        source = _open(*two_files)
        new = len(pickle.dumps(source))
        source.read(range(17))
        assert len(pickle.dumps(source)) == new
        copy = pickle.loads(pickle.dumps(source))
        assert copy.read([16, 2]) == [_png(16), _png(2)]
        assert copy.where(16) == source.where(16)
        assert copy.fingerprint == source.fingerprint
        assert _labels(copy) == list(range(17))


class TestWindow:
    def test_holds_as_many_images_as_fit_into_its_memory(self, tmp_path: Path) -> None:
        images = [bytes([number]) * 10_000 for number in range(40)]
        path = _write(tmp_path / "a.parquet", {"image": images, "other": [b"x" * 5000] * 40})
        source = _open(path, image_column="image")
        # Each image also costs Parquet a few bytes for its length and a little for the pages.
        assert source.window_size == pytest.approx((1 << 20) / 10_004, rel=0.02)
        double = _open(path, image_column="image", window_mib=2)
        assert double.window_size == pytest.approx(2 * (1 << 20) / 10_004, rel=0.02)

    def test_keeps_two_windows_of_row_groups_and_forgets_the_longest_unused(
        self, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(0)
        images = [rng.bytes((1 << 18) - 999) for _ in range(16)]  # groups of half a MiB: four fit
        path = _write(tmp_path / "a.parquet", {"image": images}, rows_per_group=2)
        source = _open(path)
        for index in (0, 2, 4, 0, 6, 8):  # the fifth group pushes out the second, not the first
            assert source.read([index]) == [images[index]]
        path.unlink()
        assert source.read([0, 9, 7, 4]) == [images[0], images[9], images[7], images[4]]
        assert isinstance(source.read([2])[0], Unreadable)


class TestLabels:
    def test_the_integers_that_occur_are_the_classes(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": _pngs(0, 4), "label": [20_000, 0, 17, 0]})
        source = _open(path)
        assert _labels(source) == [2, 0, 1, 0]
        assert source.class_names == ["0", "17", "20000"]

    @pytest.mark.parametrize("encode", [False, True], ids=["plain", "dictionary"])
    def test_names_are_numbered_in_sorted_order_over_all_files(
        self, encode: bool, tmp_path: Path
    ) -> None:
        paths = []
        for number, names in enumerate([["dog", "cat"], ["eel", "ape", "dog"]]):
            column = pa.array(names)
            column = column.dictionary_encode() if encode else column
            columns = {"image": _pngs(0, len(names)), "label": column}
            paths.append(_write(tmp_path / f"{number}.parquet", columns))
        source = _open(*paths)
        assert source.class_names == ["ape", "cat", "dog", "eel"]
        assert _labels(source) == [2, 1, 3, 0, 2]

    def test_integers_of_different_widths_are_joined(self, tmp_path: Path) -> None:
        paths = [
            _write(
                tmp_path / f"{kind}.parquet",
                {"image": _pngs(0, 2), "label": pa.array([1, 2], kind)},
            )
            for kind in (pa.int32(), pa.int64(), pa.uint8())
        ]
        source = _open(*paths)
        assert _labels(source) == [0, 1, 0, 1, 0, 1]
        assert source.class_names == ["1", "2"]

    @pytest.mark.parametrize(
        ("given", "numbers", "names"),
        [
            (pa.array([1, None, 0]), [1, -1, 0], ["0", "1"]),
            (pa.array([1, None, 0], pa.uint8()), [1, -1, 0], ["0", "1"]),
            (pa.array(["b", None, "a"]), [1, -1, 0], ["a", "b"]),
            (pa.array(["b", None, "a"]).dictionary_encode(), [1, -1, 0], ["a", "b"]),
        ],
        ids=["int64", "uint8", "names", "dictionary"],
    )
    def test_null_is_an_image_without_a_label(
        self, given: pa.Array, numbers: list[int], names: list[str], tmp_path: Path
    ) -> None:
        source = _open(_write(tmp_path / "a.parquet", {"image": _pngs(0, 3), "label": given}))
        assert _labels(source) == numbers
        assert source.class_names == names

    def test_without_a_column_of_that_name_there_are_none(self, tmp_path: Path) -> None:
        source = _open(_write(tmp_path / "a.parquet", {"image": _pngs(0, 3), "kind": [1, 2, 3]}))
        assert source.labels() is None
        assert source.class_names == []

    def test_another_column_can_be_named(self, tmp_path: Path) -> None:
        columns = {"image": _pngs(0, 3), "label": [0, 0, 0], "fine": [2, 1, 0]}
        path = _write(tmp_path / "a.parquet", columns)
        assert _labels(_open(path, label_column="fine")) == [2, 1, 0]


class TestColumns:
    def test_image_wins_over_other_binary_columns(self, tmp_path: Path) -> None:
        columns = {"mask": [b"a", b"b"], "image": _pngs(0, 2)}
        assert _open(_write(tmp_path / "a.parquet", columns)).read([1]) == [_png(1)]

    def test_the_only_binary_column_is_taken_whatever_its_name(self, tmp_path: Path) -> None:
        columns = {"image": ["a.png", "b.png"], "jpg": _pngs(0, 2)}
        assert _open(_write(tmp_path / "a.parquet", columns)).read([1]) == [_png(1)]

    def test_the_named_column_is_taken(self, tmp_path: Path) -> None:
        columns = {"image": [b"a", b"b"], "jpg": _pngs(0, 2)}
        path = _write(tmp_path / "a.parquet", columns)
        assert _open(path, image_column="jpg").read([1]) == [_png(1)]

    @pytest.mark.parametrize(
        ("columns", "asked", "message"),
        [
            (
                {"left": [b"a"], "right": [b"b"]},
                None,
                r"no single column of encoded images; binary columns: left, right; all: .*",
            ),
            (
                {"url": ["a"], "n": [1]},
                None,
                r"no single column of encoded images; binary columns: none; all: url, n",
            ),
            (
                {"image": [b"a"], "n": [1]},
                "jpg",
                r"no single column of encoded images called 'jpg'; binary columns: image; all: .*",
            ),
            (
                {"image": [b"a"], "n": [1]},
                "n",
                r"no single column of encoded images called 'n'; binary columns: image; all: .*",
            ),
        ],
        ids=["ambiguous", "none", "not there", "not binary"],
    )
    def test_no_column_to_take_is_an_error_that_lists_them(
        self, columns: dict[str, Any], asked: str | None, message: str, tmp_path: Path
    ) -> None:
        path = _write(tmp_path / "a.parquet", columns)
        with pytest.raises(DataError, match=rf"a\.parquet: {message}\. Set data\.image_column$"):
            _open(path, image_column=asked)

    def test_a_label_column_that_is_not_there_lists_the_columns(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": _pngs(0, 1), "n": [1]})
        with pytest.raises(
            DataError,
            match=r"a\.parquet: no column 'fine' for the labels; columns: image, n\. Set ",
        ):
            _open(path, label_column="fine")


class TestErrors:
    def test_a_file_that_is_not_parquet_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"these are not the bytes of a Parquet file")
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet: "):
            _open(tmp_path / "a.parquet")

    def test_a_file_cut_in_half_is_named(self, two_files: list[Path]) -> None:
        two_files[1].write_bytes(two_files[1].read_bytes()[:500])
        with pytest.raises(DataError, match=r"1\.parquet: cannot be read as Parquet: "):
            _open(*two_files)

    def test_no_rows_at_all_is_an_error(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
        with pytest.raises(DataError, match=r"data\.source=toy: the Parquet files hold no rows"):
            _open(path)

    def test_an_empty_file_among_others_is_passed_over(self, two_files: list[Path]) -> None:
        empty = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
        path = _write(two_files[0].parent / "a.parquet", empty)
        source = _open(two_files[0], path, two_files[1])
        assert source.group_sizes.tolist() == [4, 4, 2, 4, 3]
        assert source.where(10) == f"{two_files[1]} row 0 (row group 0)"
        assert _labels(source) == list(range(17))
        assert source.notes == ("1 of 3 Parquet files hold no rows",)

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (
                {"jpg": [b"a"], "label": [1]},
                r"1\.parquet: images in 'jpg', labels in 'label'; unlike",
            ),
            (
                {"image": [b"a"]},
                r"1\.parquet: images in 'image', labels in None; unlike .*0\.parquet",
            ),
            (
                {"image": pa.array([{"bytes": b"a", "path": ""}]), "label": [1]},
                r"1\.parquet: images in 'image\.bytes', .*unlike .*0\.parquet: images in 'image',",
            ),
            (
                {"image": ["a.png"], "label": [1]},
                r"1\.parquet: paths of images in 'image', labels in 'label'; unlike .*: images in",
            ),
            ({"n": [1], "label": [1]}, r"1\.parquet: no single column of encoded images"),
        ],
        ids=["another column", "no labels", "struct", "paths", "no images"],
    )
    def test_files_that_differ_are_an_error_that_names_both(
        self, second: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        first = _write(tmp_path / "0.parquet", {"image": _pngs(0, 2), "label": [0, 1]})
        with pytest.raises(DataError, match=message):
            _open(first, _write(tmp_path / "1.parquet", second))


class TestFingerprint:
    def test_is_the_same_for_the_same_files_elsewhere(self, tmp_path: Path) -> None:
        paths = [_write(tmp_path / p / "a.parquet", {"image": _pngs(0, 5)}) for p in ("x", "y")]
        assert _open(paths[0]).fingerprint == _open(paths[1]).fingerprint

    def test_changes_with_images_rows_names_and_limit(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.parquet", {"image": _pngs(0, 5)})
        seen = [_open(path).fingerprint, _open(path, limit=3).fingerprint]
        renamed = _write(tmp_path / "b.parquet", {"image": _pngs(0, 5)})
        seen.append(_open(renamed).fingerprint)
        seen.append(_open(_write(path, {"image": _pngs(0, 6)})).fingerprint)
        seen.append(_open(_write(path, {"image": _pngs(0, 5)}, rows_per_group=2)).fingerprint)
        assert len(set(seen)) == 5

    def test_changes_when_as_many_other_images_take_their_place(self, tmp_path: Path) -> None:
        # Large enough that the footer's minima and maxima leave them out.
        rng = np.random.default_rng(0)
        path = _write(tmp_path / "a.parquet", {"image": [rng.bytes(9000 + n) for n in range(5)]})
        before = _open(path).fingerprint
        _write(path, {"image": [rng.bytes(9001 + n) for n in range(5)]})
        assert _open(path).fingerprint != before

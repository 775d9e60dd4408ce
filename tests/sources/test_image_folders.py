import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from raysl.errors import DataError
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source


def _png(level: int = 0) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (4, 3), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def _write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png(number))


def _open(source: str | Path, *, held_out: bool = False, **settings: Any) -> Source:
    config = DataConfig(source=str(source), **settings)
    return open_source(config, held_out=held_out, data=config)


def _ids(source: Source) -> list[str]:
    return [source.row_id(row) for row in range(int(source.group_sizes.sum()))]


IMAGENET = ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png", "cover.png")


class TestSplits:
    def test_the_root_of_imagenet_is_its_training_images_with_their_classes(
        self, tmp_path: Path
    ) -> None:
        _write(tmp_path, *IMAGENET)
        source = _open(tmp_path)
        assert _ids(source) == ["train/cat/1.png", "train/dog/2.png"]
        assert source.class_names == ["cat", "dog"]
        assert source.splits == ("train", "validation")
        assert source.notes == (
            "the split train is read (2 images); data.split=NAME reads another one: validation (2)",
            "1 image in no split left out",
        )

    def test_another_split_is_read_by_its_name_or_the_folders(self, tmp_path: Path) -> None:
        _write(tmp_path, *IMAGENET)
        for name in ("validation", "val"):
            source = _open(tmp_path, split=name)
            assert _ids(source) == ["val/cat/3.png", "val/dog/4.png"]
            assert source.class_names == ["cat", "dog"]

    def test_images_to_test_on_come_from_the_held_out_split(self, tmp_path: Path) -> None:
        _write(tmp_path, *IMAGENET)
        assert _ids(_open(tmp_path, held_out=True)) == ["val/cat/3.png", "val/dog/4.png"]

    def test_one_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        _write(tmp_path, *IMAGENET)
        with pytest.raises(DataError, match=r"split=test: .*; existing splits: train, validation$"):
            _open(tmp_path, split="test")
        with pytest.raises(DataError, match=r"split=test: no such split; existing splits: none$"):
            _open(tmp_path / "train", split="test")

    def test_lie_below_a_chain_of_folders_too(self, tmp_path: Path) -> None:
        _write(tmp_path, "Data/CLS-LOC/train/a/1.png", "Data/CLS-LOC/test/2.png")
        source = _open(tmp_path)
        assert _ids(source) == ["Data/CLS-LOC/train/a/1.png"]
        assert source.class_names == ["a"]

    def test_of_two_years_are_one(self, tmp_path: Path) -> None:
        _write(tmp_path, "train2014/1.png", "train2017/2.png", "val2017/3.png")
        source = _open(tmp_path)
        assert _ids(source) == ["train2014/1.png", "train2017/2.png"]
        assert source.labels() is None

    def test_names_with_signs_of_patterns_are_names(self, tmp_path: Path) -> None:
        _write(tmp_path, "a+b (1)/train/x.y/1.png", "a+b (1)/val/x.y/2.png", "a+b (1)/val/z/3.png")
        source = _open(tmp_path)
        assert (_ids(source), source.class_names) == (["a+b (1)/train/x.y/1.png"], ["x.y"])


class TestAnnotations:
    def test_beside_images_are_warned_about_and_are_no_classes(self, tmp_path: Path) -> None:
        _write(tmp_path, "images/1.png", "masks/1.png")
        source = _open(tmp_path)
        assert source.labels() is None
        assert len(_ids(source)) == 2
        (note,) = source.notes
        assert note.startswith("folders masks look like annotations of the images beside them")
        assert note.endswith(f"data.source={tmp_path}/FOLDER reads one folder")

    def test_a_class_called_like_a_split_is_a_class_with_a_note(self, tmp_path: Path) -> None:
        _write(tmp_path, "car/1.png", "train/2.png")
        source = _open(tmp_path)
        assert source.class_names == ["car", "train"]
        assert source.notes[0].startswith("folders train are named like splits but used as")


def test_a_single_folder_of_folders_is_one_class_with_a_note(tmp_path: Path) -> None:
    _write(tmp_path, "pets/cat/1.png", "pets/dog/2.png")
    source = _open(tmp_path)
    assert source.class_names == ["pets"]
    (note,) = source.notes
    assert f"data.source={tmp_path}/pets uses the folders in it as classes (cat, dog)" in note
    assert _open(tmp_path / "pets").notes == ()


class TestGlobs:
    def test_of_images_are_a_source_whose_folders_are_classes(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/1.png", "cat/2.jpg", "dog/3.png")
        source = _open(tmp_path / "*/*.png")
        assert _ids(source) == ["cat/1.png", "dog/3.png"]
        assert source.class_names == ["cat", "dog"]

    def test_in_a_folder_with_signs_in_its_name_match_the_rest_alone(self, tmp_path: Path) -> None:
        for name in ("set [2020]", "what?", "a{1,2}"):
            _write(tmp_path / name, "1.png", "2.png")
            assert len(_ids(_open(f"{tmp_path}/{name}/*.png"))) == 2

    def test_of_a_folder_that_is_a_pattern_still_match(self, tmp_path: Path) -> None:
        _write(tmp_path, "set1/1.png", "set2/2.png", "other/3.png")
        assert _ids(_open(f"{tmp_path}/set[0-9]/*.png")) == ["set1/1.png", "set2/2.png"]

    def test_of_several_kinds_are_an_error(self, tmp_path: Path) -> None:
        _write(tmp_path, "1.png")
        pq.write_table(pa.table({"image": [_png()]}), tmp_path / "1.parquet")
        with pytest.raises(DataError, match=r"matches 1 images and both 1 \.parquet and 0 \.tar"):
            _open(tmp_path / "*")


class TestShards:
    def _write(self, root: Path, *names: str) -> None:
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            rows = {"image": [_png(number)], "label": [number]}
            pq.write_table(pa.table(rows), root / name)

    def test_of_hugging_face_are_read_by_split(self, tmp_path: Path) -> None:
        names = [f"data/{name}-00000-of-00001.parquet" for name in ("test", "train", "validation")]
        self._write(tmp_path, *names)
        source = _open(tmp_path)
        assert source.class_names == ["1"]
        assert source.splits == ("train", "validation", "test")
        assert "reads another one: validation (1), test (1)" in source.notes[0]
        assert _open(tmp_path, split="test").class_names == ["0"]
        assert _open(tmp_path, held_out=True).class_names == ["2"]

    def test_that_are_named_are_read_together_with_a_note(self, tmp_path: Path) -> None:
        self._write(tmp_path, "train-0.parquet", "test-0.parquet")
        source = _open(tmp_path / "*.parquet")
        assert source.class_names == ["0", "1"]
        assert source.notes == (
            "the named files belong to several splits, read as one: train (1), test (1)",
        )

    def test_of_no_split_are_counted(self, tmp_path: Path) -> None:
        self._write(tmp_path, "train/0.parquet", "val/0.parquet", "extra/0.parquet")
        assert "1 file in no split left out" in _open(tmp_path).notes

    def test_images_beside_them_are_counted(self, tmp_path: Path) -> None:
        self._write(tmp_path, "0.parquet")
        _write(tmp_path, "preview.png")
        assert _open(tmp_path).notes == ("1 image beside the Parquet files left out",)

    def test_that_only_describe_images_beside_them_are_no_source(self, tmp_path: Path) -> None:
        _write(tmp_path, "cat/1.png", "dog/2.png")
        rows = {"file_name": ["cat/1.png", "dog/2.png"], "age": [3, 4]}
        pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
        assert _open(tmp_path).class_names == ["cat", "dog"]


def test_a_built_in_set_has_two_splits() -> None:
    assert _open("digits", split="test").group_sizes.tolist() == [450]
    assert _open("digits", held_out=True).group_sizes.tolist() == [450]
    with pytest.raises(DataError, match=r"split=validation: .*; existing splits: train, test$"):
        _open("digits", split="validation")

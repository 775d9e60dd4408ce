import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.sources.folder import FolderSource
from raysl.sources.open import open_source
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import ArraySource, DataConfig, Source, SourceConfig


def _png(number: int) -> bytes:
    _, encoded = cv2.imencode(".png", np.full((3, 4, 3), number, dtype=np.uint8))
    return encoded.tobytes()


def _grey(source: Source, index: int) -> int:
    """Return the level of an image that is one level everywhere."""
    return int(decode(source.read([index])[0], where="x")[0, 0, 0])


def _open(source: str | Path, split: str = "train", **settings: Any) -> Source:
    config = DataConfig(source=str(source), **settings)
    return open_source(config, split=split, data=config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png(number))
    return root


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    root = tmp_path / "tables"
    root.mkdir()
    for number in (0, 1):
        rows = {"image": [_png(2 * number), _png(2 * number + 1)], "label": ["a", "b"]}
        pq.write_table(pa.table(rows), root / f"part-{number}.parquet")
    return root


class TestBuiltIn:
    def test_digits_open_by_name_in_two_splits(self) -> None:
        train, test = _open("digits"), _open("digits", "test")
        assert isinstance(train, ArraySource)
        assert train.group_sizes.tolist() == [1347]
        assert test.group_sizes.tolist() == [450]

    def test_a_limit_keeps_images_and_labels_at_even_distances(self) -> None:
        whole, source = _open("digits"), _open("digits", limit=7)
        labels, all_labels = source.labels(), whole.labels()
        assert labels is not None
        assert all_labels is not None
        rows = [number * 1347 // 7 for number in range(7)]
        np.testing.assert_array_equal(np.stack(source.read(range(7))), np.stack(whole.read(rows)))
        assert source.group_sizes.tolist() == [7]
        assert labels.tolist() == all_labels[rows].tolist()
        assert source.class_names == whole.class_names
        assert source.fingerprint != whole.fingerprint

    def test_torchvisions_sets_are_looked_for_below_the_root_of_the_data_section(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def open_torchvision(config: SourceConfig, split: str, *, root: str) -> ArraySource:
            asked.append((config.source, split, root))
            return ArraySource(config.source, np.zeros((2, 3, 3, 3), dtype=np.uint8))

        monkeypatch.setattr("raysl.sources.builtin.open_torchvision", open_torchvision)
        data = DataConfig(source="digits", torchvision_root=str(tmp_path))
        open_source(SourceConfig(source="stl10"), split="test", data=data)
        assert asked == [("stl10", "test", str(tmp_path))]


class TestFolder:
    def test_of_images_opens_with_its_classes(self, folder: Path) -> None:
        source = _open(folder)
        assert isinstance(source, FolderSource)
        assert source.class_names == ["cat", "dog"]
        assert [_grey(source, index) for index in range(3)] == [0, 1, 2]

    def test_opens_by_file_uri_too(self, folder: Path) -> None:
        by_path, by_uri = _open(folder), _open(f"file://{folder}/")
        assert by_uri.where(2) == by_path.where(2) == f"{folder}/dog/1.png"
        assert by_uri.fingerprint == by_path.fingerprint
        assert _grey(by_uri, 2) == 2

    def test_opens_relative_to_the_working_directory(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder / "cat")
        source = _open("../../pictures")
        assert source.fingerprint == _open(folder).fingerprint
        assert _grey(source, 2) == 2

    def test_keeps_its_place_when_pickled_and_read_elsewhere(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(folder)
        stored = pickle.dumps(_open("cat"))
        monkeypatch.chdir(tmp_path)
        assert _grey(pickle.loads(stored), 1) == 1

    def test_with_brackets_in_its_name_opens(self, folder: Path) -> None:
        renamed = folder.rename(folder.parent / "pictures [2015]")
        assert _grey(_open(renamed), 2) == 2


class TestParquet:
    @pytest.mark.parametrize(
        ("path", "levels"),
        [
            ("", [0, 1, 2, 3]),
            ("part-1.parquet", [2, 3]),
            ("*.parquet", [0, 1, 2, 3]),
            ("part-[1-9].parquet", [2, 3]),
        ],
        ids=["folder", "file", "glob", "range"],
    )
    def test_opens_a_folder_a_file_or_a_glob(
        self, path: str, levels: list[int], tables: Path
    ) -> None:
        source = _open(tables / path)
        assert isinstance(source, ParquetSource)
        assert [_grey(source, index) for index in range(len(levels))] == levels
        assert int(source.group_sizes.sum()) == len(levels)

    def test_opens_by_file_uri_too(self, tables: Path) -> None:
        source = _open(f"file://{tables}/part-0.parquet")
        assert source.where(1) == f"{tables}/part-0.parquet row 1 (row group 0)"

    def test_a_folder_named_like_a_file_opens(self, tables: Path) -> None:
        renamed = tables.rename(tables.parent / "t.parquet")
        assert _open(renamed).group_sizes.tolist() == [2, 2]
        assert _open(renamed.parent).group_sizes.tolist() == [2, 2]

    def test_the_window_of_the_data_section_is_used(self, tables: Path) -> None:
        narrow = _open(tables, shuffle_window_mib=1).window_size
        wide = _open(tables, shuffle_window_mib=3).window_size
        assert narrow is not None
        assert wide is not None
        assert wide == pytest.approx(3 * narrow, abs=3)

    def test_column_and_limit_settings_are_used(self, tmp_path: Path) -> None:
        rows = {"a": [_png(1), _png(2)], "b": [_png(3), _png(4)], "fine": [5, 6]}
        pq.write_table(pa.table(rows), tmp_path / "x.parquet")
        source = _open(tmp_path, image_column="b", label_column="fine", limit=1)
        labels = source.labels()
        assert labels is not None
        assert (_grey(source, 0), labels.tolist(), source.class_names) == (3, [0], ["5"])


class TestFolderOfBoth:
    def test_parquet_wins_over_images(self, folder: Path, tables: Path) -> None:
        tables.rename(folder / "tables")
        assert isinstance(_open(folder), ParquetSource)

    def test_hidden_files_and_folders_are_no_shards(self, tables: Path) -> None:
        for name in ("_temporary/part-9.parquet", ".part-9.parquet", "_part-9.parquet"):
            (tables / name).parent.mkdir(exist_ok=True)
            (tables / name).write_bytes(b"half written")
        assert _open(tables).group_sizes.tolist() == [2, 2]
        assert _open(tables / "*.parquet").group_sizes.tolist() == [2, 2]

    def test_tar_shards_beside_images_are_an_error_that_says_how_to_choose(
        self, folder: Path
    ) -> None:
        with tarfile.open(folder / "a.tar", "w") as shard:
            shard.add(folder / "cat" / "1.png", "1.png")
        with pytest.raises(DataError, match=rf"3 images and 1 \.tar files; give {folder}/\*\.tar"):
            _open(folder)
        assert _grey(_open(folder / "*.tar"), 0) == 0


class TestErrors:
    @pytest.mark.parametrize(
        "name", ["nowhere", "nowhere/*.parquet", "x.parquet", "x-[0-9].parquet"]
    )
    def test_nothing_there_says_so_and_what_could_be_given(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file or folder") as caught:
            _open(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"data.source={tmp_path}/{name}: ")
        assert message.endswith(
            "give digits, cifar10, cifar100, stl10, a folder of images, or shards (Parquet or "
            ".tar: a file, a folder, a glob, a range such as DIR/{000..099}.tar)"
        )

    def test_a_name_near_a_built_in_one_lists_the_built_in_ones(self) -> None:
        with pytest.raises(DataError, match=r"data\.source=cifar-10: no such .*cifar10, cifar100"):
            _open("cifar-10")

    def test_a_file_of_another_kind_is_not_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("a,b\n")
        with pytest.raises(DataError, match=r"list\.csv is not named like a Parquet file"):
            _open(tmp_path / "list.csv")

    def test_a_folder_without_images_names_the_endings_it_looked_for(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("a")
        with pytest.raises(
            DataError,
            match=r"no images, no \.parquet files and no \.tar shards .*\.jpg, \.jpeg, .*\.tiff",
        ):
            _open(tmp_path)

    def test_a_broken_parquet_file_is_named(self, tables: Path) -> None:
        (tables / "part-1.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataError, match=r"part-1\.parquet: cannot be read as Parquet"):
            _open(tables)

    def test_a_scheme_that_is_not_known_is_named(self) -> None:
        with pytest.raises(DataError, match=r"^data\.source=nope://bucket/x: "):
            _open("nope://bucket/x")


def test_a_data_worker_loads_neither_torch_nor_scikit_learn_nor_ray_nor_mlflow() -> None:
    code = "import raysl.sources.open, raysl.data.stream, sys; "
    code += "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "raysl" in loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "scipy", "ray", "mlflow", "matplotlib"}


def test_a_pack_that_has_not_finished_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "pack.json").write_text("{}")
    with pytest.raises(DataError, match="has not finished in this folder; run the same pack again"):
        open_source(SourceConfig(source=str(tmp_path)), data=DataConfig(source=str(tmp_path)))


class TestNamesOfSettings:
    """A source of another section is spoken of by that section's keys."""

    CASES: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "missing": ("none", {}),
        "range": ("{9..0}.tar", {}),
        "scheme": ("nowhere://a", {}),
        "split": ("pictures", {"split": "dev"}),
        "columns of images": ("pictures", {"label_column": "x"}),
        "filter of images": ("pictures", {"filter": (("path", "==", "x"),)}),
        "list": ("pictures", {"filter": (("path", "in file", "none"),)}),
        "filter of digits": ("digits", {"filter": (("path", "==", "x"),)}),
        "image column": ("tables", {"image_column": "x"}),
        "label column": ("tables", {"label_column": "x"}),
        "filter of Parquet": ("tables", {"filter": (("label", "==", "x"),)}),
        "filter of a column": ("tables", {"filter": (("x", "==", "x"),)}),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_are_those_of_the_section_in_every_error(
        self,
        case: str,
        folder: Path,
        tables: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        name, settings = self.CASES[case]
        data = DataConfig(source=name)
        config = SourceConfig(source=name, **settings)
        said = []
        for each in (config, config.called("evaluate"), config.called("data.test", source="x.y")):
            with pytest.raises(DataError) as caught:
                open_source(each, data=data)
            said.append(str(caught.value))
        assert "data." in said[0]
        assert said[1] == said[0].replace("data.", "evaluate.")
        assert said[2] == said[0].replace("data.source", "x.y").replace("data.", "data.test.")

    def test_are_in_the_advice_on_labels_and_in_notes_too(
        self, tables: Path, tmp_path: Path
    ) -> None:
        data = DataConfig(source="digits")
        folder = tmp_path / "splits"
        folder.mkdir()
        for split in ("train", "test"):
            shutil.copy(tables / "part-0.parquet", folder / f"{split}.parquet")
        advice = open_source(
            SourceConfig(source=f"{folder}/*.parquet").called("evaluate"), data=data
        ).label_advice
        assert advice.startswith("use Parquet files with a column of classes")
        assert "set evaluate.label_column to it" in advice
        (note,) = open_source(SourceConfig(source=str(folder)).called("evaluate"), data=data).notes
        assert "evaluate.split=NAME" in note

    def test_of_mixed_images_begin_with_their_number(self, folder: Path, tables: Path) -> None:
        wrong = {"missing": {"source": str(folder / "none")}}
        wrong["column"] = {"source": str(tables), "label_column": "x"}
        said = {}
        for name, part in wrong.items():
            with pytest.raises(DataError) as caught:
                _open(folder, mix=(part,))
            said[name] = str(caught.value)
        assert said["missing"].startswith(f"data.mix[0].source={folder}/none: no such file")
        assert said["column"].startswith(f"data.mix[0].source={tables}: {tables}/part-0.parquet: ")
        assert said["column"].endswith("Set data.mix[0].label_column")
        assert said["missing"].count("data.mix") == 1

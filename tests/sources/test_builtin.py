import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets.cifar
import torchvision.datasets.stl10
from sklearn.datasets import load_digits

from raysl.errors import DataError
from raysl.sources.builtin import open_digits, open_torchvision
from raysl.sources.source import ArraySource, DataConfig

DOWNLOADERS = (torchvision.datasets.cifar, torchvision.datasets.stl10)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network in tests")

    for module in DOWNLOADERS:
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


@pytest.fixture
def _any_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept files that are there, whatever their md5."""
    for module in DOWNLOADERS:
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def _images(count: int, side: int, seed: int) -> np.ndarray:
    """Make images as torchvision's files hold them: channels first."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def _labels(source: ArraySource) -> list[int]:
    labels = source.labels()
    assert labels is not None
    assert labels.dtype == np.int64
    return [int(label) for label in labels]


class TestDigits:
    def test_has_1347_training_and_450_test_images(self) -> None:
        train, test = open_digits("train"), open_digits("test")
        assert train.images.shape == (1347, 8, 8)
        assert test.images.shape == (450, 8, 8)
        assert train.images.dtype == np.uint8

    def test_splits_are_disjoint_and_together_are_all_digits(self) -> None:
        digits = load_digits()
        images = np.rint(digits.images * 255 / 16).astype(np.uint8)
        sources = [open_digits("train"), open_digits("test")]
        rows = [
            (int(label), image.tobytes())
            for source in sources
            for label, image in zip(_labels(source), source.images, strict=True)
        ]
        every = [
            (label, image.tobytes()) for label, image in zip(digits.target, images, strict=True)
        ]
        assert len(set(every)) == len(every) == 1797  # no image stands twice in the set itself
        assert sorted(rows) == sorted(every)

    def test_test_split_has_as_many_of_each_class_as_the_classes_have(self) -> None:
        every = np.bincount(load_digits().target)
        labels = _labels(open_digits("test"))
        assert np.abs(np.bincount(labels) - every * 450 / 1797).max() < 1

    def test_uses_the_full_range_of_levels(self) -> None:
        images = open_digits("train").images
        assert images.min() == 0
        assert images.max() == 255
        assert len(np.unique(images)) == 17

    def test_is_the_same_every_time_and_names_its_classes(self) -> None:
        one, other = open_digits("train"), open_digits("train")
        assert one.fingerprint == other.fingerprint != open_digits("test").fingerprint
        assert one.class_names == [str(number) for number in range(10)]
        assert one.where(3) == "digits/train image 3"

    def test_survives_pickling(self) -> None:
        source = open_digits("test")
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(copy.read([449])[0], source.read([449])[0])
        assert _labels(copy) == _labels(source)


@pytest.mark.usefixtures("_any_content")
class TestCIFAR:
    NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        for number, name in enumerate(names):
            images = _images(4, 32, seed=number).reshape(4, -1)
            content = {"data": images, "labels": [number, 1, 2, 3]}
            (folder / name).write_bytes(pickle.dumps(content))
        meta = {"label_names": list(self.NAMES)}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta))
        return tmp_path

    def test_training_split_is_the_five_files_in_order(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="cifar10"), "train", root=str(root))
        expected = np.concatenate([_images(4, 32, seed=n) for n in range(5)])
        np.testing.assert_array_equal(source.images, expected.transpose(0, 2, 3, 1))
        assert _labels(source) == [label for n in range(5) for label in (n, 1, 2, 3)]

    def test_test_split_is_the_sixth(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="cifar10"), "test", root=str(root))
        np.testing.assert_array_equal(source.images, _images(4, 32, seed=5).transpose(0, 2, 3, 1))
        assert source.where(2) == "cifar10/test image 2"

    def test_has_the_files_class_names(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="cifar10"), "train", root=str(root))
        assert source.class_names == list(self.NAMES)

    def test_survives_pickling(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="cifar10"), "train", root=str(root))
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(np.stack(copy.read([7, 0])), source.images[[7, 0]])
        assert copy.fingerprint == source.fingerprint

    def test_cifar100_has_fine_labels(self, tmp_path: Path) -> None:
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        for number, name in enumerate(("train", "test")):
            images = _images(3, 32, seed=number).reshape(3, -1)
            content = {"data": images, "fine_labels": [99, 7, 0], "coarse_labels": [1, 2, 3]}
            (folder / name).write_bytes(pickle.dumps(content))
        meta = {"fine_label_names": [f"fine {n}" for n in range(100)]}
        (folder / "meta").write_bytes(pickle.dumps(meta))
        source = open_torchvision(DataConfig(source="cifar100"), "train", root=str(tmp_path))
        np.testing.assert_array_equal(source.images, _images(3, 32, seed=0).transpose(0, 2, 3, 1))
        assert _labels(source) == [99, 7, 0]
        assert source.class_names[99] == "fine 99"


@pytest.mark.usefixtures("_any_content")
class TestSTL10:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        folder = tmp_path / "stl10_binary"
        folder.mkdir()
        for number, (name, count) in enumerate([("train", 3), ("test", 2), ("unlabeled", 4)]):
            # The file is column-major: each channel is stored transposed.
            images = _images(count, 96, seed=number).transpose(0, 1, 3, 2)
            np.ascontiguousarray(images).tofile(folder / f"{name}_X.bin")
        np.array([10, 1, 5], dtype=np.uint8).tofile(folder / "train_y.bin")  # counted from 1
        np.array([2, 3], dtype=np.uint8).tofile(folder / "test_y.bin")
        names = "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"
        (folder / "class_names.txt").write_text(names)
        return tmp_path

    def test_training_split_is_labelled_and_unlabelled_images(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="stl10"), "train", root=str(root))
        expected = np.concatenate([_images(3, 96, seed=0), _images(4, 96, seed=2)])
        np.testing.assert_array_equal(source.images, expected.transpose(0, 2, 3, 1))
        assert _labels(source) == [9, 0, 4, -1, -1, -1, -1]
        assert source.class_names[9] == "truck"

    def test_test_split_is_labelled(self, root: Path) -> None:
        source = open_torchvision(DataConfig(source="stl10"), "test", root=str(root))
        np.testing.assert_array_equal(source.images, _images(2, 96, seed=1).transpose(0, 2, 3, 1))
        assert _labels(source) == [1, 2]


class TestMissing:
    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
    def test_is_an_error_that_says_where_it_looked_and_what_to_do(
        self, name: str, tmp_path: Path
    ) -> None:
        with pytest.raises(
            DataError,
            match=rf"^data\.source={name}: not found in {tmp_path}/cache, .*no network in tests.*"
            r"set data\.torchvision_root, or use a folder or Parquet$",
        ):
            open_torchvision(DataConfig(source=name), "train", root=str(tmp_path / "cache"))

    def test_damaged_files_are_an_error_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The download "succeeds" and leaves nothing that has the right md5.
        monkeypatch.setattr(
            torchvision.datasets.cifar, "download_and_extract_archive", lambda *_, **__: None
        )
        with pytest.raises(DataError, match=r"data\.source=cifar10: .*corrupted"):
            open_torchvision(DataConfig(source="cifar10"), "train", root=str(tmp_path))

    def test_a_root_that_cannot_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(DataError, match=r"data\.source=stl10: not found in .*/file/cache"):
            open_torchvision(
                DataConfig(source="stl10"), "train", root=str(tmp_path / "file" / "cache")
            )

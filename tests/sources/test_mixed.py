import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from raysl.errors import DataError
from raysl.sources.mixed import MixedSource
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig, WeightedSource


def _toy(name: str, levels: range, labels: Any = None, names: Any = ()) -> ArraySource:
    images = np.stack([np.full((2, 2, 3), level, dtype=np.uint8) for level in levels])
    return ArraySource(name, images, None if labels is None else np.array(labels), names)


def _levels(source: MixedSource, rows: Any) -> list[int]:
    return [int(image[0, 0, 0]) for image in source.read(rows)]  # type: ignore[call-overload]


@pytest.fixture
def mixed() -> MixedSource:
    """Three labelled images, two without labels, three of partly the same classes."""
    parts = [
        _toy("a", range(3), [1, 0, -1], ["cat", "dog"]),
        _toy("b", range(10, 12)),
        _toy("c", range(20, 23), [0, 1, 1], ["eel", "cat"]),
    ]
    return MixedSource(parts, [1.0, 0.5, 2.0])


class TestMixedSource:
    def test_rows_follow_one_another_and_are_read_in_the_order_asked_for(
        self, mixed: MixedSource
    ) -> None:
        assert mixed.group_sizes.tolist() == [3, 2, 3]
        assert _levels(mixed, range(8)) == [0, 1, 2, 10, 11, 20, 21, 22]
        assert _levels(mixed, np.array([7, 0, 4, 0, 5, 3])) == [22, 0, 11, 0, 20, 10]

    def test_a_row_is_named_by_its_part(self, mixed: MixedSource) -> None:
        assert [mixed.where(row) for row in (0, 3, 7)] == ["a image 0", "b image 0", "c image 2"]

    def test_weights_stand_by_group(self, mixed: MixedSource) -> None:
        assert mixed.weights is not None
        assert mixed.weights.tolist() == [1.0, 0.5, 2.0]

    def test_classes_are_joined_by_name(self, mixed: MixedSource) -> None:
        labels = mixed.labels()
        assert labels is not None
        assert mixed.class_names == ["cat", "dog", "eel"]
        assert labels.tolist() == [1, 0, -1, -1, -1, 2, 0, 0]

    def test_without_any_labels_there_are_none(self) -> None:
        source = MixedSource([_toy("a", range(2)), _toy("b", range(2))], [1.0, 1.0])
        assert source.labels() is None
        assert source.class_names == []

    def test_the_smallest_window_counts(self, mixed: MixedSource) -> None:
        assert mixed.window_size is None
        mixed.parts[1].window_size = 7  # type: ignore[misc]
        mixed.parts[2].window_size = 9  # type: ignore[misc]
        assert MixedSource(mixed.parts, [1.0, 1.0, 1.0]).window_size == 7

    def test_fingerprint_changes_with_parts_order_and_weights(self) -> None:
        a, b = _toy("a", range(2)), _toy("b", range(3))
        made = [([a, b], [1.0, 1.0]), ([b, a], [1.0, 1.0]), ([a, b], [1.0, 0.5]), ([a, a], [1, 1])]
        assert len({MixedSource(parts, weights).fingerprint for parts, weights in made}) == 4

    def test_survives_pickling(self, mixed: MixedSource) -> None:
        copy = pickle.loads(pickle.dumps(mixed))
        assert _levels(copy, [7, 0]) == [22, 0]
        assert copy.fingerprint == mixed.fingerprint


class TestOpening:
    def _folder(self, root: Path, *names: str) -> str:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            _, encoded = cv2.imencode(".png", np.zeros((3, 3, 3), dtype=np.uint8))
            (root / name).write_bytes(encoded.tobytes())
        return str(root)

    def test_data_mix_comes_after_data_source(self, tmp_path: Path) -> None:
        first = self._folder(tmp_path / "1", "cat/1.png", "dog/1.png")
        second = self._folder(tmp_path / "2", "dog/1.png", "eel/1.png", "eel/2.png")
        config = DataConfig(source=first, mix=(WeightedSource(source=second, weight=0.5, limit=2),))
        source = open_source(config, data=config)
        assert source.where(2) == f"{second}/dog/1.png"
        assert source.group_sizes.tolist() == [2, 2]
        assert source.weights is not None
        assert source.weights.tolist() == [1.0, 0.5]
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [0, 1, 1, 2]
        assert source.class_names == ["cat", "dog", "eel"]

    def test_the_test_split_and_other_sections_are_not_mixed(self, tmp_path: Path) -> None:
        folder = self._folder(tmp_path, "1.png")
        config = DataConfig(source=folder, mix=(WeightedSource(source=folder),))
        assert not isinstance(open_source(config, split="test", data=config), MixedSource)
        section = WeightedSource(source=folder)
        assert not isinstance(open_source(section, data=config), MixedSource)

    def test_errors_name_the_part(self, tmp_path: Path) -> None:
        folder = self._folder(tmp_path / "data", "1.png")
        missing = str(tmp_path / "nowhere")
        parts = (WeightedSource(source=folder), WeightedSource(source=missing))
        config = DataConfig(source=folder, mix=parts)
        with pytest.raises(DataError, match=rf"^data\.mix\[1\]\.source={missing}: no such file"):
            open_source(config, data=config)
        bad = WeightedSource(source=folder, filter=(("width", ">", 3),))
        config = DataConfig(source=folder, mix=(bad,))
        with pytest.raises(DataError, match=r"^data\.mix\[0\]\.source=.*data\.mix\[0\]\.filter \["):
            open_source(config, data=config)

from typing import Any

import numpy as np
import pytest

from raysl.recipe import RunConfig, run_from_values, training_set
from raysl.sources.source import ArraySource, Labels


class Watched(ArraySource):
    """Six images of two classes; counts how often somebody asks for their labels."""

    def __init__(self) -> None:
        pixels = np.zeros((6, 8, 8), dtype=np.uint8)
        super().__init__("s", pixels, labels=np.array([0, 1, 1, -1, 1, 0]), class_names=["a", "b"])
        self.asked = 0

    def labels(self) -> Labels | None:
        self.asked += 1
        return super().labels()


def make_config(method: dict[str, Any]) -> RunConfig[Any]:
    views = {"recipe": "custom", "kinds": [{"count": 2, "size_px": 8}]}
    if method["name"] == "nce":
        views = {"recipe": "custom", "kinds": [{"count": 1, "size_px": 8}]}
    values = {
        "name": "a-run",
        "data": {"source": "digits", "views": views},
        "method": method,
        "train": {"steps": 1, "global_batch_size": 4},
    }
    return run_from_values(values, where="test")


class TestTrainingSet:
    @pytest.mark.parametrize(
        ("method", "asked"),
        [
            ({"name": "nce", "noise": "uniform"}, 0),
            ({"name": "nce", "noise": "gaussian"}, 0),
            ({"name": "nce", "noise": "labels"}, 1),
            ({"name": "margin", "num_others": 2}, 0),
            ({"name": "margin", "num_others": 2, "pairs": "labels"}, 1),
            ({"name": "simclr"}, 0),
        ],
        ids=str,
    )
    def test_looks_at_labels_only_where_the_method_uses_them(
        self, method: dict[str, Any], asked: int
    ) -> None:
        source = Watched()
        found = training_set(make_config(method), source)
        assert source.asked == asked
        assert found.class_counts == ((2, 3) if asked else None)
        assert found.num_images == 6

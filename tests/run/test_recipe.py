from typing import Any

import numpy as np
import pytest

from raysl.errors import ConfigError
from raysl.methods import load_method
from raysl.run.recipe import RunConfig, run_from_values, training_set
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


def make_config(method: dict[str, Any], **sections: Any) -> RunConfig[Any]:
    count = load_method(method["name"]).Config().num_views
    views = {"recipe": "custom", "kinds": [{"count": count, "size_px": 8}]}
    values = {
        "name": "a-run",
        "data": {"source": "digits", "views": views},
        "method": method,
        "train": {"steps": 1, "global_batch_size": 4},
    }
    return run_from_values(values | sections, where="test")


class TestFinetune:
    @pytest.mark.parametrize(
        ("method", "most"),
        [
            ({"name": "simclr", "projection_layers": 3}, 3),
            ({"name": "byol"}, 2),
            ({"name": "moco", "head": "linear"}, 1),
            ({"name": "moco_v3"}, 2),
            ({"name": "nce"}, 1),
            ({"name": "rotation"}, 0),
        ],
        ids=str,
    )
    def test_from_a_layer_that_the_head_has_not_is_refused(
        self, method: dict[str, Any], most: int
    ) -> None:
        def evaluate(layers: int) -> dict[str, Any]:
            return {"final": ["finetune"], "finetune": {"head_layers": layers}}

        found = make_config(method, evaluate=evaluate(most)).evaluate.finetune
        assert found.head_layers == most
        wanted = rf"head_layers={most + 1}: .* method {method['name']} ends at layer {most}"
        with pytest.raises(ConfigError, match=wanted):
            make_config(method, evaluate=evaluate(most + 1))

    def test_of_moco_v3_on_a_vision_transformer_has_a_third_layer(self) -> None:
        vit = {"name": "vit_tiny", "patch_size_px": 4, "depth": 1}
        evaluate = {"final": ["finetune"], "finetune": {"head_layers": 3}}
        config = make_config({"name": "moco_v3"}, evaluate=evaluate, backbone=vit)
        assert config.evaluate.trained == ("finetune",)


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

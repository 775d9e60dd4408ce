from typing import Any

import numpy as np
import pytest
import torch

from raysl.config.idle import idle_settings
from raysl.config.load import validate
from raysl.errors import ConfigError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.probes import FewShotConfig, KnnConfig, LbfgsConfig, LinearConfig
from raysl.evaluate.protocol import (
    EvaluateConfig,
    LabelledSets,
    knn_top1,
    measure_probes,
    probe_sets,
)
from raysl.evaluate.registry import PROTOCOLS
from raysl.sources.pixels import Bits
from raysl.sources.source import ArraySource, DataConfig


def made_up(*, few_shot: bool = True) -> LabelledSets:
    """90 images of three classes, the first 72 of them to train on."""
    labels = np.arange(90) % 3
    images = ArraySource("made up", np.zeros((90, 8, 8), np.uint8), labels, ["a", "b", "c"])
    parts = [
        EvalImages(images, rows, labels[rows], size_px=8, crop_fraction=1.0, num_threads=1)
        for rows in (np.arange(72), np.arange(72, 90))
    ]
    return LabelledSets(*parts, images.class_names, few_shot=few_shot)


class TestTestImages:
    """Where ``evaluate`` is silent, they are decoded as the training images are."""

    DATA = DataConfig(source="a", intensity=Bits(bits=12), color_profile="ignore", pages="first")

    def test_take_the_pixels_of_the_training_images(self) -> None:
        config = EvaluateConfig(source="b", label_column="fine", split="test")
        found = config.test_images(self.DATA)
        assert found.decoding() == self.DATA.decoding()
        assert (found.source, found.label_column, found.split) == ("b", "fine", "test")

    def test_unless_they_have_their_own(self) -> None:
        own = {"intensity": Bits(bits=10), "color_profile": "convert", "pages": "refuse"}
        found = EvaluateConfig.model_validate({"source": "b", **own}).test_images(self.DATA)
        assert found.decoding() == (Bits(bits=10), "convert", "refuse")


class TestProtocols:
    def features(self, sets: LabelledSets) -> list[torch.Tensor]:
        torch.manual_seed(0)
        centers = torch.randn(3, 6)
        return [
            centers[torch.from_numpy(images.labels)] + torch.randn(len(images), 6)
            for images in (sets.train, sets.test)
        ]

    def test_are_those_of_the_registry_with_the_settings_of_the_configuration(self) -> None:
        sets = made_up()
        train, test = self.features(sets)
        config = EvaluateConfig(
            final=("knn", "linear", "linear_lbfgs", "few_shot"),
            seeds=(3, 4),
            knn=KnnConfig(k=3, temperature=0.5),
            linear=LinearConfig(epochs=2),
            linear_lbfgs=LbfgsConfig(inverse_penalties=(0.1,)),
            few_shot=FewShotConfig(labels_per_class=2, draws=4, inverse_penalty=0.1),
        )
        arrays = probe_sets(sets, train, test)
        expected: dict[str, list[float]] = {}
        for name in config.final:
            protocol, settings = PROTOCOLS[name], getattr(config, name)
            assert protocol.measure is not None
            expected[name] = [
                protocol.measure(settings, arrays, seed=seed, device="cpu").top1
                for seed in protocol.seeds(settings, (3, 4)) or (0,)
            ]
        assert [len(values) for values in expected.values()] == [1, 2, 1, 4]
        assert measure_probes(config, sets, train, test) == {
            "knn_top1": expected["knn"][0],
            "linear_top1": np.mean(expected["linear"]),
            "linear_top1_std": np.std(expected["linear"]),
            "linear_lbfgs_top1": expected["linear_lbfgs"][0],
            "few_shot_top1": np.mean(expected["few_shot"]),
            "few_shot_top1_std": np.std(expected["few_shot"]),
        }
        assert knn_top1(config, sets, train, test) == expected["knn"][0]

    def test_the_few_shot_probe_alone_is_left_out_where_labels_are_too_few(self) -> None:
        sets = made_up(few_shot=False)
        train, test = self.features(sets)
        found = measure_probes(EvaluateConfig(), sets, train, test)
        assert set(found) == {"knn_top1", "linear_lbfgs_top1"}


class TestFinal:
    def test_names_protocols_of_the_registry(self) -> None:
        with pytest.raises(ConfigError, match=r"final: protocols: 'linaer' .*mean 'linear'\?"):
            validate(EvaluateConfig, {"final": ["knn", "linaer"]}, where="x")
        with pytest.raises(ConfigError, match="give at least one of knn"):
            validate(EvaluateConfig, {"final": []}, where="x")
        with pytest.raises(ConfigError, match="'transfer' is not known"):
            validate(EvaluateConfig, {"final": ["transfer"]}, where="x")
        config = EvaluateConfig(final=("finetune", "knn", "knn"))
        assert (config.probes, config.trained) == (("knn",), ("finetune",))

    @pytest.mark.parametrize(
        ("settings", "untrained", "pixels"),
        [
            ({}, True, True),
            ({"final": ("knn", "linear")}, True, True),
            ({"final": ("knn", "finetune")}, False, False),
            ({"final": ("finetune",), "untrained_baseline": True}, False, False),
            ({"final": ("knn",), "untrained_baseline": True}, True, False),
            ({"pixel_baseline": False}, True, False),
        ],
    )
    def test_baselines_are_measured_beside_more_than_nearest_neighbours(
        self, settings: dict[str, Any], untrained: bool, pixels: bool
    ) -> None:
        config = EvaluateConfig(**settings)
        assert (config.measures_untrained, config.measures_pixels) == (untrained, pixels)
        assert config.is_quick == (not untrained and not pixels)

    def test_settings_of_fine_tuning_that_is_not_named_do_nothing(self) -> None:
        values = {"final": ["knn"], "semi_1": {"epochs": 3}, "linear": {"epochs": 3}}
        (problem,) = idle_settings(EvaluateConfig, values, within=("evaluate",))
        assert problem.text == (
            "evaluate.semi_1.epochs=3 does nothing with evaluate.final=[knn], without semi_1; "
            "drop it"
        )

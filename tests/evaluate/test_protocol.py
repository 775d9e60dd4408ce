import numpy as np
import numpy.typing as npt
import torch

from raysl.evaluate.features import EvalImages
from raysl.evaluate.knn import knn_accuracy
from raysl.evaluate.linear import few_shot_accuracy, linear_accuracy
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets, all_protocols, knn_top1
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

    def test_are_the_measures_with_the_settings_of_the_configuration(self) -> None:
        sets = made_up()
        train, test = self.features(sets)
        config = EvaluateConfig(
            knn_k=3,
            knn_temperature=0.5,
            few_shot_labels=2,
            few_shot_draws=4,
            inverse_penalty=0.1,
        )
        labels: list[npt.NDArray[np.int64]] = [sets.train.labels, sets.test.labels]
        arrays = train.numpy(), labels[0], test.numpy(), labels[1]
        few = few_shot_accuracy(*arrays, labels_per_class=2, num_draws=4, inverse_penalty=0.1)
        tensors = train, torch.from_numpy(labels[0]), test, torch.from_numpy(labels[1])
        knn = knn_accuracy(*tensors, k=3, temperature=0.5)
        assert all_protocols(config, sets, train, test) == {
            "knn_top1": knn,
            "linear_top1": linear_accuracy(*arrays, inverse_penalty=0.1),
            "few_shot_top1": few.mean,
            "few_shot_top1_std": few.deviation,
        }
        assert knn_top1(config, sets, train, test) == knn

    def test_the_few_shot_probe_alone_is_left_out_where_labels_are_too_few(self) -> None:
        sets = made_up(few_shot=False)
        train, test = self.features(sets)
        assert set(all_protocols(EvaluateConfig(), sets, train, test)) == {
            "knn_top1",
            "linear_top1",
        }

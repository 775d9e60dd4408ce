import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from raysl.augment.pipeline import make_views
from raysl.errors import ShapeError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.label_free import label_free_measures, pair_views, positive_pairs
from raysl.nn.geometry import alignment, uniformity
from raysl.sources.source import ArraySource


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def images(count: int = 20, *, threads: int = 2) -> EvalImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    rows = np.arange(count)[::-1].copy()
    source = ArraySource("made up", pixels)
    return EvalImages(source, rows, rows, size_px=8, crop_fraction=1.0, num_threads=threads)


class TestLabelFree:
    def test_of_features_without_direction(self) -> None:
        features = torch.cat([torch.eye(32), -torch.eye(32)]).repeat(8, 1)
        found = label_free_measures(features, (features, features))
        assert found["rankme"] == pytest.approx(32.0)
        assert found["alpha_req"] == pytest.approx(0.0, abs=1e-9)
        assert found["alignment"] == 0.0
        assert found["feature_std"] == pytest.approx(1.0)
        assert found["uniformity"] == pytest.approx(uniformity(features).item(), rel=1e-4)

    def test_of_a_power_law_is_its_exponent(self) -> None:
        signs = torch.linalg.qr(normal(64, 64).double()).Q
        features = torch.cat([signs, -signs]) * torch.arange(1, 65).double() ** -0.6
        assert label_free_measures(features)["alpha_req"] == pytest.approx(1.2, rel=1e-6)

    def test_of_collapsed_features(self) -> None:
        found = label_free_measures(torch.ones(40, 8), (torch.ones(5, 8), torch.ones(5, 8)))
        expected = {"rankme": 1.0, "alignment": 0.0, "uniformity": 0.0, "feature_std": 0.0}
        assert found == pytest.approx(expected, abs=1e-3)

    def test_sees_images_of_the_whole_set_for_the_uniformity(self) -> None:
        """Folders come class by class: the first ones are all of one."""
        features = torch.zeros(8192, 2)
        features[:4096, 0] = features[4096:, 1] = 1.0
        expected = math.log((1 + math.exp(-4)) / 2)
        assert label_free_measures(features)["uniformity"] == pytest.approx(expected, abs=1e-3)

    def test_knows_neither_scale_nor_rotation(self) -> None:
        features = normal(200, 12) * torch.arange(1, 13)
        turn = torch.linalg.qr(normal(12, 12)).Q
        pair = (features[:50], features[50:100])
        one = label_free_measures(features, pair)
        other = label_free_measures(features @ turn * 7, (pair[0] @ turn * 7, pair[1] @ turn * 7))
        one.pop("feature_std")  # of each dimension: a rotation moves it
        other.pop("feature_std")
        assert other == pytest.approx(one, rel=1e-3)

    def test_leaves_out_what_cannot_be_computed(self) -> None:
        assert "alignment" not in label_free_measures(normal(30, 8))
        assert "alpha_req" not in label_free_measures(normal(30, 3))
        assert label_free_measures(torch.full((4, 3), math.nan)) == {}
        assert label_free_measures(normal(1, 8))["uniformity"] == 0.0

    @pytest.mark.parametrize(
        "shapes", [((5,),), ((0, 3),), ((5, 3), (2, 3), (1, 3)), ((5, 3), (2, 4), (2, 4))]
    )
    def test_refuses_shapes_that_do_not_fit(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        features, *pair = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ShapeError, match="expected features"):
            label_free_measures(features, (pair[0], pair[1]) if pair else None)


class TestPositivePairs:
    def test_are_the_views_of_each_images_row(self) -> None:
        some = images()
        first, second = positive_pairs(nn.Flatten(), some, to_input=to_input)
        assert len(first) == 20
        for place in (0, 7):
            row = int(some.rows[place])
            (views,) = make_views(some.image(place), pair_views(8), seed=0, epoch=0, index=row)
            expected = to_input(np.stack(views)).flatten(1)
            torch.testing.assert_close(torch.stack([first[place], second[place]]), expected)

    def test_do_not_depend_on_threads_or_on_how_many_there_are(self) -> None:
        first = positive_pairs(nn.Flatten(), images(threads=1), to_input=to_input)
        many = positive_pairs(nn.Flatten(), images(threads=4), to_input=to_input)
        few = positive_pairs(nn.Flatten(), images(), to_input=to_input, num_images=2)
        assert torch.equal(first[0], many[0])
        assert torch.equal(few[1], first[1][[0, 19]])

    def test_leave_the_encoder_as_it_was_and_show_it_evaluation(self) -> None:
        encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
        first, _ = positive_pairs(encoder, images(), to_input=to_input)
        plain, _ = positive_pairs(nn.Flatten(), images(), to_input=to_input)
        assert torch.equal(first, plain)
        assert encoder.training

    def test_of_the_same_image_are_nearer_than_of_two(self) -> None:
        first, second = positive_pairs(nn.Flatten(), images(), to_input=to_input)
        assert alignment(first, second) < alignment(first, second.roll(1, 0))

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.data.decode import decode
from raysl.downstream.attention import attention_maps
from raysl.downstream.confusion import confusion_matrix, draw_confusion, worst_pairs
from raysl.downstream.label_fraction import by_labels, draw_by_labels
from raysl.downstream.neighbour_grid import nearest, vote
from raysl.downstream.spectrum import draw_spectrum
from raysl.errors import DataError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.vit import VisionTransformer
from raysl.report.feature_map import cluster_labels


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shape_of(path: Path) -> tuple[int, ...]:
    image = decode(path.read_bytes(), where=path.name)
    assert image.std() > 5
    return image.shape


class TestNearest:
    def test_are_those_of_sorting_all_cosines(self) -> None:
        train, queries = normal(40, 5), normal(700, 5, seed=1)
        found = nearest(train, queries, k=7)
        for row in (0, 511, 512, 699):
            cosines = [
                float(queries[row] @ t / np.linalg.norm(t) / np.linalg.norm(queries[row]))
                for t in train
            ]
            expected = np.argsort(cosines)[::-1][:7]
            np.testing.assert_array_equal(found.places[row], expected)
            np.testing.assert_allclose(
                found.similarities[row], np.sort(cosines)[::-1][:7], rtol=1e-5, atol=1e-6
            )

    def test_of_few_images_are_all_and_never_those_that_are_not_finite(self) -> None:
        train = normal(3, 4)
        train[1] = np.nan
        train[2] = -train[0]
        found = nearest(train, train[:1], k=9)
        assert found.places.tolist() == [[0, 1, 2]]

    def test_vote_by_similarity(self) -> None:
        found = nearest(np.eye(3, dtype=np.float32), np.array([[3.0, 2.0, 2.0]], "f4"), k=3)
        labels = np.array([0, 1, 1])
        low, high = (vote(labels, found, temperature=t) for t in (0.01, 100.0))
        assert (low[0].tolist(), high[0].tolist()) == ([0], [1])
        assert high[1][0] == pytest.approx(2 / 3, abs=0.01)

    def test_of_many_classes_take_memory_for_those_that_are_voted_for(self) -> None:
        features = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
        labels = np.arange(40) % 3
        found = nearest(features, features[:9] + 0.5, k=7)
        near = vote(labels, found, temperature=0.5)
        ids = np.array([5, 1 << 40, 1 << 50])
        far = vote(ids[labels], found, temperature=0.5)
        assert far[0].tolist() == ids[near[0]].tolist()
        assert far[1].tolist() == near[1].tolist()
        assert len(set(near[0].tolist())) > 1


class TestConfusion:
    def test_counts_by_true_class_and_leaves_out_the_unknown(self) -> None:
        labels, told = np.array([0, 0, 1, 2, -1]), np.array([0, 1, 1, 0, 2])
        expected = [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
        assert confusion_matrix(labels, told, num_classes=3).tolist() == expected

    def test_worst_pairs_are_those_of_the_largest_share(self) -> None:
        counts = np.array([[90, 10, 0], [2, 1, 1], [0, 5, 5]])
        labels, told = np.repeat(np.indices((3, 3)).reshape(2, 9), counts.ravel(), axis=1)
        labels, told = np.append(labels, -1), np.append(told, 0)
        expected = [(2, 1, 5, 10), (1, 0, 2, 4), (1, 2, 1, 4), (0, 1, 10, 100)]
        assert worst_pairs(labels, told) == expected
        assert worst_pairs(labels, told, most=1) == expected[:1]

    def test_memory_goes_with_the_images_and_not_with_the_classes(self, tmp_path: Path) -> None:
        """A matrix of so many classes would be 8 TB."""
        labels, told = np.array([17, 17, 999_999]), np.array([17, 999_999, 17])
        tracemalloc.start()
        draw_confusion(tmp_path / "a.png", labels, told, ["a"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 << 20
        assert worst_pairs(labels, told) == [(999_999, 17, 1, 1), (17, 999_999, 1, 2)]

    @pytest.mark.parametrize("num", [2, 20, 21, 1000])
    def test_is_as_wide_for_any_number_of_classes(self, tmp_path: Path, num: int) -> None:
        labels = np.arange(3 * num) % num
        told = np.where(np.arange(3 * num) % 4 == 0, (labels + 1) % num, labels)
        draw_confusion(tmp_path / "a.png", labels, told, [f"$class_{n}" for n in range(num)])
        height, width, _ = shape_of(tmp_path / "a.png")
        assert width == 1040
        assert height < 1500

    def test_without_labels_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no labels"):
            draw_confusion(tmp_path / "a.png", np.array([-1]), np.array([0]), ["a"])


class TestByLabels:
    def test_knows_how_many_labels_each_protocol_saw(self) -> None:
        def entry(mean: float, **settings: Any) -> dict[str, Any]:
            return {"mean": mean, "deviation": 0.01, "settings": settings}

        points = by_labels(
            {
                "linear": entry(0.6),
                "few_shot": entry(0.3, labels_per_class=5),
                "semi_1": entry(0.2),
                "semi_10": entry(0.4, label_fraction=0.1) | {"facts": [{"num_labels": 512}, {}]},
                "finetune": entry(0.8, label_fraction=0.5),
                "transfer": entry(0.9),
                "knn": entry(0.5),
            },
            num_train=5000,
            num_classes=10,
        )
        assert [(each.num_labels, each.mean) for each in points] == [
            (50, 0.3), (50, 0.2), (512, 0.4), (2500, 0.8), (5000, 0.6), (5000, 0.5),
        ]  # fmt: skip

    def test_takes_several_numbers_of_one_protocol(self) -> None:
        several = {"10": {"mean": 0.2}, "100": {"mean": 0.5, "deviation": 0.1}}
        points = by_labels({"few_shot": {"by_labels": several}}, num_train=1, num_classes=1)
        assert [(each.num_labels, each.deviation) for each in points] == [(10, 0.0), (100, 0.1)]

    def test_of_one_number_there_is_no_curve(self, tmp_path: Path) -> None:
        points = by_labels({"linear": {"mean": 0.5}}, num_train=9, num_classes=3)
        with pytest.raises(DataError, match="one number"):
            draw_by_labels(tmp_path / "a.png", points)


class TestSpectrum:
    def test_draws_few_and_many_dimensions_and_bad_rows(self, tmp_path: Path) -> None:
        for shape in ((50, 2), (20, 64), (300, 128)):
            features = normal(*shape)
            features[0, 0] = np.inf
            draw_spectrum(tmp_path / "a.png", features)
            shape_of(tmp_path / "a.png")

    def test_of_one_direction_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="all features are the same"):
            draw_spectrum(tmp_path / "a.png", np.ones((9, 4), dtype=np.float32))


class TestClusters:
    def test_of_far_blobs_are_the_blobs_the_largest_first(self) -> None:
        sizes = (10, 30, 20)
        truth = np.repeat(np.arange(3), sizes)
        features = 20 * np.eye(3, 8)[truth] + normal(60, 8)
        found = cluster_labels(features, num_clusters=3)
        assert found.tolist() == np.array([2, 0, 1])[truth].tolist()

    def test_are_fewer_where_few_directions_differ(self) -> None:
        features = np.array([[1.0, 0], [2, 0], [0, 1], [np.nan, 0]])
        assert cluster_labels(features, num_clusters=10).tolist() == [0, 0, 1, -1]
        assert cluster_labels(features[3:], num_clusters=2).tolist() == [-1]


def test_attention_maps_are_the_networks_stretched() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(name="vit_tiny", depth=2, patch_size_px=8)
    net = build_backbone(config, image_size_px=32).eval().net
    assert isinstance(net, VisionTransformer)
    images = torch.randn(2, 3, 32, 16)
    maps = attention_maps(net, images)
    assert maps.shape == (2, 3, 4, 2)
    raw = net.last_attention(images)[1, 2].detach().numpy().reshape(4, 2)
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    np.testing.assert_allclose(maps[1, 2], expected, atol=1e-6)

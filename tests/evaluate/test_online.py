import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from raysl.augment.pipeline import make_views
from raysl.evaluate.features import embed_alone
from raysl.evaluate.label_free import label_free_measures, pair_views
from raysl.evaluate.labelled import open_labelled
from raysl.evaluate.online import (
    LABEL_FREE,
    NUM_PAIRS,
    NUM_UNLABELLED,
    OnlineFeatures,
    OnlineSets,
    ViewPairs,
    online_metrics,
    open_online,
    spread_rows,
)
from raysl.evaluate.probes import KnnConfig
from raysl.evaluate.protocol import EvaluateConfig, knn_top1
from raysl.sources.source import ArraySource, DataConfig
from raysl.sources.subset import SubsetSource

CONFIG = EvaluateConfig(knn=KnnConfig(k=3))
DATA = DataConfig(source="made-up")


def source(count: int = 40, *, labels: bool = True) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
    classes = np.arange(count) % 2 if labels else None
    return ArraySource("made up", pixels, classes, ["even", "odd"] if labels else [])


def opened(images: ArraySource) -> OnlineSets:
    labelled = open_labelled(CONFIG, DATA, images, size_px=8, num_threads=1)
    return open_online(CONFIG, labelled, images, size_px=8, num_threads=1)


class TestSpreadRows:
    def test_are_all_of_a_small_source(self) -> None:
        assert spread_rows(np.array([3, 4]), 7).tolist() == list(range(7))
        assert spread_rows(np.array([3, 4]), 100).tolist() == list(range(7))

    @pytest.mark.parametrize(
        ("sizes", "most", "groups_read"),
        [
            ([100_000], 2048, 1),
            ([5000] * 400, 2048, 32),  # 64 of each: a row of a Parquet file costs its row group
            ([1] * 5000, 2048, 2048),
            ([7] * 3 + [4000], 2048, 4),  # small groups do not fill the number
            ([10] * 300, 2048, 205),
        ],
    )
    def test_are_as_many_as_asked_for_in_few_groups(
        self, sizes: list[int], most: int, groups_read: int
    ) -> None:
        rows = spread_rows(np.array(sizes), most)
        assert len(rows) == most
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        assert rows[-1] < sum(sizes)
        groups = np.searchsorted(np.cumsum(sizes), rows, side="right")
        assert len(np.unique(groups)) <= groups_read
        assert np.array_equal(rows, spread_rows(np.array(sizes), most))

    def test_come_from_all_of_a_group(self) -> None:
        rows = spread_rows(np.array([100_000]), 100)
        assert np.abs(np.diff(rows) - 1010).max() <= 1


class TestViewPairs:
    def test_are_the_views_that_alignment_is_measured_on_elsewhere(self) -> None:
        images, rows = source(), np.array([3, 0, 8])
        pairs = ViewPairs(images, rows, size_px=8, num_threads=2)
        pixels = np.concatenate(list(pairs.batches(np.arange(len(pairs)))))
        for place, row in enumerate(rows.tolist()):
            ((first, second),) = make_views(
                images.images[row], pair_views(8), seed=0, epoch=0, index=row
            )
            np.testing.assert_array_equal(pixels[place], first)
            np.testing.assert_array_equal(pixels[len(rows) + place], second)
            assert not np.array_equal(first, second)


class TestOpenOnline:
    def test_takes_the_labelled_images_and_pairs_of_the_training_ones(self) -> None:
        sets = opened(source())
        assert sets.labelled is not None
        assert sets.train is sets.labelled.train
        assert len(sets.pairs) == 2 * len(sets.train)
        assert set(sets.pairs.rows.tolist()) == set(sets.train.rows.tolist())

    @pytest.mark.parametrize("seen", ["a part", "others"])
    def test_pairs_are_of_the_source_whose_rows_they_are(self, seen: str) -> None:
        """A run may train on a part of the source, or be measured within other images."""
        whole = source()
        labelled = open_labelled(CONFIG, DATA, whole, size_px=8, num_threads=1)
        trained = SubsetSource(whole, np.array([1, 2]), only=True)
        sets = open_online(
            CONFIG,
            labelled,
            trained if seen == "a part" else source(3, labels=False),
            size_px=8,
            num_threads=1,
        )
        assert sets.pairs.source is whole
        assert len(np.concatenate(list(sets.pairs.batches(np.arange(len(sets.pairs)))))) == 64

    def test_takes_a_bounded_number_where_there_are_no_labels(self) -> None:
        sets = opened(source(NUM_UNLABELLED + 500, labels=False))
        assert sets.labelled is None
        assert len(sets.train) == NUM_UNLABELLED
        assert len(sets.pairs) == 2 * NUM_PAIRS
        few = CONFIG.model_copy(update={"max_train_images": 30})
        images = source(100, labels=False)
        assert len(open_online(few, None, images, size_px=8, num_threads=1).train) == 30


class TestOnlineMetrics:
    def test_are_the_measures_by_themselves(self) -> None:
        sets = opened(source())
        assert sets.labelled is not None
        generator = torch.Generator().manual_seed(0)
        train, pairs, test = (
            torch.randn(len(images), 6, generator=generator)
            for images in (sets.train, sets.pairs, sets.labelled.test)
        )
        found = online_metrics(CONFIG, sets, OnlineFeatures(train, pairs, test))
        half = len(sets.train)
        free = label_free_measures(train, (pairs[:half], pairs[half:]))
        accuracy = knn_top1(CONFIG, sets.labelled, train, test)
        wanted = {"eval/knn_top1": accuracy, **{f"eval/{k}": free[k] for k in LABEL_FREE}}
        assert found == wanted
        unlabelled = sets._replace(labelled=None)
        del wanted["eval/knn_top1"]
        assert online_metrics(CONFIG, unlabelled, OnlineFeatures(train, pairs, None)) == wanted

    def test_leave_out_what_features_that_are_not_finite_do_not_give(self) -> None:
        sets = opened(source())
        assert sets.labelled is not None
        lost = torch.full((len(sets.train), 4), float("nan"))
        test = torch.ones(len(sets.labelled.test), 4)
        pairs = torch.ones(len(sets.pairs), 4)
        found = online_metrics(CONFIG, sets, OnlineFeatures(lost, pairs, test))
        assert set(found) == {"eval/knn_top1"}


class TestEmbedAlone:
    @pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
    def test_gives_each_image_its_features_in_the_batches_of_the_ranks(
        self, num_ranks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysl.evaluate.features._BATCH", 8)
        seen: list[int] = []

        def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
            seen.append(len(pixels))
            return torch.from_numpy(pixels).float().permute(0, 3, 1, 2)

        images = opened(source(25, labels=False)).train
        features = embed_alone(torch.nn.Flatten(), images, to_input=to_input, num_ranks=num_ranks)
        wanted = np.concatenate(list(images.batches(np.arange(25)))).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(features.numpy(), wanted.reshape(25, -1))
        share = -(-25 // num_ranks)
        of_a_rank = [min(8, share - start) for start in range(0, share, 8)]
        assert seen == of_a_rank * num_ranks

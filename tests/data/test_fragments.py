import numpy as np
import pytest

from raysl.data.fragments import Fragments, fragments_of, images_per_epoch
from raysl.data.plan import Plan


def _rows(fragments: Fragments) -> np.ndarray:
    ranges = [np.arange(a, a + n) for a, n in zip(fragments.starts, fragments.sizes, strict=True)]
    return np.concatenate(ranges)


def _count(sizes: list[int], weights: list[float], epochs: int, seed: int = 0) -> np.ndarray:
    counts = np.zeros(sum(sizes), dtype=int)
    for epoch in range(epochs):
        found = fragments_of(np.array(sizes), np.array(weights), seed=seed, epoch=epoch)
        counts += np.bincount(_rows(found), minlength=sum(sizes))
    return counts


class TestFragmentsOf:
    def test_without_weights_are_the_groups(self) -> None:
        found = fragments_of(np.array([5, 3, 9]), None, seed=0, epoch=4)
        assert found.starts.tolist() == [0, 5, 8]
        assert found.sizes.tolist() == [5, 3, 9]
        assert found.repeats.tolist() == [0, 0, 0]

    def test_every_image_comes_up_as_often_as_its_weight_says(self) -> None:
        counts = _count([100, 30, 30, 40], [1.0, 0.5, 0.5, 2.5], epochs=8)
        assert set(counts[:100]) == {8}
        assert set(counts[100:160]) == {4}
        assert set(counts[160:]) == {20}

    @pytest.mark.parametrize("weight", [0.3, 1 / 3, 0.07, 1.9])
    def test_no_image_is_ever_more_than_one_ahead_of_another(self, weight: float) -> None:
        for epochs in (1, 2, 5, 13):
            counts = _count([90], [weight], epochs)
            assert counts.max() - counts.min() <= 1
            assert counts.sum() == epochs * round(90 * weight)

    def test_the_part_of_a_pass_is_a_sample_of_all_and_another_each_epoch(self) -> None:
        first, second = (
            _rows(fragments_of(np.array([1000]), np.array([0.5]), seed=0, epoch=epoch))
            for epoch in (0, 1)
        )
        assert len(first) == len(second) == 500
        assert not set(first) & set(second)
        assert 400 < first.mean() < 600
        assert len(np.unique(first // 100)) == 10

    def test_a_row_that_comes_up_again_in_an_epoch_says_so(self) -> None:
        found = fragments_of(np.array([10]), np.array([2.5]), seed=0, epoch=0)
        seen = [
            (int(row), int(repeat))
            for start, size, repeat in zip(*found, strict=True)
            for row in range(start, start + size)
        ]
        for repeat in found.repeats:
            seen += [(-1, int(repeat))]
        pairs = [pair for pair in seen if pair[0] >= 0]
        assert len(pairs) == 25
        assert len(set(pairs)) == 25

    def test_another_seed_takes_another_part(self) -> None:
        parts = [
            set(_rows(fragments_of(np.array([1000]), np.array([0.2]), seed=s, epoch=0)).tolist())
            for s in (0, 1)
        ]
        assert parts[0] != parts[1]


def test_images_per_epoch_rounds_each_part() -> None:
    assert images_per_epoch(np.array([10, 5]), None) == 15
    assert images_per_epoch(np.array([10, 5, 5]), np.array([1.0, 0.25, 0.25])) == 12
    assert images_per_epoch(np.array([10, 3]), np.array([1.0, 0.01])) == 11


class TestPlanOfWeights:
    def test_batches_are_full_and_mixed_and_views_of_repeats_differ(self) -> None:
        plan = Plan(
            [60, 20],
            seed=0,
            global_batch_size=20,
            item_size=10,
            num_steps=30,
            weights=np.array([1.0, 2.0]),
        )
        assert plan.num_images == 100
        assert plan.steps_per_epoch == 5
        epoch = [plan.item(position) for position in range(10)]
        keys = np.concatenate([item.keys for item in epoch])
        rows = np.concatenate([item.indices for item in epoch])
        assert len(np.unique(keys)) == 100
        assert (keys % 80 == rows).all()
        assert np.bincount(rows, minlength=80).tolist() == [1] * 60 + [2] * 20
        shares = [np.mean(item.indices >= 60) for item in epoch]
        assert min(shares) > 0
        assert max(shares) < 1

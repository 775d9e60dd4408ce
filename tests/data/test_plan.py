import itertools
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from raysl.data.plan import Plan, item_size_for
from raysl.errors import ConfigError

# Groups and window: one group; many; uneven; some larger than the window; single rows; empty ones.
SOURCES: list[tuple[list[int], int | None]] = [
    ([100], None),
    ([10] * 10, None),
    ([10] * 10, 30),
    ([1, 40, 3, 17, 29, 10], 30),
    ([50, 7, 43], 20),
    ([1] * 100, 7),
    ([1] * 100, 1),
    ([0, 60, 0, 40, 0], 50),
    ([100], 10),
]


def _plan(group_sizes: list[int], window_size: int | None = None, **changes: Any) -> Plan:
    options = {"seed": 3, "global_batch_size": 12, "item_size": 4, "num_steps": 40, **changes}
    return Plan(group_sizes, window_size=window_size, **options)


def _epoch(plan: Plan, epoch: int) -> list[int]:
    return [int(index) for index in plan.indices(epoch, 0, plan.num_images)]


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as can be, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestOrder:
    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_each_epoch_is_a_permutation_of_the_images(
        self, groups: list[int], window: int | None
    ) -> None:
        plan = _plan(groups, window)
        for epoch in range(5):
            assert sorted(_epoch(plan, epoch)) == list(range(100))

    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_epochs_and_seeds_differ(self, groups: list[int], window: int | None) -> None:
        orders = [_epoch(_plan(groups, window, seed=s), e) for s in range(3) for e in range(3)]
        assert len({tuple(order) for order in orders}) == 9

    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_no_image_comes_twice_within_an_epoch_of_items(
        self, groups: list[int], window: int | None
    ) -> None:
        plan = _plan(groups, window)
        for _, items in itertools.groupby(
            (plan.item(position) for position in range(plan.num_items)), lambda item: item.epoch
        ):
            rows = np.concatenate([item.indices for item in items])
            assert len(set(rows.tolist())) == len(rows) == 96

    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_groups_that_are_mixed_fit_into_the_window(
        self, groups: list[int], window: int | None
    ) -> None:
        plan = _plan(groups, window)
        group_of = np.repeat(np.arange(len(groups)), groups)
        order = group_of[_epoch(plan, 0)]
        places = {g: np.flatnonzero(order == g) for g in set(order.tolist())}
        spans = sorted((where[0], where[-1], g) for g, where in places.items())
        mixed: list[set[int]] = []
        reach = -1
        for first, last, group in spans:  # groups whose spans overlap are held together
            if first > reach:
                mixed.append(set())
            mixed[-1].add(group)
            reach = max(reach, last)
        for held in mixed:
            assert len(held) == 1 or sum(groups[g] for g in held) <= (window or 100)

    def test_a_window_holds_several_groups_and_mixes_them(self) -> None:
        order = np.array(_epoch(_plan([10] * 10, 50), 0)) // 10
        assert len(set(order[:50].tolist())) == 5
        assert len(set(order[:10].tolist())) > 1

    def test_without_a_window_every_image_is_as_likely_at_every_place(self) -> None:
        plan = _plan([2, 3, 1], global_batch_size=2, item_size=1)
        orders = np.array([_epoch(plan, epoch) for epoch in range(3000)])
        for place in range(6):
            counts = np.bincount(orders[:, place], minlength=6)
            assert np.abs(counts - 500).max() < 4.5 * np.sqrt(3000 * 1 / 6 * 5 / 6)

    def test_with_windows_every_image_is_as_likely_to_come_first(self) -> None:
        plan = _plan([2, 3, 1, 2], 4, global_batch_size=2, item_size=1)
        first = [int(plan.indices(epoch, 0, 1)[0]) for epoch in range(4000)]
        # A group comes first one time in four, and the window behind it depends on its size:
        # not uniform over images, but over images of one group.
        counts = np.bincount(first, minlength=8)
        for group in ([0, 1], [2, 3, 4], [6, 7]):
            mean = counts[group].mean()
            assert np.abs(counts[group] - mean).max() < 4.5 * np.sqrt(mean)
        assert counts.min() > 0

    def test_is_known_once_and_for_all(self) -> None:
        # Other numbers here would change, on a resume, the rest of every stored run.
        plan = Plan([4, 2, 4], seed=1, global_batch_size=5, item_size=5, num_steps=4, window_size=6)
        assert _epoch(plan, 0) == [7, 5, 8, 9, 4, 6, 0, 2, 1, 3]
        assert _epoch(plan, 1) == [1, 3, 2, 4, 5, 0, 8, 6, 7, 9]


class TestItem:
    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_is_a_pure_function_of_the_position(
        self, groups: list[int], window: int | None
    ) -> None:
        plan = _plan(groups, window)
        copies = [pickle.loads(pickle.dumps(plan)) for _ in range(2)]
        positions = np.random.default_rng(0).permutation(plan.num_items).tolist()
        expected = {p: _plan(groups, window).item(p).indices.tolist() for p in positions[:20]}
        in_order = {p: plan.item(p).indices.tolist() for p in range(plan.num_items)}
        assert {p: in_order[p] for p in expected} == expected
        for copy in copies:
            assert {p: copy.item(p).indices.tolist() for p in positions} == in_order

    @pytest.mark.usefixtures("_hasty_threads")
    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_is_the_same_from_several_threads(self, groups: list[int], window: int | None) -> None:
        plan, shared = _plan(groups, window), _plan(groups, window)
        positions = np.random.default_rng(0).permutation(plan.num_items).tolist() * 4
        with ThreadPoolExecutor(8) as pool:
            items = pool.map(shared.item, positions)
            for position, item in zip(positions, items, strict=True):
                assert item.indices.tolist() == plan.item(position).indices.tolist()

    def test_a_used_plan_pickles_as_small_as_a_new_one(self) -> None:
        plan = _plan([1000, 1000], 500)
        new = len(pickle.dumps(plan))
        for position in range(plan.num_items):
            plan.item(position)
        assert len(pickle.dumps(plan)) == new

    def test_counts_steps_and_epochs_by_hand(self) -> None:
        # 100 images, batches of 12: 8 steps an epoch; items of 4: 3 a step.
        plan = _plan([100])
        assert (plan.steps_per_epoch, plan.items_per_step, plan.num_items) == (8, 3, 120)
        where = {p: plan.item(p)[:3] for p in (0, 2, 3, 23, 24, 119)}
        assert where == {
            0: (0, 0, 0),
            2: (2, 0, 0),
            3: (3, 1, 0),
            23: (23, 7, 0),
            24: (24, 8, 1),
            119: (119, 39, 4),
        }

    def test_items_of_a_step_are_its_places_of_the_epoch_in_order(self) -> None:
        plan = _plan([30, 70], 40)
        batch = np.concatenate([plan.item(p).indices for p in (27, 28, 29)])  # step 9: epoch 1
        assert batch.tolist() == _epoch(plan, 1)[12:24]

    @pytest.mark.parametrize(("groups", "window"), SOURCES)
    def test_a_global_batch_holds_the_same_images_for_every_item_size(
        self, groups: list[int], window: int | None
    ) -> None:
        def batches(item_size: int) -> list[list[int]]:
            plan = _plan(groups, window, item_size=item_size, num_steps=20)
            rows = [plan.item(position).indices for position in range(plan.num_items)]
            return np.concatenate(rows).reshape(20, 12).tolist()

        expected = batches(12)
        for item_size in (1, 2, 3, 4, 6):
            assert batches(item_size) == expected

    @pytest.mark.parametrize(
        ("images", "batch", "steps"), [(100, 100, 1), (100, 51, 1), (100, 50, 2), (100, 33, 3)]
    )
    def test_an_epoch_has_whole_batches_only(self, images: int, batch: int, steps: int) -> None:
        plan = _plan([images], global_batch_size=batch, item_size=batch)
        assert plan.steps_per_epoch == steps

    def test_another_rest_is_left_out_each_epoch(self) -> None:
        plan = _plan([100], num_steps=80)
        left_out = []
        for epoch in range(10):
            rows = {int(i) for p in range(24) for i in plan.item(epoch * 24 + p).indices}
            left_out.append(frozenset(range(100)) - rows)
        assert all(len(rest) == 4 for rest in left_out)
        assert len(set(left_out)) == 10


@pytest.mark.parametrize(("groups", "window"), SOURCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_items_of_another_size_hold_the_same_images_in_the_same_order(
    groups: list[int], window: int | None, weighted: bool
) -> None:
    weights = np.full(len(groups), 1.5) if weighted else None
    first = _plan(groups, window, weights=weights)
    for size in (1, 6, 12):
        other = first.with_item_size(size)
        assert other.item_size == size
        assert other.num_items * size == first.num_items * first.item_size
        for name in ("indices", "keys"):
            found, wanted = (
                np.concatenate([getattr(plan.item(p), name) for p in range(plan.num_items)])
                for plan in (other, first)
            )
            np.testing.assert_array_equal(found, wanted)


class TestErrors:
    def test_a_batch_larger_than_the_source_says_what_would_fit(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"global_batch_size=1200 is larger than the source, which has 1,000 images; "
            r"use at most 1000",
        ):
            _plan([400, 600], global_batch_size=1200)

    def test_an_item_that_does_not_divide_the_batch_names_both(self) -> None:
        with pytest.raises(ConfigError, match=r"item of 5 images does not divide .*size=12"):
            _plan([100], item_size=5)


class TestItemSizeFor:
    @pytest.mark.parametrize(
        ("batch", "image_bytes", "size"),
        [
            (128, 1000, 128),
            (2048, 1000, 1024),  # small ones: up to 1,024
            (250, 1000, 250),
            (1031, 1000, 1),  # a prime above the limit
            (131, 10**5, 1),
            (1, 1000, 1),
            (512, 2 * 3 * 96 * 96, 128),
            (512, 2 * 3 * 64 * 64, 256),  # 8 MiB hold 341
            (512, 2 * 3 * 224 * 224, 128),
            (512, 10 * 3 * 224 * 224, 64),  # 96 MiB hold 66 images
            (512, 1 << 30, 1),
        ],
    )
    def test_by_hand(self, batch: int, image_bytes: int, size: int) -> None:
        assert item_size_for(batch, bytes_per_image=image_bytes) == size

    def test_divides_the_batch_and_stays_within_128_large_images_and_96_mib(self) -> None:
        for batch in range(1, 300):
            for image_bytes in (1, 10**5, 10**6, 10**7):
                size = item_size_for(batch, bytes_per_image=image_bytes)
                assert batch % size == 0
                assert size <= 128 or size * image_bytes <= 8 << 20
                assert size == 1 or size * image_bytes <= 96 << 20

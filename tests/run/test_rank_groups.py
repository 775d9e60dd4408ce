"""Groups of train workers get together what one execution of Ray Data gives all of them."""

import itertools

import pytest

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.run.rank_groups import RankGroup, rank_groups
from raysl.run.ray_data import Packing, packing_for

SPEC = BlockSpec((View(count=2, size_px=16, crop=Crop()),))


class TestRankGroups:
    @pytest.mark.parametrize(("workers", "data_workers"), [(1, 7), (4, 1), (4, 60)])
    def test_up_to_four_workers_share_one(self, workers: int, data_workers: int) -> None:
        assert rank_groups(workers, data_workers) == [RankGroup(range(workers), data_workers)]

    def test_256_workers_have_64_with_a_fair_share_of_the_data_workers(self) -> None:
        groups = rank_groups(256, 2000 - 256)
        assert [group.ranks for group in groups] == [range(n, n + 4) for n in range(0, 256, 4)]
        assert {group.num_data_workers for group in groups} == {27, 28}

    def test_a_larger_group_has_more_data_workers(self) -> None:
        assert rank_groups(5, 10) == [RankGroup(range(2), 4), RankGroup(range(2, 5), 6)]

    @pytest.mark.parametrize("most_ranks", [1, 3, 4])
    @pytest.mark.parametrize("workers", [1, 2, 5, 8, 9, 31])
    @pytest.mark.parametrize("data_workers", [1, 2, 3, 7, 100])
    def test_every_worker_is_in_one_group_and_no_group_is_without_a_data_worker(
        self, workers: int, data_workers: int, most_ranks: int
    ) -> None:
        groups = rank_groups(workers, data_workers, most_ranks=most_ranks)
        ranks = [rank for group in groups for rank in group.ranks]
        assert ranks == list(range(workers))
        shares = [group.num_data_workers for group in groups]
        assert sum(shares) == data_workers
        assert min(shares) >= 1
        sizes = [len(group.ranks) for group in groups]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= most_ranks or len(groups) == data_workers


class TestPackingOfAGroup:
    @pytest.mark.parametrize(
        ("workers", "most_ranks"), [(2, 1), (3, 2), (4, 4), (5, 4), (8, 4), (12, 5)]
    )
    @pytest.mark.parametrize("items_per_worker", [1, 3])
    @pytest.mark.parametrize("start_step", [0, 7, 39])
    @pytest.mark.parametrize("steps_per_block", [1, 2, 4])
    def test_each_rank_gets_the_items_of_one_execution_in_the_same_blocks(
        self,
        workers: int,
        most_ranks: int,
        items_per_worker: int,
        start_step: int,
        steps_per_block: int,
    ) -> None:
        if items_per_worker > 1 and steps_per_block > 1:
            pytest.skip("only an item that is a worker's whole batch is packed")
        batch = workers * items_per_worker * 2
        plan = Plan([500], seed=1, global_batch_size=batch, item_size=2, num_steps=40)
        one = Packing(start_step, workers, steps_per_block, range(workers))
        # Ray deals the blocks of an execution to its ranks in turn.
        whole = [one.positions(block, plan) for block in range(one.num_blocks(plan))]
        first = start_step * plan.items_per_step
        for group in rank_groups(workers, 100, most_ranks=most_ranks):
            packing = one._replace(ranks=group.ranks)
            blocks = [packing.positions(b, plan) for b in range(packing.num_blocks(plan))]
            for place, rank in enumerate(group.ranks):
                mine = blocks[place :: len(group.ranks)]
                assert mine == whole[rank::workers]
                real = [p for p in itertools.chain(*mine) if p < plan.num_items]
                assert real == list(range(first + rank, plan.num_items, workers))

    def test_a_block_is_as_long_as_without_groups(self) -> None:
        plan = Plan([500], seed=1, global_batch_size=16, item_size=2, num_steps=10_000)
        one = packing_for(plan, SPEC, start_step=100, num_workers=8)
        group = packing_for(plan, SPEC, start_step=100, num_workers=8, ranks=range(4, 8))
        assert group == one._replace(ranks=range(4, 8))
        assert one.steps_per_block > 1
        assert group.num_blocks(plan) == one.num_blocks(plan) // 2

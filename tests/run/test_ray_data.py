"""The stream on Ray Data is the plan, block by block and bit by bit."""

import numpy as np
import pytest

from raysl.augment.crop import Crop
from raysl.augment.ops import Blur, ColorJitter, Flip
from raysl.augment.pipeline import View
from raysl.data.block import Block
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker, iterate, join_chunks
from raysl.run.ray_cluster import Layout
from raysl.run.ray_data import (
    Packing,
    PlanSource,
    execution_options,
    iterate_shard,
    open_dataset,
    packing_for,
    regroup,
)
from raysl.sources.source import ArraySource

pytestmark = pytest.mark.ray

VIEWS = (View(count=2, size_px=16, crop=Crop(), ops=(Flip(), ColorJitter(), Blur())),)


def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (50, 20, 24, 3), dtype=np.uint8)
    return ArraySource("made up", images)


def plan(item_size: int = 4) -> Plan:
    return Plan([50], seed=3, global_batch_size=8, item_size=item_size, num_steps=15)


def layout(num_data_workers: int) -> Layout:
    return Layout(1, 1.0, num_data_workers, 0.9, False, 1, 1)


def same(found: Block, expected: Block) -> bool:
    found = join_chunks(found)
    return all(np.array_equal(found[name], expected[name]) for name in expected)


class TestPlanSource:
    @pytest.mark.parametrize("count", [0, 1, 100, 251, 1001])
    def test_every_read_task_yields_as_many_blocks(self, count: int) -> None:
        numbers = PlanSource(count)
        blocks = [next(iter(task())) for task in numbers.get_read_tasks(1)]
        assert {block.num_rows for block in blocks} == {numbers.per_task}
        found = [n for block in blocks for n in block["number"].to_pylist()]
        assert found == list(range(numbers.num_blocks))
        assert numbers.num_blocks >= count

    def test_there_are_at_most_a_thousand_of_them(self) -> None:
        short, long = PlanSource(99_999), PlanSource(12_207_040)  # a billion images, 100 times
        assert (short.per_task, short.num_tasks) == (100, 1000)
        assert (long.per_task, long.num_tasks) == (12_208, 1000)


class TestPacking:
    def test_a_small_batch_of_one_item_shares_a_block_with_those_of_later_steps(self) -> None:
        long = Plan([50], seed=3, global_batch_size=8, item_size=8, num_steps=100_000)
        assert (
            packing_for(long, BlockSpec(VIEWS), start_step=0, num_workers=1).steps_per_block == 512
        )
        packing = packing_for(long, BlockSpec(VIEWS), start_step=99_900, num_workers=1)
        assert packing == Packing(99_900, 1, 3, range(1))  # so that there are at least 32 blocks
        assert packing.num_blocks(long) == 34
        assert packing.positions(1, long) == [99_903, 99_904, 99_905]
        assert (
            packing_for(plan(8), BlockSpec(VIEWS), start_step=4, num_workers=1).steps_per_block == 1
        )

    @pytest.mark.parametrize("start_step", [0, 4])
    @pytest.mark.parametrize("steps_per_block", [1, 2, 4, 100])
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_each_worker_gets_its_items_of_each_step_once_and_in_order(
        self, start_step: int, steps_per_block: int, num_workers: int
    ) -> None:
        order = plan(8 // num_workers)
        packing = Packing(start_step, num_workers, steps_per_block, range(num_workers))
        blocks = range(packing.num_blocks(order))
        for rank in range(num_workers):
            mine = [p for b in blocks[rank::num_workers] for p in packing.positions(b, order)]
            real = [position for position in mine if position < order.num_items]
            first = start_step * order.items_per_step
            assert real == list(range(first + rank, order.num_items, num_workers))
            assert mine[: len(real)] == real

    def test_large_blocks_and_batches_of_several_items_are_not_packed(self) -> None:
        large = BlockSpec((View(count=2, size_px=1000),))
        assert packing_for(plan(8), large, start_step=0, num_workers=1).steps_per_block == 1
        assert (
            packing_for(plan(2), BlockSpec(VIEWS), start_step=0, num_workers=2).steps_per_block == 1
        )


class TestStream:
    @pytest.mark.usefixtures("ray_cluster")
    def test_from_a_step_on_equals_the_same_plan_made_in_this_process(self) -> None:
        start_step, item_size = 4, 8  # a block holds several steps
        import ray

        data = ray.data.DataContext.get_current()
        data.execution_options = execution_options()
        dataset = open_dataset(
            ray.put(source()),
            plan(item_size),
            BlockSpec(VIEWS),
            start_step=start_step,
            layout=layout(num_data_workers=2),
        )
        found = iterate_shard(dataset.iterator, batch_size=8, prefetch_batches=2)
        expected = iterate(
            ItemMaker(source(), plan(item_size), BlockSpec(VIEWS)),
            start_step=start_step,
            rank=0,
            world_size=1,
            num_threads=1,
        )
        steps = 0
        for mine, bare in zip(expected, found, strict=False):
            assert same(bare, mine)
            steps += 1
        assert steps == 15 - start_step


class TestRegroup:
    def block(self, start: int, rows: int) -> Block:
        index = np.arange(start, start + rows)
        return {"index": index, "views_0": index.astype(np.uint8)}

    def test_blocks_of_a_batch_keep_their_pixels_where_they_are(self) -> None:
        blocks = [self.block(start, 3) for start in range(0, 12, 3)]
        batches = list(regroup(blocks, batch_size=6))
        assert [batch["index"].tolist() for batch in batches] == [[*range(6)], [*range(6, 12)]]
        parts = [part for batch in batches for part in batch["views_0"]]
        assert len(parts) == len(blocks)
        for part, whole in zip(parts, blocks, strict=True):
            assert np.shares_memory(part, whole["views_0"])
            assert part.tolist() == whole["views_0"].tolist()

    def test_a_block_of_several_batches_is_cut_without_a_copy(self) -> None:
        block = self.block(0, 12)
        batches = list(regroup([block], batch_size=4))
        assert [batch["index"].tolist() for batch in batches] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9, 10, 11],
        ]
        assert all(np.shares_memory(batch["views_0"], block["views_0"]) for batch in batches)

    def test_what_does_not_fill_a_batch_is_left(self) -> None:
        assert list(regroup([self.block(0, 3)], batch_size=6)) == []

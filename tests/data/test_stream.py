import pickle
import threading
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from raysl.augment.crop import Crop
from raysl.augment.ops import ColorJitter, Flip
from raysl.augment.pipeline import View, make_views
from raysl.data.block import Block, view_column
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker, concatenate, iterate
from raysl.errors import DataError, DecodeError
from raysl.sources.pixels import PLAIN
from raysl.sources.source import ArraySource, BadImagesConfig

NUM_IMAGES = 50
NUM_STEPS = 9  # four a pass: the run ends in its third
VIEWS = (
    View(count=2, size_px=12, ops=(Flip(), ColorJitter())),
    View(count=3, size_px=8, crop=Crop(scale=(0.1, 0.4))),
)


class _Encoded(ArraySource):
    """Images as PNG bytes; those in ``broken`` are garbage."""

    broken: tuple[int, ...] = ()

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        encoded = [cv2.imencode(".png", self.images[index])[1].tobytes() for index in indices]
        return [
            b"garbage" if index in self.broken else data
            for index, data in zip(indices, encoded, strict=True)
        ]


class _Grouped:
    """The same images in two groups that are quick to read."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source
        self.group_sizes = np.array([20, 30])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 20, 3), dtype=np.uint8)
    return ArraySource("toy", images)


def _maker(
    item_size: int = 2, source: ArraySource | None = None, *, policy: str = "fail"
) -> ItemMaker:
    plan = Plan(
        [20, 30],
        seed=5,
        global_batch_size=12,
        item_size=item_size,
        num_steps=NUM_STEPS,
        window_size=30,
    )
    bad_images = BadImagesConfig.model_validate({"policy": policy})
    return ItemMaker(source or _source(), plan, BlockSpec(VIEWS, bad_images=bad_images))


def _iterate(make: ItemMaker, **changes: Any) -> list[Block]:
    options = {"start_step": 0, "rank": 0, "world_size": 1, "num_threads": 2, **changes}
    return list(iterate(make, **options))


def _same(one: Block, other: Block) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def _by_index(blocks: Sequence[Block]) -> list[dict[int, tuple[bytes, ...]]]:
    """Return, a step, the pixels of all columns by the row of the image."""
    return [
        {
            int(index): tuple(block[view_column(kind)][row].tobytes() for kind in (0, 1))
            for row, index in enumerate(block["index"])
        }
        for block in blocks
    ]


def _view_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("raysl-views")]


class TestItemMaker:
    def test_has_a_column_a_kind_of_view_and_the_rows_and_the_step(self) -> None:
        block = _maker(item_size=4)(5)
        assert {name: (column.shape, column.dtype.name) for name, column in block.items()} == {
            "views_0": ((4, 2, 12, 12, 3), "uint8"),
            "views_1": ((4, 3, 8, 8, 3), "uint8"),
            "index": ((4,), "int64"),
            "step": ((4,), "int64"),
            "bad": ((4,), "int64"),
            "flaw": ((4,), "uint8"),
        }

    @pytest.mark.parametrize("position", [0, 7, 31, 53])
    def test_holds_the_views_of_the_plans_images(self, position: int) -> None:
        make = _maker()
        block = make(position)
        item = make.plan.item(position)
        assert block["index"].tolist() == item.indices.tolist()
        assert block["step"].tolist() == [item.step] * 2
        for row, index in enumerate(item.indices.tolist()):
            image = _source().images[index]
            expected = make_views(image, VIEWS, seed=5, epoch=item.epoch, index=index)
            for kind in (0, 1):
                np.testing.assert_array_equal(block[view_column(kind)][row], expected[kind])

    def test_decodes_encoded_images_to_the_same_views(self) -> None:
        images = _source().images
        encoded = _Encoded("toy", images[..., ::-1])  # OpenCV writes BGR
        assert _same(_maker()(3), _maker(source=encoded)(3))

    def test_gives_grey_images_three_channels(self) -> None:
        grey = ArraySource("toy", _source().images[..., 0].copy())
        views = _maker(source=grey)(0)["views_1"]
        assert views.shape == (2, 3, 8, 8, 3)
        assert (views[..., 0] == views[..., 2]).all()

    def test_gives_the_same_bits_again_in_any_order_and_from_a_pickled_copy(self) -> None:
        make = _maker()
        blocks = {position: make(position) for position in range(54)}
        copy = pickle.loads(pickle.dumps(make))
        for position in np.random.default_rng(0).permutation(54).tolist():
            assert _same(copy(position), blocks[position])

    def test_never_writes_to_the_source(self) -> None:
        source = _source()
        before = source.images.copy()
        source.images.setflags(write=False)
        for position in range(10):
            _maker(source=source)(position)
        np.testing.assert_array_equal(source.images, before)

    @pytest.mark.parametrize("position", [54, 55, 1000])
    def test_a_position_past_the_end_gives_empty_pixels_of_no_image(self, position: int) -> None:
        make = _maker()
        block = make(position)
        real = make(0)
        assert {n: (c.shape, c.dtype) for n, c in block.items()} == {
            n: (c.shape, c.dtype) for n, c in real.items()
        }
        assert block["index"].tolist() == [-1, -1]
        assert block["step"].tolist() == [NUM_STEPS] * 2
        assert block["bad"].tolist() == [-1, -1]
        assert not block["views_0"].any()
        assert not block["views_1"].any()

    def test_an_image_that_cannot_be_decoded_is_named(self) -> None:
        source = _Encoded("toy", _source().images)
        make = _maker(source=source)
        bad = int(make.plan.item(4).indices[1])
        source.broken = (bad,)
        with pytest.raises(DecodeError, match=rf"^toy image {bad} \(7 bytes, "):
            make(4)


class TestBadImages:
    @pytest.mark.parametrize("policy", ["skip", "replace"])
    def test_leave_the_block_full_and_are_named_in_it(self, policy: str) -> None:
        source = _Encoded("toy", _source().images[..., ::-1])
        make = _maker(6, source, policy=policy)
        wanted = make.plan.item(4).indices
        bad = sorted(wanted[[1, 4]].tolist())
        source.broken = tuple(bad)
        block, whole = make(4), _maker(6)(4)
        spoilt = np.isin(wanted, bad)
        assert block["bad"].tolist() == np.where(spoilt, wanted, -1).tolist()
        assert block["flaw"].tolist() == np.where(spoilt, int(Flaw.NOT_AN_IMAGE), 0).tolist()
        assert block["index"][~spoilt].tolist() == wanted[~spoilt].tolist()
        assert not set(block["index"].tolist()) & set(bad)
        for column in ("views_0", "views_1"):
            np.testing.assert_array_equal(block[column][~spoilt], whole[column][~spoilt])
            assert block[column][spoilt].any(axis=(1, 2, 3, 4)).all()

    def test_skip_takes_another_of_the_item_with_views_of_its_own(self) -> None:
        source = _Encoded("toy", _source().images)
        make = _maker(6, source, policy="skip")
        wanted = make.plan.item(4).indices
        source.broken = (int(wanted[2]),)
        block = make(4)
        other = wanted.tolist().index(int(block["index"][2]))
        assert other != 2
        assert not np.array_equal(block["views_0"][2], block["views_0"][other])

    def test_replace_draws_from_the_same_group(self) -> None:
        source = _Encoded("toy", _source().images)
        make = ItemMaker(_Grouped(source), _maker().plan, _maker(policy="replace").spec)
        source.broken = tuple(range(20, 50, 3))
        drawn = [
            (int(bad), int(index))
            for position in range(54)
            for bad, index in zip(*(make(position)[c] for c in ("bad", "index")), strict=True)
            if bad >= 0
        ]
        assert len(drawn) > 20
        assert all(index >= 20 and index not in source.broken for _, index in drawn)
        assert len({index for _, index in drawn}) > 8

    @pytest.mark.parametrize("policy", ["skip", "replace"])
    def test_give_the_same_bits_whatever_the_order_and_the_item_size(self, policy: str) -> None:
        source = _Encoded("toy", _source().images)
        source.broken = (3, 17, 40)
        make = _maker(2, source, policy=policy)
        blocks = {position: make(position) for position in range(54)}
        again = _maker(2, source, policy=policy)
        for position in reversed(range(54)):
            assert _same(again(position), blocks[position])

    @pytest.mark.parametrize("policy", ["skip", "replace"])
    def test_a_source_of_nothing_else_ends_with_an_error(self, policy: str) -> None:
        source = _Encoded("toy", _source().images)
        source.broken = tuple(range(NUM_IMAGES))
        with pytest.raises(DataError, match=r"^toy image \d+ is bad .*100 others"):
            _maker(2, source, policy=policy)(0)

    def test_a_group_of_nothing_else_is_replaced_from_the_others(self) -> None:
        source = _Encoded("toy", _source().images)
        source.broken = tuple(range(20))
        make = ItemMaker(_Grouped(source), _maker().plan, _maker(policy="replace").spec)
        indices = np.concatenate([make(position)["index"] for position in range(24)])
        assert indices.min() >= 20


class TestLargeJpegs:
    def test_are_decoded_smaller_and_give_nearly_the_same_views(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        photo = cv2.resize(noise // 2 + 60, (900, 600), interpolation=cv2.INTER_LINEAR)
        encoded = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        views = (View(count=2, size_px=64, crop=Crop(scale=(0.3, 1.0)), ops=(Flip(),)),)

        class Photos(ArraySource):
            def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
                return [encoded.tobytes() for _ in indices]

        source = Photos("photos", np.zeros((8, 1, 1), dtype=np.uint8))
        plan = Plan([8], seed=0, global_batch_size=8, item_size=8, num_steps=1)
        block = ItemMaker(source, plan, BlockSpec(views))(0)
        sizes = []
        for row, index in enumerate(block["index"].tolist()):
            decode_or_flaw(encoded.tobytes(), PLAIN, shrink=lambda h, w: sizes.append((h, w)) or 1)
            expected = make_views(photo, views, seed=0, epoch=0, index=index)[0]
            apart = np.abs(block["views_0"][row].astype(int) - np.stack(expected))
            assert apart.mean() < 4
        assert sizes == [(600, 900)] * 8


class TestColorOnTheDevice:
    def test_leaves_pixels_as_the_crop_made_them_and_hands_on_the_plans(self) -> None:
        ops = (ColorJitter(prob=1.0), Flip(prob=0.5))
        whole = (View(count=2, size_px=12, ops=ops), View(size_px=8))
        crops = (View(count=2, size_px=12), View(size_px=8))
        plan = _maker(4).plan
        device = ItemMaker(_source(), plan, BlockSpec(whole, color_on="device"))(5)
        bare = ItemMaker(_source(), plan, BlockSpec(crops))(5)
        np.testing.assert_array_equal(device["views_0"], bare["views_0"])
        np.testing.assert_array_equal(device["views_1"], bare["views_1"])
        assert device["numbers_0"].shape == (4, 2, 10)
        assert device["numbers_1"].shape == (4, 1, 0)
        assert device["numbers_0"].dtype == np.float32
        assert (device["numbers_0"][..., 0] == 1).all()
        assert set(np.unique(device["numbers_0"][..., 9])) <= {0.0, 1.0}
        order = np.sort(device["numbers_0"][..., 5:9], axis=-1)
        assert (order == [0, 1, 2, 3]).all()


class TestIterate:
    def test_equals_the_item_maker_item_by_item(self) -> None:
        make = _maker()
        batches = _iterate(make, num_threads=3)
        assert len(batches) == NUM_STEPS
        for step, batch in enumerate(batches):
            assert _same(batch, concatenate([make(6 * step + part) for part in range(6)]))

    @pytest.mark.parametrize("prefetch_steps", [0, 1, 5, 100])
    @pytest.mark.parametrize("num_threads", [1, 4])
    def test_threads_and_prefetching_change_nothing(
        self, num_threads: int, prefetch_steps: int
    ) -> None:
        expected = _iterate(_maker())
        batches = _iterate(_maker(), num_threads=num_threads, prefetch_steps=prefetch_steps)
        assert len(batches) == len(expected)
        assert all(map(_same, batches, expected))

    @pytest.mark.parametrize("world_size", [2, 3, 6])
    def test_several_ranks_share_the_global_batches_of_one(self, world_size: int) -> None:
        alone = _by_index(_iterate(_maker()))
        ranks = [
            _by_index(_iterate(_maker(), rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        for step in range(NUM_STEPS):
            parts = [rank[step] for rank in ranks]
            assert [len(part) for part in parts] == [12 // world_size] * world_size
            assert {k: v for part in parts for k, v in part.items()} == alone[step]

    def test_ranks_take_items_in_turn(self) -> None:
        make = _maker()
        for rank in range(3):
            (first, *_) = _iterate(make, rank=rank, world_size=3)
            assert _same(first, concatenate([make(rank), make(rank + 3)]))

    @pytest.mark.parametrize("item_size", [1, 3, 4, 12])
    def test_the_item_size_changes_neither_images_nor_pixels(self, item_size: int) -> None:
        assert _by_index(_iterate(_maker(item_size))) == _by_index(_iterate(_maker()))

    @pytest.mark.parametrize("start_step", [1, 4, 8, 9])
    @pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3)])
    def test_a_resumed_run_gets_exactly_the_remaining_batches(
        self, start_step: int, rank: int, world_size: int
    ) -> None:
        whole = _iterate(_maker(), rank=rank, world_size=world_size)
        rest = _iterate(_maker(), rank=rank, world_size=world_size, start_step=start_step)
        assert len(rest) == NUM_STEPS - start_step
        assert all(map(_same, rest, whole[start_step:]))
        assert [int(batch["step"][0]) for batch in rest] == list(range(start_step, NUM_STEPS))

    def test_a_single_item_a_batch_is_passed_on_without_a_copy(self) -> None:
        block = _maker(item_size=12)(0)
        assert concatenate([block]) is block

    @pytest.mark.parametrize("num_threads", [1, 3])
    def test_an_error_in_a_thread_reaches_the_consumer_at_its_step(self, num_threads: int) -> None:
        source = _Encoded("toy", _source().images)
        make = _maker(source=source)
        bad = int(make.plan.item(3 * 6 + 1).indices[0])  # step 3, same pass
        source.broken = (bad,)
        batches = iterate(make, start_step=0, rank=0, world_size=1, num_threads=num_threads)
        assert [int(next(batches)["step"][0]) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DecodeError, match=rf"^toy image {bad} "):
            next(batches)
        assert not _view_threads()

    def test_stopping_early_leaves_no_thread_behind(self) -> None:
        batches = iterate(
            _maker(), start_step=0, rank=0, world_size=1, num_threads=3, prefetch_steps=4
        )
        next(batches)
        assert len(_view_threads()) == 3
        batches.close()  # type: ignore[attr-defined]
        assert not _view_threads()

    def test_stopping_early_drops_the_items_that_were_waiting(self) -> None:
        made = []

        class Slow(ItemMaker):
            def __call__(self, position: int) -> Block:
                made.append(position)
                threading.Event().wait(0.01 if position >= 6 else 0)
                return super().__call__(position)

        base = _maker()
        make = Slow(base.source, base.plan, base.spec)
        batches = iterate(
            make, start_step=0, rank=0, world_size=1, num_threads=1, prefetch_steps=100
        )
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert 6 <= len(made) < base.plan.num_items

    def test_an_ended_run_leaves_no_thread_behind(self) -> None:
        assert len(_iterate(_maker(), num_threads=3)) == NUM_STEPS
        assert not _view_threads()

    @pytest.mark.parametrize("prefetch_steps", [0, 2])
    def test_runs_no_further_ahead_than_it_was_told(self, prefetch_steps: int) -> None:
        made = []

        class Counting(ItemMaker):
            def __call__(self, position: int) -> Block:
                made.append(position)
                return super().__call__(position)

        base = _maker()
        make = Counting(base.source, base.plan, base.spec)
        batches = iterate(
            make, start_step=0, rank=0, world_size=1, num_threads=2, prefetch_steps=prefetch_steps
        )
        next(batches)
        # The batch in use, those ahead, and the one that took the used one's place.
        assert max(made) < 6 * (2 + prefetch_steps)
        batches.close()  # type: ignore[attr-defined]
        assert max(made) < 6 * (2 + prefetch_steps)


class TestConcatenate:
    def test_joins_column_by_column_in_order(self) -> None:
        blocks = [
            {"index": np.array([1, 2]), "step": np.array([0, 0])},
            {"index": np.array([3]), "step": np.array([0])},
        ]
        joined = concatenate(blocks)
        assert {name: column.tolist() for name, column in joined.items()} == {
            "index": [1, 2, 3],
            "step": [0, 0, 0],
        }

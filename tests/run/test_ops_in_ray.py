"""Every operation gives the same bits bare, in this process and in Ray Data's workers."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import ray

from raysl.augment.crop import apply_crop
from raysl.augment.ops import Op
from raysl.augment.pipeline import View
from raysl.augment.random import borrow_view_stream
from raysl.augment.recipes import CustomViews
from raysl.config.load import validate
from raysl.config.yaml_text import parse_yaml
from raysl.data.block import Block, view_column
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker, iterate, join_chunks
from raysl.run.ray_cluster import Layout
from raysl.run.ray_data import execution_options, iterate_shard, open_dataset
from raysl.sources.source import ArraySource

# One kind of view for each operation, all with settings of their own, and one for all in a row.
OPS = [
    "{op: crop, prob: 1.0, scale: [0.3, 0.5], ratio: [0.9, 1.2]}",
    "{op: flip, prob: 1.0}",
    "{op: rotate, prob: 1.0, max_deg: 70.0}",
    "{op: quarter_turn, prob: 1.0}",
    "{op: color_jitter, prob: 1.0, brightness: 0.5, contrast: 0.6, saturation: 0.7, hue: 0.3, "
    "brightness_kind: add}",
    "{op: grey, prob: 1.0}",
    "{op: blur, prob: 1.0, sigma_px: [1.0, 2.5], kernel_fraction: 0.3}",
    "{op: solarise, prob: 1.0, threshold: 90}",
    "{op: noise, prob: 1.0, sigma: [0.05, 0.2]}",
    "{op: sobel, prob: 1.0}",
    "{op: cutout, prob: 1.0, side: [0.4, 0.6], fill: 9}",
]
SIZE_PX, SEED, NUM_IMAGES, BATCH = 32, 3, 16, 4


def kinds(*, with_ops: bool = True) -> tuple[View, ...]:
    ops = [*OPS, ", ".join(OPS)]
    crop = "{scale: [0.3, 0.9], ratio: [0.6, 1.5]}"
    lines = [
        f"- {{size_px: {SIZE_PX}, crop: {crop}, ops: [{op if with_ops else ''}]}}" for op in ops
    ]
    values = parse_yaml("kinds:\n" + "\n".join(lines), where="test")
    return validate(CustomViews, values, where="test").views()


class Mixed(ArraySource):
    """Every other image as pixels, the others as JPEG files."""

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        return [
            cv2.imencode(".jpg", self.images[index])[1].tobytes()
            if index % 2
            else self.images[index]
            for index in indices
        ]


def source() -> ArraySource:
    blobs = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 6, 8, 3), dtype=np.uint8)
    images = [cv2.resize(each, (80, 60), interpolation=cv2.INTER_CUBIC) for each in blobs]
    return Mixed("made up", np.stack(images))


def plan() -> Plan:
    return Plan([NUM_IMAGES], seed=SEED, global_batch_size=BATCH, item_size=2, num_steps=4)


def in_this_process(views: tuple[View, ...]) -> Iterator[Block]:
    make = ItemMaker(source(), plan(), BlockSpec(views))
    return iterate(make, start_step=0, rank=0, world_size=1, num_threads=1)


def in_ray() -> Iterator[Block]:
    ray.data.DataContext.get_current().execution_options = execution_options()
    layout = Layout(1, 1.0, 2, 0.9, False, 1, 1)
    dataset = open_dataset(
        ray.put(source()), plan(), BlockSpec(kinds()), start_step=0, layout=layout
    )
    return map(join_chunks, iterate_shard(dataset.iterator, batch_size=BATCH, prefetch_batches=2))


def bare(number: int, index: int) -> np.ndarray:
    """Make a view of an image of the first epoch by calling its operations one by one."""
    view, image = kinds()[number], source().images[index]
    rng = borrow_view_stream(seed=SEED, epoch=0, index=index, view=number)
    result = apply_crop(image, view.crop.plan(rng, height=60, width=80), size_px=SIZE_PX)
    for op, step in [(op, op.plan(rng)) for op in view.ops]:
        result = op.apply(result, step)
    return result


def by_index(blocks: Iterator[Block], number: int) -> dict[int, npt.NDArray[np.uint8]]:
    return {
        index: pixels
        for block in blocks
        for index, pixels in zip(
            block["index"].tolist(), block[view_column(number)][:, 0], strict=True
        )
    }


class TestTheOperationsHere:
    def test_are_all_there_are(self) -> None:
        (union, _) = get_args(Op)
        found = [type(view.ops[0]) for view in kinds()[:-1]]
        assert found == list(get_args(union)), "give a new operation a line in OPS"
        assert [type(op) for op in kinds()[-1].ops] == found

    @pytest.mark.parametrize("op", kinds()[-1].ops, ids=lambda op: op.op)
    def test_have_settings_of_their_own_and_always_happen(self, op: Any) -> None:
        given = op.model_dump(exclude={"op", "prob"})
        assert op.prob == 1.0
        assert all(given[name] != type(op).model_fields[name].default for name in given)

    @pytest.mark.parametrize("number", range(len(OPS) + 1))
    def test_change_every_image(self, number: int) -> None:
        changed = by_index(in_this_process(kinds()), number)
        plain = by_index(in_this_process(kinds(with_ops=False)), number)
        assert sorted(changed) == sorted(plain) == list(range(NUM_IMAGES))
        assert all((changed[index] != plain[index]).any() for index in changed)

    @pytest.mark.parametrize("number", range(len(OPS) + 1))
    def test_give_the_same_bits_one_by_one_as_in_an_item(self, number: int) -> None:
        made = by_index(in_this_process(kinds()), number)
        for index in range(0, NUM_IMAGES, 2):  # those that need no decoding
            np.testing.assert_array_equal(made[index], bare(number, index))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "known_to_workers")
def test_every_operation_gives_the_same_bits_in_ray_data() -> None:
    here = list(in_this_process(kinds()))
    there = [block for block, _ in zip(in_ray(), here, strict=False)]
    assert len(there) == len(here) == 4
    names = [view.ops[0].op for view in kinds()[:-1]] + ["all in a row"]
    apart = [
        (name, step)
        for number, name in enumerate(names)
        for step, (one, other) in enumerate(zip(here, there, strict=True))
        if one[view_column(number)].tobytes() != other[view_column(number)].tobytes()
    ]
    assert apart == []
    for one, other in zip(here, there, strict=True):
        assert one["index"].tolist() == other["index"].tolist()
        assert one["step"].tolist() == other["step"].tolist()

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from raysl.augment.crop import Crop, CropBox, Image, apply_crop
from raysl.augment.ops import Blur, Flip, Grey, Op, Rotate, Solarise
from raysl.augment.pipeline import View, ViewPlan, apply_view, make_views, plan_view
from raysl.augment.random import borrow_view_stream
from raysl.config.load import validate
from raysl.config.yaml_text import parse_yaml, to_yaml
from raysl.errors import ConfigError

EVERY_OP = tuple(kind(prob=0.5) for kind in get_args(get_args(Op)[0]))
GLOBAL = View(count=2, size_px=24, ops=EVERY_OP)
LOCAL = View(count=3, size_px=16, crop=Crop(scale=(0.05, 0.3)), ops=EVERY_OP)


def _image(seed: int, height: int = 40, width: int = 30) -> Image:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image.setflags(write=False)
    return image


def _same(one: Sequence[Sequence[Image]], other: Sequence[Sequence[Image]]) -> bool:
    return all(
        np.array_equal(a, b)
        for kind, kind_too in zip(one, other, strict=True)
        for a, b in zip(kind, kind_too, strict=True)
    )


class TestMakeViews:
    def test_gives_a_list_a_kind_with_its_count_and_size(self) -> None:
        first, second = make_views(_image(0), [GLOBAL, LOCAL], seed=0, epoch=0, index=0)
        assert [view.shape for view in first] == [(24, 24, 3)] * 2
        assert [view.shape for view in second] == [(16, 16, 3)] * 3
        assert all(view.dtype == np.uint8 for view in [*first, *second])

    def test_is_a_function_of_the_key_whatever_the_order_and_the_other_images(self) -> None:
        keys = [(epoch, index) for epoch in range(3) for index in range(10)]

        def make(key: tuple[int, int]) -> list[list[Image]]:
            return make_views(_image(key[1]), [GLOBAL, LOCAL], seed=4, epoch=key[0], index=key[1])

        in_order = {key: make(key) for key in keys}
        alone = make((1, 7))
        shuffled = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
        with ThreadPoolExecutor(3) as pool:
            in_threads = dict(zip(shuffled, pool.map(make, shuffled), strict=True))
        assert _same(alone, in_order[1, 7])
        assert all(_same(in_order[key], in_threads[key]) for key in keys)

    @pytest.mark.parametrize("part", ["seed", "epoch", "index"])
    def test_depends_on_each_part_of_the_key(self, part: str) -> None:
        key = {"seed": 1, "epoch": 2, "index": 3}
        one = make_views(_image(0), [GLOBAL], **key)
        other = make_views(_image(0), [GLOBAL], **{**key, part: 9})
        assert not _same(one, other)

    def test_all_views_of_an_image_differ(self) -> None:
        view = View(count=5, size_px=24)
        made = make_views(_image(0), [view, view], seed=0, epoch=0, index=0)
        assert len({image.tobytes() for kind in made for image in kind}) == 10

    def test_numbers_the_views_on_from_kind_to_kind(self) -> None:
        image = _image(0)
        made = make_views(image, [GLOBAL, LOCAL], seed=1, epoch=2, index=3)
        for number, kind, view in [(0, GLOBAL, made[0][0]), (4, LOCAL, made[1][2])]:
            rng = borrow_view_stream(seed=1, epoch=2, index=3, view=number)
            plan = plan_view(kind, rng, height=40, width=30)
            np.testing.assert_array_equal(apply_view(kind, image, plan), view)

    def test_never_writes_to_the_image(self) -> None:
        # Also where nothing is resized, so that the first operation gets the image itself.
        whole = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
        image = _image(0, 24, 24)
        before = image.copy()
        for op in EVERY_OP:
            view = View(count=4, size_px=24, crop=whole, ops=(op.model_copy(update={"prob": 1.0}),))
            for index in range(5):
                make_views(image, [view], seed=0, epoch=0, index=index)
        for index in range(20):
            make_views(image, [GLOBAL, LOCAL], seed=0, epoch=0, index=index)
        np.testing.assert_array_equal(image, before)


class TestPlanView:
    def test_does_not_look_at_the_pixels(self) -> None:
        plans = [
            plan_view(
                GLOBAL, borrow_view_stream(seed=0, epoch=0, index=0, view=0), height=40, width=30
            )
            for _ in range(2)
        ]
        assert plans[0] == plans[1]
        assert len(plans[0].steps) == len(EVERY_OP)

    def test_uses_the_crops_scale_and_ratio(self) -> None:
        view = View(crop=Crop(scale=(0.25, 0.25), ratio=(1.0, 1.0)))
        box = plan_view(view, np.random.default_rng(0), height=40, width=40).box
        assert (box.height, box.width) == (20, 20)


class TestApplyView:
    def test_crops_then_applies_the_operations_in_their_order(self) -> None:
        view = View(size_px=16, ops=(Rotate(), Solarise(), Grey(), Flip(), Blur()))
        plan = ViewPlan(CropBox(2, 3, 20, 22), (30.0, True, True, True, 1.0))
        expected = Rotate().apply(apply_crop(_image(0), plan.box, size_px=16), 30.0)
        expected = Grey().apply(Solarise().apply(expected, True), True)
        expected = Blur().apply(Flip().apply(expected, True), 1.0)
        np.testing.assert_array_equal(apply_view(view, _image(0), plan), expected)

    def test_a_plan_in_which_nothing_happens_is_the_crop(self) -> None:
        view = View(size_px=16, ops=EVERY_OP)
        plan = ViewPlan(CropBox(2, 3, 16, 16), (None,) * len(EVERY_OP))
        np.testing.assert_array_equal(apply_view(view, _image(0), plan), _image(0)[2:18, 3:19])

    def test_a_plan_of_another_view_is_an_error(self) -> None:
        plan = ViewPlan(CropBox(0, 0, 16, 16), (True,))
        with pytest.raises(ValueError, match="shorter"):
            apply_view(View(size_px=16, ops=(Flip(), Grey())), _image(0), plan)


class TestOps:
    @pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.op)
    def test_with_probability_zero_leaves_every_image_alone(self, op: Any) -> None:
        never = op.model_copy(update={"prob": 0.0})
        rng = np.random.default_rng(0)
        for _ in range(20):
            np.testing.assert_array_equal(never.apply(_image(0), never.plan(rng)), _image(0))

    @pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.op)
    def test_are_planned_as_often_as_their_probability_says(self, op: Any) -> None:
        rng, often, draws = np.random.default_rng(0), op.model_copy(update={"prob": 0.3}), 4000
        share = np.mean([often.plan(rng) is not None for _ in range(draws)])
        assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / draws))

    @pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: op.op)
    def test_with_probability_one_changes_every_image(self, op: Any) -> None:
        always = op.model_copy(update={"prob": 1.0})
        rng = np.random.default_rng(0)
        for _ in range(20):
            if op.op == "blur":  # a Gaussian of less than 0.2 px rounds to nothing
                always = always.model_copy(update={"sigma_px": (0.5, 2.0)})
            square = _image(0, 40, 40)  # as views are
            assert (always.apply(square, always.plan(rng)) != square).any()

    def test_solarises_threshold_reaches_the_pixels(self) -> None:
        np.testing.assert_array_equal(Solarise(threshold=0).apply(_image(0), True), 255 - _image(0))


class TestConfigs:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"scale": (0.5, 0.2)}, r"scale is \[low, high\] with low <= high; got \[0.5, 0.2\]"),
            ({"ratio": (2.0, 1.0)}, r"ratio is \[low, high\] with low <= high; got \[2.0, 1.0\]"),
            ({"scale": (0.0, 1.0)}, "greater than 0"),
            ({"scale": (0.5, 1.5)}, "less than or equal to 1"),
            ({"pad": 0.1}, r"pad=0\.1 needs short_side, .*; set short_side too \(\[1, 1\]"),
            ({"border": "reflect"}, r"border=reflect needs pad"),
        ],
    )
    def test_a_crop_that_cannot_be_drawn_is_an_error(
        self, given: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValidationError, match=message):
            Crop(**given)

    @pytest.mark.parametrize(
        ("op", "message"),
        [
            (
                "{op: flop}",
                r"ops\.0: got 'flop', allowed: crop, flip, .*cutout; did you mean 'flip'\?",
            ),
            ("{op: solarize}", r"ops\.0: got 'solarize'.*did you mean 'solarise'\?"),
            ("{op: flip, prob: 1.5}", r"ops\.0\.prob: .*less than or equal to 1, got 1\.5"),
            (
                "{op: blur, sigma: [1, 2]}",
                r"ops\.0: unknown key 'sigma'; did you mean 'sigma_px'\?",
            ),
            (
                "{op: color_jitter, hue: 0.6}",
                r"ops\.0\.hue: .*less than or equal to 0\.5, got 0\.6",
            ),
            ("{op: solarise, threshold: 257}", r"ops\.0\.threshold: .*got 257"),
            ("{op: rotate, max_deg: -1}", r"ops\.0\.max_deg: .*got -1"),
            ("{op: noise, sigma: [0.2, 0.1]}", r"ops\.0: sigma is \[low, high\].*got \[0\.2, 0"),
            ("{op: cutout, side: [0.5, 0.4]}", r"ops\.0: side is \[low, high\].*got \[0\.5, 0"),
            ("{op: cutout, fill: 256}", r"ops\.0\.fill: .*got 256"),
            ("{prob: 0.5}", r"ops\.0: .*'op'"),
        ],
    )
    def test_a_bad_operation_is_an_error_that_names_its_place(self, op: str, message: str) -> None:
        values = parse_yaml(f"ops: [{op}]", where="x")
        with pytest.raises(ConfigError, match=message):
            validate(View, values, where="x")

    @pytest.mark.parametrize("count", [0, 257])
    def test_a_kind_has_between_1_and_256_views(self, count: int) -> None:
        with pytest.raises(ValidationError, match=r"count\n"):
            View(count=count)

    def test_a_dump_loads_again(self) -> None:
        view = View(count=3, size_px=9, crop=Crop(scale=(0.1, 0.2)), ops=EVERY_OP)
        values = parse_yaml(to_yaml(view.model_dump(mode="json")), where="dump")
        assert validate(View, values, where="dump") == view

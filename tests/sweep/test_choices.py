import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import validate
from raysl.config.yaml_text import to_yaml
from raysl.sweep.choices import Choices, draw_random, sample
from raysl.sweep.config import Dimension, SweepConfig

BASE = {
    "data": {"source": "digits", "views": {"recipe": "simclr", "size_px": 32}},
    "method": {"name": "simclr"},
    "train": {"steps": 4, "global_batch_size": 16},
}

SPACE = {
    "a.grid": {"grid": [1, 2, 3]},
    "a.lr": {"log_uniform": [1e-4, 1e-1]},
    "a.word": {"choice": ["p", "q"]},
}


@pytest.fixture
def choices(tmp_path: Path) -> Any:
    """Make the choices of a space over two base files, or one."""

    def make(space: dict[str, Any], *, bases: tuple[str, ...] = ("plain",), **more: Any) -> Choices:
        for name in bases:
            (tmp_path / f"{name}.yaml").write_text(to_yaml(BASE | {"seed": len(name)}))
        base = [str(tmp_path / f"{name}.yaml") for name in bases]
        values = {"name": "a", "base": base, "space": space, **more}
        return Choices(validate(SweepConfig, values, where="x"))

    return make


class TestCombinations:
    def test_is_the_product_and_the_last_one_changes_fastest(self, choices: Any) -> None:
        both = choices({"a.x": {"grid": [1, 2]}, "b.y": {"choice": ["p", "q"]}})
        assert list(both.combinations()) == [
            {"a.x": 1, "b.y": "p"},
            {"a.x": 1, "b.y": "q"},
            {"a.x": 2, "b.y": "p"},
            {"a.x": 2, "b.y": "q"},
        ]

    def test_several_bases_are_the_first_dimension(self, choices: Any) -> None:
        both = choices({"a.x": {"grid": [1, 2]}}, bases=("one", "other"))
        assert list(both.combinations()) == [
            {"config": "one", "a.x": 1},
            {"config": "one", "a.x": 2},
            {"config": "other", "a.x": 1},
            {"config": "other", "a.x": 2},
        ]

    def test_no_dimension_is_one_combination(self, choices: Any) -> None:
        assert list(choices({}).combinations()) == [{}]

    def test_a_dimension_whose_condition_does_not_hold_is_left_out(self, choices: Any) -> None:
        conditional = choices(
            {
                "method.memory_length": {"grid": [64, 128], "when": {"method.memory": True}},
                "method.memory": {"grid": [False, True]},
            }
        )
        assert list(conditional.combinations()) == [
            {"method.memory": False},
            {"method.memory_length": 64, "method.memory": True},
            {"method.memory_length": 128, "method.memory": True},
        ]

    def test_a_whole_range_is_all_its_numbers(self, choices: Any) -> None:
        found = choices({"a.x": {"int": [3, 5]}}).combinations()
        assert [params["a.x"] for params in found] == [3, 4, 5]


class TestConditions:
    def test_ask_for_a_label_or_its_value(self, choices: Any) -> None:
        space = {
            "method": {"grid": {"cold": {"name": "simclr", "temperature": 0.1}, "plain": 7}},
            "a.x": {"grid": [1], "when": {"method": "cold"}},
            "a.y": {"grid": [1], "when": {"method": 7}},
        }
        found = list(choices(space).combinations())
        assert found == [{"method": "cold", "a.x": 1}, {"method": "plain", "a.y": 1}]

    def test_ask_for_one_of_a_list(self, choices: Any) -> None:
        space = {"a.x": {"grid": [1, 2, 3]}, "a.y": {"grid": [0], "when": {"a.x": [1, 3]}}}
        assert [len(params) for params in choices(space).combinations()] == [2, 1, 2]

    def test_ask_for_a_setting_inside_a_section_that_is_varied(self, choices: Any) -> None:
        space = {
            "method": {"grid": {"a": {"name": "simclr"}, "b": {"name": "moco"}}},
            "method.queue_length": {"grid": [64], "when": {"method.name": "moco"}},
        }
        found = list(choices(space).combinations())
        assert found == [{"method": "a"}, {"method": "b", "method.queue_length": 64}]

    @pytest.mark.parametrize(
        ("when", "holds"),
        [
            ({"method.name": "simclr"}, True),  # of the base file
            ({"method.memory": False}, True),  # a default
            ({"data.limit": 100}, True),  # of `set`
            ({"method.name": "moco"}, False),
            ({"data.views.recipe": "simclr", "method.memory": True}, False),  # all must hold
            ({"config": "plain"}, True),
        ],
    )
    def test_ask_for_what_the_run_would_have(
        self, when: dict[str, Any], holds: bool, choices: Any
    ) -> None:
        one = choices({"a.x": {"grid": [1], "when": when}}, set={"data.limit": 100})
        assert one.exists("a.x", {}) == holds

    def test_ask_for_the_settings_of_the_chosen_base(self, choices: Any) -> None:
        one = choices({"a.x": {"grid": [1], "when": {"seed": 5}}}, bases=("one", "other"))
        assert list(one.combinations()) == [{"config": "one"}, {"config": "other", "a.x": 1}]

    def test_may_depend_on_each_other_in_a_chain(self, choices: Any) -> None:
        space = {
            "a.z": {"grid": [1], "when": {"a.y": 1}},
            "a.y": {"grid": [1, 2], "when": {"a.x": 1}},
            "a.x": {"grid": [1, 2]},
        }
        chain = choices(space)
        assert chain.order == ["a.x", "a.y", "a.z"]
        assert chain.demands("a.z") == {"a.y": 1, "a.x": 1}
        assert [list(params) for params in chain.combinations()] == [
            ["a.z", "a.y", "a.x"],
            ["a.y", "a.x"],
            ["a.x"],
        ]

    def test_in_a_circle_are_found(self, choices: Any) -> None:
        space = {
            "a.x": {"grid": [1], "when": {"a.y": 1}},
            "a.y": {"grid": [1], "when": {"a.x": 1}},
            "a.z": {"grid": [1]},
        }
        assert choices(space).in_cycles == ["a.x", "a.y"]


class TestExclude:
    def test_leaves_out_combinations_with_all_its_values(self, choices: Any) -> None:
        space = {"a.x": {"grid": [1, 2, 3]}, "a.y": {"grid": [1, 2, 3]}}
        exclude = [{"a.x": 1, "a.y": [2, 3]}, {"a.x": 2, "a.y": 3}]
        found = choices(space, exclude=exclude).combinations()
        assert [(each["a.x"], each["a.y"]) for each in found] == [
            (1, 1),
            (2, 1),
            (2, 2),
            (3, 1),
            (3, 2),
            (3, 3),
        ]

    def test_may_ask_for_labels_the_base_and_what_the_run_would_have(self, choices: Any) -> None:
        space = {"method": {"grid": {"a": {"name": "simclr"}, "b": {"name": "moco"}}}}
        for exclude in ({"method": "b"}, {"method.name": "moco"}, {"method": {"name": "moco"}}):
            assert list(choices(space, exclude=[exclude]).combinations()) == [{"method": "a"}]
        both = choices({}, bases=("one", "other"), exclude=[{"config": "one", "seed": 3}])
        assert list(both.combinations()) == [{"config": "other"}]

    def test_holds_for_draws_too(self, choices: Any) -> None:
        space = {
            "a.grid": {"grid": [1, 2]},
            "a.word": {"choice": ["p", "q", "r"]},
            "a.lr": {"uniform": [0, 1]},
        }
        exclude = [{"a.grid": 1, "a.word": ["p", "q"]}]
        drawn = draw_random(choices(space, exclude=exclude), seed=0, count=30)
        assert len(drawn) == 30
        assert {each["a.word"] for each in drawn if each["a.grid"] == 1} == {"r"}
        assert {each["a.word"] for each in drawn if each["a.grid"] == 2} == {"p", "q", "r"}


class TestSample:
    @pytest.mark.parametrize(
        ("kind", "share", "value"),
        [
            ("uniform", 0.0, 1.0),
            ("uniform", 0.5, 50.5),
            ("log_uniform", 0.5, 10.0),
            ("log_uniform", 0.25, 3.162),  # four digits, as a person would type it
            ("int", 0.0, 1),
            ("int", 0.999999, 100),
            ("log_int", 0.999999, 100),
            ("log_int", 0.0, 1),
        ],
    )
    def test_a_share_of_a_range_of_1_to_100(self, kind: str, share: float, value: float) -> None:
        found = sample(Dimension(**{kind: (1, 100)}), share)  # type: ignore[arg-type]
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize("share", [0.0, 0.4, 0.9999999])
    def test_stays_within_bounds_that_four_digits_cannot_say(self, share: float) -> None:
        low, high = 0.123456, 0.123457
        assert low <= sample(Dimension(uniform=(low, high)), share) <= high  # type: ignore[operator]

    def test_whole_numbers_come_equally_often(self) -> None:
        dimension = Dimension(int=(2, 4))
        counts = Counter(sample(dimension, place / 300) for place in range(300))
        assert counts == {2: 100, 3: 100, 4: 100}


class TestDrawRandom:
    def test_is_a_function_of_the_seed(self, choices: Any) -> None:
        one, two = choices(SPACE), choices(SPACE)
        assert draw_random(one, seed=3, count=9) == draw_random(two, seed=3, count=9)
        assert draw_random(one, seed=3, count=9) != draw_random(one, seed=4, count=9)

    def test_more_draws_begin_with_the_same_ones(self, choices: Any) -> None:
        one = choices(SPACE)
        assert draw_random(one, seed=0, count=12)[:5] == draw_random(one, seed=0, count=5)

    def test_another_dimension_leaves_the_draws_of_the_others(self, choices: Any) -> None:
        alone = draw_random(choices(SPACE), seed=0, count=20)
        more = choices({"a.new": {"uniform": [0, 1]}, **SPACE})
        beside = draw_random(more, seed=0, count=20)
        assert [{k: v for k, v in each.items() if k != "a.new"} for each in beside] == alone

    def test_combinations_of_grids_come_equally_often(self, choices: Any) -> None:
        space = SPACE | {"b.grid": {"grid": ["x", "y"]}}
        drawn = draw_random(choices(space, bases=("one", "other")), seed=1, count=36)
        counts = Counter((each["config"], each["a.grid"], each["b.grid"]) for each in drawn)
        assert len(counts) == 12
        assert set(counts.values()) == {3}

    def test_a_part_of_the_grids_is_no_corner_of_them(self, choices: Any) -> None:
        space = {"a.x": {"grid": list(range(6))}, "a.y": {"grid": list(range(6))}}
        drawn = draw_random(choices(space), seed=0, count=12)
        assert len({each["a.x"] for each in drawn}) > 3
        assert len({each["a.y"] for each in drawn}) > 3

    def test_no_two_are_equal_while_there_are_others(self, choices: Any) -> None:
        space = {"a.x": {"choice": list(range(10))}, "a.y": {"int": [1, 4]}}
        drawn = draw_random(choices(space), seed=0, count=39)
        assert len({tuple(each.items()) for each in drawn}) == 39

    def test_where_there_are_fewer_each_comes_once(self, choices: Any) -> None:
        space = {"a.x": {"choice": [1, 2]}, "a.y": {"int": [1, 3]}}
        drawn = draw_random(choices(space), seed=0, count=100)
        assert {(each["a.x"], each["a.y"]) for each in drawn} == {
            (x, y) for x in (1, 2) for y in (1, 2, 3)
        }
        assert len(drawn) == 6

    def test_a_grid_value_with_few_combinations_leaves_its_share_to_others(
        self, choices: Any
    ) -> None:
        space = {
            "a.x": {"grid": [1, 2]},
            "a.y": {"choice": list(range(20)), "when": {"a.x": 2}},
        }
        drawn = draw_random(choices(space), seed=0, count=15)
        assert len({tuple(each.items()) for each in drawn}) == 15
        assert sum(each["a.x"] == 1 for each in drawn) == 1

    def test_a_grid_with_a_condition_on_a_draw_is_drawn_itself(self, choices: Any) -> None:
        space = {
            "a.on": {"choice": [True, False]},
            "a.lr": {"uniform": [0, 1]},
            "a.x": {"grid": [1, 2], "when": {"a.on": True}},
        }
        drawn = draw_random(choices(space), seed=0, count=40)
        assert all(("a.x" in each) == each["a.on"] for each in drawn)
        assert {each.get("a.x") for each in drawn} == {1, 2, None}

    def test_a_log_range_is_even_in_its_logarithm(self, choices: Any) -> None:
        drawn = draw_random(choices({"a.lr": {"log_uniform": [1e-4, 1.0]}}), seed=0, count=400)
        decades = Counter(math.floor(math.log10(each["a.lr"])) for each in drawn)
        assert set(decades) <= {-4, -3, -2, -1, 0}
        assert all(70 < decades[decade] < 130 for decade in (-4, -3, -2, -1))

from typing import Any

import pytest

from raysl.config.load import validate
from raysl.errors import ConfigError
from raysl.sweep.config import Dimension, SweepConfig


def _space(**dimensions: Any) -> dict[str, Dimension]:
    values = {"name": "a", "base": "b.yaml", "space": dimensions}
    return validate(SweepConfig, values, where="sweep").space


def _complaint(dimension: Any) -> str:
    """Return what is said of a dimension, without its name."""
    with pytest.raises(ConfigError) as caught:
        _space(x=dimension)
    lines = str(caught.value).split("\n")[1:]
    assert all(line.startswith("  space.x") for line in lines)
    return "\n".join(line.removeprefix("  space.x") for line in lines)


class TestDimension:
    def test_plain_values_are_their_own_labels(self) -> None:
        dimension = _space(x={"grid": [0.1, "a", True, None]})["x"]
        assert dimension.kind == "grid"
        assert dimension.is_listed
        assert dimension.labels() == dimension.values() == [0.1, "a", True, None]
        assert dimension.value_of("a") == "a"

    def test_labels_stand_for_any_value(self) -> None:
        moco = {"name": "moco", "queue_length": 64}
        dimension = _space(x={"choice": {"simclr": {"name": "simclr"}, "moco": moco}})["x"]
        assert dimension.labels() == ["simclr", "moco"]
        assert dimension.values() == [{"name": "simclr"}, moco]
        assert dimension.value_of("moco") == moco

    @pytest.mark.parametrize(
        ("kind", "is_whole", "is_log"),
        [
            ("uniform", False, False),
            ("log_uniform", False, True),
            ("int", True, False),
            ("log_int", True, True),
        ],
    )
    def test_a_range_has_bounds_and_its_numbers_stand_for_themselves(
        self, kind: str, is_whole: bool, is_log: bool
    ) -> None:
        dimension = _space(x={kind: [1, 8]})["x"]
        assert not dimension.is_listed
        assert (dimension.kind, dimension.is_whole, dimension.is_log) == (kind, is_whole, is_log)
        assert dimension.bounds == (1, 8)
        assert dimension.value_of(3) == 3

    @pytest.mark.parametrize(
        ("dimension", "complaint"),
        [
            ({"grid": []}, ".grid: no values; give at least one"),
            (
                {"choice": {}},
                ".choice: takes a list of values, or a section of label: value; got {}",
            ),
            ({"grid": 3}, ".grid: takes a list of values, or a section of label: value; got 3"),
            ({"grid": [1, 2, 1]}, ".grid: the value 1 is listed twice"),
            (
                {"grid": [[1, 2], 3]},
                ".grid: the value [1, 2] needs a name; give a section of label: value",
            ),
            ({"uniform": [2, 1]}, ".uniform: takes [low, high] with low < high; got [2, 1]"),
            ({"int": [2, 2]}, ".int: takes [low, high] with low < high; got [2, 2]"),
            ({"int": [1, 2.5]}, ".int: takes [low, high], two whole numbers; got [1, 2.5]"),
            ({"uniform": [1]}, ".uniform: takes [low, high], two numbers; got [1]"),
            (
                {"log_uniform": [0, 1]},
                ".log_uniform: a logarithm takes [low, high] with low > 0; got [0, 1]",
            ),
            (
                {"log_int": [-1, 1]},
                ".log_int: a logarithm takes [low, high] with low > 0; got [-1, 1]",
            ),
            (
                {"grid": [1], "int": [1, 2]},
                ": give exactly one of grid, choice, uniform, log_uniform, int, log_int; "
                "got ['grid', 'int']",
            ),
            (
                {"when": {"a": 1}},
                ": give exactly one of grid, choice, uniform, log_uniform, int, log_int; got none",
            ),
            ({"grd": [1]}, ": unknown key 'grd'; did you mean 'grid'?"),
        ],
    )
    def test_a_mistake_is_named(self, dimension: Any, complaint: str) -> None:
        assert _complaint(dimension) == complaint

    def test_two_mistakes_in_one_list_are_two_lines(self) -> None:
        assert _complaint({"grid": [1, 1, [2]]}).count("\n") == 1


class TestSweepConfig:
    def test_one_base_is_a_list_of_one(self) -> None:
        one = validate(SweepConfig, {"name": "a", "base": "runs/b.yaml"}, where="x")
        assert one.base == ("runs/b.yaml",)
        assert list(one.bases) == ["b"]

    def test_comes_back_the_same_from_its_dump(self) -> None:
        sweep = validate(
            SweepConfig,
            {
                "name": "a",
                "base": ["b.yaml", "c.yaml"],
                "set": {"data.limit": 100},
                "space": {
                    "method": {"grid": {"one": {"name": "simclr"}}},
                    "optim.base_lr": {"log_uniform": [1e-4, 1e-1], "when": {"method": "one"}},
                    "train.global_batch_size": {"log_int": [16, 64]},
                },
                "scheduler": {"name": "asha", "grace_epochs": 2},
                "search": {"name": "optuna"},
            },
            where="x",
        )
        assert validate(SweepConfig, sweep.model_dump(mode="json"), where="dump") == sweep

    def test_a_scheduler_has_its_own_settings_only(self) -> None:
        values = {"name": "a", "base": "b", "scheduler": {"name": "pbt", "grace_epochs": 1}}
        with pytest.raises(ConfigError, match="scheduler: unknown key 'grace_epochs'"):
            validate(SweepConfig, values, where="x")

    @pytest.mark.parametrize("name", ["", "a b", "../a", ".hidden"])
    def test_the_name_is_that_of_a_folder(self, name: str) -> None:
        with pytest.raises(ConfigError, match="name: a name starts with a letter or digit"):
            validate(SweepConfig, {"name": name, "base": "b"}, where="x")

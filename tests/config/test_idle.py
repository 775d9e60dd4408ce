"""Settings without effect, in sections made for it; those of runs are in test_recipe_idle.py."""

from typing import Any, ClassVar, Literal

import pytest

from raysl.config.base import GIVEN, Config, Duration, Idle
from raysl.config.idle import dotted_keys, idle_settings, refuse_idle, without_idle
from raysl.errors import ConfigError


class Oven(Config):
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("degrees", "fan"), {"kind": ("microwave",)}),
        Idle(("watts",), {"kind": ("gas", "electric")}),
        Idle(("glow",), {"light": (False,), "colour": (None,)}),
        Idle(("rest",), {"heat": (0,)}),
        Idle(("minutes",), {"recipe": (GIVEN,)}),
    )
    kind: Literal["gas", "electric", "microwave"] = "gas"
    degrees: tuple[int, int] = (180, 200)
    fan: bool = False
    watts: int = 800
    light: bool = False
    colour: str | None = None
    glow: float = 0.5
    heat: Duration = Duration(steps=0)
    rest: int = 1
    minutes: int = 5
    recipe: str | None = None


class Kitchen(Config):
    idle: ClassVar[tuple[Idle, ...]] = (Idle(("oven.fan",), {"power": (False,)}),)
    power: bool = True
    oven: Oven = Oven()
    ovens: tuple[Oven, ...] = ()


def _found(values: dict[str, Any]) -> list[str]:
    return [problem.text for problem in idle_settings(Kitchen, values)]


@pytest.mark.parametrize(
    ("oven", "text"),
    [
        (
            {"kind": "microwave", "degrees": [180, 220]},
            "oven.degrees=[180, 220] does nothing with oven.kind=microwave; drop it, or set "
            "oven.kind=gas or electric",
        ),
        (
            {"watts": 700},  # the default of what puts it to use counts too
            "oven.watts=700 does nothing with oven.kind=gas; drop it, or set oven.kind=microwave",
        ),
        (
            {"glow": 0.1},
            "oven.glow=0.1 does nothing with oven.light=false and oven.colour=null; drop it, or "
            "set oven.light=true or give oven.colour",
        ),
        (
            {"heat": {"epochs": 0}, "rest": 2},
            "oven.rest=2 does nothing with oven.heat={epochs: 0}; drop it, or change oven.heat",
        ),
        (
            {"recipe": "cake", "minutes": 7},
            "oven.minutes=7 does nothing with oven.recipe=cake; drop it, or change oven.recipe",
        ),
    ],
)
def test_is_said_with_what_puts_it_out_of_use_and_two_cures(oven: Any, text: str) -> None:
    assert _found({"oven": oven}) == [text]


@pytest.mark.parametrize(
    "oven",
    [
        {"kind": "microwave", "degrees": [180, 200], "fan": False},  # as a dump has defaults
        {"kind": "microwave", "watts": 700},
        {"light": True, "glow": 0.1},
        {"colour": "red", "glow": 0.1},
        {"heat": {"epochs": 0.5}, "rest": 2},
        {"recipe": None, "minutes": 7},
        {"degrees": None, "kind": "microwave"},
        {"no such key": 1},
    ],
)
def test_a_default_and_what_is_of_use_are_fine(oven: Any) -> None:
    assert _found({"oven": oven}) == []


def test_what_a_whole_section_dumps_is_fine_whatever_is_chosen() -> None:
    for kind in ("gas", "electric", "microwave"):
        assert _found({"oven": Oven(kind=kind).model_dump(mode="json")}) == []


def test_is_found_in_lists_and_across_sections() -> None:
    values = {"power": False, "oven": {"fan": True}, "ovens": [{}, {"watts": 1}]}
    assert [problem.place for problem in idle_settings(Kitchen, values)] == [
        ("oven", "fan"),
        ("ovens", "1", "watts"),
    ]


def test_all_of_it_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"^x: 2 bad keys\n  watts=1 does .*\n  glow=0.1 does"):
        refuse_idle(Oven, {"watts": 1, "glow": 0.1}, where="x")


class TestLayers:
    def test_what_a_layer_makes_idle_of_a_lower_one_leaves_with_it(self) -> None:
        before = {"oven": {"kind": "microwave", "watts": 700, "rest": 1}}
        after = {"oven": {"kind": "gas", "watts": 700, "rest": 1}}
        found = without_idle(Kitchen, before, after, ["oven.kind"])
        assert found == {"oven": {"kind": "gas", "rest": 1}}
        assert after["oven"]["watts"] == 700

    @pytest.mark.parametrize("given", [["oven.kind", "oven.watts"], ["oven"], ["oven.watts.x"]])
    def test_what_it_gives_itself_stays_and_is_a_problem(self, given: list[str]) -> None:
        after = {"oven": {"kind": "gas", "watts": 700}}
        assert without_idle(Kitchen, {"oven": {"kind": "microwave"}}, after, given) == after

    def test_what_was_idle_before_stays_and_is_a_problem(self) -> None:
        before = {"oven": {"watts": 700}}
        after = {"oven": {"watts": 700, "fan": True}}
        assert without_idle(Kitchen, before, after, ["oven.fan"]) == after

    def test_the_keys_of_a_file_are_those_of_its_values(self) -> None:
        assert list(dotted_keys({"a": {"b": 1, "c": {"d": [1]}}, "e": None})) == [
            "a.b",
            "a.c.d",
            "e",
        ]

import pytest
from pydantic import ValidationError

from raysl.config.base import Config, Duration


class _Section(Config):
    size_px: int = 4
    share: float = 0.5


class TestConfig:
    def test_cannot_be_written_to(self) -> None:
        section = _Section()
        with pytest.raises(ValidationError, match="frozen"):
            section.size_px = 5

    def test_refuses_a_key_that_it_does_not_have(self) -> None:
        with pytest.raises(ValidationError, match="size_pz"):
            _Section(size_pz=5)  # type: ignore[call-arg]

    def test_does_not_turn_a_string_into_a_number(self) -> None:
        with pytest.raises(ValidationError, match="valid integer"):
            _Section(size_px="5")  # type: ignore[arg-type]

    def test_checks_its_defaults_too(self) -> None:
        class Wrong(Config):
            size_px: int = "4"  # type: ignore[assignment]

        with pytest.raises(ValidationError, match="valid integer"):
            Wrong()

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_refuses_numbers_that_are_not_finite(self, number: float) -> None:
        with pytest.raises(ValidationError, match="finite"):
            _Section(share=number)


class TestDuration:
    def test_no_unit_is_an_error(self) -> None:
        with pytest.raises(
            ValidationError, match="exactly one of steps, epochs, fraction; got none"
        ):
            Duration()

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"steps": 1, "epochs": 1.0}, r"\['steps', 'epochs'\]"),
            ({"steps": 0, "fraction": 0.0}, r"\['steps', 'fraction'\]"),
            ({"steps": 1, "epochs": 1.0, "fraction": 1.0}, r"\['steps', 'epochs', 'fraction'\]"),
        ],
    )
    def test_two_units_are_an_error_that_names_them(
        self, given: dict[str, float], named: str
    ) -> None:
        with pytest.raises(ValidationError, match=f"exactly one of .*got {named}"):
            Duration(**given)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("duration", "steps"),
        [
            (Duration(steps=7), 7),
            (Duration(steps=0), 0),
            (Duration(epochs=2.0), 20),
            (Duration(epochs=0.25), 2),  # 2.5: half goes to the even neighbour
            (Duration(epochs=0.26), 3),
            (Duration(epochs=0.0), 0),
            (Duration(fraction=0.1), 40),
            (Duration(fraction=1.0), 400),
            (Duration(fraction=0.0), 0),
        ],
    )
    def test_in_steps_by_hand(self, duration: Duration, steps: int) -> None:
        assert duration.in_steps(steps_per_epoch=10, total_steps=400) == steps

    @pytest.mark.parametrize("given", [{"steps": -1}, {"epochs": -0.1}, {"fraction": 1.1}])
    def test_out_of_range_is_an_error(self, given: dict[str, float]) -> None:
        with pytest.raises(ValidationError, match=r"should be (greater|less) than or equal"):
            Duration(**given)  # type: ignore[arg-type]

    def test_a_dump_loads_again_although_it_sets_every_unit(self) -> None:
        duration = Duration(epochs=3.0)
        assert duration.model_dump() == {"steps": None, "epochs": 3.0, "fraction": None}
        assert Duration.model_validate_json(duration.model_dump_json()) == duration

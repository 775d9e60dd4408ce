from typing import Any

import pytest

from raysl.config.load import apply_overrides, validate
from raysl.errors import ConfigError, DataError
from raysl.sources.open import open_source
from raysl.sources.pixels import PLAIN, Bits, Decoding, Percentiles
from raysl.sources.source import DataConfig, SourceConfig


def _read(*overrides: str) -> SourceConfig:
    return validate(SourceConfig, apply_overrides({"source": "x"}, overrides), where="x")


class TestIntensity:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("[0, 4095]", (0.0, 4095.0)),
            ("[-1.5, 2]", (-1.5, 2.0)),
            ("{bits: 12}", Bits(bits=12)),
            ("{percentile: [0.5, 99.5]}", Percentiles(percentile=(0.5, 99.5))),
            ("null", None),
        ],
    )
    def test_is_two_values_bits_or_percentiles(self, text: str, value: Any) -> None:
        config = _read(f"intensity={text}")
        assert config.intensity == value
        assert config.decoding().intensity == value
        dumped = config.model_dump(mode="json")
        assert validate(SourceConfig, dumped, where="x") == config

    @pytest.mark.parametrize(
        "text",
        ["[9, 1]", "[1, 1]", "[1]", "12", "{bits: 0}", "{bit: 2}", "{percentile: [60, 40]}"],
    )
    def test_of_another_kind_is_one_clear_error(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"1 bad key\n  intensity: give \[low, high\] with"):
            _read(f"intensity={text}")


def test_settings_that_nobody_gives_are_the_plain_ones() -> None:
    assert _read().decoding() == PLAIN == Decoding(None, "convert", "refuse")


def test_a_setting_of_columns_is_refused_for_a_built_in_set() -> None:
    config = DataConfig(source="digits", label_column="age")
    with pytest.raises(DataError, match=r"data.label_column=age does nothing, as a built-in set"):
        open_source(config, data=config)


def test_sources_are_mixed_into_whichever_split_is_trained_on() -> None:
    config = DataConfig(source="digits", split="test", mix=({"source": "digits"},))  # type: ignore[arg-type]
    assert open_source(config, data=config).group_sizes.tolist() == [450, 1347]
    assert open_source(config, held_out=True, data=config).group_sizes.tolist() == [450]

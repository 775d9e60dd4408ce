"""Text that YAML takes for something else, and files that extend what is no file."""

from pathlib import Path

import pytest

from raysl.config.base import Config
from raysl.config.load import apply_overrides, read_layers, read_mapping, validate
from raysl.errors import ConfigError


class _Named(Config):
    name: str
    source: str | None = None


@pytest.mark.parametrize(
    ("override", "kind", "cure"),
    [
        ("name=2024", "2024 without quotes is a number", "name='\"2024\"'"),
        ("name=1e3", "1000.0 without quotes is a number", "name='\"1000.0\"'"),
        ("name=true", "true without quotes is a Boolean", "name='\"true\"'"),
        ("source=7", "7 without quotes is a number", "source='\"7\"'"),
    ],
)
def test_a_number_for_a_text_is_answered_with_its_cure(override: str, kind: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(_Named, apply_overrides({"name": "a"}, [override]), where="x")
    text = str(caught.value)
    assert f"takes text, but {kind}" in text
    assert text.endswith(f"on the command line {cure}")
    cured = validate(_Named, apply_overrides({"name": "a"}, [cure.replace("'", "")]), where="x")
    assert getattr(cured, override.partition("=")[0]) == cure.split('"')[1]


@pytest.mark.parametrize("given", ["[a.yaml, b.yaml]", "{a: b}", "3", "true"])
def test_extending_what_is_no_file_is_refused(given: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: {given}\n")
    with pytest.raises(ConfigError, match=r"x.yaml: 'extends' names one file, as text; got"):
        read_mapping(path)


def test_layers_come_from_the_bottom_up(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text("extends: c.yaml\n")
    (tmp_path / "c.yaml").write_text("name: c\n")
    assert read_layers(tmp_path / "a.yaml") == [{"name": "c"}, {}, {"name": "a"}]

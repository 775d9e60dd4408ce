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


class TestTooLarge:
    def test_a_section_that_contains_itself_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("name: r\ndata: &data\n  views: [*data]\n")
        with pytest.raises(ConfigError, match=r"run\.yaml, line 2: .* contains itself through an"):
            read_mapping(path)

    def test_aliases_count_as_what_they_stand_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("a: &a [1, 2, 3]\nb: &b [*a, *a, *a]\nc: [*b, *b]\n")
        # 1 mapping, 3 keys, 4 values in a, 1 + 3 * 4 in b, 1 + 2 * 13 in c
        monkeypatch.setattr("raysl.config.yaml_text._MAX_VALUES", 48)
        assert len(read_mapping(path)["c"]) == 2
        monkeypatch.setattr("raysl.config.yaml_text._MAX_VALUES", 47)
        with pytest.raises(ConfigError, match=r"run\.yaml: more than 47 values, with aliases"):
            read_mapping(path)

    def test_deep_sections_and_large_files_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("a: " + "[" * 3000 + "]" * 3000)
        with pytest.raises(ConfigError, match=r"run\.yaml: sections are nested too deeply"):
            read_mapping(path)
        monkeypatch.setattr("raysl.config.load._MAX_BYTES", 5999)
        with pytest.raises(ConfigError, match=r"run\.yaml: 6,003 bytes are too many"):
            read_mapping(path)

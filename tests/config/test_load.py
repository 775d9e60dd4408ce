from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from raysl.config.base import Config, Duration, PositiveFloat, PositiveInt, Probability
from raysl.config.load import (
    MISSING,
    apply_overrides,
    drop_key,
    get_key,
    read_mapping,
    validate,
    validated,
)
from raysl.config.yaml_text import parse_yaml, to_yaml
from raysl.errors import ConfigError


class _Optim(Config):
    name: Literal["sgd", "lars", "adamw"] = "sgd"
    base_lr: PositiveFloat = 0.3
    warmup: Duration = Duration(epochs=10.0)


class _Flip(Config):
    op: Literal["flip"] = "flip"
    prob: Probability = 0.5


class _Blur(Config):
    op: Literal["blur"] = "blur"
    sigma_px: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)


class _Fixed(Config):
    recipe: Literal["fixed"] = "fixed"
    size_px: PositiveInt = 224


class _Composed(Config):
    recipe: Literal["composed"] = "composed"
    ops: tuple[Annotated[_Flip | _Blur, Field(discriminator="op")], ...] = ()

    @model_validator(mode="after")
    def _short(self) -> "_Composed":
        if len(self.ops) > 2:
            raise ValueError(f"at most 2 operations; got {len(self.ops)}")
        return self


class _Run(Config):
    title: str
    seed: int = 0
    optim: _Optim = _Optim()
    views: Annotated[_Fixed | _Composed, Field(discriminator="recipe")] = _Fixed()
    every: Duration | None = None


def _problems(values: dict[str, Any]) -> list[str]:
    """Return the lines of the error, one a bad key, without the heading."""
    with pytest.raises(ConfigError) as caught:
        validate(_Run, {"title": "a", **values}, where="run.yaml")
    heading, *lines = str(caught.value).split("\n")
    number = f"{len(lines)} bad key{'s' if len(lines) > 1 else ''}"
    assert heading == f"run.yaml: {number}"
    return [line.removeprefix("  ") for line in lines]


class TestParseYaml:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1e-3", 0.001),
            ("1E3", 1000.0),
            ("-2.5e+2", -250.0),
            (".5e1", 5.0),
            ("1.e2", 100.0),
            ("0.1", 0.1),
        ],
    )
    def test_a_number_with_an_exponent_is_a_float(self, text: str, number: float) -> None:
        value = parse_yaml(text, where="x")
        assert type(value) is float
        assert value == number

    @pytest.mark.parametrize("text", ["e3", "1e", "resnet1e3", "1e-3x"])
    def test_what_only_looks_like_a_number_stays_a_string(self, text: str) -> None:
        assert parse_yaml(text, where="x") == text

    def test_an_int_stays_an_int(self) -> None:
        assert type(parse_yaml("10", where="x")) is int

    def test_a_key_that_stands_twice_is_an_error_with_file_and_line(self) -> None:
        text = "title: a\noptim:\n  base_lr: 1\n  name: sgd\n  base_lr: 2\n"
        with pytest.raises(
            ConfigError,
            match=r"^run\.yaml: key 'base_lr' occurs twice .* begins at line 3; keep one",
        ):
            parse_yaml(text, where="run.yaml")

    def test_the_same_key_in_two_sections_is_fine(self) -> None:
        assert parse_yaml("{a: {x: 1}, b: {x: 2}}", where="x") == {"a": {"x": 1}, "b": {"x": 2}}

    def test_broken_yaml_names_the_file_and_the_line(self) -> None:
        with pytest.raises(ConfigError, match=r"^run\.yaml: not valid YAML:(.|\n)*line 2"):
            parse_yaml("a: 1\nb: [1, 2", where="run.yaml")

    def test_makes_plain_values_only(self) -> None:
        with pytest.raises(ConfigError, match="not valid YAML"):
            parse_yaml("!!python/object/apply:os.getcwd []", where="x")


class TestReadMapping:
    def test_an_empty_file_is_an_empty_mapping(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("# nothing yet\n")
        assert read_mapping(path) == {}

    def test_a_list_is_no_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("- 1\n- 2\n")
        with pytest.raises(ConfigError, match=r"a\.yaml: expected 'key: value' lines, got list"):
            read_mapping(path)

    def test_a_missing_file_names_the_nearest_one(self, tmp_path: Path) -> None:
        (tmp_path / "simclr_cifar10.yaml").write_text("a: 1\n")
        (tmp_path / "other.yaml").write_text("a: 1\n")
        with pytest.raises(
            ConfigError,
            match=r"simclr_cifar1\.yaml: no such file; did you mean .*simclr_cifar10\.yaml",
        ):
            read_mapping(tmp_path / "simclr_cifar1.yaml")

    def test_a_missing_file_with_no_near_name_suggests_none(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"simclr\.yaml: no such file$"):
            read_mapping(tmp_path / "simclr.yaml")

    def test_a_folder_or_binary_file_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_mapping(tmp_path)
        (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read"):
            read_mapping(tmp_path / "a.yaml")


class TestExtends:
    @pytest.fixture
    def child_of(self, tmp_path: Path) -> Any:
        def write(parent: str, child: str) -> dict[str, Any]:
            (tmp_path / "base").mkdir()
            (tmp_path / "base" / "parent.yaml").write_text(parent)
            (tmp_path / "child.yaml").write_text(f"extends: base/parent.yaml\n{child}")
            return read_mapping(tmp_path / "child.yaml")

        return write

    def test_sections_merge_key_by_key(self, child_of: Any) -> None:
        merged = child_of(
            "seed: 1\noptim: {base_lr: 1.0, name: lars}\ndata: {source: digits}",
            "optim: {base_lr: 2.0, decay: 3.0}\ntitle: x",
        )
        assert merged == {
            "seed": 1,
            "title": "x",
            "optim": {"base_lr": 2.0, "name": "lars", "decay": 3.0},
            "data": {"source": "digits"},
        }

    def test_a_value_inside_a_section_is_replaced_whole(self, child_of: Any) -> None:
        merged = child_of(
            "optim: {warmup: {epochs: 10}, betas: [1, 2, 3]}",
            "optim: {warmup: {steps: 5}, betas: [4]}",
        )
        assert merged == {"optim": {"warmup": {"steps": 5}, "betas": [4]}}

    @pytest.mark.parametrize("tag", ["name", "recipe"])
    def test_another_name_or_recipe_replaces_the_section(self, tag: str, child_of: Any) -> None:
        merged = child_of(f"part: {{{tag}: a, only_of_a: 1}}", f"part: {{{tag}: b, other: 2}}")
        assert merged == {"part": {tag: "b", "other": 2}}

    def test_the_same_name_merges(self, child_of: Any) -> None:
        merged = child_of("part: {name: a, x: 1, y: 1}", "part: {name: a, x: 2}")
        assert merged == {"part": {"name": "a", "x": 2, "y": 1}}

    @pytest.mark.parametrize("new", ["null", "3", "[1]"])
    def test_a_section_can_be_replaced_by_a_value(self, new: str, child_of: Any) -> None:
        merged = child_of("part: {x: 1}", f"part: {new}")
        assert merged == {"part": parse_yaml(new, where="x")}

    def test_a_grandparent_counts_and_paths_are_relative_to_their_file(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "top.yaml").write_text("x: 1\ny: 1\nz: 1")
        (tmp_path / "a" / "mid.yaml").write_text("extends: ../top.yaml\ny: 2\nz: 2")
        (tmp_path / "a" / "b" / "low.yaml").write_text("extends: ../mid.yaml\nz: 3")
        assert read_mapping(tmp_path / "a" / "b" / "low.yaml") == {"x": 1, "y": 2, "z": 3}

    def test_a_circle_is_an_error_that_names_where_it_closes(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("extends: b.yaml")
        (tmp_path / "b.yaml").write_text("extends: a.yaml")
        with pytest.raises(ConfigError, match=r"a\.yaml: 'extends' forms a cycle at .*a\.yaml$"):
            read_mapping(tmp_path / "a.yaml")

    def test_a_file_that_extends_itself_is_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("extends: ./a.yaml")
        with pytest.raises(ConfigError, match="forms a cycle"):
            read_mapping(tmp_path / "a.yaml")

    def test_a_missing_parent_names_the_nearest_file(self, tmp_path: Path) -> None:
        (tmp_path / "parent.yaml").write_text("x: 1")
        (tmp_path / "a.yaml").write_text("extends: parnet.yaml")
        with pytest.raises(
            ConfigError, match=r"parnet\.yaml: no such file; did you mean .*parent\.yaml"
        ):
            read_mapping(tmp_path / "a.yaml")


class TestApplyOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("0.1", 0.1),
            ("3e-1", 0.3),
            ("5", 5),
            ("true", True),
            ("null", None),
            ("", None),
            ("lars", "lars"),
            ("'5'", "5"),
            ("[1, 2]", [1, 2]),
            ("{epochs: 5}", {"epochs": 5}),
            ("a=b", "a=b"),
        ],
    )
    def test_values_are_typed_as_yaml(self, text: str, value: object) -> None:
        result = apply_overrides({"optim": {"x": 9, "y": 1}}, [f"optim.x={text}"])
        assert result == {"optim": {"x": value, "y": 1}}
        assert type(result["optim"]["x"]) is type(value)

    def test_later_ones_win_and_missing_sections_are_made(self) -> None:
        result = apply_overrides({}, ["a.b.c=1", "a.b.d=2", "a.b.c=3", "e=4"])
        assert result == {"a": {"b": {"c": 3, "d": 2}}, "e": 4}

    def test_a_null_section_becomes_one(self) -> None:
        assert apply_overrides({"every": None}, ["every.steps=3"]) == {"every": {"steps": 3}}

    def test_what_was_given_is_left_alone(self) -> None:
        values = {"a": {"b": 1}}
        apply_overrides(values, ["a.b=2", "a.c=3"])
        assert values == {"a": {"b": 1}}

    @pytest.mark.parametrize("override", ["seed", "=3", "optim.=3", ".seed=3", "optim..x=3", ""])
    def test_one_that_is_not_key_and_value_is_an_error(self, override: str) -> None:
        with pytest.raises(ConfigError, match=r"is not of the form section\.key=value") as caught:
            apply_overrides({}, [override])
        assert repr(override) in str(caught.value)

    def test_a_path_through_a_value_is_an_error_that_names_it(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"'optim\.base_lr\.x=1': optim\.base_lr is the value 0\.3, not a section",
        ):
            apply_overrides({"optim": {"base_lr": 0.3}}, ["optim.base_lr.x=1"])

    def test_a_section_is_not_replaced_by_a_word(self) -> None:
        with pytest.raises(ConfigError, match=r"'optim=lars': optim is a section; set optim\.KEY="):
            apply_overrides({"optim": {"base_lr": 0.3}}, ["optim=lars"])

    def test_broken_yaml_names_the_override(self) -> None:
        with pytest.raises(ConfigError, match=r"^override 'a\.b=\[1': not valid YAML"):
            apply_overrides({}, ["a.b=[1"])

    def test_a_key_twice_in_a_value_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="key 'x' occurs twice"):
            apply_overrides({}, ["a={x: 1, x: 2}"])


class TestDottedKeys:
    @pytest.fixture
    def values(self) -> dict[str, Any]:
        return {"views": {"kinds": [{"size_px": 8, "ops": ["flip", "blur"]}, {"size_px": 4}]}}

    def test_an_override_reaches_into_a_list(self, values: dict[str, Any]) -> None:
        result = apply_overrides(values, ["views.kinds.1.size_px=2", "views.kinds.0.ops.1=grey"])
        assert result["views"]["kinds"] == [{"size_px": 8, "ops": ["flip", "grey"]}, {"size_px": 2}]

    def test_one_beyond_the_end_of_a_list_adds_to_it(self, values: dict[str, Any]) -> None:
        result = apply_overrides(values, ["views.kinds.0.ops.2=sobel"])
        assert result["views"]["kinds"][0]["ops"] == ["flip", "blur", "sobel"]

    @pytest.mark.parametrize(
        ("key", "given"),
        [
            ("views.kinds.0.ops.3", "'3'"),
            ("views.kinds.2.size_px", "'2'"),
            ("views.kinds.x", "'x'"),
        ],
    )
    def test_a_place_that_a_list_does_not_have_is_an_error(
        self, key: str, given: str, values: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError, match=f"is a list of 2 entries; got the index {given}"):
            apply_overrides(values, [f"{key}=1"])

    def test_what_a_key_names_can_be_read_and_dropped(self, values: dict[str, Any]) -> None:
        assert get_key(values, "views.kinds.0.ops.1") == "blur"
        assert get_key({"a": None}, "a") is None
        for nothing in ("views.x", "views.kinds.2", "views.kinds.0.size_px.x"):
            assert get_key(values, nothing) is MISSING
            drop_key(values, nothing)
        drop_key(values, "views.kinds.0.ops.0")
        drop_key(values, "views.kinds.1")
        assert values == {"views": {"kinds": [{"size_px": 8, "ops": ["blur"]}]}}


class _Several(Config):
    named: dict[str, _Flip] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _two_rules(self) -> "_Several":
        if "bad" in self.named:
            raise ValueError("one rule\nanother rule")
        return self


class TestProblems:
    def test_have_the_keys_that_a_person_typed(self) -> None:
        ops = [{"op": "flip", "prob": 2}]
        values = {"title": "a", "sed": 1, "views": {"recipe": "composed", "ops": ops}}
        found = validated(_Run, values)
        assert isinstance(found, list)
        assert {problem.place for problem in found} == {("views", "ops", "0", "prob"), ("sed",)}

    def test_in_a_mapping_name_its_key_though_it_has_dots(self) -> None:
        found = validated(_Several, {"named": {"a.b": {"op": "flip", "pro": 1}}})
        assert isinstance(found, list)
        assert [(each.place, each.text) for each in found] == [
            (("named", "a.b", "pro"), "named.a.b: unknown key 'pro'; did you mean 'prob'?")
        ]

    def test_several_of_one_rule_are_a_line_each(self) -> None:
        found = validated(_Several, {"named": {"bad": {}}})
        assert isinstance(found, list)
        assert [each.text for each in found] == ["top level: one rule", "top level: another rule"]


class TestValidate:
    def test_an_unknown_key_at_top_level_names_the_nearest(self) -> None:
        assert _problems({"sed": 1}) == ["top level: unknown key 'sed'; did you mean 'seed'?"]

    def test_an_unknown_key_like_no_other_lists_the_known_ones(self) -> None:
        assert _problems({"optim": {"zzz": 1}}) == [
            "optim: unknown key 'zzz'; known keys: base_lr, name, warmup"
        ]

    def test_an_unknown_key_in_a_section_names_the_section_and_the_nearest(self) -> None:
        assert _problems({"optim": {"base_rl": 1.0}}) == [
            "optim: unknown key 'base_rl'; did you mean 'base_lr'?"
        ]

    def test_an_unknown_key_two_sections_deep(self) -> None:
        assert _problems({"optim": {"warmup": {"epoch": 1}}})[0] == (
            "optim.warmup: unknown key 'epoch'; did you mean 'epochs'?"
        )

    def test_an_unknown_key_behind_a_section_that_may_be_null(self) -> None:
        assert _problems({"every": {"epochs": 1, "setps": 1}})[0] == (
            "every: unknown key 'setps'; did you mean 'steps'?"
        )

    def test_an_unknown_key_of_a_union_is_looked_up_in_the_chosen_member(self) -> None:
        assert _problems({"views": {"recipe": "fixed", "sice_px": 3}}) == [
            "views: unknown key 'sice_px'; did you mean 'size_px'?"
        ]

    def test_an_unknown_key_in_a_list_of_operations_names_its_place(self) -> None:
        ops = [{"op": "flip"}, {"op": "blur", "sigma": [1, 2]}]
        assert _problems({"views": {"recipe": "composed", "ops": ops}}) == [
            "views.ops.1: unknown key 'sigma'; did you mean 'sigma_px'?"
        ]

    def test_an_unknown_operation_names_its_place_the_known_ones_and_the_nearest(self) -> None:
        ops = [{"op": "flip"}, {"op": "flop", "prob": 0.5}]
        assert _problems({"views": {"recipe": "composed", "ops": ops}}) == [
            "views.ops.1: got 'flop', allowed: flip, blur; did you mean 'flip'?"
        ]

    def test_an_unknown_recipe_names_the_known_ones(self) -> None:
        assert _problems({"views": {"recipe": "simclr"}}) == [
            "views: got 'simclr', allowed: fixed, composed"
        ]

    def test_a_bad_word_names_the_allowed_ones_and_the_nearest(self) -> None:
        assert _problems({"optim": {"name": "adam"}}) == [
            "optim.name: got 'adam', allowed: sgd, lars, adamw; did you mean 'adamw'?"
        ]

    def test_a_wrong_type_names_the_key_and_what_was_given(self) -> None:
        assert _problems({"optim": {"base_lr": "fast"}}) == [
            'optim.base_lr: Input should be a valid number, got "fast"'
        ]
        assert _problems({"seed": 1.5})[0].startswith("seed: Input should be a valid integer")
        assert _problems({"seed": 1.5})[0].endswith(", got 1.5")
        assert _problems({"seed": "1"}) == ['seed: Input should be a valid integer, got "1"']

    def test_a_value_in_place_of_a_section_names_the_key(self) -> None:
        assert _problems({"optim": 3})[0].startswith("optim: ")
        assert _problems({"optim": 3})[0].endswith("got 3")

    def test_out_of_range_names_the_key_the_limit_and_what_was_given(self) -> None:
        assert _problems({"optim": {"base_lr": -0.1}}) == [
            "optim.base_lr: Input should be greater than 0, got -0.1"
        ]
        ops = [{"op": "blur", "sigma_px": [1, -2]}]
        assert _problems({"views": {"recipe": "composed", "ops": ops}}) == [
            "views.ops.0.sigma_px.1: Input should be greater than 0, got -2"
        ]

    def test_not_a_number_is_out_of_range(self) -> None:
        assert _problems({"optim": {"base_lr": float("nan")}}) == [
            "optim.base_lr: Input should be a finite number, got NaN"
        ]

    def test_a_rule_between_keys_names_the_section(self) -> None:
        assert _problems({"optim": {"warmup": {"epochs": 1, "steps": 2}}}) == [
            "optim.warmup: give exactly one of steps, epochs, fraction; got ['steps', 'epochs']"
        ]

    def test_a_rule_of_a_union_member_names_the_section_without_the_tag(self) -> None:
        views = {"recipe": "composed", "ops": [{"op": "flip"}] * 3}
        assert _problems({"views": views}) == ["views: at most 2 operations; got 3"]

    def test_a_missing_key_is_named(self) -> None:
        with pytest.raises(ConfigError) as caught:
            validate(_Run, {"seed": 1}, where="run.yaml")
        assert str(caught.value) == "run.yaml: 1 bad key\n  title: missing; it has no default"

    def test_several_bad_keys_are_listed_at_once(self) -> None:
        values = {
            "sed": 1,
            "optim": {"base_lr": -1, "name": "lasr"},
            "views": {"recipe": "composed", "ops": [{"op": "flip", "prob": 2}]},
        }
        assert sorted(_problems(values)) == [
            "optim.base_lr: Input should be greater than 0, got -1",
            "optim.name: got 'lasr', allowed: sgd, lars, adamw; did you mean 'lars'?",
            "top level: unknown key 'sed'; did you mean 'seed'?",
            "views.ops.0.prob: Input should be less than or equal to 1, got 2",
        ]

    def test_an_int_is_read_as_a_float_and_a_list_as_a_tuple(self) -> None:
        ops = [{"op": "blur", "sigma_px": [1, 2]}]
        run = validate(
            _Run,
            {"title": "a", "optim": {"base_lr": 1}, "views": {"recipe": "composed", "ops": ops}},
            where="x",
        )
        assert type(run.optim.base_lr) is float
        assert run.views == _Composed(ops=(_Blur(sigma_px=(1.0, 2.0)),))


class TestToYaml:
    @pytest.mark.parametrize(
        "run",
        [
            _Run(title="plain"),
            _Run(
                title="all: of # it, gr\u00fcn",
                seed=2**62,
                optim=_Optim(name="lars", base_lr=1e-7, warmup=Duration(fraction=0.05)),
                views=_Composed(ops=(_Flip(prob=0.1), _Blur(sigma_px=(1e-5, 3.0)))),
                every=Duration(steps=3),
            ),
        ],
        ids=["defaults", "everything set"],
    )
    def test_a_dump_loads_again_as_the_same_run(self, run: _Run) -> None:
        values = parse_yaml(to_yaml(run.model_dump(mode="json")), where="dump")
        assert validate(_Run, values, where="dump") == run

    @pytest.mark.parametrize("word", ["1e3", "1e-3", "12e45", "0.5", "10", "null", "true", "a: b"])
    def test_a_string_that_looks_like_something_else_stays_a_string(self, word: str) -> None:
        assert parse_yaml(to_yaml({"title": word}), where="dump") == {"title": word}

    def test_keeps_the_order_of_the_keys(self) -> None:
        assert to_yaml({"b": 1, "a": 2}) == "b: 1\na: 2\n"

"""The tables of docs/recipes say what the YAML sets, and why where the authors do otherwise."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from raysl.augment.pipeline import View
from raysl.config.base import Config
from raysl.config.yaml_text import parse_yaml
from raysl.methods import load_method
from raysl.methods.base import Method, TrainingSet
from raysl.nn.backbones import build_backbone
from raysl.optim.build import peak_lr
from raysl.run.recipe import RunConfig, load_run

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
INDEX = ROOT / "docs" / "recipes.md"
NUM_IMAGES = {"cifar10": 50_000, "imagenet": 1_281_167}

# What decides a run's result in every method: each table has these.
ALWAYS = (
    "backbone.name",
    "data.mean",
    "data.std",
    "num_views",
    "views[0].crop",
    "views[0].ops.flip.prob",
    "views[0].size_px",
    "optim.name",
    "optim.schedule",
    "optim.warmup",
    "optim.weight_decay",
    "optim.decay_bias_and_norm",
    "train.epochs",
    "train.global_batch_size",
)


class Row(NamedTuple):
    """One setting: what the authors have and where, what we have and why."""

    recipe: str
    setting: str
    theirs: str
    where: str
    ours: str
    why: str


def rows_of(page: Path) -> Iterator[Row]:
    """Yield the rows of all tables of a page; a section's heading is the recipe's name."""
    recipe = ""
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            recipe = line.removeprefix("## ").strip()
        elif line.startswith("| `"):
            setting, theirs, where, ours, why = (
                cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]
            )
            yield Row(recipe, setting.strip("`"), theirs, where, ours, why)


ROWS = [row for page in TABLES for row in rows_of(page)]
RECIPES = sorted({row.recipe for row in ROWS})


def value_of(cell: str) -> Any:
    """Return a cell's value: YAML between backticks, or plain words, which equal nothing."""
    if cell.startswith("`") and cell.endswith("`"):
        return parse_yaml(cell.strip("`"), where="a table")
    return f"in words: {cell}"


@cache
def run_of(recipe: str) -> RunConfig[Any]:
    return load_run(ROOT / "configs" / f"{recipe}.yaml")


@cache
def method_of(recipe: str) -> Method:
    """Return the method as it is built for the data set in the recipe's name, without memory."""
    config = run_of(recipe)
    images = next(count for name, count in NUM_IMAGES.items() if name in recipe)
    data = TrainingSet(
        images,
        config.train.global_batch_size,
        config.view_sizes_px,
        mean=config.data.mean,
        std=config.data.std,
    )
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, image_size_px=config.image_size_px)
        return load_method(config.method.name)(config.method, backbone, data)


def layers_of(head: nn.Sequential) -> str:
    """Return a head as ``512-512 bn relu, 512-128 bn plain``; plain: without scale and shift."""
    layers: list[str] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            layers.append(f"{layer.in_features}-{layer.out_features}")
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layers[-1] += " bn" if layer.affine else " bn plain"
        else:
            layers[-1] += f" {type(layer).__name__.lower()}"
    return ", ".join(layers)


def setting_of(recipe: str, key: str) -> Any:
    """Return what a recipe sets.

    Beside the keys of the YAML: ``peak_lr``; ``num_views`` of an image; ``views[I].KEY`` of the
    I-th kind of view, whatever recipe made it, with ``ops.NAME.KEY`` for an operation in it;
    ``head`` and ``predictor`` as they are built.
    """
    config = run_of(recipe)
    kinds = config.data.views.views()
    if key == "peak_lr":
        return peak_lr(config.optim, global_batch_size=config.train.global_batch_size)
    if key == "num_views":
        return sum(kind.count for kind in kinds)
    if key == "head":
        head = method_of(recipe).projection_head
        return None if head is None else layers_of(head)
    if key == "predictor":
        predictor = method_of(recipe).predictor
        assert isinstance(predictor, nn.Sequential)
        return layers_of(predictor)
    if match := re.fullmatch(r"views\[(\d)\]\.(.+)", key):
        return _of_view(kinds[int(match[1])], match[2])
    return _plain(_follow(config, key))


def _of_view(view: View, key: str) -> Any:
    if not (match := re.fullmatch(r"ops\.(\w+)\.(\w+)", key)):
        return _plain(_follow(view, key))
    name, part = match.groups()
    found = [op for op in view.ops if op.op == name]
    assert len(found) < 2, f"{name} stands twice"
    if not found:  # what is not there never happens
        return 0.0 if part == "prob" else None
    if part == "strengths":
        return [getattr(found[0], kind) for kind in ("brightness", "contrast", "saturation", "hue")]
    return _plain(getattr(found[0], part))


def _follow(value: Any, key: str) -> Any:
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _plain(value: Any) -> Any:
    """Return a value as YAML has it; of a section what is set."""
    if isinstance(value, Config):
        return value.model_dump(mode="json", exclude_defaults=True)
    return list(value) if isinstance(value, tuple) else value


def same(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == pytest.approx(right, rel=1e-4)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ours_is_what_the_recipe_sets(recipe: str) -> None:
    wrong = [
        f"{row.setting}: the table has {row.ours}, the recipe {setting_of(recipe, row.setting)!r}"
        for row in ROWS
        if row.recipe == recipe and not same(value_of(row.ours), setting_of(recipe, row.setting))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_differs_has_a_reason(recipe: str) -> None:
    silent = [
        f"{row.setting}: {row.theirs} and {row.ours}"
        for row in ROWS
        if row.recipe == recipe and not same(value_of(row.theirs), value_of(row.ours))
        if len(row.why) < 8
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("recipe", RECIPES)
def test_has_what_decides_the_result_and_nothing_twice(recipe: str) -> None:
    settings = [row.setting for row in ROWS if row.recipe == recipe]
    assert len(settings) == len(set(settings))
    missing = [key for key in ALWAYS if not any(name.startswith(key) for name in settings)]
    assert not missing
    assert {"peak_lr", "optim.base_lr"} & set(settings)


def test_keys_that_are_made_of_the_yaml() -> None:
    recipe = "moco_v2_resnet50_imagenet"
    assert setting_of(recipe, "peak_lr") == 0.03
    assert setting_of(recipe, "num_views") == 2
    assert setting_of(recipe, "views[0].ops.color_jitter.strengths") == [0.4, 0.4, 0.4, 0.1]
    assert setting_of(recipe, "views[0].ops.solarise.prob") == 0.0
    assert setting_of(recipe, "head") == "2048-2048 relu, 2048-128"
    with pytest.raises(AttributeError):
        setting_of(recipe, "optim.learning_rate")


def test_values_in_code_are_compared_and_words_equal_nothing() -> None:
    assert same(value_of("`1e-4`"), 0.0001)
    assert same(value_of("`[0.2, 1]`"), [0.2, 1.0])
    assert same(value_of("`null`"), None)
    assert not same(value_of("`true`"), 1)
    assert not same(value_of("`sync`"), "worker")
    assert not same(value_of("cosine"), "cosine")


def test_theirs_has_a_file_and_a_line_or_a_paper() -> None:
    code = re.compile(
        r"\[(?P<file>\S+):(?P<line>\d+)\]"
        r"\(https://github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{10}/(?P=file)#L(?P=line)\)"
    )
    paper = re.compile(r"arXiv:\d{4}\.\d{5}v\d+, .+")
    nowhere = [row for row in ROWS if not (code.fullmatch(row.where) or paper.fullmatch(row.where))]
    assert not nowhere


def test_every_ready_recipe_has_a_table_or_is_said_to_be_our_own() -> None:
    ready = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    own = set(re.findall(r"^- `(\w+)`:", INDEX.read_text(), flags=re.MULTILINE))
    assert own.isdisjoint(RECIPES)
    assert own | set(RECIPES) == ready


def test_the_index_names_every_table() -> None:
    links = re.findall(r"\]\(recipes/(\w+\.md)#(\w+)\)", INDEX.read_text())
    assert {recipe for _, recipe in links} == set(RECIPES)
    for page, recipe in links:
        assert any(row.recipe == recipe for row in rows_of(ROOT / "docs" / "recipes" / page))

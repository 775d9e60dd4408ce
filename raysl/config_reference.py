"""Write the reference of all settings, with type, default and meaning, from their classes."""

import inspect
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raysl.config.help_text import docstring_of
from raysl.config.load import models_in, tags_of
from raysl.downstream.evaluation_config import EvaluationConfig
from raysl.downstream.pipeline import PipelineConfig
from raysl.embed.config import EmbedConfig
from raysl.exchange.export import ExportConfig
from raysl.exchange.import_encoder import ImportConfig
from raysl.methods import load_method, method_names
from raysl.pack.config import PackConfig
from raysl.run.recipe import RunConfig
from raysl.sweep.config import SweepConfig

_HEAD = """\
# Every setting

`raysl config --reference FILE` writes this file from the classes that read the settings; a test
compares. A key is `section.key`, in YAML and as an override (`optim.base_lr=0.1`). `null` means
"not set"; a setting without a default is required. [settings.md](settings.md) says when a setting
has an effect. `raysl config --list` prints the shipped configurations.
"""
_VERBS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("A sweep", "`raysl sweep`", SweepConfig),
    ("A pipeline", "`raysl pipeline`", PipelineConfig),
    ("Evaluation", "`raysl evaluate`", EvaluationConfig),
    ("Packing", "`raysl pack`", PackConfig),
    ("Embedding", "`raysl embed`", EmbedConfig),
    ("Export", "`raysl export`", ExportConfig),
    ("Import", "`raysl import`", ImportConfig),
)
_WORDS = {int: "integer", float: "number", str: "text", bool: "true, false", NoneType: "null"}
_BOUNDS = (("gt", "> {}"), ("ge", ">= {}"), ("lt", "< {}"), ("le", "<= {}"))
_TAGS = ("name", "recipe", "op")
_TAG_MEANING = "Selects this section."


class _Section(NamedTuple):
    key: str
    model: type[BaseModel]
    title: str
    """The key, with the name of the section if several are allowed there."""


def reference() -> str:
    """Return the reference of all settings, in Markdown."""
    seen: set[type[BaseModel]] = set()
    lines = [_HEAD, "## A run\n", "`raysl pretrain`, `finetune` and `distill`.\n"]
    lines += _tables(RunConfig, seen, without=("method",))
    lines.append("## Methods\n")
    for name in method_names():
        lines += _tables(load_method(name).Config, seen, key="method", title=f"method: {name}")
    for title, verb, model in _VERBS:
        lines += [f"## {title}\n", f"{verb}.\n", *_tables(model, seen)]
    return "\n".join(lines).rstrip() + "\n"


def _tables(
    model: type[BaseModel],
    seen: set[type[BaseModel]],
    *,
    key: str = "",
    title: str = "",
    without: tuple[str, ...] = (),
) -> Iterator[str]:
    """Yield the tables of a section and of the sections in it, without those in ``seen``."""
    queue = [_Section(key, model, title)]
    while queue:
        section = queue.pop(0)
        if section.model in seen:
            continue
        seen.add(section.model)
        if section.title:
            yield f"### {section.title}\n"
        yield "| key | type | default | |"
        yield "|---|---|---|---|"
        subsections: list[_Section] = []
        for name, field in section.model.model_fields.items():
            if name in without and section.model is model:
                continue
            dotted = f"{section.key}.{name}".removeprefix(".")
            is_tag = name in _TAGS and get_origin(field.annotation) is Literal
            default = "" if field.is_required() and not is_tag else _code(_default(field))
            cells = (_code(dotted), _type(field.annotation, field.metadata), default)
            meaning = _meaning(section.model, name) or (_TAG_MEANING if is_tag else "")
            yield f"| {' | '.join(cells)} | {meaning} |"
            subsections += _sections(dotted, field)
        yield ""
        queue = subsections + queue


def _sections(dotted: str, field: FieldInfo) -> Iterator[_Section]:
    models = models_in(field.annotation)
    for model in models:
        tag = _tag(model)
        which = f": {tag}" if tag else f" ({', '.join(model.model_fields)})"
        yield _Section(dotted, model, f"{dotted}{which if len(models) > 1 else ''}")


def _meaning(model: type[BaseModel], name: str) -> str:
    """Return the description of a field, inherited if a subclass only changes the default."""
    texts: list[str | None] = [docstring_of(model, name)]
    # A field of one section without a description takes the docstring of the section.
    sections = models_in(model.model_fields[name].annotation)
    texts += [inspect.getdoc(section) for section in sections if len(sections) == 1]
    return " ".join(next((text for text in texts if text), "").split("\n\n")[0].split()).replace(
        "|", "\\|"
    )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        tag = _tag(type(value))
        value = tag or value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        value = [v.model_dump(mode="json") if isinstance(v, BaseModel) else v for v in value]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _type(annotation: Any, metadata: Any = ()) -> str:
    """Return the type of a field in words, with the bounds of numbers."""
    bounds = [
        text.format("2^63" if getattr(rule, name) == 1 << 63 else f"{getattr(rule, name):g}")
        for rule in _rules(metadata)
        for name, text in _BOUNDS
        if getattr(rule, name, None) is not None
    ]
    return " ".join([_bare_type(annotation), ", ".join(bounds)]).strip()


def _rules(metadata: Any) -> Iterator[Any]:
    for rule in metadata:
        yield from rule.metadata if isinstance(rule, FieldInfo) else [rule]


def _bare_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return _union_type(arguments)
    if origin is Literal:
        words = ", ".join(_code(str(value)) for value in arguments)
    elif origin is tuple and arguments[-1] is ...:
        words = f"list of {_type(arguments[0])}"
    elif origin is tuple:
        words = f"[{', '.join(map(_type, arguments))}]"
    elif origin is dict:
        words = "mapping"
    else:
        words = "section" if models_in(annotation) else _WORDS.get(annotation, "any")
    return words


def _union_type(arguments: tuple[Any, ...]) -> str:
    sections = [a for a in arguments if models_in(a) == [a]]
    named = [_code(tag) for tag in map(_tag, sections) if tag]
    first = [f"section: {', '.join(named)}" if named else "section"] if sections else []
    return " or ".join(dict.fromkeys([*first, *(_type(a) for a in arguments if a not in sections)]))


def _tag(model: type[BaseModel]) -> str | None:
    """Return the name that selects a section in a union; None if there is no single name."""
    tags = tags_of(model)
    return tags[0] if len(tags) == 1 else None


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")

"""Read the docstrings of settings, and format them for a verb's --help."""

import ast
import inspect
import textwrap
from collections.abc import Collection
from functools import cache
from itertools import pairwise

from raysl.config.base import Config


def settings_text(model: type[Config], *, without: Collection[str] = ()) -> str:
    """Return each key of a model with its default and its description.

    Args:
        model: The configuration class that the verb's overrides set.
        without: Keys to leave out, because the verb takes them as arguments.
    """
    lines = []
    for name, field in model.model_fields.items():
        if name in without:
            continue
        default = field.get_default(call_default_factory=True)
        default = "null" if default is None else default
        default = str(default).lower() if isinstance(default, bool) else default
        text = " ".join(docstring_of(model, name).split())
        lines.append(f"  {name}={'[]' if default == () else default}\n      {text}")
    return "\n".join(lines)


def docstring_of(model: type, name: str) -> str:
    """Return the docstring below an attribute of a class or of the nearest parent that has one.

    Read from the source when somebody asks: with pydantic's ``use_attribute_docstrings`` each
    process of a run would take 0.24 s longer to start.
    """
    docstrings = (_docstrings(each).get(name) for each in model.__mro__ if each is not object)
    return next((text for text in docstrings if text), "")


@cache
def _docstrings(model: type) -> dict[str, str]:
    try:
        source = inspect.getsource(model)
    except (OSError, TypeError):  # a class without a source, such as a parametrized one
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        line.target.id: inspect.cleandoc(text.value.value)
        for line, text in pairwise(definition.body)
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }

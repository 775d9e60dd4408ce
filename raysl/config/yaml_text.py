"""Read and write YAML: plain values, with a message for what is not YAML or far too large."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from raysl.errors import ConfigError

_INT = "tag:yaml.org,2002:int"
# Numbers that YAML 1.1, which PyYAML reads, takes to the base 60 or 8 and readers to the base 10.
_OTHER_BASE = re.compile(r"[-+]?(?:[0-9_]+:[0-9_:]+|0[0-9_]+)")
_MOST_DIGITS = 100  # Python refuses to read or print more than 4,300
_SHORT = 40
# Far beyond any configuration; what unfolds to more would fill the memory.
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads ``1e-3`` as a float, as YAML 1.2 does; PyYAML reads it as a string.

    A repeated key is an error, not a silent overwrite.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise ConfigError for a repeated key."""
        if not isinstance(node, yaml.MappingNode):  # such as !!map 5
            return super().construct_mapping(node, deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(
                    f"{node.start_mark.name}: key {key!r} occurs twice in the section that begins "
                    f"at line {node.start_mark.line + 1}; keep one"
                )
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; raise ConfigError where its tag or its digits make none."""
        try:
            if node.tag == _INT and isinstance(node, yaml.ScalarNode):
                _check_int(node)
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            what = node.value if isinstance(node.value, str) else "a section"
            raise ConfigError(
                f"{node.start_mark.name}, line {node.start_mark.line + 1}: {_short(what)} is no "
                f"value of the kind {node.tag.rpartition(':')[2]}: {error}; quote it if it is text"
            ) from None


def _check_int(node: yaml.ScalarNode) -> None:
    if len(node.value) > _MOST_DIGITS:
        raise ValueError(f"it has {len(node.value):,} digits")
    if _OTHER_BASE.fullmatch(node.value):
        base = 60 if ":" in node.value else 8
        raise ValueError(f"YAML reads it to the base {base}")


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes strings which the loader would read as numbers, such as ``1e3``."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        where: Its file or override, for messages.

    Raises:
        ConfigError: If the text is not YAML (the message names the line), is nested too deeply,
            contains itself through an alias, or has too many values.
    """
    try:
        loader = _Loader(text)
        loader.name = where
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, where=where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: sections are nested too deeply to be read") from None


def _check_size(root: yaml.Node, *, where: str) -> None:
    """Raise ConfigError if a document has too many values with all its aliases written out."""
    sizes: dict[int, int | None] = {}  # None while the node is being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            counted = sizes[id(node)]
            if counted is None:
                raise ConfigError(
                    f"{where}, line {node.start_mark.line + 1}: this section contains itself "
                    f"through an alias (*); write out what it should contain"
                )
            return counted
        sizes[id(node)] = None
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = total = 1 + sum(size(child) for child in children)
        return total

    if size(root) > _MAX_VALUES:
        raise ConfigError(
            f"{where}: more than {_MAX_VALUES:,} values, with aliases (*) written out; a "
            f"configuration has hundreds"
        )


def to_yaml(values: Mapping[str, Any]) -> str:
    """Format plain values as YAML, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

"""The nodes of a cluster, and which of them train and which make views. No Ray."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

_SHOWN_NODES = 8
_NODE_ID = "ray.io/node-id"
# Ray Data 2.60 counts the CPUs of nodes with this label only for a stream that asks for its value.
SUBCLUSTER = "ray-subcluster"

_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:{_WORD}(?:\.{_WORD})*/)?{_WORD}")
_VALUE = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:, ?{_WORD})*\))")

Labels = Mapping[str, str]
"""The labels of a node, or what a role asks of them in Ray's syntax: ``a``, ``!a``, ``in(a, b)`` or
``!in(a, b)``. A node without the label has any value that is asked for with ``!``."""


class Node(NamedTuple):
    """A node, with all its CPUs and GPUs or with those that nothing holds."""

    name: str
    cpus: float
    gpus: float = 0.0
    node_id: str = ""
    labels: Labels = MappingProxyType({})


class Nodes(NamedTuple):
    """The nodes of a cluster, in one order."""

    all: Sequence[Node]
    free: Sequence[Node]
    """The same nodes with the CPUs and GPUs that nothing holds."""

    def only(self, wanted: Callable[[Node], bool]) -> "Nodes":
        """Return some of the nodes."""
        pairs = [(node, free) for node, free in zip(*self, strict=True) if wanted(node)]
        return Nodes([node for node, _ in pairs], [free for _, free in pairs])


class Roles(NamedTuple):
    """Which nodes train and which make views.

    Attributes:
        train_on: ``cluster.train_on``; None trains on any node.
        data_on: ``cluster.data_on``; None makes views on any node.
    """

    train_on: Labels | None = None
    data_on: Labels | None = None

    @property
    def of_train(self) -> str:
        """What a message says after "the nodes" that train."""
        return _of("cluster.train_on", self.train_on)

    @property
    def of_data(self) -> str:
        """What a message says after "the nodes" that make views."""
        return _of("cluster.data_on", self.data_on)

    def trains(self, node: Node) -> bool:
        """Return whether train workers may be on a node."""
        return has_labels(node, self.train_on)

    def makes_views(self, node: Node) -> bool:
        """Return whether data workers may be on a node, and Ray Data counts its CPUs."""
        subcluster = (self.data_on or {}).get(SUBCLUSTER)
        return has_labels(node, self.data_on) and node.labels.get(SUBCLUSTER) == subcluster

    def train_nodes(self, nodes: Sequence[Node], *, use_gpu: bool = False) -> list[Node]:
        """Return the nodes that train workers may be on, on GPUs those that have one."""
        return [node for node in nodes if self.trains(node) and (node.gpus >= 1 or not use_gpu)]

    def data_nodes(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes that data workers may be on."""
        return [node for node in nodes if self.makes_views(node)]

    def members(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes that have a role at all."""
        return [node for node in nodes if self.trains(node) or self.makes_views(node)]

    def missing(self, nodes: Sequence[Node]) -> str | None:
        """Return which node a run cannot do without, and the labels there are; None if it has both.

        Without any node the number of CPUs says so.
        """
        if nodes and not self.train_nodes(nodes):
            return f"a node{self.of_train}: {describe_labels(nodes)}"
        if nodes and not self.data_nodes(nodes):
            other = f" without the label {SUBCLUSTER}, or its value in cluster.data_on"
            return f"a node{self.of_data or other}: {describe_labels(nodes)}"
        return None


ANYWHERE = Roles()
"""No node has a role of its own."""


def check_labels(labels: Labels) -> None:
    """Raise ValueError unless Ray accepts what a role asks of the labels of its nodes."""
    if not labels:
        raise ValueError("name at least one label, such as {role: train}, or null for any node")
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no name of a label, such as role or ray.io/node-group")
        if not _VALUE.fullmatch(value):
            raise ValueError(
                f"{key}: {value!r} is no value of a label; write a, !a, in(a, b) or !in(a, b)"
            )
        if key == SUBCLUSTER and not re.fullmatch(_WORD, value):
            raise ValueError(f"{key}: Ray Data looks only for one value, not for {value!r}")


def has_labels(node: Node, wanted: Labels | None) -> bool:
    """Return whether a node has the labels that are asked for, as Ray decides it."""
    for key, value in (wanted or {}).items():
        values = value.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        is_one = node.labels.get(key) in [each.strip() for each in values]
        if is_one == value.startswith("!"):
            return False
    return True


def _of(name: str, labels: Labels | None) -> str:
    return "" if labels is None else f" of {name}={written(labels)}"


def written(labels: Labels) -> str:
    """Return labels as they are written in a configuration."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in labels.items()) + "}"


def describe_labels(nodes: Sequence[Node]) -> str:
    """Return the labels of each node in one line."""
    return _listed([f"{_name(node)} has {_labels_text(node)}" for node in nodes])


def describe_nodes(nodes: Sequence[Node], free: Sequence[Node] | None = None) -> str:
    """Return the CPUs and GPUs of each node in one line, and how many of them are free."""
    lefts: Sequence[Node | None] = [None] * len(nodes) if free is None else free
    return _listed(
        [
            f"{_name(node)} has {_amounts(node, left)}"
            for node, left in zip(nodes, lefts, strict=True)
        ]
    )


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN_NODES
    return "; ".join([*texts[:_SHOWN_NODES], *[f"{more} more nodes"] * (more > 0)]) or "no node"


def _name(node: Node) -> str:
    return node.name or "node"


def _labels_text(node: Node) -> str:
    shown = {key: value for key, value in sorted(node.labels.items()) if key != _NODE_ID}
    return written(shown) if shown else "no labels"


def _amounts(node: Node, free: Node | None) -> str:
    kinds = [("CPUs", node.cpus, free and free.cpus), ("GPUs", node.gpus, free and free.gpus)]
    return " and ".join(
        f"{total:g} {what}" if left is None else f"{left:g} of {total:g} {what} free"
        for what, total, left in kinds
        if total or what == "CPUs"
    )

"""Find the encoders in a weight file, recognise their layout, and choose one.

An encoder is found by a tensor name that every network of its kind has (``layer1.0.conv1.weight``).
Its address consists of the keys that lead to its state dict and the prefix of that name, such as
``state_dict/module.encoder_q.``.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from raysl.encoder.layouts import ANYWHERE, LAYOUTS, OTHER, FileLayout, Network, Place
from raysl.encoder.naming import ANCHORS, to_plain_names
from raysl.encoder.stored import Content, State, StoredTensor

_MAX_DEPTH = 6  # of nested mappings


class ChosenNetwork(NamedTuple):
    """The chosen network and its layout."""

    network: Network
    layout: FileLayout
    what: str
    """The network's name in its paper."""
    others: tuple[str, ...]
    """Addresses of the other networks in the file."""

    @property
    def description(self) -> str:
        """The network's name and address, and the addresses of the others."""
        text = f"{self.what} ({self.network.address or 'the whole file'})"
        if not self.others:
            return text
        return f"{text}; not {', '.join(other or 'the whole file' for other in self.others)}"


def find_networks(content: Content, anchors: Collection[str] = ANCHORS) -> list[Network]:
    """Return every encoder in a file.

    Args:
        content: The content of the file.
        anchors: Tensor names, of which an encoder has at least one.
    """
    wanted = {*anchors}
    networks = []
    for keys, state in _state_dicts(content, (), set()):
        for prefix in sorted({p for name in state for p in _prefixes(name, wanted)}):
            inner = {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }
            beside = {
                name.removeprefix("module."): value
                for name, value in state.items()
                if not name.startswith(prefix)
            }
            address = "".join(f"{key}/" for key in keys) + prefix
            plain, naming = to_plain_names(inner)
            networks.append(Network(address, plain, naming, beside))
            if plain.keys() != inner.keys():
                networks.append(Network(address, inner, "plain", beside))
    return networks


def networks_named(content: Content, wanted: Collection[str]) -> list[Network]:
    """Return the networks that have the largest number of the wanted tensor names; may be empty."""
    networks = find_networks(content, {*wanted, *ANCHORS})
    names = {*wanted}
    most = max((len(network.state.keys() & names) for network in networks), default=0)
    return [network for network in networks if len(network.state.keys() & names) == most]


def choose(
    networks: list[Network], layout: str = "auto", *, address: str | None = None
) -> ChosenNetwork | None:
    """Choose a network; None if no network has the layout or the address.

    Args:
        networks: The networks of a file.
        layout: Name of one of :data:`raysl.encoder.layouts.LAYOUTS`, or ``auto``.
        address: Address of the network to choose; None chooses the one that its layout prefers.
    """
    allowed = [n for n in networks if address is None or n.address == address]
    layouts = [known for known in LAYOUTS if layout in ("auto", known.name)]
    places = [(known, place) for known in layouts for place in known.places]
    for known, place in places:
        fitting = [n for n in _at(place, allowed) if place.sign(n)]
        if fitting:
            return ChosenNetwork(fitting[0], known, place.what, _others(fitting[0], networks))
    if layout == "auto" and allowed:
        best = max(allowed, key=lambda network: len(network.state))
        return ChosenNetwork(best, OTHER, "the network", _others(best, networks))
    for known, place in places:  # the user named the layout, so its ``sign`` may be missing
        if layout != "auto" and place.address != ANYWHERE and _at(place, allowed):
            best = _at(place, allowed)[0]
            return ChosenNetwork(best, known, place.what, _others(best, networks))
    return None


def _at(place: Place, networks: list[Network]) -> list[Network]:
    return [network for network in networks if re.fullmatch(place.address, network.address)]


def _others(network: Network, networks: list[Network]) -> tuple[str, ...]:
    return tuple(sorted({n.address for n in networks} - {network.address}))


def _state_dicts(
    content: Content, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], State]]:
    """Yield every mapping that directly holds tensors, with the keys that lead to it."""
    if id(content) in seen or len(keys) > _MAX_DEPTH:  # a pickled mapping may contain itself
        return
    seen.add(id(content))
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if tensors:
        yield keys, tensors
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield from _state_dicts(value, (*keys, name), seen)


def _prefixes(name: str, wanted: Collection[str]) -> Iterator[str]:
    """Yield the prefix that remains without each wanted name at the end of ``name``."""
    start = 0
    while start >= 0:
        if name[start:] in wanted:
            yield name[:start]
        dot = name.find(".", start)
        start = dot + 1 if dot >= 0 else -1

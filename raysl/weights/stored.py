"""A tensor that is still in its file."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class StoredTensor(NamedTuple):
    """What a file says of a tensor, and how to get it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns it on the CPU, in memory of its own."""


# What a file holds: mappings of mappings, at whose ends are stored tensors and other things.
Content = Mapping[str, Any]
# The tensors of one network, by name.
State = dict[str, StoredTensor]


def stored(tensor: Tensor) -> StoredTensor:
    """Return a tensor in memory as one in a file."""
    return StoredTensor(tuple(tensor.shape), lambda: tensor)

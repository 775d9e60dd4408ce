"""A tensor that is still in its file."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class StoredTensor(NamedTuple):
    """The shape of a tensor in a file, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Reads the tensor to memory of its own, on the CPU."""


# Nested mappings, with stored tensors and other objects as leaves.
Content = Mapping[str, Any]
# The tensors of one network, by name.
State = dict[str, StoredTensor]


def stored(tensor: Tensor) -> StoredTensor:
    """Wrap a tensor in memory as a stored one."""
    return StoredTensor(tuple(tensor.shape), lambda: tensor)

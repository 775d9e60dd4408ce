"""Tensors that are still in their file."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class StoredTensor(NamedTuple):
    """The shape of a tensor in a file, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Reads the tensor to new memory on the CPU."""


Content = Mapping[str, Any]
"""The content of a file: nested mappings of stored tensors and other objects."""
State = dict[str, StoredTensor]
"""The tensors of a network, by name."""


def stored(tensor: Tensor) -> StoredTensor:
    """Wrap a tensor in memory as a stored tensor."""
    return StoredTensor(tuple(tensor.shape), lambda: tensor)

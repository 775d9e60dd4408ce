"""Write and read networks as safetensors files, with a description in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from raysl.errors import DataError
from raysl.folder.whole import appears_whole


class NetworkFile(NamedTuple):
    """The content of a network's file."""

    description: dict[str, Any]
    state: dict[str, Tensor]


def write_network(
    path: Path, state: Mapping[str, Tensor], *, kind: str, description: Mapping[str, Any]
) -> None:
    """Write tensors with a description in the header, atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    header = {"format": kind, "raysl": json.dumps(description)}
    # Through a plain open: safetensors' own writer makes files that only their owner can read.
    with appears_whole(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=header))


def read_network(path: Path, *, kind: str, what: str) -> NetworkFile:
    """Read a file written by :func:`write_network`, without running any code from it.

    Args:
        path: The file.
        kind: The format that its header must name.
        what: Description of that format, for error messages.

    Raises:
        DataError: If the file is missing, damaged, of another format, or has values that are not
            finite.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; it should be {what}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None
    if header.get("format") != kind:
        raise DataError(f"{path}: safetensors, but not {what}")
    try:
        description = json.loads(header["raysl"])
    except (KeyError, ValueError, RecursionError):  # the last one: deeply nested brackets
        description = None
    if not isinstance(description, dict):
        raise DataError(f"{path}: {what} with a damaged header")
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise DataError(f"{path}: its weights are not all finite: {name}")
    return NetworkFile(description, state)


def fill(module: nn.Module, state: Mapping[str, Tensor], *, path: Path) -> None:
    """Load a state dict strictly, without checking module versions, which files do not store.

    Raises:
        DataError: If names or shapes do not fit.
    """
    module_state = module.state_dict()
    versioned = type(module_state)(state)
    if hasattr(module_state, "_metadata"):
        versioned._metadata = module_state._metadata  # type: ignore[attr-defined]
    try:
        module.load_state_dict(versioned)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path}: its weights do not fit: {text}") from None

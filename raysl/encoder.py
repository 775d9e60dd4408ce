"""The encoder file: weights that plain torchvision loads, and what is needed to use them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from raysl.errors import DataError
from raysl.nn.backbones import Backbone, build_backbone

_FORMAT = "raysl-encoder-1"


def save_encoder(path: Path, backbone: Backbone, *, description: dict[str, Any]) -> None:
    """Write an encoder's weights under torchvision's names, without ``fc``.

    Args:
        path: A ``.safetensors`` file; it appears complete or not at all.
        backbone: What to write.
        description: ``name`` and ``stem`` of the backbone, ``mean``, ``std``, ``image_size_px``;
            kept in the file's header.
    """
    state = {
        name: value.detach().cpu().contiguous() for name, value in backbone.net.state_dict().items()
    }
    header = {
        "format": _FORMAT,
        "raysl": json.dumps(description | {"embed_dim": backbone.embed_dim}),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    # Through a plain open: safetensors' own writer makes files that only their owner can read.
    temporary.write_bytes(save(state, metadata=header))
    temporary.replace(path)


def read_description(path: str | Path) -> dict[str, Any]:
    """Return what a file's header says of the encoder.

    Raises:
        DataError: If it is not an encoder that raysl wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None
    if header.get("format") != _FORMAT:
        raise DataError(f"{path}: safetensors, but not an encoder that raysl wrote")
    description: dict[str, Any] = json.loads(header["raysl"])
    return description


def load_encoder(path: str | Path) -> nn.Module:
    """Load an encoder.

    Args:
        path: ``encoder.safetensors``, or the run folder that holds it.

    Returns:
        A module in evaluation mode on the CPU: ``(N, 3, H, W)`` float, normalised -> ``(N, D)``. No
        code from the file is run.

    Raises:
        DataError: If it is not an encoder that raysl wrote, or its weights do not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    description = read_description(path)
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(description["name"], stem=description["stem"])
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    try:
        backbone.net.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path}: its weights do not fit {description['name']}: {error}") from None
    return backbone.eval()

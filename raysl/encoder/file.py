"""Write and load the encoder file: weights under their library's names, and metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import nn

from raysl.encoder.fit import fill, fitted, pooled_anew
from raysl.encoder.layouts import Network
from raysl.encoder.networks import ChosenNetwork, choose, networks_named
from raysl.encoder.read import read_content, read_header, read_safetensors
from raysl.errors import ConfigError, DataError
from raysl.folder.whole import appears_whole
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.resnet import ResNet
from raysl.nn.vit import VisionTransformer

_FORMAT = "raysl-encoder-1"
_FILE = "encoder.safetensors"
_OF_HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")


def save_encoder(path: Path, backbone: Backbone, *, description: dict[str, Any]) -> None:
    """Write an encoder's weights under torchvision's or timm's names, without the classifier.

    Args:
        path: A ``.safetensors`` file, written atomically.
        backbone: The encoder.
        description: ``backbone`` (its section of the configuration, as JSON, without the path of
            its initial weights), ``image_size_px``, ``mean``, ``std`` and further metadata; stored
            in the file's header.
    """
    state = {
        name: value.detach().cpu().contiguous() for name, value in backbone.net.state_dict().items()
    }
    known = description | {"embed_dim": backbone.embed_dim}
    if "backbone" in known:
        section = known["backbone"].items()
        known["backbone"] = {key: value for key, value in section if key != "weights"}
    header = {"format": _FORMAT, "raysl": json.dumps(known)}
    # Written by open(): files of safetensors' own writer are only readable by their owner.
    with appears_whole(path) as temporary:
        temporary.write_bytes(save(state, metadata=header))


def read_description(path: str | Path) -> dict[str, Any]:
    """Return the description in a file's header.

    Raises:
        DataError: If it is not an encoder that raysl wrote.
    """
    header = read_header(Path(path))
    if header.get("format") != _FORMAT:
        raise DataError(f"{path}: safetensors, but not an encoder that raysl wrote")
    try:
        description = json.loads(header["raysl"])
    except (KeyError, ValueError):
        description = None
    if not isinstance(description, dict):
        raise DataError(f"{path}: an encoder of raysl with a damaged header")
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
        ConfigError: If it is a model of timm, and timm is not installed or does not know it.
    """
    path = encoder_file(path)
    description = read_description(path)
    config = described_backbone(description, where=path)
    size = description.get("image_size_px", 224)
    if not isinstance(size, int) or size <= 0:
        raise DataError(f"{path}: its header has image_size_px={size!r}, not a positive integer")
    with torch.random.fork_rng(devices=[]):
        try:
            backbone = build_backbone(config, image_size_px=size)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    state = {name: value.read() for name, value in read_safetensors(path).items()}
    try:
        fill(backbone.net, state)
    except RuntimeError as error:
        raise DataError(f"{path}: its weights do not fit {config.name}: {error}") from None
    return backbone.eval()


def load_weights(backbone: Backbone, path: str | Path, *, layout: str = "auto") -> str:
    """Load weights into an encoder.

    All of the encoder's tensors must exist and fit; otherwise nothing changes. A norm of the tokens
    is replaced by a new one of their mean (:func:`raysl.encoder.fit.pooled_anew`).

    Args:
        backbone: The encoder, changed in place.
        path: A run folder, an encoder file of raysl, or a weight file in any layout of
            :mod:`raysl.encoder.layouts`. No code from the file is run.
        layout: Name of the layout, or ``auto``.

    Returns:
        Which of the file's networks was used, in words.

    Raises:
        DataError: If the file cannot be read, does not fit, or holds numbers that are not finite.
    """
    path = encoder_file(path)
    content = read_content(path)
    wanted = backbone.net.state_dict().keys()
    networks = networks_named(content, wanted) or [Network("", {}, "plain", {})]
    found = choose(networks, layout)
    if found is None:
        held = ", ".join(sorted({n.address or "the whole file" for n in networks}))
        raise DataError(f"{path}: holds nothing of the layout {layout}; there is: {held}")
    state = pooled_anew(found.network.state, backbone.net)
    tensors = fitted(state, backbone.net, where=path)
    _check_told(backbone.net, found, path)
    fill(backbone.net, tensors)
    return found.taken


def _check_told(net: nn.Module, found: ChosenNetwork, path: Path) -> None:
    """Reject settings that differ from those fixed by the file's training code."""
    told = found.layout.fixed(found.network)
    own: dict[str, tuple[Any, str]] = {}
    if isinstance(net, VisionTransformer):
        own = {"num_heads": (net.blocks[0].attn.num_heads, "{} attention heads")}  # type: ignore[union-attr]
    elif isinstance(net, ResNet):
        own = {
            "stem": (net.stem, "the stem {}"),
            "shortcut_edge": (net.shortcut_edge, "{} beyond the edge of its shortcuts"),
        }
    for key, (value, words) in own.items():
        if told.get(key, value) != value:
            raise DataError(
                f"{path}: {found.layout.whose} has {words.format(told[key])}; set backbone.{key}="
                f"{told[key]}"
            )


def encoder_file(path: str | Path) -> Path:
    """Return the weight file of a run folder, or of a Hugging Face folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    theirs = [path / name for name in _OF_HUGGING_FACE if (path / name).is_file()]
    return theirs[0] if theirs and not (path / _FILE).exists() else path / _FILE


def described_backbone(description: Mapping[str, Any], *, where: str | Path) -> BackboneConfig:
    """Return the section of the configuration that a header contains.

    Raises:
        DataError: If it does not describe an encoder that this version supports.
    """
    section = description.get("backbone")
    if section is None:  # raysl 0.1 wrote these two keys, for residual networks only
        section = {key: description[key] for key in ("name", "stem") if key in description}
    try:
        return BackboneConfig.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("backbone", *first["loc"])))
        raise DataError(
            f"{where}: its header describes no encoder that this version of raysl knows: "
            f"{place}: {first['msg']}"
        ) from None

"""Write and load encoder files: weights under torchvision's or timm's names, and metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from raysl.encoder.fit import fill, fitted, without_token_norm
from raysl.encoder.layouts import Network
from raysl.encoder.networks import ChosenNetwork, choose, networks_named
from raysl.encoder.read import read_content, read_header, read_safetensors
from raysl.errors import ConfigError, DataError
from raysl.folder.whole import appears_whole
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.resnet import ResNet
from raysl.nn.vit import VisionTransformer
from raysl.store.reading import local_copy

_FORMAT = "raysl-encoder-1"
_FILE = "encoder.safetensors"
_HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")


def save_encoder(path: Path, backbone: Backbone, *, description: dict[str, Any]) -> None:
    """Write an encoder file.

    Args:
        path: A ``.safetensors`` file, written atomically.
        backbone: The encoder.
        description: Metadata for the file's header: ``backbone`` (that section of the
            configuration as JSON; the path of initial weights is not stored), ``image_size_px``,
            ``mean``, ``std`` and others.
    """
    write_encoder(path, backbone.net.state_dict(), backbone.embed_dim, description=description)


def write_encoder(
    path: Path, weights: Mapping[str, Tensor], embed_dim: int, *, description: dict[str, Any]
) -> None:
    """Write an encoder file from the state of its network; see :func:`save_encoder`."""
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    stored = description | {"embed_dim": embed_dim}
    if "backbone" in stored:
        section = stored["backbone"].items()
        stored["backbone"] = {key: value for key, value in section if key != "weights"}
    header = {"format": _FORMAT, "raysl": json.dumps(stored)}
    # Not by safetensors' own writer, whose files only their owner may read.
    with appears_whole(path) as temporary:
        temporary.write_bytes(save(state, metadata=header))


def read_description(path: str | Path) -> dict[str, Any]:
    """Return the description in the header of an encoder file.

    Raises:
        DataError: If the file is not an encoder that raysl wrote.
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
        path: ``encoder.safetensors``, or the run folder that holds it; a path or an address.

    Returns:
        A module in evaluation mode on the CPU: ``(N, 3, H, W)`` float, normalised -> ``(N, D)``. No
        code from the file is run.

    Raises:
        DataError: If the file is not an encoder that raysl wrote, or its weights do not fit.
        ConfigError: If the encoder is a model of timm, and timm is not installed or lacks it.
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

    The file must hold all tensors of the encoder, in their shapes; otherwise nothing changes. If
    the encoder normalises the mean of the tokens and the file's network each token, the encoder
    keeps its initial norm (:func:`raysl.encoder.fit.without_token_norm`).

    Args:
        backbone: The encoder, changed in place.
        path: A run folder, an encoder file of raysl, or a weight file in any layout of
            :mod:`raysl.encoder.layouts`. No code from the file is run.
        layout: Name of the layout, or ``auto``.

    Returns:
        A description of the network that was loaded.

    Raises:
        DataError: If the file cannot be read, does not fit, or holds weights that are not finite.
    """
    path = encoder_file(path)
    content = read_content(path)
    wanted = backbone.net.state_dict().keys()
    networks = networks_named(content, wanted) or [Network("", {}, "plain", {})]
    chosen = choose(networks, layout)
    if chosen is None:
        held = ", ".join(sorted({n.address or "the whole file" for n in networks}))
        raise DataError(f"{path}: holds no network of the layout {layout}; it holds: {held}")
    state = without_token_norm(chosen.network.state, backbone.net)
    tensors = fitted(state, backbone.net, where=path)
    _check_fixed_settings(backbone.net, chosen, path)
    fill(backbone.net, tensors)
    return chosen.description


def _check_fixed_settings(net: nn.Module, chosen: ChosenNetwork, path: Path) -> None:
    """Reject a network whose settings differ from those that the file's training code fixes."""
    fixed = chosen.layout.fixed(chosen.network)
    settings: dict[str, tuple[Any, str]] = {}
    if isinstance(net, VisionTransformer):
        settings = {"num_heads": (net.blocks[0].attn.num_heads, "{} attention heads")}  # type: ignore[union-attr]
    elif isinstance(net, ResNet):
        settings = {
            "stem": (net.stem, "the stem {}"),
            "shortcut_edge": (net.shortcut_edge, "{} beyond the edge of its shortcuts"),
        }
    for key, (value, words) in settings.items():
        if fixed.get(key, value) != value:
            raise DataError(
                f"{path}: {chosen.layout.origin} has {words.format(fixed[key])}; set "
                f"backbone.{key}={fixed[key]}"
            )


def encoder_file(path: str | Path) -> Path:
    """Return the weight file of a run folder or a Hugging Face folder, or the given file.

    Of an address in a store, it is the file of a local copy.

    Raises:
        DataError: If there is nothing at the address.
    """
    path = local_copy(path)
    if not path.is_dir():
        return path
    hugging_face = [path / name for name in _HUGGING_FACE_FILES if (path / name).is_file()]
    return hugging_face[0] if hugging_face and not (path / _FILE).exists() else path / _FILE


def described_backbone(description: Mapping[str, Any], *, where: str | Path) -> BackboneConfig:
    """Return the settings of the backbone in the description of an encoder file.

    Raises:
        DataError: If they do not describe a backbone that this version supports.
    """
    section = description.get("backbone")
    if section is None:  # raysl 0.1 wrote these two keys, for residual networks only
        section = {key: description[key] for key in ("name", "stem") if key in description}
    try:
        return BackboneConfig.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("backbone", *first["loc"])))
        raise DataError(
            f"{where}: its header describes no encoder that this version of raysl supports: "
            f"{key}: {first['msg']}"
        ) from None

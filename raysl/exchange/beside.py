"""Read the metadata of a weight file: its header, or configuration files in the same folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raysl.encoder.file import described_backbone
from raysl.encoder.normalisation import SOLO_LEARN
from raysl.encoder.read import is_safetensors, read_header
from raysl.errors import DataError

_VITS = ("vit", "vit_mae")
# Options of transformers' networks that raysl does not support, with the one value that it has.
_TRANSFORMERS_FIXED: dict[str, dict[str, Any]] = {
    "hidden_act": {"vit": "gelu", "vit_mae": "gelu", "resnet": "relu"},
    "downsample_in_bottleneck": {"resnet": False},
    "downsample_in_first_stage": {"resnet": False},
}
_DINOV2_HEAD_DIM = 64


class Beside(NamedTuple):
    """Metadata of an encoder; None where it is not stored."""

    backbone: Mapping[str, Any] = {}
    """Settings of :class:`BackboneConfig`."""
    image_size_px: int | None = None
    """Side of the training images."""
    mean: Any = None
    """Mean of each channel of the training images."""
    std: Any = None
    """Standard deviation of each channel."""
    source: str = ""
    """The file with the metadata; empty for the header of the weight file, and without metadata."""


def read_beside(file: Path) -> Beside:
    """Read the metadata of a weight file.

    Exports of raysl have it in their header. For other files it is read from the same folder:
    ``config.json`` of timm, ``config.json`` and ``preprocessor_config.json`` of transformers, or
    ``args.json`` of solo-learn.

    Raises:
        DataError: If raysl's header is damaged, or transformers' config.json describes a network
            that raysl does not support.
    """
    if is_safetensors(file):
        header = read_header(file)
        if "raysl" in header:
            return _from_header(header["raysl"], file)
    config = _json(file.with_name("config.json"))
    if "pretrained_cfg" in config:
        return _from_timm(config)
    if "model_type" in config:
        return _from_transformers(config, _json(file.with_name("preprocessor_config.json")), file)
    return _from_solo_learn(_json(file.with_name("args.json")))


def _from_header(text: str, file: Path) -> Beside:
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise DataError(f"{file}: an encoder of raysl with a damaged header")
    section = described_backbone(description, where=file).model_dump(mode="json")
    section.pop("weights")
    size, mean, std = (description.get(key) for key in ("image_size_px", "mean", "std"))
    return Beside(section, size, mean, std)


def _from_timm(config: Mapping[str, Any]) -> Beside:
    try:
        pretrained = config["pretrained_cfg"]
        size = int(pretrained["input_size"][-1])
        return Beside({}, size, pretrained["mean"], pretrained["std"], "config.json")
    except (ValueError, KeyError, TypeError, IndexError):
        return Beside()


def _from_transformers(
    config: Mapping[str, Any], processor: Mapping[str, Any], file: Path
) -> Beside:
    """Read the settings of transformers' network and of its image processor."""
    kind = str(config["model_type"])
    for key, allowed in _TRANSFORMERS_FIXED.items():
        value = config.get(key, allowed.get(kind))
        if value != allowed.get(kind, value):
            raise DataError(
                f"{file}: config.json has {key}={value}; raysl's networks have {allowed[kind]}. "
                "Export it with transformers to ONNX instead"
            )
    heads, dim = config.get("num_attention_heads"), config.get("hidden_size")
    section: dict[str, Any] = {}
    if kind in _VITS:
        section = {"num_heads": heads, "norm_eps": config.get("layer_norm_eps", 1e-12)}
    elif kind.startswith("dinov2") and dim != _DINOV2_HEAD_DIM * (heads or 0):
        raise DataError(
            f"{file}: config.json has num_attention_heads={heads} for hidden_size={dim}; timm's "
            f"DINOv2 has one head per {_DINOV2_HEAD_DIM} features"
        )
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    section = {key: value for key, value in section.items() if value is not None}
    files = "config.json" if mean is None else "config.json and preprocessor_config.json"
    if not (_is_channels(mean) and _is_channels(std)):
        mean = std = None
    return Beside(section, None, mean, std, files)


def _from_solo_learn(arguments: Mapping[str, Any]) -> Beside:
    """Read the arguments that solo-learn's Checkpointer stores with every checkpoint."""
    data = arguments.get("data")
    name = data.get("dataset") if isinstance(data, dict) else None
    if name in SOLO_LEARN:
        channels, size = SOLO_LEARN[name], _crop_size(arguments.get("augmentations"))
        return Beside({}, size, channels.mean, channels.std, f"args.json (data.dataset: {name})")
    return Beside()


def _crop_size(augmentations: Any) -> int | None:
    """Return the side of the largest views of solo-learn's augmentations; None if unknown."""
    entries = augmentations if isinstance(augmentations, list) else []
    sizes = [entry.get("crop_size") for entry in entries if isinstance(entry, dict)]
    return max((size for size in sizes if isinstance(size, int)), default=0) or None


def _is_channels(values: Any) -> bool:
    """Return whether a value is a list of three finite numbers."""
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if there is no such file or no mapping in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}

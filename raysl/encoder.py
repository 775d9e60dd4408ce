"""The encoder file: weights under their library's names, and what is needed to use them."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone

_FORMAT = "raysl-encoder-1"
_FILE = "encoder.safetensors"

# Where files of others keep the model; DINO's teacher is what its authors evaluate.
_WRAPPERS = ("teacher", "state_dict", "model")
# What stands before the encoder's names; MoCo's encoder_q and base_encoder are what it trains.
_PREFIXES = ("module.", "backbone.", "net.", "model.", "encoder.", "encoder_q.", "base_encoder.")
_CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.", "head_dist.")
_NAMES_SHOWN = 5


def save_encoder(path: Path, backbone: Backbone, *, description: dict[str, Any]) -> None:
    """Write an encoder's weights under torchvision's or timm's names, without the classifier.

    Args:
        path: A ``.safetensors`` file; it appears complete or not at all.
        backbone: What to write.
        description: ``backbone`` (its section of the configuration, as JSON; the place that its
            first weights came from is left out), ``image_size_px``, ``mean``, ``std`` and whatever
            else is worth knowing; kept in the file's header.
    """
    state = {
        name: value.detach().cpu().contiguous() for name, value in backbone.net.state_dict().items()
    }
    known = description | {"embed_dim": backbone.embed_dim}
    if "backbone" in known:
        section = known["backbone"].items()
        known["backbone"] = {key: value for key, value in section if key != "weights"}
    header = {"format": _FORMAT, "raysl": json.dumps(known)}
    temporary = path.with_name(f".{path.name}.tmp")
    # Through a plain open: safetensors' own writer makes files that only their owner can read.
    temporary.write_bytes(save(state, metadata=header))
    temporary.replace(path)


def read_description(path: str | Path) -> dict[str, Any]:
    """Return what a file's header says of the encoder.

    Raises:
        DataError: If it is not an encoder that raysl wrote.
    """
    header = _header(path)
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
    path = _file_of(path)
    description = read_description(path)
    config = _described(description, path)
    size = description.get("image_size_px", 224)
    if not isinstance(size, int) or size <= 0:
        raise DataError(f"{path}: its header has image_size_px={size!r}, not a positive integer")
    with torch.random.fork_rng(devices=[]):
        try:
            backbone = build_backbone(config, image_size_px=size)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    try:
        _fill(backbone.net, _read_safetensors(path))
    except RuntimeError as error:
        raise DataError(f"{path}: its weights do not fit {config.name}: {error}") from None
    return backbone.eval()


def load_weights(backbone: Backbone, path: str | Path) -> None:
    """Start an encoder from given weights.

    Names may stand behind what training codes put before them (``module.``, ``backbone.``,
    ``encoder_q.`` and so on, in a ``state_dict``, ``model`` or ``teacher``), and a classifier or
    head may stand beside them. Everything else must fit; nothing is changed if it does not.

    Args:
        backbone: What to fill, in place.
        path: A run folder, an encoder file of raysl, or a ``.safetensors``, ``.pth`` or ``.pt``
            file that holds tensors of the same layout. No code from the file is run.

    Raises:
        DataError: If the file cannot be read, does not fit, or holds numbers that are not finite.
    """
    path = _file_of(path)
    wanted = backbone.net.state_dict()
    state = _without_prefixes(_read_tensors(path), wanted)
    # Files from before torch 0.4 count no batches, and nothing that raysl does reads the count.
    counts = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")}
    state = counts | {
        name: value
        for name, value in state.items()
        if name in wanted or not name.startswith(_CLASSIFIERS)
    }
    problems = _misfits(state, wanted)
    if problems:
        raise DataError(f"{path}: its weights do not fit the backbone: {'; '.join(problems)}")
    for name, value in state.items():
        if not value.isfinite().all():
            raise DataError(f"{path}: its weights are not all finite: {name}")
    _fill(backbone.net, state)


def _fill(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, as one of this version of the module: files keep no versions."""
    own = net.state_dict()
    versioned = type(own)(state)
    if hasattr(own, "_metadata"):
        versioned._metadata = own._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned)


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    return path / _FILE if path.is_dir() else path


def _header(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None


def _described(description: Mapping[str, Any], path: Path) -> BackboneConfig:
    """The section of the configuration that a header holds."""
    section = description.get("backbone")
    if section is None:  # raysl 0.1 wrote these two keys, for residual networks only
        section = {key: description[key] for key in ("name", "stem") if key in description}
    try:
        return BackboneConfig.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("backbone", *first["loc"])))
        raise DataError(
            f"{path}: its header describes no encoder that this version of raysl knows: "
            f"{where}: {first['msg']}"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, out of their wrapper."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a run folder or a file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # The options of a run, which DINO, MAE and MoCo v3 put beside the weights, are plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle raises whatever it likes
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path}: not a file of tensors alone, and code in it is not run: {reason}"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _without_prefixes(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that has the most of the wanted names, without what precedes them.

    An encoder's own names may begin like a prefix (``encoder.``), hence the count.
    """
    best = state
    for prefix in _PREFIXES:
        inner = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        if inner:
            inner = _without_prefixes(inner, wanted)
        if len(inner.keys() & wanted.keys()) > len(best.keys() & wanted.keys()):
            best = inner
    return best


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being loaded, a phrase for each kind; empty if nothing."""
    both = [name for name in wanted if name in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in both
        if state[name].shape != wanted[name].shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": shapes,
    }
    return [f"{what}: {_first(names)}" for what, names in kinds.items() if names]


def _first(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown

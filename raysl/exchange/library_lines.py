"""Generate Python lines that load an encoder file, without raysl where possible."""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from raysl.errors import ConfigError
from raysl.nn.backbones import (
    BackboneConfig,
    library_name,
    timm_model,
    torchvision_classifier,
    torchvision_options,
    whole_torchvision_model,
)

Library = Literal["torchvision", "timm"]
_FILE = "encoder.safetensors"
_TIMM_VIT_NORM_EPS = 1e-6


class TimmCall(NamedTuple):
    """The arguments of ``timm.create_model``, apart from ``num_classes=0``; plain values."""

    architecture: str
    options: dict[str, Any]


def encoder_lines(config: BackboneConfig, *, image_size_px: int, file: str = _FILE) -> list[str]:
    """Return Python lines that build ``model`` from an encoder file.

    Args:
        config: The settings of the backbone.
        image_size_px: Side of the training images.
        file: Path of the encoder file.
    """
    library: Library = "timm" if config.family in ("vit", "timm") else "torchvision"
    if plain_problem(config, library) is not None:
        return ["import raysl", "", f"model = raysl.load_encoder({json.dumps(file)})"]
    return library_lines(config, library, image_size_px=image_size_px, file=file)


def library_lines(
    config: BackboneConfig, library: Library, *, image_size_px: int, file: str
) -> list[str]:
    """Return Python lines that build ``model`` from a library's class and load the file strictly.

    Raises:
        ConfigError: If the library has no class for the backbone, or is not installed.
    """
    problem = plain_problem(config, library)
    if problem is not None:
        raise ConfigError(problem)
    if library == "timm":
        call = timm_call(config, image_size_px)
        options = "".join(f", {key}={value!r}" for key, value in call.options.items())
        lines = [f'model = timm.create_model("{call.architecture}", num_classes=0{options})']
        lines += _stem_lines(config)
    else:
        lines = _torchvision_lines(config, image_size_px)
    return [
        f"import safetensors.torch, torch, {library}",
        "",
        *lines,
        f"model.load_state_dict(safetensors.torch.load_file({json.dumps(file)}))",
        "model.eval()",
    ]


def plain_problem(config: BackboneConfig, library: Library) -> str | None:
    """Return why a library has no class for an encoder; None if it has one."""
    other = {"torchvision": "timm", "timm": "torchvision"}[library]
    only_library = {"vit": "timm", "timm": "timm", "torchvision": "torchvision"}.get(config.family)
    if only_library == other:
        return f"{library} has no {config.name} with these names; use --format {other}"
    unsupported = _unsupported_options(config)
    if unsupported:
        return (
            f"neither torchvision nor timm has a {config.name} with {unsupported}; use --format "
            "onnx, torch_export or torchscript, or raysl.load_encoder"
        )
    return None


def timm_call(config: BackboneConfig, image_size_px: int) -> TimmCall:
    """Return the call by which timm builds an encoder, apart from a ResNet's stem.

    Raises:
        ConfigError: If timm is not installed.
    """
    name = config.name
    if config.family == "timm":
        return TimmCall(library_name(config), timm_model(config, image_size_px)[1])
    if config.family == "vit":
        patch = 14 if name == "vit_huge" else 16
        options = {
            "img_size": image_size_px,
            "patch_size": config.patch_size_px,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "global_pool": "token" if config.pool == "cls" else "avg",
            "fc_norm": config.pool == "mean_norm",
        }
        options = {key: value for key, value in options.items() if value is not None}
        return TimmCall(f"{name}_patch{patch}_224", options)
    if config.norm == "group":
        return TimmCall(name, {"norm_layer": "groupnorm"})
    return TimmCall(name, {})


def _unsupported_options(config: BackboneConfig) -> str:
    """Return the options of a ResNet or a ViT that no library supports; empty if there are none."""
    is_set = {
        f"width={config.width:g}": config.width != 1,
        "selective kernels": config.selective_kernels,
        "norm=none": config.norm == "none",
        f"norm_eps={config.norm_eps:g}": config.norm_eps != _TIMM_VIT_NORM_EPS,
    }
    return " and ".join(option for option, used in is_set.items() if used)


def _torchvision_lines(config: BackboneConfig, image_size_px: int) -> list[str]:
    if config.family == "resnet":
        norm = "norm_layer=lambda c: torch.nn.GroupNorm(32, c)" if config.norm == "group" else ""
        return [
            f"model = torchvision.models.{config.name}({norm})",
            "model.fc = torch.nn.Identity()",
            *_stem_lines(config),
        ]
    if config.family == "convnext":
        return [
            f"model = torchvision.models.{config.name}()",
            "model.classifier[2] = torch.nn.Identity()",
        ]
    options = torchvision_options(config, image_size_px)
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    with torch.random.fork_rng(devices=[]):
        path = torchvision_classifier(whole_torchvision_model(config, image_size_px))
    return [
        f'model = torchvision.models.get_model("{library_name(config)}", weights=None{arguments})',
        f'model.set_submodule("{path}", torch.nn.Identity())',
    ]


def _stem_lines(config: BackboneConfig) -> Sequence[str]:
    if config.family != "resnet" or config.stem == "imagenet":
        return []
    stride = ", stride=2" if config.stem == "small" else ""
    padding = 2 if config.stem == "cifar_padded" else 1
    return [
        f"model.conv1 = torch.nn.Conv2d(3, 64, 3{stride}, padding={padding}, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]

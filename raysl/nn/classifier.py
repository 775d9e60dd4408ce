"""Classifiers: an encoder, the first layers of its projection head and a linear layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.heads import build_layers, describe_layers
from raysl.nn.network_file import fill, read_network, write_network

CLASSIFIER_FILE = "classifier.safetensors"
HEAD_FILE = "projection_head.safetensors"

_CLASSIFIER, _HEAD = "raysl-classifier-1", "raysl-projection-head-1"
_CLASSIFIER_STD = 0.01  # of the initial weights, as in the SimCLR authors' code
_HEAD_PREFIX = "projection_head."
# The names of the classifier in torchvision and timm, by family.
_NAMES = {"resnet": "fc", "vit": "head", "convnext": "classifier.2"}


class Classifier(nn.Module):
    """An encoder with a classification layer.

    Args:
        encoder: Maps images to features.
        head: The layers kept from the projection head, possibly none.
        class_names: Class names, by number.

    Source: T. Chen et al. 2020, arXiv:2006.10029v2, sec. 2: f_task(x) = W_task sigma(W_1 f(x)) for
    a head of one layer.
    """

    def __init__(self, encoder: Backbone, head: nn.Sequential, class_names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        widths = [layer.out_features for layer in head if isinstance(layer, nn.Linear)]
        self.linear = nn.Linear([encoder.embed_dim, *widths][-1], len(class_names))
        nn.init.normal_(self.linear.weight, std=_CLASSIFIER_STD)
        nn.init.zeros_(self.linear.bias)
        self.class_names = list(class_names)
        self.description: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float, normalised, to logits ``(N, classes)``."""
        return self.logits(self.encoder(images))

    def logits(self, features: Tensor) -> Tensor:
        """Map ``(N, embed_dim)`` to logits ``(N, classes)``."""
        return self.linear(self.head(features))  # type: ignore[no-any-return]


def save_classifier(path: Path, model: Classifier, *, description: Mapping[str, Any]) -> None:
    """Write a classifier; without a head, the original torchvision or timm model loads it.

    Args:
        path: A ``.safetensors`` file, written atomically.
        model: The classifier.
        description: ``backbone`` (its section of the configuration), ``image_size_px``, ``mean``,
            ``std`` and any further facts.
    """
    backbone = {key: v for key, v in description["backbone"].items() if key != "weights"}
    config = BackboneConfig.model_validate(backbone)
    name = _name_in_library(config, model.encoder.net)
    state = dict(model.encoder.net.state_dict())
    state |= {_HEAD_PREFIX + key: value for key, value in model.head.state_dict().items()}
    state |= {f"{name}.{key}": value for key, value in model.linear.state_dict().items()}
    metadata = {
        **description,
        "backbone": backbone,
        "class_names": model.class_names,
        "classifier": name,
        "head": describe_layers(model.head),
    }
    write_network(path, state, kind=_CLASSIFIER, description=metadata)


def load_classifier(path: str | Path) -> Classifier:
    """Load a classifier.

    Args:
        path: ``classifier.safetensors``, or the run folder that holds it.

    Returns:
        A module in evaluation mode on the CPU: ``(N, 3, H, W)`` float, normalised -> logits ``(N,
        classes)``, with ``class_names`` and ``description``. No code from the file is run.

    Raises:
        DataError: If it is not a classifier that raysl wrote, or its weights do not fit.
        ConfigError: If its encoder is a model of timm, and timm is not installed or does not know
            it.
    """
    path = _file_in(path, CLASSIFIER_FILE)
    what = "the classifier of a fine-tuned run (raysl finetune writes one)"
    description, state = read_network(path, kind=_CLASSIFIER, what=what)
    name = str(description.get("classifier"))
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "head": {}, "linear": {}}
    for key, value in state.items():
        if key.startswith(_HEAD_PREFIX):
            parts["head"][key.removeprefix(_HEAD_PREFIX)] = value
        elif key.startswith(f"{name}."):
            parts["linear"][key.removeprefix(f"{name}.")] = value
        else:
            parts["net"][key] = value
    with torch.random.fork_rng(devices=[]):
        model = _build(description, path)
    fill(model.encoder.net, parts["net"], path=path)
    fill(model.head, parts["head"], path=path)
    fill(model.linear, parts["linear"], path=path)
    model.description = description
    return model.eval()


def _build(description: Mapping[str, Any], path: Path) -> Classifier:
    names, size = description.get("class_names"), description.get("image_size_px")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise DataError(f"{path}: its header names no classes")
    if not isinstance(size, int) or size <= 0:
        raise DataError(f"{path}: its header has image_size_px={size!r}, not a positive integer")
    try:
        config = BackboneConfig.model_validate(description.get("backbone"))
    except ValidationError as error:
        raise DataError(
            f"{path}: its header describes no encoder that this version of raysl knows: "
            f"{error.errors()[0]['msg']}"
        ) from None
    try:
        encoder = build_backbone(config, image_size_px=size)
        head = build_layers(description.get("head") or [], inputs=encoder.embed_dim)
        return Classifier(encoder, head, names)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{path}: {error}") from None
    except RuntimeError as error:  # not enough memory for the positions of such images
        raise DataError(f"{path}: its header has image_size_px={size}: {error}") from None


def save_head(path: Path, head: nn.Sequential, *, description: Mapping[str, Any]) -> None:
    """Write a projection head, so that fine-tuning can keep its first layers."""
    metadata = {**description, "layers": describe_layers(head)}
    write_network(path, head.state_dict(), kind=_HEAD, description=metadata)


def load_head(path: str | Path) -> nn.Sequential:
    """Load a projection head.

    Args:
        path: ``projection_head.safetensors``, or the run folder that holds it.

    Returns:
        Its layers, with gradients; no code from the file is run.

    Raises:
        DataError: If it is not a projection head that raysl wrote, or its weights do not fit.
    """
    path = _file_in(path, HEAD_FILE)
    what = "the projection head of a pretraining that raysl wrote"
    description, state = read_network(path, kind=_HEAD, what=what)
    with torch.random.fork_rng(devices=[]):
        try:
            head = build_layers(description.get("layers") or [])
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    fill(head, state, path=path)
    return head


def _file_in(path: str | Path, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _name_in_library(config: BackboneConfig, net: nn.Module) -> str:
    """Return the classifier's name in the encoder's own library."""
    if config.family in _NAMES:
        return _NAMES[config.family]
    if config.family == "timm":
        settings = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
        name = settings.get("classifier") if isinstance(settings, Mapping) else None
        return name if isinstance(name, str) else "classifier"
    # raysl replaced the classifier, the last layer, by the identity.
    names = [path for path, layer in net.named_modules() if isinstance(layer, nn.Identity)]
    return names[-1] if names else "classifier"

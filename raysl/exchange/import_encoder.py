"""Encoder files of other training codes, made into one of raysl's own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.config.load import validate
from raysl.encoder import described_backbone, encoder_file, load_encoder, save_encoder
from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import NAMES, Backbone, BackboneConfig, build_backbone
from raysl.weights.fit import fill, fitted
from raysl.weights.layouts import LAYOUTS, Found, choose, find_networks
from raysl.weights.read import is_safetensors, read_content, read_header
from raysl.weights.recognise import Recognised, recognise
from raysl.weights.whole import appears_whole

_SIZE_PX = 224

Channel = Annotated[float, Field(ge=0, le=1)]


class ImportConfig(Config):
    """What a file cannot tell."""

    backbone: dict[str, Any] = Field(default_factory=dict)
    """Settings of the backbone, as in a configuration: backbone.stem=small. What the tensors tell
    need not be given; a name of torchvision or timm needs no recognition."""
    image_size_px: PositiveInt | None = None
    """Side of the images that it was trained for; null takes that of its positions, else 224."""
    mean: tuple[Channel, Channel, Channel] | None = None
    """Of the channels of its training images; null is that in the file, else
    that of the layout's authors: 0 in ports of SimCLR, ImageNet's in all others."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Their deviation, likewise."""


class Imported(NamedTuple):
    """What was read, and what was taken."""

    backbone: BackboneConfig
    layout: str
    whose: str
    """Whose layout it is."""
    taken: str
    """Which of the file's networks, in words."""
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embed_dim: int
    guessed: tuple[str, ...]
    """What was assumed, as the tensors do not tell."""


class _Beside(NamedTuple):
    """What lies with the weights and tells of them: a header, a config.json."""

    backbone: Mapping[str, Any]
    image_size_px: int | None = None
    mean: Any = None
    std: Any = None


@torch.no_grad()
def import_encoder(path: Path, config: ImportConfig, output: Path, *, layout: str) -> Imported:
    """Make an encoder file of a file of weights.

    Args:
        path: A file in any known layout, or a folder of Hugging Face.
        config: What the file does not tell.
        output: A ``.safetensors`` file; it appears complete or not at all.
        layout: Name of the layout, or ``auto``.

    Raises:
        DataError: If the file cannot be read, is of another layout, or does not fit. No code from
            it is run.
        ConfigError: If settings contradict each other, or the backbone is not recognised.
    """
    file = encoder_file(path)
    content = read_content(file)
    beside = _beside(file)
    networks = find_networks(content)
    found = choose(networks, layout) if networks else None
    name = str({**beside.backbone, **config.backbone}.get("name", ""))
    if found is None and not name:
        raise _not_there(file, layout, [n.address for n in networks])
    if found is None or ":" in name:  # of torchvision or timm, with whatever names those have
        recognised = Recognised({}, None, ())
    else:
        recognised = recognise(found.network.state)
    backbone_config = _backbone_config(file, config, beside, recognised, found)
    size = config.image_size_px or recognised.image_size_px or beside.image_size_px or _SIZE_PX
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(backbone_config, image_size_px=size)
    if not recognised.section:  # names that the general table does not know
        found = _by_names(file, content, backbone, layout)
    assert found is not None
    fill(backbone.net, fitted(found.network.state, backbone.net, where=file))
    backbone.eval()
    mean = config.mean or beside.mean or found.layout.mean
    std = config.std or beside.std or found.layout.std
    given = {f"backbone.{key}" for key in (*config.backbone, *beside.backbone)}
    guessed = [g for g in recognised.guessed if g.partition("=")[0] not in given]
    if None in (config.mean or beside.mean, config.std or beside.std):
        plain = found.layout.mean == (0, 0, 0)
        guessed.append(f"mean and std ({'pixels as they are' if plain else 'of ImageNet'})")
    imported = Imported(
        backbone_config, found.layout.name, found.layout.whose, found.taken, size,
        tuple(map(float, mean)), tuple(map(float, std)), backbone.embed_dim, tuple(guessed),
    )  # fmt: skip
    _write(output, backbone, imported, file)
    return imported


def _backbone_config(
    file: Path,
    config: ImportConfig,
    beside: _Beside,
    recognised: Recognised,
    found: Found | None,
) -> BackboneConfig:
    """Put together what the tensors, layout, header and user say; the last one counts."""
    section = {**recognised.section}
    if found is not None and "patch_size_px" in section:
        dim = found.network.state["patch_embed.proj.weight"].shape[0]
        heads = found.layout.num_heads.get(dim)
        section |= {"num_heads": heads} if heads else {}
        section |= {"positions": found.layout.positions} if "pool" not in section else {}
    section |= {**beside.backbone, **config.backbone}
    if "name" not in section:
        raise ConfigError(
            f"{file}: a network of a size that raysl has no name for ({_seen(recognised)}); give "
            f"backbone.name: {', '.join(NAMES)}, torchvision:NAME or timm:NAME"
        )
    values = {"backbone": {**section, "weights": None}}
    return validate(_Section, values, where=str(file)).backbone


class _Section(Config):
    backbone: BackboneConfig


def _seen(recognised: Recognised) -> str:
    seen = ", ".join(f"{key}={value}" for key, value in recognised.section.items())
    return seen or "neither a ResNet, a ViT nor a ConvNeXt"


def _by_names(file: Path, content: Any, backbone: Backbone, layout: str) -> Found:
    """Find a network by all of its names."""
    wanted = backbone.net.state_dict().keys()
    networks = find_networks(content, wanted)
    if not networks:
        raise DataError(f"{file}: holds no tensor that is named as one of the backbone's")
    most = max(len(network.state.keys() & wanted) for network in networks)
    best = [network for network in networks if len(network.state.keys() & wanted) == most]
    found = choose(best, layout)
    if found is None:
        raise _not_there(file, layout, [network.address for network in best])
    return found


def _not_there(file: Path, layout: str, addresses: list[str]) -> DataError:
    if not addresses:
        return DataError(
            f"{file}: holds no encoder that is known by its names (ResNet, ViT, ConvNeXt); if "
            "it is one of torchvision's or timm's, give backbone.name=torchvision:NAME or timm:NAME"
        )
    there = ", ".join(sorted({address or "the whole file" for address in addresses}))
    names = ", ".join(known.name for known in LAYOUTS)
    return DataError(
        f"{file}: holds no network of the layout {layout}; there is: {there}. Leave --layout out, "
        f"or give the right one: {names}"
    )


def _beside(file: Path) -> _Beside:
    """Read what raysl's exports keep in their header, else what timm keeps in config.json."""
    if is_safetensors(file):
        header = read_header(file)
        if "raysl" in header:
            try:
                known = json.loads(header["raysl"])
            except ValueError:
                known = None
            if not isinstance(known, dict):
                raise DataError(f"{file}: an encoder of raysl with a damaged header")
            section = described_backbone(known, where=file).model_dump(mode="json")
            section.pop("weights")
            size = known.get("image_size_px")
            return _Beside(section, size, known.get("mean"), known.get("std"))
    try:
        config = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
        pretrained = config["pretrained_cfg"]
        size = int(pretrained["input_size"][-1])
        return _Beside({}, size, pretrained["mean"], pretrained["std"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return _Beside({})


def _write(output: Path, backbone: Backbone, imported: Imported, file: Path) -> None:
    images = torch.randn(2, 3, imported.image_size_px, imported.image_size_px)
    features = backbone(images)
    if not features.isfinite().all():
        raise DataError(f"{file}: its features of random images are not finite")
    description = {
        "backbone": imported.backbone.model_dump(mode="json"),
        "image_size_px": imported.image_size_px,
        "mean": list(imported.mean),
        "std": list(imported.std),
        "imported": {"file": file.name, "layout": imported.layout, "network": imported.taken},
    }
    with appears_whole(output) as temporary:
        save_encoder(temporary, backbone, description=description)
        if not torch.allclose(load_encoder(temporary)(images), features, rtol=1e-5, atol=1e-5):
            raise DataError(f"{output}: loaded again, it gives other features; nothing is left")

"""Import weights of other training code as an encoder file of raysl."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.config.load import validate
from raysl.encoder.dinov2_names import LAYER_SCALE_NAME
from raysl.encoder.file import encoder_file, load_encoder, save_encoder
from raysl.encoder.fit import fill, fitted
from raysl.encoder.layouts import LAYOUTS, Network
from raysl.encoder.networks import ChosenNetwork, choose, find_networks, networks_named
from raysl.encoder.normalisation import IMAGENET, PIXELS
from raysl.encoder.read import read_content
from raysl.encoder.recognise import Recognised, assumed, recognise
from raysl.errors import ConfigError, DataError
from raysl.exchange.beside import Beside, read_beside
from raysl.folder.whole import appears_whole
from raysl.nn.backbones import NAMES, Backbone, BackboneConfig, build_backbone
from raysl.nn.vit import VIT_SIZES

_SIZE_PX, _SMALL_PX = 224, 32
# Layouts that many projects use, so they do not tell the normalisation.
_SHARED_LAYOUTS = ("torchvision", "timm", "transformers", "other")

Channel = Annotated[float, Field(ge=0, le=1)]


class ImportConfig(Config):
    """The settings that a weight file may not contain."""

    network: str | None = None
    """Address in the file of the network to import, as raysl import prints it, such as
    student/module.backbone. (with the final dot); null takes the one that the layout prefers."""
    backbone: dict[str, Any] = Field(default_factory=dict)
    """Settings of the backbone, as in a configuration: backbone.stem=small. Names and shapes of the
    tensors show most of them, but none if backbone.name is a model of torchvision or timm."""
    image_size_px: PositiveInt | None = None
    """Side of the training images in pixels; null takes the side that the position embeddings fit,
    else 224, or 32 with a stem for small images."""
    mean: tuple[Channel, Channel, Channel] | None = None
    """Mean of each channel of the training images, in [0, 1]; null takes the value in the file or
    beside it, else the value that the layout's authors use."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of each channel; null takes the value in the file or beside it, else the
    value that the layout's authors use."""


class Imported(NamedTuple):
    """The result of an import; field names are keys of ``raysl import --json``."""

    backbone: BackboneConfig
    layout: str
    whose: str
    """The project whose code writes the layout."""
    taken: str
    """The imported network, its address, and the networks that were not imported, in words."""
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embed_dim: int
    told: str
    """The files beside the weights that hold metadata; empty if there are none."""
    guessed: tuple[str, ...]
    """Assumed settings, each as ``setting (reason); otherwise other settings``."""


@torch.no_grad()
def import_encoder(path: Path, config: ImportConfig, output: Path, *, layout: str) -> Imported:
    """Convert a weight file to an encoder file.

    Args:
        path: A file in any known layout, or a Hugging Face folder.
        config: Settings that the file may not contain.
        output: The ``.safetensors`` file to write; it appears atomically.
        layout: Name of the layout, or ``auto``.

    Raises:
        DataError: If the file cannot be read, has another layout, or does not fit the backbone. No
            code from it is run.
        ConfigError: If settings contradict each other, or the backbone is not recognised.
    """
    file = encoder_file(path)
    content = read_content(file)
    beside = read_beside(file)
    networks = find_networks(content)
    chosen = choose(networks, layout, address=_address(file, config, networks))
    name = str({**beside.backbone, **config.backbone}.get("name", ""))
    if chosen is None and not name:
        raise _no_network(file, layout, [n.address for n in networks])
    recognised = Recognised({}, None, ()) if chosen is None else recognise(chosen.network.state)
    if ":" in name:  # a torchvision or timm model, with its own names
        recognised = recognised._replace(section={}, assumptions=())
    backbone_config = _backbone_config(file, config, beside, recognised, chosen)
    size = config.image_size_px or recognised.image_size_px or beside.image_size_px
    usual_px = _SIZE_PX if backbone_config.stem == "imagenet" else _SMALL_PX
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(backbone_config, image_size_px=size or usual_px)
    if not recognised.section:  # find the network by the names of this backbone's tensors
        chosen = _by_names(file, content, backbone, layout, config.network)
    assert chosen is not None
    fill(backbone.net, _fitted(chosen, backbone, file))
    backbone.eval()
    normalisation = chosen.layout.normalisation(chosen.network)
    mean = config.mean or beside.mean or normalisation.mean
    std = config.std or beside.std or normalisation.std
    settings = {f"backbone.{key}" for key in (*config.backbone, *beside.backbone)}
    assumptions = _assumptions(recognised, chosen, config, settings)
    if size is None:
        because = "the file does not tell the side of its images"
        assumptions.append(
            assumed(f"image_size_px={usual_px}", because, otherwise="image_size_px=N")
        )
    if None in (config.mean or beside.mean, config.std or beside.std):
        assumptions.append(_assumed_normalisation(chosen, mean, std))
    imported = Imported(
        backbone_config, chosen.layout.name, chosen.layout.origin, chosen.description,
        size or usual_px, tuple(map(float, mean)), tuple(map(float, std)),
        backbone.embed_dim, beside.source, tuple(assumptions),
    )  # fmt: skip
    _write(output, backbone, imported, file)
    return imported


def _fitted(chosen: ChosenNetwork, backbone: Backbone, file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone; an error on layer scales names backbones with them."""
    try:
        return fitted(chosen.network.state, backbone.net, where=file)
    except DataError as error:
        if LAYER_SCALE_NAME not in chosen.network.state or backbone.net.state_dict().keys() >= {
            LAYER_SCALE_NAME
        }:
            raise
        raise DataError(
            f"{error}. Its network has layer scales, as some of timm's: give backbone.name=timm:"
            "NAME of the same size, such as timm:vit_small_patch14_dinov2"
        ) from None


def _address(file: Path, config: ImportConfig, networks: list[Network]) -> str | None:
    """Return the configured address, after checking that the file has it; None if it is not set."""
    if config.network is None:
        return None
    addresses = sorted({network.address for network in networks})
    if addresses and config.network not in addresses:
        held = ", ".join(address or "'' (the whole file)" for address in addresses)
        raise ConfigError(f"{file}: holds no network={config.network}; it holds: {held}")
    return config.network


def _assumptions(
    recognised: Recognised, chosen: ChosenNetwork, config: ImportConfig, settings: set[str]
) -> list[str]:
    """Describe the assumed network and the assumed settings of the backbone.

    Args:
        recognised: The recognised backbone.
        chosen: The network to import.
        config: The settings of the import.
        settings: Dotted names of settings that are not assumed.
    """
    settings = settings | {f"backbone.{key}" for key in chosen.layout.fixed(chosen.network)}
    assumptions = [a for a in recognised.assumptions if a.partition("=")[0] not in settings]
    if config.network is None and chosen.others:
        others = " or ".join(f"network={address or repr('')}" for address in chosen.others)
        network = f"network={chosen.network.address or repr('')}"
        assumptions.insert(0, assumed(network, chosen.what, otherwise=others))
    return assumptions


def _assumed_normalisation(chosen: ChosenNetwork, mean: Any, std: Any) -> str:
    normalisation = chosen.layout.normalisation(chosen.network)
    if chosen.layout.name in _SHARED_LAYOUTS:
        because = f"{normalisation.origin}, as in most training code"
    else:
        because = f"{normalisation.origin}, as in the code of this layout"
    other = PIXELS if normalisation != PIXELS else IMAGENET
    return assumed(
        f"mean={_list(mean)} std={_list(std)}",
        because,
        otherwise=f"mean={_list(other.mean)} std={_list(other.std)} ({other.origin}) or your own",
    )


def _list(values: Any) -> str:
    """Format a list as a single word of a command line."""
    return f"[{','.join(f'{float(value):g}' for value in values)}]"


def _backbone_config(
    file: Path,
    config: ImportConfig,
    beside: Beside,
    recognised: Recognised,
    chosen: ChosenNetwork | None,
) -> BackboneConfig:
    """Merge the backbone's settings from tensors, layout, files beside the weights and user.

    Later ones override earlier ones.
    """
    section = {**recognised.section}
    size = VIT_SIZES.get(str(section.get("name")))
    if chosen is not None and section:
        section |= chosen.layout.fixed(chosen.network)
    section |= {**beside.backbone, **config.backbone}
    if size is not None and section.get("num_heads") == size.num_heads:
        del section["num_heads"]  # implied by the name
    if "name" not in section:
        raise ConfigError(
            f"{file}: raysl has no backbone of this size ({_section_text(recognised)}); give "
            f"backbone.name: {', '.join(NAMES)}, torchvision:NAME or timm:NAME"
        )
    values = {"backbone": {**section, "weights": None}}
    return validate(_Section, values, where=str(file)).backbone


class _Section(Config):
    backbone: BackboneConfig


def _section_text(recognised: Recognised) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in recognised.section.items())
    return settings or "neither a ResNet, a ViT nor a ConvNeXt"


def _by_names(
    file: Path, content: Any, backbone: Backbone, layout: str, address: str | None
) -> ChosenNetwork:
    """Find a network by the names of all its tensors."""
    names = backbone.net.state_dict().keys()
    networks = [n for n in networks_named(content, names) if n.state.keys() & names]
    if not networks:
        raise DataError(f"{file}: no tensor has a name of one of the backbone's")
    chosen = choose(networks, layout, address=address)
    if chosen is None:
        raise _no_network(file, layout, [network.address for network in networks])
    return chosen


def _no_network(file: Path, layout_name: str, addresses: list[str]) -> DataError:
    if not addresses:
        return DataError(
            f"{file}: no tensor names of a ResNet, ViT or ConvNeXt were found; for other models of "
            "torchvision or timm, give backbone.name=torchvision:NAME or timm:NAME"
        )
    held = ", ".join(sorted({address or "the whole file" for address in addresses}))
    names = ", ".join(layout.name for layout in LAYOUTS)
    return DataError(
        f"{file}: holds no network of the layout {layout_name}; it holds: {held}. Leave --layout "
        f"out, or give another layout: {names}"
    )


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
            raise DataError(f"{output}: the written encoder gives other features; it was deleted")

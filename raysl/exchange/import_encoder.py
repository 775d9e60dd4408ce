"""Import weights of other training code as an encoder file of raysl."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.config.load import validate
from raysl.encoder.dinov2_names import OF_DINOV2
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
# Layouts that many projects share, recognised by parameter names alone.
_BY_NAMES_ALONE = ("torchvision", "timm", "transformers", "other")

Channel = Annotated[float, Field(ge=0, le=1)]


class ImportConfig(Config):
    """The settings that a weight file may not contain."""

    network: str | None = None
    """Address in the file of the network to import, as this verb prints it, such as
    student/module.backbone. with the dot; null takes the one that the layout prefers."""
    backbone: dict[str, Any] = Field(default_factory=dict)
    """Settings of the backbone, as in a configuration: backbone.stem=small. Names and shapes of the
    tensors show most of them; with a name of torchvision or timm nothing is recognised."""
    image_size_px: PositiveInt | None = None
    """Side of the training images in pixels; null takes that of the position embeddings, else 224,
    or 32 with a stem for small images."""
    mean: tuple[Channel, Channel, Channel] | None = None
    """Mean of the channels of the training images in [0, 1]; null takes the value in the file or
    beside it, else that of the layout's authors."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of these channels, likewise."""


class Imported(NamedTuple):
    """The result of an import."""

    backbone: BackboneConfig
    layout: str
    whose: str
    """The project of the layout."""
    taken: str
    """Description of the imported network of the file."""
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embed_dim: int
    told: str
    """The file beside the weights that holds metadata; empty if there is none."""
    guessed: tuple[str, ...]
    """Assumptions about missing information: ``setting (why); otherwise setting``."""


@torch.no_grad()
def import_encoder(path: Path, config: ImportConfig, output: Path, *, layout: str) -> Imported:
    """Convert a weight file to an encoder file.

    Args:
        path: A file in any known layout, or a Hugging Face folder.
        config: The settings that the file does not contain.
        output: A ``.safetensors`` file, written atomically.
        layout: Name of the layout, or ``auto``.

    Raises:
        DataError: If the file cannot be read, is of another layout, or does not fit. No code from
            it is run.
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
        recognised = recognised._replace(section={}, guessed=())
    backbone_config = _backbone_config(file, config, beside, recognised, chosen)
    size = config.image_size_px or recognised.image_size_px or beside.image_size_px
    usual_px = _SIZE_PX if backbone_config.stem == "imagenet" else _SMALL_PX
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(backbone_config, image_size_px=size or usual_px)
    if not recognised.section:  # names that the general table lacks
        chosen = _by_names(file, content, backbone, layout, config.network)
    assert chosen is not None
    fill(backbone.net, _fitted(chosen, backbone, file))
    backbone.eval()
    normalisation = chosen.layout.normalisation(chosen.network)
    mean = config.mean or beside.mean or normalisation.mean
    std = config.std or beside.std or normalisation.std
    settings = {f"backbone.{key}" for key in (*config.backbone, *beside.backbone)}
    guessed = _guessed(recognised, chosen, config, settings)
    if size is None:
        because = "nothing tells the side of its images"
        guessed.append(assumed(f"image_size_px={usual_px}", because, otherwise="image_size_px=N"))
    if None in (config.mean or beside.mean, config.std or beside.std):
        guessed.append(_assumed_normalisation(chosen, mean, std))
    imported = Imported(
        backbone_config, chosen.layout.name, chosen.layout.whose, chosen.taken, size or usual_px,
        tuple(map(float, mean)), tuple(map(float, std)), backbone.embed_dim, beside.source,
        tuple(guessed),
    )  # fmt: skip
    _write(output, backbone, imported, file)
    return imported


def _fitted(chosen: ChosenNetwork, backbone: Backbone, file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone; for layer scales, the error says what reads them."""
    try:
        return fitted(chosen.network.state, backbone.net, where=file)
    except DataError as error:
        if OF_DINOV2 not in chosen.network.state or backbone.net.state_dict().keys() >= {OF_DINOV2}:
            raise
        raise DataError(
            f"{error}. It has layer scales, which timm's networks have: give backbone.name=timm:"
            "NAME, such as timm:vit_small_patch14_dinov2, whose size is that of the file"
        ) from None


def _address(file: Path, config: ImportConfig, networks: list[Network]) -> str | None:
    """Return the configured address, after checking that it is in the file."""
    if config.network is None:
        return None
    addresses = sorted({network.address for network in networks})
    if addresses and config.network not in addresses:
        held = ", ".join(address or "'' (the whole file)" for address in addresses)
        raise ConfigError(f"{file}: holds no network={config.network}; there is: {held}")
    return config.network


def _guessed(
    recognised: Recognised, chosen: ChosenNetwork, config: ImportConfig, settings: set[str]
) -> list[str]:
    """List the assumptions about network and backbone that ``settings`` do not decide."""
    settings = settings | {f"backbone.{key}" for key in chosen.layout.fixed(chosen.network)}
    guessed = [g for g in recognised.guessed if g.partition("=")[0] not in settings]
    if config.network is None and chosen.others:
        others = " or ".join(f"network={address or repr('')}" for address in chosen.others)
        network = f"network={chosen.network.address or repr('')}"
        guessed.insert(0, assumed(network, chosen.what, otherwise=others))
    return guessed


def _assumed_normalisation(chosen: ChosenNetwork, mean: Any, std: Any) -> str:
    normalisation = chosen.layout.normalisation(chosen.network)
    if chosen.layout.name in _BY_NAMES_ALONE:
        because = f"{normalisation.whose}, which most training codes have"
    else:
        because = f"{normalisation.whose}, as in the code of this layout"
    other = PIXELS if normalisation != PIXELS else IMAGENET
    return assumed(
        f"mean={_list(mean)} std={_list(std)}",
        because,
        otherwise=f"mean={_list(other.mean)} std={_list(other.std)} ({other.whose}) or your own",
    )


def _list(values: Any) -> str:
    """Format a list as one word of a command line."""
    return f"[{','.join(f'{float(value):g}' for value in values)}]"


def _backbone_config(
    file: Path,
    config: ImportConfig,
    beside: Beside,
    recognised: Recognised,
    chosen: ChosenNetwork | None,
) -> BackboneConfig:
    """Merge the settings from tensors, layout, files beside and user; later ones win."""
    section = {**recognised.section}
    size = VIT_SIZES.get(str(section.get("name")))
    if chosen is not None and section:
        section |= chosen.layout.fixed(chosen.network)
    section |= {**beside.backbone, **config.backbone}
    if size is not None and section.get("num_heads") == size.num_heads:
        del section["num_heads"]  # implied by the name
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
    settings = ", ".join(f"{key}={value}" for key, value in recognised.section.items())
    return settings or "neither a ResNet, a ViT nor a ConvNeXt"


def _by_names(
    file: Path, content: Any, backbone: Backbone, layout: str, address: str | None
) -> ChosenNetwork:
    """Find a network by the names of all its tensors."""
    names = backbone.net.state_dict().keys()
    networks = [n for n in networks_named(content, names) if n.state.keys() & names]
    if not networks:
        raise DataError(f"{file}: holds no tensor that is named as one of the backbone's")
    chosen = choose(networks, layout, address=address)
    if chosen is None:
        raise _no_network(file, layout, [network.address for network in networks])
    return chosen


def _no_network(file: Path, layout_name: str, addresses: list[str]) -> DataError:
    if not addresses:
        return DataError(
            f"{file}: holds no encoder that is known by its names (ResNet, ViT, ConvNeXt); if "
            "it is one of torchvision's or timm's, give backbone.name=torchvision:NAME or timm:NAME"
        )
    held = ", ".join(sorted({address or "the whole file" for address in addresses}))
    names = ", ".join(layout.name for layout in LAYOUTS)
    return DataError(
        f"{file}: holds no network of the layout {layout_name}; there is: {held}. Leave --layout "
        f"out, or give the right one: {names}"
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
            raise DataError(f"{output}: loaded again, it gives other features; nothing is left")

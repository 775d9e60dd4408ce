"""The settings of `raysl evaluate`, and their defaults from the run that trained the encoder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from raysl.config.base import Config, PositiveInt
from raysl.config.load import (
    apply_overrides,
    read_mapping,
    validate,
    validated,
)
from raysl.encoder.file import read_description, save_encoder
from raysl.errors import ConfigError, DataError
from raysl.evaluate.registry import ProtocolSettings
from raysl.nn.backbones import NAMES, BackboneConfig, build_backbone, check_model_name
from raysl.run.places import start_folder
from raysl.run.recipe import ClusterConfig
from raysl.sources.belonging import OF_SOURCE, named_source, without_other_source
from raysl.sources.filter import Condition
from raysl.sources.pixels import ColorProfile, Intensity, Pages
from raysl.sources.place import absolute_config, place_key
from raysl.sources.source import DataConfig, LocatedSource, WeightedSource
from raysl.track.config import TrackConfig, check_run_name
from raysl.track.run_folder import RunFolder

NOT_FROM_RUN = ("data.labels", "data.if_changed")
"""Settings of a run's images that its evaluation takes over in no case."""

# What says which images, and how they are decoded, of what an evaluation knows. Not data.labels: a
# pretraining that is to see no labels may well be measured with them.
_FROM_RUN = tuple(
    key for key in (*OF_SOURCE, "torchvision_root") if f"data.{key}" not in NOT_FROM_RUN
)
_NOT_IMAGES = {"test_source", "test_limit", "test", "labels"}
_EVALUATIONS = "evaluations"


class EvaluationTestConfig(Config):
    """How ``test_source`` is read; of settings that are null, as ``data.source`` is."""

    image_column: str | None = None
    """null takes that of ``data.source``."""
    label_column: str | None = None
    """null takes that of ``data.source``."""
    filter: tuple[Condition, ...] = ()
    """Of the test images alone."""
    limit: PositiveInt | None = None
    """Of the test images alone, spread over their source."""
    split: str | None = None
    """null takes the validation split, else the test split, else all."""
    intensity: Intensity | None = None
    """null takes that of ``data.source``."""
    color_profile: ColorProfile | None = None
    """null takes that of ``data.source``."""
    pages: Pages | None = None
    """null takes that of ``data.source``."""


class EvaluationData(LocatedSource):
    """The labelled images: those that train the probes, and those that test them."""

    mix: tuple[WeightedSource, ...] = ()
    """More images for the probes, as of a run; their weights do nothing here."""
    test_source: str | None = None
    """Test images. null takes the validation split that lies beside the source, else its test
    split; without either, a fifth of the labels is held out for testing. Where the source has no
    labels, or none of the same classes, the probes are trained and tested within these images."""
    test: EvaluationTestConfig = EvaluationTestConfig()
    """More of test_source."""
    test_limit: PositiveInt | None = None
    """Test on so many images at most, drawn at random, always the same."""
    labels: Literal["none"] | None = None
    """none: the source has no labels, whatever its folders or columns are called. A run's setting
    is not taken over: what was trained without labels may be measured with them."""


class FeaturesConfig(Config):
    """How images come to the encoder."""

    size_px: PositiveInt | None = None
    """Side of the square; null takes what the encoder was made for."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Side of the centred square over the image's shorter side (0.875 is usual for ImageNet)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass."""


class EvaluationConfig(ProtocolSettings):
    """One evaluation."""

    name: str | None = None
    """Folder of the evaluation below the run's; null takes the name of the images."""
    output_dir: str = "runs"
    """Where the folder of an encoder goes that lies in no run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of random weights, where a backbone is named instead of an encoder."""
    data: EvaluationData
    backbone: BackboneConfig | None = None
    """More of a backbone that is named instead of an encoder, such as backbone.stem=cifar."""
    features: FeaturesConfig = FeaturesConfig()
    transfer: EvaluationData | None = None
    """Protocol transfer: other labelled images, on which kNN and the linear probe are measured."""
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()


class EncoderOrigin(NamedTuple):
    """The encoder that is measured."""

    encoder: Path
    """Its file."""
    folder: Path
    """Evaluations lie below it."""
    run: Path | None
    """The run folder that trained it, if one did."""
    size_px: int
    """What it was made for."""


def load_evaluation(
    encoder: str, overrides: Sequence[str], *, home: Path
) -> tuple[EvaluationConfig, EncoderOrigin]:
    """Read the settings of an evaluation and find its encoder; a named one is made and written.

    Args:
        encoder: A run folder, an encoder file, or the name of a backbone (random weights).
        overrides: ``section.key=value``.
        home: What relative paths of results are relative to.

    Raises:
        ConfigError: Lists every bad key at once; also if there are no images.
        DataError: If there is no such encoder.
    """
    path = _existing(encoder, home)
    values = _values_of_run(path, overrides) if path is not None else {}
    values = apply_overrides(values, overrides)
    if path is None:
        section = values.get("backbone") or {}
        values["backbone"] = {"name": encoder} | section
    elif "backbone" in values:
        raise ConfigError(f"backbone: {encoder} is an encoder already; drop the section")
    if "source" not in (values.get("data") or {}):
        raise ConfigError(f"data.source: missing; say on which images {encoder} is measured")
    config = _with_absolute_sources(
        validate(EvaluationConfig, values, where=" ".join(["raysl evaluate", encoder]))
    )
    if config.name is not None:
        try:
            check_run_name(config.name)
        except ValueError as error:
            raise ConfigError(f"name: {error}") from None
    output = home / Path(config.output_dir).expanduser()
    if path is None:
        return config, _untrained(config, output)
    return config, _origin_of(path, output)


def _with_absolute_sources(config: EvaluationConfig) -> EvaluationConfig:
    update = {"data": _absolute(config.data)}
    if config.transfer is not None:
        update["transfer"] = _absolute(config.transfer)
    return config.model_copy(update=update)


def _absolute(data: EvaluationData, *, first: Sequence[Path] = ()) -> EvaluationData:
    test = absolute_config(data.test, first=first)
    found = absolute_config(data, first=first)
    return found if test is data.test else found.model_copy(update={"test": test})


def labels_note(config: EvaluationConfig, origin: EncoderOrigin) -> str:
    """Return the line for a run that was to see no labels; empty for another."""
    run = read_mapping(RunFolder(origin.run).config) if origin.run is not None else {}
    data = run.get("data") or {}
    if data.get("labels") != "none" or config.data.labels == "none":
        return ""
    if place_key(str(data.get("source"))) != place_key(config.data.source):
        return ""
    return (
        f"{config.data.source} is measured with its labels, although the run was trained with "
        f"data.labels=none; data.labels=none here leaves them out, too"
    )


def evaluation_folder(config: EvaluationConfig, origin: EncoderOrigin) -> Path:
    """Return where an evaluation lies."""
    name = config.name or _name_of(config.data.source)
    return origin.folder / _EVALUATIONS / name


def data_config(data: EvaluationData) -> DataConfig:
    """Return what opens the training images of an evaluation."""
    return validate(DataConfig, images_of(data) | {"labels": data.labels}, where="data")


def images_of(data: EvaluationData) -> dict[str, Any]:
    """Return the settings of the training images as plain values."""
    return data.model_dump(mode="json", exclude=_NOT_IMAGES)


def _existing(encoder: str, home: Path) -> Path | None:
    for place in (Path(encoder).expanduser(), home / Path(encoder).expanduser()):
        if place.exists():
            return place.absolute()
    if encoder in NAMES or encoder.startswith(("torchvision:", "timm:")):
        return None
    raise DataError(
        f"{encoder}: no such run folder or encoder file, and no backbone; give a run folder, an "
        f"encoder.safetensors, or for random weights one of {', '.join(NAMES)}, torchvision:NAME, "
        f"timm:NAME"
    )


def _values_of_run(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What a run says of its images; nothing of those that others are given for."""
    folder = path if path.is_dir() else path.parent
    file = RunFolder(folder).config
    if not file.exists():
        return {}
    run = read_mapping(file)
    first = start_folder(RunFolder(folder), str(run.get("output_dir", "runs")))
    run, _ = without_other_source(
        run,
        source=named_source(overrides, "data.source"),
        test_source=named_source(overrides, "data.test_source"),
        first=first,
    )
    data, evaluate = run.get("data") or {}, run.get("evaluate") or {}
    images = {key: data[key] for key in _FROM_RUN if key in data}
    if evaluate.get("source") is not None:
        images["test_source"] = evaluate["source"]
        names = [name for name in EvaluationTestConfig.model_fields if name in evaluate]
        images["test"] = {name: evaluate[name] for name in names}
    if "source" in images:
        found = validated(EvaluationData, images)
        if not isinstance(found, list):  # what is wrong is told when all of it is looked at
            images = _absolute(found, first=first).model_dump(mode="json", exclude_unset=True)
    return {
        "track": run.get("track") or {},
        "features": {"crop_fraction": evaluate.get("crop_fraction", 1.0)},
        **({"data": images} if images else {}),
    }


def _origin_of(path: Path, output: Path) -> EncoderOrigin:
    folder = path if path.is_dir() else path.parent
    encoder = RunFolder(folder).encoder if path.is_dir() else path
    if not encoder.is_file():
        raise DataError(
            f"{path}: holds no {encoder.name}; give the folder of a finished run, or an encoder "
            f"file"
        )
    size_px = _size_of(read_description(encoder))
    in_run = RunFolder(folder).config.exists()
    if in_run and encoder == RunFolder(folder).encoder:
        return EncoderOrigin(encoder, folder, folder, size_px)
    own = folder.name if encoder.stem == "encoder" else encoder.stem
    return EncoderOrigin(encoder, output / re.sub(r"[^A-Za-z0-9._=-]+", "-", own), None, size_px)


def _untrained(config: EvaluationConfig, output: Path) -> EncoderOrigin:
    """Write an encoder of random weights, a function of the seed; the same file every time."""
    backbone, size_px = config.backbone, config.features.size_px
    assert backbone is not None
    if size_px is None:
        raise ConfigError(
            f"features.size_px: {backbone.name} has random weights and was made for no size; say "
            f"at which it sees the images, such as features.size_px=32 for CIFAR-10"
        )
    if backbone.weights is not None:
        raise ConfigError("backbone.weights: give that file or folder itself to raysl evaluate")
    check_model_name(backbone)
    data = data_config(config.data)
    described: Mapping[str, Any] = {
        "backbone": backbone.model_dump(mode="json"),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size_px": size_px,
        "method": "none: random weights",
        "seed": config.seed,
    }
    name = f"untrained-{re.sub(r'[^A-Za-z0-9._=-]+', '-', backbone.name)}-seed{config.seed}"
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    file = RunFolder(folder).encoder
    # One that is there stays: the bytes of safetensors' header change from one writing to the next.
    if not file.exists() or not _says(read_description(file), described):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = build_backbone(backbone, image_size_px=size_px)
        save_encoder(file, network, description=dict(described))
    return EncoderOrigin(file, folder, None, size_px)


def _says(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a file's header says what it would say; it leaves out where weights came from."""
    section = {key: value for key, value in wanted["backbone"].items() if key != "weights"}
    return all(
        found.get(key) == value for key, value in (dict(wanted) | {"backbone": section}).items()
    )


def _size_of(description: Mapping[str, Any]) -> int:
    size = description.get("image_size_px", 224)
    return size if isinstance(size, int) and size > 0 else 224


def _name_of(source: str) -> str:
    """A folder's name out of a source's: its last part, without what folders cannot be called."""
    last = source.rstrip("/").rpartition("/")[2]
    last = re.sub(r"\.(parquet|tar)$", "", last)
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", last).strip("-._=") or "images"

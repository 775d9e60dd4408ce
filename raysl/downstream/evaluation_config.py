"""The settings of `raysl evaluate`, and their defaults from the run that trained the encoder."""

import re
import shutil
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
from raysl.encoder.file import encoder_file, read_description, save_encoder
from raysl.errors import ConfigError, DataError
from raysl.evaluate.embedding import encoder_digest
from raysl.evaluate.registry import ProtocolSettings
from raysl.folder.address import is_address
from raysl.folder.whole import appears_whole
from raysl.nn.backbones import NAMES, BackboneConfig, build_backbone, check_model_name
from raysl.run.cluster_config import ClusterConfig
from raysl.run.places import start_folder
from raysl.sources.belonging import OF_SOURCE, named_source, without_other_source
from raysl.sources.filter import Condition
from raysl.sources.pixels import ColorProfile, Intensity, Pages
from raysl.sources.place import absolute_config, place_key
from raysl.sources.source import DataConfig, LocatedSource, WeightedSource
from raysl.store.reading import local_copy
from raysl.track.config import DiskDir, TrackConfig, check_run_name
from raysl.track.run_folder import RunFolder

NOT_FROM_RUN = ("data.labels", "data.if_changed")
"""Settings of a run's images that its evaluation never inherits."""

# Settings that name images and their decoding. data.labels is not among them: a pretraining without
# labels may still be measured with labels.
_FROM_RUN = tuple(
    key for key in (*OF_SOURCE, "torchvision_root") if f"data.{key}" not in NOT_FROM_RUN
)
_NOT_IMAGES = {"test_source", "test_limit", "test", "labels"}
_EVALUATIONS = "evaluations"


class EvaluationTestConfig(Config):
    """How ``test_source`` is read; settings that are null equal those of ``data.source``."""

    image_column: str | None = None
    """null uses the value of ``data.source``."""
    label_column: str | None = None
    """null uses the value of ``data.source``."""
    filter: tuple[Condition, ...] = ()
    """Conditions on the test images."""
    limit: PositiveInt | None = None
    """Maximal number of test images, spread over their source."""
    split: str | None = None
    """null uses the validation split, else the test split, else all images."""
    intensity: Intensity | None = None
    """null uses the value of ``data.source``."""
    color_profile: ColorProfile | None = None
    """null uses the value of ``data.source``."""
    pages: Pages | None = None
    """null uses the value of ``data.source``."""


class EvaluationData(LocatedSource):
    """The labelled images: those that train the probes, and those that test them."""

    mix: tuple[WeightedSource, ...] = ()
    """Additional images for the probes, as in a run; weights have no effect here."""
    test_source: str | None = None
    """Test images. null uses the validation split of the source, else its test split; without
    either, a fifth of the labels is held out for testing. If the source has no labels of the test
    classes, the probes are trained and tested on parts of these images."""
    test: EvaluationTestConfig = EvaluationTestConfig()
    """Further settings of test_source."""
    test_limit: PositiveInt | None = None
    """Maximal number of test images, a fixed random subset."""
    labels: Literal["none"] | None = None
    """none: treat the source as unlabelled, whatever its folders or columns are called. The setting
    is not inherited from a run: an encoder trained without labels may be measured with them."""


class FeaturesConfig(Config):
    """How images are given to the encoder."""

    size_px: PositiveInt | None = None
    """Side of the square; null uses the image size that the encoder was trained for."""
    crop_fraction: Annotated[float, Field(ge=0.01, le=1.0)] = 1.0
    """Side of the centred square over the image's shorter side (0.875 is usual for ImageNet)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""


class EvaluationConfig(ProtocolSettings):
    """One evaluation."""

    name: str | None = None
    """Folder of the evaluation below the run's; null uses the name of the images."""
    output_dir: DiskDir = "runs"
    """Parent of the results of an encoder that is not in a run folder on a disk."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the random weights, if a backbone is named instead of an encoder."""
    data: EvaluationData
    backbone: BackboneConfig | None = None
    """Further settings of a backbone that is named instead of an encoder, such as
    backbone.stem=cifar."""
    features: FeaturesConfig = FeaturesConfig()
    transfer: EvaluationData | None = None
    """Protocol transfer: other labelled images, on which kNN and the linear probe are measured."""
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()


class EncoderOrigin(NamedTuple):
    """The encoder to measure."""

    encoder: Path
    """Path of ``encoder.safetensors``."""
    folder: Path
    """Parent folder of ``evaluations``."""
    run: Path | None
    """Folder of the run that trained the encoder; None if unknown."""
    size_px: int
    """Image size that the encoder was trained for."""


def load_evaluation(
    encoder: str, overrides: Sequence[str], *, home: Path
) -> tuple[EvaluationConfig, EncoderOrigin]:
    """Read the settings of an evaluation and find its encoder; write one for a backbone's name.

    Args:
        encoder: A run folder, an encoder file, or the name of a backbone (random weights).
        overrides: ``section.key=value``.
        home: Base folder of relative output paths.

    Raises:
        ConfigError: Lists every bad key at once; also if no images are named.
        DataError: If the encoder does not exist.
    """
    path = _find_encoder(encoder, home)
    values = _values_of_run(path, overrides) if path is not None else {}
    values = apply_overrides(values, overrides)
    if path is None:
        section = values.get("backbone") or {}
        values["backbone"] = {"name": encoder} | section
    elif "backbone" in values:
        raise ConfigError(f"backbone: {encoder} is already an encoder; drop the section")
    if "source" not in (values.get("data") or {}):
        raise ConfigError(f"data.source: missing; name the images to measure {encoder} on")
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
    return config, _origin_of(_placed(path, output) if is_address(encoder) else path, output)


def _with_absolute_sources(config: EvaluationConfig) -> EvaluationConfig:
    update = {"data": _absolute(config.data)}
    if config.transfer is not None:
        update["transfer"] = _absolute(config.transfer)
    return config.model_copy(update=update)


def _absolute(data: EvaluationData, *, first: Sequence[Path] = ()) -> EvaluationData:
    test = absolute_config(data.test, first=first)
    absolute = absolute_config(data, first=first)
    return absolute if test is data.test else absolute.model_copy(update={"test": test})


def labels_note(config: EvaluationConfig, origin: EncoderOrigin) -> str:
    """Return a note if a run trained without labels is measured with them; else empty."""
    run = read_mapping(RunFolder(origin.run).config) if origin.run is not None else {}
    data = run.get("data") or {}
    if data.get("labels") != "none" or config.data.labels == "none":
        return ""
    if place_key(str(data.get("source"))) != place_key(config.data.source):
        return ""
    return (
        f"{config.data.source} is measured with its labels, although the run was trained with "
        f"data.labels=none; set data.labels=none here to ignore them"
    )


def evaluation_folder(config: EvaluationConfig, origin: EncoderOrigin) -> Path:
    """Return the folder of an evaluation."""
    name = config.name or _name_of(config.data.source)
    return origin.folder / _EVALUATIONS / name


def data_config(data: EvaluationData) -> DataConfig:
    """Return the settings that open the training images of an evaluation."""
    return validate(DataConfig, images_of(data) | {"labels": data.labels}, where="data")


def images_of(data: EvaluationData) -> dict[str, Any]:
    """Return the settings of the training images as plain values."""
    return data.model_dump(mode="json", exclude=_NOT_IMAGES)


def _find_encoder(encoder: str, home: Path) -> Path | None:
    if is_address(encoder):
        return local_copy(encoder)
    for path in (Path(encoder).expanduser(), home / Path(encoder).expanduser()):
        if path.exists():
            return path.absolute()
    if encoder in NAMES or encoder.startswith(("torchvision:", "timm:")):
        return None
    raise DataError(
        f"{encoder}: no such run folder or encoder file, and no backbone; give a run folder, an "
        f"encoder.safetensors, or for random weights one of {', '.join(NAMES)}, torchvision:NAME, "
        f"timm:NAME"
    )


def _values_of_run(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that an evaluation inherits from a run, without those of other images."""
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
        inherited = validated(EvaluationData, images)
        if not isinstance(inherited, list):  # problems are reported when all settings are validated
            images = _absolute(inherited, first=first).model_dump(mode="json", exclude_unset=True)
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
            f"{path}: contains no {encoder.name}; give the folder of a finished run, or an encoder "
            f"file"
        )
    size_px = _size_of(read_description(encoder))
    in_run = RunFolder(folder).config.exists()
    if in_run and encoder == RunFolder(folder).encoder:
        return EncoderOrigin(encoder, folder, folder, size_px)
    name = folder.name if encoder.stem == "encoder" else encoder.stem
    return EncoderOrigin(encoder, output / re.sub(r"[^A-Za-z0-9._=-]+", "-", name), None, size_px)


def _placed(copy: Path, output: Path) -> Path:
    """Copy a run, or an encoder file and what is beside it, to where all nodes and times see it.

    Args:
        copy: The local copy of a run or a file in a store.
        output: Parent of the results.

    Raises:
        ConfigError: If another encoder has the same name there.
    """
    source = copy if copy.is_dir() else copy.parent
    target = output / source.name
    files = [each if copy.is_dir() else each / copy.name for each in (source, target)]
    if target.exists() and not _is_same_encoder(*map(encoder_file, files)):
        raise ConfigError(
            f"{target}: holds another encoder than the address; set output_dir to another folder"
        )
    if not target.exists():
        with appears_whole(target) as temporary:
            shutil.copytree(source, temporary)
    return target if copy.is_dir() else target / copy.name


def _is_same_encoder(one: Path, other: Path) -> bool:
    return other.exists() and encoder_digest(one) == encoder_digest(other)


def _untrained(config: EvaluationConfig, output: Path) -> EncoderOrigin:
    """Write an encoder with random weights from the seed, unless its file exists."""
    backbone, size_px = config.backbone, config.features.size_px
    assert backbone is not None
    if size_px is None:
        raise ConfigError(
            f"features.size_px: {backbone.name} has random weights and no image size; set one, "
            f"such as features.size_px=32 for CIFAR-10"
        )
    if backbone.weights is not None:
        raise ConfigError(
            "backbone.weights: give this file or folder to raysl evaluate instead of a backbone"
        )
    check_model_name(backbone)
    data = data_config(config.data)
    description: Mapping[str, Any] = {
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
    # An existing file is kept: writing it again would change the bytes of its header.
    if not file.exists() or not _describes(read_description(file), description):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = build_backbone(backbone, image_size_px=size_px)
        save_encoder(file, network, description=dict(description))
    return EncoderOrigin(file, folder, None, size_px)


def _describes(header: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a file's header has the wanted description; it omits backbone.weights."""
    section = {key: value for key, value in wanted["backbone"].items() if key != "weights"}
    return all(
        header.get(key) == value for key, value in (dict(wanted) | {"backbone": section}).items()
    )


def _size_of(description: Mapping[str, Any]) -> int:
    size = description.get("image_size_px", 224)
    return size if isinstance(size, int) and size > 0 else 224


def _name_of(source: str) -> str:
    """Return a folder name for a source: its last part, without characters that folders lack."""
    last = source.rstrip("/").rpartition("/")[2]
    last = re.sub(r"\.(parquet|tar)$", "", last)
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", last).strip("-._=") or "images"

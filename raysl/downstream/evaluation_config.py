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
from raysl.evaluate.embedding import encoder_digest
from raysl.evaluate.registry import ProtocolSettings
from raysl.folder.address import below, is_address
from raysl.nn.backbones import NAMES, BackboneConfig, build_backbone, check_model_name
from raysl.run.cluster_config import ClusterConfig
from raysl.run.held import place_of
from raysl.run.places import start_folder
from raysl.sources.belonging import OF_SOURCE, named_source, without_other_source
from raysl.sources.filter import Condition
from raysl.sources.pixels import ColorProfile, Intensity, Pages
from raysl.sources.place import absolute_config, place_key
from raysl.sources.source import DataConfig, LocatedSource, WeightedSource
from raysl.store.objects import Store
from raysl.store.reading import local_copy
from raysl.store.scratch import scratch_folder
from raysl.track.config import OutputDir, TrackConfig, check_run_name
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
    output_dir: OutputDir = "runs"
    """Parent of the results of an encoder that is not in a run folder: a path or an address of a
    store. The results of a run in a store go there if this is set, else below the run."""
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
    """Path of ``encoder.safetensors``, or of its local copy."""
    folder: Path | str
    """Path or address of the parent folder of ``evaluations``."""
    run: Path | None
    """Folder of the run that trained the encoder, or its local copy; None if unknown."""
    size_px: int
    """Image size that the encoder was trained for."""
    address: str | None = None
    """Address of the run, or else of the encoder; None if they are on a disk."""

    @property
    def start(self) -> Path:
        """The folder or file that a fine-tuning starts from, or its local copy."""
        return self.run or self.encoder

    @property
    def place(self) -> str:
        """Path or address of the encoder, as other processes know it."""
        if self.address is None:
            return str(self.encoder)
        return self.address if self.run is None else f"{self.address}/{self.encoder.name}"


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
    if path is None:
        return config, _untrained(config, home)
    return config, _origin_of(encoder, path, config, home)


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


def evaluation_place(config: EvaluationConfig, origin: EncoderOrigin) -> Path | str:
    """Return the path or address of an evaluation's folder."""
    name = config.name or _name_of(config.data.source)
    if isinstance(origin.folder, Path):
        return origin.folder / _EVALUATIONS / name
    return below(origin.folder, _EVALUATIONS, name)


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


def _origin_of(given: str, path: Path, config: EvaluationConfig, home: Path) -> EncoderOrigin:
    """Return the encoder that a command names.

    Args:
        given: The argument of the command.
        path: The run folder or encoder file that it names, or a local copy.
        config: The settings of the evaluation.
        home: Base folder of relative output paths.
    """
    folder = path if path.is_dir() else path.parent
    encoder = RunFolder(folder).encoder if path.is_dir() else path
    if not encoder.is_file():
        raise DataError(
            f"{given}: contains no {encoder.name}; give the folder of a finished run, or an "
            f"encoder file"
        )
    size_px = _size_of(read_description(encoder))
    address = given.rstrip("/") if is_address(given) else None
    if RunFolder(folder).config.exists() and encoder == RunFolder(folder).encoder:
        if address is None:
            return EncoderOrigin(encoder, folder, folder, size_px)
        run = address if path.is_dir() else address.rpartition("/")[0]
        given_place = "output_dir" in config.model_fields_set
        place = place_of(config.output_dir, folder.name, home) if given_place else run
        return EncoderOrigin(encoder, place, folder, size_px, run)
    name = folder.name if encoder.stem == "encoder" else encoder.stem
    place = place_of(config.output_dir, re.sub(r"[^A-Za-z0-9._=-]+", "-", name), home)
    if address is None and not isinstance(place, Path):
        return _stored(encoder, place, size_px)
    address = f"{address}/{encoder.name}" if address is not None and path.is_dir() else address
    return EncoderOrigin(encoder, place, None, size_px, address)


def _stored(encoder: Path, place: str, size_px: int) -> EncoderOrigin:
    """Copy an encoder and its projection head to a store, where the train workers find them.

    Args:
        encoder: The encoder on this machine.
        place: Address of the parent folder of its evaluations.
        size_px: Image size that the encoder was trained for.

    Raises:
        ConfigError: If another encoder has the same name there.
    """
    store, address = Store(place), below(place, RunFolder(encoder.parent).encoder.name)
    if RunFolder(encoder.parent).encoder.name in store.list(recursive=False):
        if encoder_digest(local_copy(address)) != encoder_digest(encoder):
            raise ConfigError(
                f"{place}: holds another encoder than {encoder}; set output_dir to another address"
            )
    else:
        head = RunFolder(encoder.parent).projection_head
        for file in (head, encoder):
            if file.exists():
                name = file.name if file == head else RunFolder(file.parent).encoder.name
                store.put_file(name, file)
    return EncoderOrigin(local_copy(address), place, None, size_px, address)


def _untrained(config: EvaluationConfig, home: Path) -> EncoderOrigin:
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
    place = place_of(config.output_dir, name, home)
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
        file = RunFolder(place).encoder
        _write_untrained(file, description, config)
        return EncoderOrigin(file, place, None, size_px)
    with scratch_folder(name) as folder:
        _write_untrained(RunFolder(folder).encoder, description, config)
        return _stored(RunFolder(folder).encoder, place, size_px)


def _write_untrained(file: Path, description: Mapping[str, Any], config: EvaluationConfig) -> None:
    # An existing file is kept: writing it again would change the bytes of its header.
    if file.exists() and _describes(read_description(file), description):
        return
    assert config.backbone is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_backbone(config.backbone, image_size_px=description["image_size_px"])
    save_encoder(file, network, description=dict(description))


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

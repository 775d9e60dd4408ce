"""The protocol of a source of images, and the settings that describe a source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, PrivateAttr, field_validator, model_validator

from raysl.augment.crop import Image
from raysl.augment.pipeline import device_ops
from raysl.augment.recipes import SimCLRViews, Views
from raysl.config.base import Config, Idle, PositiveFloat, PositiveInt
from raysl.errors import DataError, hide_passwords
from raysl.sources.filter import Condition
from raysl.sources.pixels import PLAIN, ColorProfile, Decoding, Intensity, Pages

Labels = npt.NDArray[np.int64]
_Channel = Annotated[float, Field(ge=0.0, le=1.0)]

BUILT_IN = ("digits", "cifar10", "cifar100", "stl10")


class SourceConfig(Config):
    """The settings of a set of images, labelled or not."""

    idle: ClassVar[tuple[Idle, ...]] = (
        # Built-in sets are pixels in memory, with their own labels.
        Idle(
            ("image_column", "label_column", "intensity", "color_profile", "pages"),
            {"source": BUILT_IN},
        ),
    )
    source: str
    """digits, cifar10, cifar100, stl10; a folder of images (with or without class folders); Parquet
    files or WebDataset .tar shards: a file, a folder of them, a glob, or a range such as
    DIR/{000..099}.tar. A path, or a URI such as s3://bucket/folder."""

    @field_validator("source")
    @classmethod
    def _has_no_password(cls, source: str | None) -> str | None:
        if (
            source is not None and hide_passwords(source) != source
        ):  # it is stored, printed and sent to MLflow
            raise ValueError(
                "an address of images must not contain a password or a secret key; set the "
                "variables of its store instead, such as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        return source

    image_column: str | None = None
    """Parquet: column of encoded images; null takes 'image', or the only binary column. Tar shards:
    suffix of the image to use in samples with several images."""
    label_column: str | None = None
    """Parquet: column of labels (integers or names); null takes 'label' if there is one. Tar
    shards: key in a sample's .json; null takes its .cls, or the key 'label'."""
    filter: tuple[Condition, ...] = ()
    """Keep only the images that fulfil all conditions, each [column, comparison, value]. Files and
    tar members have the columns path and bytes, Parquet files those that they hold."""
    limit: PositiveInt | None = None
    """Use only this many of the images that the filter keeps, spread over the source."""
    split: str | None = None
    """Built-in sets: train or test. Sources with splits, as folders or in the names of shards: the
    split to use; null takes train."""
    intensity: Intensity | None = None
    """The values that become black and white in images of more than 8 bits: [low, high], {bits:
    12}, or {percentile: [0.5, 99.5]} of each image. null takes the full range of integers, and 0 to
    1 for floating point numbers; 8-bit images stay as they are."""
    color_profile: ColorProfile = "convert"
    """Images with a colour profile (Display P3, Adobe RGB, CMYK): convert them to sRGB, or ignore
    the profile, as torchvision and OpenCV do."""
    pages: Pages = "refuse"
    """TIFF files with several pages, or with channels that are not colours: refuse them as bad
    images, use the first page or channel, or use up to three of them as red, green and blue."""

    _section: str = PrivateAttr("data")
    _source_key: str = PrivateAttr("data.source")

    def called(self, section: str, *, source: str = "") -> Self:
        """Return a copy whose settings have other names in messages.

        Args:
            section: The section that has these settings: ``data.mix[0]``, ``evaluate``.
            source: The key of the source; "" stands for ``source`` of the section.
        """
        copy = self.model_copy()
        copy._section, copy._source_key = section, source or f"{section}.source"
        return copy

    def key(self, name: str) -> str:
        """Return a setting's name for a message: ``data.filter`` for "filter"."""
        return self._source_key if name == "source" else f"{self._section}.{name}"

    @property
    def named(self) -> str:
        """The source as a user gave it, the beginning of a message: ``data.source=/photos``."""
        return f"{self.key('source')}={self.source}"

    def decoding(self) -> Decoding:
        """Return the settings that the decoder needs."""
        return Decoding(self.intensity, self.color_profile, self.pages)


class WeightedSource(SourceConfig):
    """A source that is mixed with another one."""

    weight: PositiveFloat = 1.0
    """How often an epoch reads each image of this source, relative to data.source: 0.5 reads it
    every other epoch."""


class BadImagesConfig(Config):
    """What to do with files that are damaged, empty, too large, or not images."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("max_share",), {"policy": ("fail",)}),)
    policy: Literal["skip", "replace", "fail"] = "replace"
    """skip fills an image's slot in the batch with another image of its item, with other views;
    replace fills it with an image from the same file or row group; fail ends the run. Batches stay
    full."""
    max_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """End the run once more than this share of the source turns out to be bad."""
    max_megapixels: Annotated[float, Field(gt=0.0, le=178.0)] = 100.0
    """An image with more pixels is bad: small files can expand into gigabytes."""


class LabelsConfig(Config):
    """The labels that training may use."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("seed",), {"fraction": (1,)}),)
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labels, balanced over the classes as far as possible, with at least one label of
    each class. Test images that are held out of the source (evaluate.source) are never used."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the draw; with the same seed a smaller share is part of a larger one."""
    only: bool = False
    """Train only on the images with these labels. false keeps the other images without labels, for
    distillation. Supervised training never uses them."""


class LocatedSource(SourceConfig):
    """A source that may be one of torchvision's data sets."""

    torchvision_root: str = "~/.cache/raysl"
    """Folder of torchvision's data sets; missing ones are downloaded there."""


class DataConfig(LocatedSource):
    """The training images and their views."""

    mix: tuple[WeightedSource, ...] = ()
    """More sources, mixed with data.source according to their weights."""
    bad_images: BadImagesConfig = BadImagesConfig()
    """What to do with images that cannot be used."""
    if_changed: Literal["stop", "go_on"] = "stop"
    """If the images have changed since the run began: stop and report the changes, or go_on:
    resume with the order and length that the current images give."""
    labels: LabelsConfig | Literal["none"] | None = None
    """Labels for methods that learn from labels; null uses all. The run folder's labels.json lists
    the rows used. none treats the source as unlabelled, even if it has class folders or a column of
    labels; nothing is measured with its labels."""
    views: Views = SimCLRViews()
    """The views of an image that a method receives: a named recipe, or custom."""
    color_on: Literal["cpu", "device"] = "cpu"
    """Where the last operations of the views run: in the data workers, or batched on the
    accelerator of the train workers, which leaves the CPUs to decode and crop."""
    mean: tuple[_Channel, _Channel, _Channel] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue pixels in [0, 1], subtracted once on the device."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue pixels in [0, 1]."""
    shuffle_window_mib: PositiveInt = 512
    """Encoded images that a data worker holds to shuffle across row groups of Parquet files; a
    smaller source is shuffled fully."""

    @model_validator(mode="after")
    def _device_has_something_to_do(self) -> "DataConfig":
        views = self.views.views() if self.color_on == "device" else ()
        if views and not any(view.ops for view in views):
            raise ValueError(
                "color_on: device runs the last operations of a view on the accelerator, and these "
                "views have none; set color_on: cpu"
            )
        for view in views:
            if view.ops and not device_ops(view):
                raise ValueError(
                    f"color_on: device runs the last operations of a view on the accelerator, but "
                    f"{view.ops[-1].op!r} only runs on the CPU; set color_on: cpu or put it before "
                    f"the others"
                )
        return self


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of an image that exists but cannot be read; counts as a bad image."""

    reason: str
    """Why the image cannot be read, as a sentence fragment."""


Encoded = bytes | Image | Unreadable
"""The bytes of an image file, decoded pixels, or why the image cannot be read."""


def size_of(encoded: Encoded) -> int:
    """Return the size in bytes of a file or of decoded pixels; 0 if unreadable."""
    if isinstance(encoded, Unreadable):
        return 0
    return encoded.nbytes if isinstance(encoded, np.ndarray) else len(encoded)


class Source(Protocol):
    """Images in a fixed order. Small enough to send to every data worker."""

    name: str
    weights: npt.NDArray[np.float64] | None
    """How often an epoch reads each image of a group, ``(num_groups,)``; None means once."""
    fingerprint: str
    """16 hex digits that change with the images."""
    notes: tuple[str, ...]
    """Lines about content that is skipped, mixed in or used in an unexpected way, with number and
    reason. Printed by `raysl data` and at the start of a run."""
    splits: tuple[str, ...]
    """Names of the splits at the same place, including this one: train, validation, test, ..."""
    label_advice: str
    """How to get (other) labels from a source of this kind; used in error messages."""

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Images in each group, rows that are fast to read together; ``(num_groups,)``."""
        ...

    @property
    def window_size(self) -> int | None:
        """Largest number of images that a data worker can hold to shuffle; None for no limit."""
        ...

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the encoded bytes, or the pixels, of these rows, in the given order.

        An image whose read error is lasting is returned as ``Unreadable``.
        """
        ...

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of a row."""
        ...

    def where(self, index: int) -> str:
        """Name a row for an error message."""
        ...

    def row_id(self, index: int) -> str:
        """Return a row's unique name within the source, the same wherever the source is stored.

        It is a file's path, SHARD/MEMBER for tar, FILE:ROW for Parquet. Filters offer it as the
        column ``row_id``; embeddings use it as their id.
        """
        ...

    def labels(self) -> Labels | None:
        """Return class numbers ``(num_images,)``, -1 for unlabelled rows; None without labels."""
        ...

    @property
    def class_names(self) -> list[str]:
        """Class names, by number; empty without labels."""
        ...


class ArraySource:
    """Images in memory, as pixels.

    Args:
        name: Name for messages.
        images: ``(M, H, W)`` or ``(M, H, W, 3)`` uint8.
        labels: ``(M,)`` class numbers or None; negative for an unlabelled image.
        class_names: Class names, by number.
        splits: The splits of the data set.
    """

    def __init__(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        labels: Labels | None = None,
        class_names: Sequence[str] = (),
        splits: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.images = images
        self.window_size = None
        self.weights: npt.NDArray[np.float64] | None = None
        self.notes: tuple[str, ...] = ()
        self.splits = tuple(splits)
        self.label_advice = "use a source that has labels"
        self.class_names = list(class_names)
        self._labels = labels
        self.fingerprint = digest(np.ascontiguousarray(images).data)

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """One group of all images, since they are in memory."""
        return np.array([len(self.images)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the pixels of these rows."""
        return [self.images[index] for index in indices]

    def decoding(self, index: int) -> Decoding:
        """Return the defaults: pixels need no decoding."""
        return PLAIN

    def where(self, index: int) -> str:
        """Name a row."""
        return f"{self.name} image {index}"

    def row_id(self, index: int) -> str:
        """Name a row."""
        return self.where(index)

    def labels(self) -> Labels | None:
        """Return the class numbers, or None."""
        return self._labels


def refuse_columns(config: SourceConfig, what: str) -> None:
    """Raise DataError for settings about columns, for a source without columns.

    Args:
        config: The source's settings.
        what: The kind of source, such as "a folder of image files".

    Raises:
        DataError: If one of these settings is given.
    """
    for name in ("image_column", "label_column"):
        if (value := getattr(config, name)) is not None:
            raise DataError(
                f"{config.named}: {config.key(name)}={value} does nothing, as {what} has no "
                f"columns; drop {config.key(name)}, or set it to null"
            )


def reading_order(num_files: int, limit: int | None) -> list[int]:
    """Return the order in which to read files; with a limit, the first ones are far apart.

    With a limit, the order is the van der Corput sequence: the start, then 1/2, 1/4 and 3/4, then
    the eighths of the list.
    """
    if limit is None:
        return list(range(num_files))
    bits = max(1, (num_files - 1).bit_length())
    steps = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return list(dict.fromkeys(step * num_files >> bits for step in steps))


def spread_rows(total: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return ``limit`` of ``total`` rows, evenly spaced and sorted; all if the limit is None."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * total // limit


def digest(*parts: bytes | memoryview | str) -> str:
    """Return 16 hex digits that change with any of the parts."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()

"""Where images come from: one small protocol, and the function that opens a source by its name."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs
from pydantic import Field

from raysl.augment.crop import Image
from raysl.augment.recipes import SimCLRViews, Views
from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.errors import DataError

Labels = npt.NDArray[np.int64]
Split = Literal["train", "test"]
_Channel = Annotated[float, Field(ge=0.0, le=1.0)]

BUILT_IN = ("digits", "cifar10", "cifar100", "stl10")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class SourceConfig(Config):
    """A set of images, labelled or not."""

    source: str
    """digits, cifar10, cifar100, stl10; a folder of images (in class folders or not); a Parquet
    file, a folder of them or a glob. A path, or a URI such as s3://bucket/folder."""
    image_column: str | None = None
    """Parquet: column of encoded images; null takes 'image', or the only binary column."""
    label_column: str | None = None
    """Parquet: column of labels (integers or names); null takes 'label' if there is one."""
    limit: PositiveInt | None = None
    """Use only the first so many images."""


class DataConfig(SourceConfig):
    """The training images and what is made of them."""

    torchvision_root: str = "~/.cache/raysl"
    """Folder of torchvision's data sets; they are downloaded there if they are missing."""
    views: Views = SimCLRViews()
    """The views of an image that a method sees: a recipe by name, or composed."""
    mean: tuple[_Channel, _Channel, _Channel] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue pixels in [0, 1], taken off once on the device."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Their standard deviation."""
    shuffle_window_mib: PositiveInt = 512
    """Encoded images a data worker holds to shuffle across the row groups of Parquet files; a
    smaller source is shuffled fully."""


class Source(Protocol):
    """Images in a fixed order. Small enough to send to every data worker."""

    name: str
    fingerprint: str
    """Changes when the images do: 16 hex digits."""

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Images in each group that is quick to read as a whole."""
        ...

    @property
    def window_size(self) -> int | None:
        """Most images that a data worker can hold at once; None for no limit."""
        ...

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[bytes | Image]:
        """Return the encoded bytes, or the pixels, of these rows, in their order."""
        ...

    def where(self, index: int) -> str:
        """Name a row for an error message."""
        ...

    def labels(self) -> Labels | None:
        """Return a class number for each row, ``(num_images,)``, or None."""
        ...

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by number; empty without labels."""
        ...


class ArraySource:
    """Images that lie in memory as pixels.

    Args:
        name: For messages.
        images: ``(M, H, W)`` or ``(M, H, W, 3)`` uint8.
        labels: ``(M,)`` class numbers or None; negative for an image without one.
        class_names: By number.
    """

    def __init__(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        labels: Labels | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.images = images
        self.window_size = None
        self.class_names = list(class_names)
        self._labels = labels
        self.fingerprint = digest(np.ascontiguousarray(images).data)

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """All images are quick to read."""
        return np.array([len(self.images)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[bytes | Image]:
        """Return the pixels of these rows."""
        return [self.images[index] for index in indices]

    def where(self, index: int) -> str:
        """Name a row."""
        return f"{self.name} image {index}"

    def labels(self) -> Labels | None:
        """Return the class numbers."""
        return self._labels


def digest(*parts: bytes | memoryview | str) -> str:
    """Return 16 hex digits that change when any part does."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow file system and the path of a local path or a URI.

    Raises:
        DataError: If the URI's scheme is not known.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise DataError(f"data.source={uri}: {error}") from None

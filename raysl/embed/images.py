"""Reopen the images of embeddings to show them, and open query images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.config.load import validate
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.embed.config import EmbedConfig
from raysl.embed.embeddings import Embeddings
from raysl.embed.shards import ABOUT
from raysl.errors import DataError
from raysl.evaluate.features import square
from raysl.sources.formats import IMAGE_SUFFIXES
from raysl.sources.open import open_source
from raysl.sources.pixels import PLAIN, Decoding
from raysl.sources.place import absolute_config
from raysl.sources.source import (
    ArraySource,
    DataConfig,
    Encoded,
    Source,
    Unreadable,
)

_SHOWN_PX = 160


def reopen_source(embeddings: Embeddings) -> Source:
    """Open the source that embeddings were made of.

    Raises:
        DataError: If the source is missing or has changed.
    """
    about = embeddings.about
    config = embed_config(embeddings)
    data = DataConfig(source=config.source, torchvision_root=config.torchvision_root)
    source = open_source(config, data=data)
    if source.fingerprint != about["wanted"]["fingerprint"]:
        raise DataError(
            f"{about['source']}: has changed since it was embedded into {embeddings.folder.uri}; "
            f"embed it again into another folder"
        )
    return source


def embed_config(embeddings: Embeddings) -> EmbedConfig:
    """Return the settings that embeddings were made with, including the path of their source."""
    about = embeddings.about
    settings: dict[str, Any] = {**about["settings"], "source": about["source"]}
    where = f"{embeddings.folder.uri}/{ABOUT}"
    return absolute_config(validate(EmbedConfig, settings, where=where))


def open_queries(path: str, *, decoding: Decoding = PLAIN) -> tuple[Source, list[str]]:
    """Open an image file or all images of a folder; also return their names.

    Args:
        path: Local path of an image file or a folder.
        decoding: The decoding settings of the embedded images.

    Raises:
        DataError: If there is no such file, or no image in the folder.
    """
    root = Path(path).expanduser()
    files = [root]
    if root.is_dir():
        images = (p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        files = sorted(images)
    if not files or not files[0].is_file():
        raise DataError(f"--query {path}: no such file, or a folder without images")
    names = [str(file.relative_to(root)) if root.is_dir() else file.name for file in files]
    return FileImages(files, decoding), names


class FileImages(ArraySource):
    """Images in a list of files.

    Args:
        files: Path of each row.
        decoding: The decoding settings of all files.
    """

    def __init__(self, files: Sequence[Path], decoding: Decoding = PLAIN) -> None:
        super().__init__("queries", np.zeros((len(files), 1, 1), dtype=np.uint8))
        self.files = list(files)
        self._decoding = decoding

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the bytes of the files of these rows."""
        return [_read(self.files[index]) for index in indices]

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings, the same for all rows."""
        return self._decoding

    def where(self, index: int) -> str:
        """Return the path of a row's file."""
        return str(self.files[index])


def _read(file: Path) -> Encoded:
    try:
        return file.read_bytes()
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}")


def squares(source: Source, rows: Sequence[int]) -> list[Image]:
    """Return the centred squares of images for a picture, ``(S, S, 3)`` uint8, all of one size.

    S is 160 px, or less if all images are smaller. A bad image is black.
    """
    images = [
        decode_or_flaw(encoded, source.decoding(row))
        for row, encoded in zip(rows, source.read(np.asarray(rows, dtype=np.int64)), strict=True)
    ]
    blank = np.zeros((1, 1, 3), dtype=np.uint8)
    pixels = [blank if isinstance(image, Flaw) else image for image in images]
    side = min(_SHOWN_PX, max((min(image.shape[:2]) for image in pixels), default=1))
    return [square(image, size_px=side, crop_fraction=1.0) for image in pixels]

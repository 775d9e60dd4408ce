"""Read any weight file: safetensors, or a file by ``torch.save`` since version 0.4."""

import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from raysl.encoder.pickled import AttackError, Placeholder, read_pickled
from raysl.encoder.stored import Content, State, StoredTensor
from raysl.errors import DataError

_LENGTH_BYTES = 8  # a safetensors file starts with its header's length, then "{"


def read_content(path: Path) -> Content:
    """Read the content of a weight file; tensors stay in the file until they are requested.

    Args:
        path: A ``.safetensors`` file, or one by ``torch.save`` under any name.

    Returns:
        Nested mappings, with :class:`StoredTensor` for tensors.

    Raises:
        DataError: If the file cannot be read, is damaged, holds no mapping, or tries to run code,
            which is never run.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a run folder or a file of weights")
    start = _start(path)
    if not start:
        raise DataError(f"{path}: the file is empty")
    if is_safetensors(path):
        return read_safetensors(path)
    content = _read_pickled(path, start)
    if isinstance(content, Placeholder):
        raise DataError(
            f"{path}: holds an object of class {content.name}, not its tensors; save its "
            "state_dict() instead"
        )
    if not isinstance(content, Mapping):
        kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
        raise DataError(f"{path}: holds a {kind}, not a state dict")
    return content


def is_safetensors(path: Path) -> bool:
    """Return whether a file is in the safetensors format, by its suffix or its first bytes."""
    return path.suffix == ".safetensors" or _start(path)[_LENGTH_BYTES:] == b"{"


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LENGTH_BYTES + 1)


def read_safetensors(path: Path) -> State:
    """Read the tensors of a safetensors file.

    Raises:
        DataError: If the file is not in this format, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise not_safetensors(path, error) from None

    def reader(name: str) -> Any:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]

        return read

    return {name: StoredTensor(shape, reader(name)) for name, shape in shapes.items()}


def read_header(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file.

    Raises:
        DataError: If the file is not in this format, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise not_safetensors(path, error) from None


def not_safetensors(path: Path, error: Exception) -> DataError:
    """Return the error for a file that is missing or not in the safetensors format."""
    if not path.exists():
        return DataError(
            f"{path}: no such file or folder; give a finished run, or a file of weights"
        )
    return DataError(f"{path}: not a safetensors file: {error}")


def _read_pickled(path: Path, start: bytes) -> Any:
    try:
        return read_pickled(path)
    except AttackError as error:
        raise DataError(
            f"{path}: it tries to run code when loaded, by {error}. raysl does not run it; do "
            "not load the file with other software"
        ) from None
    except Exception as error:  # a damaged or hostile pickle may raise anything
        if isinstance(error, pickle.UnpicklingError | UnicodeDecodeError) and start[0] != 0x80:
            reason = f"neither safetensors nor by torch.save; it starts with {start[:-1]!r}"
        else:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if tarfile.is_tarfile(path):
            reason = (
                "a tar archive, as torch before 0.1.10 wrote; save it again with a later version"
            )
        raise DataError(f"{path}: cannot be read as a file of weights: {reason}") from None

"""Read ``torch.save`` files as data: tensors and plain values only; no code is run.

A pickle is a small program that names functions for its reader to call. This reader has its own
versions of the few functions that build tensors and dictionaries. Any other name, of a class or a
function, becomes a placeholder that ignores its arguments: nothing is imported or called. So
checkpoints that contain options, loggers or whole modules can be read. Names that only an attack
needs are an error, because such a file should not be used at all.
"""

import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from raysl.encoder.stored import StoredTensor

# The first number of a file from before torch 1.6; source: torch/serialization.py.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PARTS = 3  # the magic number, the version, the machine's properties
_LENGTH_BYTES = 8
_LOCAL_HEADER_BYTES = 30  # of a zip archive's member, up to its name

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# Modules, and functions of _BUILTINS, that only an attack needs.
_ATTACKS = {
    "os", "posix", "nt", "subprocess", "pty", "runpy", "importlib", "imp", "shutil", "socket",
    "ctypes", "webbrowser", "commands", "popen2", "pdb", "bdb", "timeit", "pip",
}  # fmt: skip
_BUILTIN_ATTACKS = {"eval", "exec", "execfile", "compile", "open", "open_code", "__import__"}
_BUILTINS = ("builtins", "__builtin__", "io", "_io")


class AttackError(Exception):
    """A file tries to run code when it is read."""


class _Storage(NamedTuple):
    """Consecutive numbers in the file, which tensors refer to."""

    key: str
    dtype: torch.dtype
    first: int  # index of the first number
    length: int  # number of numbers


class _StorageType(NamedTuple):
    dtype: torch.dtype


class Placeholder:
    """Replaces every object that is neither a tensor nor plain data."""

    name = "?"

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        """Accept the arguments of the real class."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _swallow(self, *_: object, **__: object) -> None:
        """Accept any state that a pickle sets on an object."""

    __call__ = __setstate__ = __setitem__ = append = extend = add = _swallow


class _Reader:
    """Unpickles a file, and reads the storages of its tensors on demand.

    Args:
        numbers: Returns the bytes of a storage.
        swapped: Whether the file has another byte order than this machine.
    """

    def __init__(self, numbers: Callable[[_Storage], bytes], *, swapped: bool = False) -> None:
        self.numbers = numbers
        self.swapped = swapped
        self.storages: dict[str, _Storage] = {}

    def load(self, file: BinaryIO) -> Any:
        """Read a pickle from an open file."""
        return _Unpickler(file, self).load()

    def tensor(
        self,
        storage: object,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *rest: Any,
    ) -> StoredTensor:
        """Build a stored tensor in place of ``torch._utils._rebuild_tensor`` and later versions."""
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtypes = [value for value in rest if isinstance(value, torch.dtype)]
        dtype = dtypes[0] if dtypes else storage.dtype
        shape = tuple(int(side) for side in size)
        strides = tuple(int(step) for step in stride)

        def read() -> Tensor:
            values = self._values(storage, dtype)
            return values.as_strided(shape, strides, int(offset)).clone(
                memory_format=torch.contiguous_format
            )

        return StoredTensor(shape, read)

    def _values(self, storage: _Storage, dtype: torch.dtype) -> Tensor:
        """Read a storage as a tensor of one dimension."""
        data = bytearray(self.numbers(storage))
        if not data:
            return torch.empty(0, dtype=dtype)
        if self.swapped:
            swapped = torch.frombuffer(data, dtype=torch.uint8)
            data = bytearray(
                swapped.view(-1, dtype.itemsize).flip(1).contiguous().numpy().tobytes()
            )
        return torch.frombuffer(data, dtype=dtype)


class _Unpickler(pickle.Unpickler):
    """Resolves names to this module's replacements only; an instance reads one file."""

    def __init__(self, file: BinaryIO, reader: _Reader) -> None:
        # The encoding and error handler of torch.load, for files of Python 2.
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._reader = reader
        self._classes: dict[tuple[str, str], type] = {}
        mapping = self._class("collections", "OrderedDict", dict)
        self._replacements: dict[str, Any] = {
            "OrderedDict": mapping,
            "dict": mapping,
            "defaultdict": lambda *_: mapping(),
            "Size": tuple,
            "_rebuild_tensor": reader.tensor,
            "_rebuild_tensor_v2": reader.tensor,
            "_rebuild_tensor_v3": reader.tensor,
            "_rebuild_parameter": lambda data, *_: data,
            "_rebuild_parameter_with_state": lambda data, *_: data,
            # For tensors with attributes; ``function`` is one of the functions above.
            "_rebuild_from_type_v2": lambda function, _type, values, _state: function(*values),
        }

    def persistent_load(self, saved: Any) -> Any:
        """Return the storage that a tensor refers to."""
        if not isinstance(saved, tuple) or not saved:
            raise pickle.UnpicklingError("an unknown kind of reference")
        if saved[0] == "module":  # a class with its source code, in old files
            return saved[1]
        kind, key, count = saved[1], str(saved[2]), int(saved[4])
        if saved[0] != "storage" or not isinstance(kind, _StorageType):
            raise pickle.UnpicklingError(f"a reference to a {saved[0]!r}")
        storage = _Storage(key, kind.dtype, 0, count)
        self._reader.storages[key] = storage
        view = saved[5] if len(saved) > 5 else None
        if view is not None:
            storage = storage._replace(first=int(view[1]), length=int(view[2]))
        return storage

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the replacement of a Python object, never the object itself."""
        root = module.partition(".")[0]
        if root in _ATTACKS or (module in _BUILTINS and name in _BUILTIN_ATTACKS):
            raise AttackError(f"{module}.{name}")
        if root == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        has_own = root in ("torch", "collections", *_BUILTINS)
        if has_own and name in self._replacements:
            return self._replacements[name]
        return self._class(module, name, Placeholder)

    def _class(self, module: str, name: str, base: type) -> type:
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = type("Placeholder", (base,), {"name": f"{module}.{name}"})
        return self._classes[key]


def read_pickled(path: Path) -> Any:
    """Read a file by ``torch.save``, with :class:`StoredTensor` for tensors.

    Raises:
        AttackError: If the file tries to run code.
        Exception: Any error, if the file is damaged or has another format.
    """
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    return _read_legacy(path)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in infos if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip archive, but not one of torch.save")
        (root,) = roots
        if f"{root}constants.pkl" in infos:
            raise ValueError("a TorchScript archive, which is a program; save its state_dict()")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ValueError("a compressed archive, which torch.save never writes")
        order = sys.byteorder
        if f"{root}byteorder" in infos:
            order = archive.read(f"{root}byteorder").decode("ascii").strip()  # type: ignore[assignment]

        def numbers(storage: _Storage) -> bytes:
            return _part(_record(path, infos[f"{root}data/{storage.key}"]), storage)

        reader = _Reader(numbers, swapped=order != sys.byteorder)
        with archive.open(f"{root}data.pkl") as file:
            content = reader.load(file)  # type: ignore[arg-type]
        for storage in reader.storages.values():
            info = infos.get(f"{root}data/{storage.key}")
            if info is None or info.file_size < storage.length * storage.dtype.itemsize:
                raise ValueError(f"the numbers of storage {storage.key} are missing")
    return content


def _record(path: Path, info: zipfile.ZipInfo) -> bytes:
    """Read a member of an archive at its offset, and verify its checksum."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        file.seek(name + extra, 1)
        data = file.read(info.file_size)
    if zlib.crc32(data) != info.CRC:
        raise ValueError("the checksum of a tensor's numbers is wrong")
    return data


def _part(data: bytes, storage: _Storage) -> bytes:
    size = storage.dtype.itemsize
    return data[storage.first * size : (storage.first + storage.length) * size]


def _read_legacy(path: Path) -> Any:
    """Read a file from before torch 1.6: five pickles, then the storages one after the other."""
    offsets: dict[str, int] = {}

    def numbers(storage: _Storage) -> bytes:
        with open(path, "rb") as reopened:
            reopened.seek(offsets[storage.key] + storage.first * storage.dtype.itemsize)
            return reopened.read(storage.length * storage.dtype.itemsize)

    reader = _Reader(numbers)
    with open(path, "rb") as file:
        magic, _version, machine = (reader.load(file) for _ in range(_LEGACY_PARTS))
        if magic != _LEGACY_MAGIC:
            raise ValueError("a pickle, but not one of torch.save")
        order: Any = "little" if machine.get("little_endian", True) else "big"
        reader.swapped = order != sys.byteorder
        content = reader.load(file)
        for key in reader.load(file):
            storage = reader.storages[key]
            count = int.from_bytes(file.read(_LENGTH_BYTES), order)
            offsets[key] = file.tell()
            if count != storage.length:
                raise ValueError(f"storage {key} has {count} numbers, not {storage.length}")
            file.seek(count * storage.dtype.itemsize, 1)
        if path.stat().st_size < file.tell() or offsets.keys() != reader.storages.keys():
            raise ValueError("the file ends within its numbers")
    return content

"""Read the encoder of a run in a store, from a local copy that lasts as long as this process."""

import atexit
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raysl.errors import DataError, RunFolderError
from raysl.folder.address import is_address
from raysl.store.objects import Entry, Store
from raysl.store.scratch import scratch_folder

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl")
_SETTINGS = (".yaml", ".yml")
_BESIDE = (".safetensors", ".bin", ".yaml", ".json", "method_pictures.npz")
_ENCODER = "encoder.safetensors"
_LOCK = threading.Lock()
_COPIES = ExitStack()
atexit.register(_COPIES.close)
# Copies by the address of the folder and, if it is not a run's, the name of the file. Each has what
# the store listed: a folder that was replaced since is copied again.
_MADE: dict[tuple[str, str | None], tuple[dict[str, Entry], Path]] = {}
# Folders in stores that this process works on, and their local copies.
_HELD: dict[str, Path] = {}


@contextmanager
def held_copy(address: str, path: Path) -> Iterator[None]:
    """Let :func:`local_copy` return what is below ``path`` for addresses below ``address``."""
    _HELD[address] = path
    try:
        yield
    finally:
        _HELD.pop(address, None)


def local_copy(place: str | Path) -> Path:
    """Return the path of a run folder or a file of weights; one in a store is copied first.

    Of a run folder, the networks and the records beside them are copied, not the checkpoints; of
    the folder of a YAML file, the other YAML files. Each address is copied once by a process, as
    long as it does not change.

    Args:
        place: A path, which is returned as it is, or an address.

    Raises:
        DataError: If there is nothing at the address, or it cannot be read.
    """
    if not is_address(place):
        return Path(place)
    address = str(place).rstrip("/")
    if (held := _held(address)) is not None:
        return held
    folder, _, name = address.rpartition("/")
    with _LOCK:
        if name.endswith((*_WEIGHTS, *_SETTINGS)):
            return _copied(folder, name) / name
        return _copied(address, None)


def _held(address: str) -> Path | None:
    """Return the path of an encoder in a folder that this process works on, or of its folder."""
    for held, path in list(_HELD.items()):
        if address == held or address.startswith(f"{held}/"):
            local = path / address.removeprefix(held).lstrip("/")
            if local.is_file() or (local / _ENCODER).is_file():
                return local
    return None


def _copied(address: str, name: str | None) -> Path:
    """Return a local copy of the files of a folder in a store.

    Args:
        address: Address of the folder.
        name: A file that it must hold; None for a run folder.
    """
    beside = _SETTINGS if name is not None and name.endswith(_SETTINGS) else _BESIDE
    try:
        store = Store(address, setting="run")
        listed = store.list(recursive=False)
        wanted = {each: listed[each] for each in listed if each.endswith(beside) or each == name}
        if not wanted or (name is not None and name not in wanted):
            what = "no finished run" if name is None else f"no {name}"
            raise DataError(
                f"{address}: holds {what}; give the address of a run folder with an {_ENCODER}, or "
                f"of a file of weights or settings"
            )
        made, path = _MADE.get((address, name), (None, None))
        if path is None or made != wanted:
            path = _COPIES.enter_context(scratch_folder(address.rpartition("/")[2] or "run"))
            for each in wanted:
                store.get_file(each, path / each)
            _MADE[address, name] = wanted, path
    except RunFolderError as error:
        raise DataError(str(error)) from None
    return path

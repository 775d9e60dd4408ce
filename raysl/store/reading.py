"""Read the encoder of a run in a store, from a local copy that lasts as long as this process."""

import atexit
import threading
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from raysl.errors import DataError, RunFolderError
from raysl.folder.address import is_address
from raysl.store.objects import Store
from raysl.store.scratch import scratch_folder

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl")
_BESIDE = (".safetensors", ".bin", ".yaml", ".json")
_LOCK = threading.Lock()
_COPIES = ExitStack()
atexit.register(_COPIES.close)


def local_copy(place: str | Path) -> Path:
    """Return the path of a run folder or a file of weights; one in a store is copied first.

    Of a run folder, the networks and the records beside them are copied, not the checkpoints. Each
    address is copied once by a process.

    Args:
        place: A path, which is returned as it is, or an address.

    Raises:
        DataError: If there is nothing at the address, or it cannot be read.
    """
    if not is_address(place):
        return Path(place)
    address = str(place).rstrip("/")
    folder, _, name = address.rpartition("/")
    with _LOCK:
        if name.endswith(_WEIGHTS):
            return _copied(folder, name) / name
        return _copied(address, None)


@cache
def _copied(address: str, name: str | None) -> Path:
    """Return a local copy of the files of a folder in a store.

    Args:
        address: Address of the folder.
        name: A file that it must hold; None for a run folder.
    """
    try:
        store = Store(address, setting="run")
        names = [each for each in store.list(recursive=False) if each.endswith(_BESIDE)]
        if name is not None and name not in names and name.endswith(_WEIGHTS):
            names = [*names, name] if name in store.list(recursive=False) else []
        if not names:
            what = "no finished run" if name is None else f"no {name}"
            raise DataError(
                f"{address}: holds {what}; give the address of a run folder with an "
                f"encoder.safetensors, or of a file of weights"
            )
        path = _COPIES.enter_context(scratch_folder(address.rpartition("/")[2] or "run"))
        for each in names:
            store.get_file(each, path / each)
    except RunFolderError as error:
        raise DataError(str(error)) from None
    return path

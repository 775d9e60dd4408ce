"""Hold a folder for one command: on a disk by a lock, in a store by a lease.

A command works on a local copy of a folder in a store, its scratch, and copies what it changes.
Sweeps, pipelines, evaluations and runs (:mod:`raysl.run.stored`) are held in this way.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from raysl.errors import ConfigError, RayslError, RunFolderError
from raysl.folder.address import below, is_address
from raysl.folder.claim import aside_name, set_aside
from raysl.folder.shared import Copied
from raysl.report.terminal import say
from raysl.store.lease import LEASE, Lease
from raysl.store.mirror import Mirror, StoredRun, Wanted
from raysl.store.objects import Store
from raysl.store.publisher import Publisher
from raysl.store.reading import held_copy
from raysl.store.scratch import delete_abandoned, scratch_base, scratch_folder

_IN_ONE_PROCESS = "memory://"


class Holdable(Protocol):
    """A folder that a command can hold, which may be the local copy of one in a store."""

    path: Path

    def __init__(self, path: Path, *, stored: Copied | None = None) -> None: ...

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder on a disk; raise RunFolderError if another process holds the lock."""
        ...


F = TypeVar("F", bound=Holdable)


class Kind(NamedTuple):
    """A kind of folder, and how a command shares it with other processes."""

    name: str
    """For messages, such as ``sweep``."""
    restored: Wanted
    """The files of an earlier start that the command needs."""
    of_others: Wanted = lambda _: False
    """The files that other processes write and the command reads."""


def place_of(output_dir: str, name: str, home: Path) -> Path | str:
    """Return the path or the address of a folder in ``output_dir``.

    Args:
        output_dir: A path or an address of a store.
        name: Name of the folder.
        home: Base folder of a relative path.
    """
    if is_address(output_dir):
        return below(output_dir, name)
    return (home / Path(output_dir).expanduser() / name).absolute()


def check_reachable(output_dir: str, *, uses_ray: bool) -> None:
    """Check that the processes of a command can share a store.

    Raises:
        ConfigError: If the store is in the memory of one process, and the command uses several.
    """
    if output_dir.startswith(_IN_ONE_PROCESS) and uses_ray:
        raise ConfigError(
            f"output_dir={output_dir}: each process of Ray has a memory of its own; set "
            f"cluster.num_train_workers=0, or use a store that all processes reach"
        )


@contextmanager
def held_folder(
    place: Path | str, make: type[F], kind: Kind, *, fresh: bool = False
) -> Iterator[F]:
    """Hold a folder on a disk or in a store, and provide it in a ``with`` block.

    Args:
        place: Its path or address.
        make: Its class.
        kind: What it is.
        fresh: Rename an earlier folder of this name.

    Raises:
        RunFolderError: If another process holds the folder, or it cannot be reached.
    """
    if not isinstance(place, Path):
        with leased_copy(place, kind.name, fresh=fresh) as (path, stored):
            copy = FolderCopy(path, stored, kind)
            copy.restore()
            with copy.published():
                yield make(path, stored=copy)
        return
    folder = make(place)
    if fresh and place.exists():
        say(f"the earlier {kind.name} is now in {set_aside(folder)}")
    with folder.locked():
        yield folder


@contextmanager
def leased_copy(address: str, kind: str, *, fresh: bool) -> Iterator[tuple[Path, StoredRun]]:
    """Lease a folder in a store and provide an empty local folder for its copy.

    Args:
        address: Address of the folder.
        kind: What it is, for messages.
        fresh: Move an earlier folder to another address.

    Raises:
        RunFolderError: If another process holds it, or the store cannot be reached.
    """
    store = Store(address)
    instead = f"give this {kind} another name=..."
    try:
        with (
            Lease(store, instead=instead, tell=say) as lease,
            local_copy_of(store.address) as path,
        ):
            if fresh:
                move_aside(store, kind)
            yield path, StoredRun(store, lease.token)
    finally:
        delete_abandoned(scratch_base())  # of processes of this command that were killed


@contextmanager
def local_copy_of(address: str) -> Iterator[Path]:
    """Provide an empty local folder for the copy of a folder in a store.

    Errors of raysl in the block name the address, and encoders below it are read from the copy.
    """
    with (
        scratch_folder(address.rpartition("/")[2]) as path,
        address_in_errors(path, address),
        held_copy(address, path),
    ):
        yield path


def move_aside(store: Store, kind: str) -> None:
    """Move a folder in a store to its address plus the current time, to free its name."""
    if set(store.list()) - {LEASE}:
        aside = Store(aside_name(store.address), setting=store.setting)
        store.move_to(aside, without=[LEASE])
        say(f"the earlier {kind} is now in {aside.address}")


class FolderCopy:
    """A command's local copy of a folder in a store.

    Args:
        path: The local folder.
        stored: The folder in the store.
        kind: What it is.
    """

    def __init__(self, path: Path, stored: StoredRun, kind: Kind) -> None:
        self.address = stored.store.address
        self._path = path
        self._stored = stored
        self._kind = kind
        self._mirror = Mirror(path, stored.store, check=stored.check)
        self._publisher = Publisher(self._copy)

    def restore(self) -> None:
        """Copy what an earlier start left."""
        self._mirror.pull(self._kind.restored)

    def publish(self, *, waits: bool) -> None:
        """Copy the folder's changes to the store."""
        self._publisher.publish(waits=waits)

    def fetch(self, below: str = "") -> None:
        """Copy what other processes have written; with ``below``, directly in one folder."""
        self._mirror.pull(self._kind.of_others, below=below, recursive=not below)

    def for_workers(self) -> StoredRun:
        """Return what other processes need to open the folder."""
        return self._stored

    @contextmanager
    def published(self) -> Iterator[None]:
        """Copy the folder's changes within the block, and what is left at its end.

        Raises:
            RunFolderError: If the last changes cannot be copied.
        """
        with self._publisher:
            try:
                yield
            except RunFolderError:  # of the store, or before anything was changed
                raise
            except BaseException:  # which is raised, whatever else fails
                try:
                    self.publish(waits=True)
                except RunFolderError as error:
                    say(f"  {error}")
                raise
            self.publish(waits=True)

    def _copy(self, patient: bool) -> None:
        self._mirror.push(patient=patient)


@contextmanager
def address_in_errors(path: Path, address: str) -> Iterator[None]:
    """Let errors of raysl in the block name a folder's address instead of its local copy."""
    try:
        yield
    except RayslError as error:
        text = str(error)
        if str(path) not in text:
            raise
        text = text.replace(str(path), address)
        if "No space left" in text:
            text += f" (of the local copy, in {path}; RAYSL_SCRATCH names another folder)"
        shown = type(error)(text)
        shown.on_every_rank = error.on_every_rank
        raise shown from None

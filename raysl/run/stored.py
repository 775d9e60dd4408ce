"""The run folder of a run whose ``output_dir`` is an address of an object store.

Every process that reads or writes the folder works on a local copy of its own, its scratch, and
copies what it changes. The driver holds the folder's lease and owns what describes the run; rank 0
of the workers owns metrics, checkpoints, networks and results. Without Ray the driver is rank 0.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from raysl.folder.address import is_address
from raysl.folder.claim import set_aside
from raysl.folder.shared import SharedFolder
from raysl.report.terminal import say
from raysl.run.held import (
    FolderCopy,
    Kind,
    address_in_errors,
    check_reachable,
    held_folder,
    leased_copy,
    local_copy_of,
    move_aside,
    place_of,
)
from raysl.run.recipe import RunConfig
from raysl.store.mirror import CHECKPOINTS, Mirror, StoredRun, checkpoint_steps
from raysl.store.publisher import Publisher
from raysl.store.scratch import scratch_folder
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.checkpoint import is_damaged

_EVALUATED = "to_evaluate/"
_ERROR, _STOP, _METRICS, _BAD = "error.json", "stop", "metrics.jsonl", "bad_images.jsonl"
_EVENTS, _LAST_STEP, _STACKS = "events.jsonl", "last_step", "stacks/"
# What the driver writes itself, on Ray too.
_OF_DRIVER = ("config.yaml", "source.json", "extensions.json", "mlflow.json", "report.html")
_FOLDERS_OF_OTHERS = (
    CHECKPOINTS,
    _EVALUATED,
    "pictures/",
    "ray/",
    "protocols/",
    "evaluations/",
    "exports/",
)
_SMALL = (".yaml", ".json", ".jsonl")
_RUN = Kind(
    "run",
    restored=lambda name: (
        name == _STOP or (name.endswith(_SMALL) and not name.startswith(_FOLDERS_OF_OTHERS))
    ),
    of_others=lambda name: not name.startswith((*_FOLDERS_OF_OTHERS, *_OF_DRIVER)),
)


@contextmanager
def opened_folder(
    config: RunConfig[Any], home: Path, *, fresh: bool, extend: bool = False
) -> Iterator[RunFolder]:
    """Lock a run's folder, on a disk or in a store, and provide it in a ``with`` block.

    Args:
        config: The run's configuration.
        home: Base folder of a relative ``output_dir``.
        fresh: Rename the folder of an earlier run.
        extend: A finished run may go on; else its checkpoint is not copied from a store.

    Raises:
        RunFolderError: If another process holds the folder, or it cannot be reached.
        ConfigError: If the run cannot be in a store.
    """
    check_stored(config)
    place = place_of(config.output_dir, config.name, home)
    if isinstance(place, Path):
        with held_folder(place, RunFolder, _RUN, fresh=fresh) as folder:
            yield folder
        return
    with leased_copy(place, _RUN.name, fresh=fresh) as (path, stored):
        copy = _DriverCopy(path, stored)
        folder = RunFolder(path, stored=copy)
        copy.restore()
        copy.restore_of(trains_here=not config.cluster.uses_ray)
        if extend or "run_dir" not in (folder.read_results() or {}):
            copy.restore_checkpoint()
        with copy.published():
            yield folder


@contextmanager
def opened_below(
    parent: SharedFolder,
    path: Path,
    *,
    trains_here: bool,
    is_stale: Callable[[RunFolder], bool] = lambda _: False,
) -> Iterator[RunFolder]:
    """Open the folder of a run below a folder that this command holds.

    A checkpoint in a store is not copied until :func:`restore_checkpoint` is called.

    Args:
        parent: The folder that is held.
        path: Path of the run folder, below the path of ``parent``.
        trains_here: Whether the run trains in this process.
        is_stale: Whether an existing folder is of another run; it is renamed then.

    Raises:
        RunFolderError: If another process holds the folder, or it cannot be reached.
    """
    if parent.stored is None:
        folder = RunFolder(path)
        if path.exists() and is_stale(folder):
            say(f"the earlier {path.name} is now in {set_aside(folder)}")
        with folder.locked():
            yield folder
        return
    stored = parent.stored.for_workers().below(path.relative_to(parent.path).as_posix())
    with opened_part(stored, is_stale=is_stale) as (folder, restore_of):
        restore_of(trains_here=trains_here)
        yield folder


@contextmanager
def opened_part(
    stored: StoredRun, *, is_stale: Callable[[RunFolder], bool] = lambda _: False
) -> Iterator[tuple[RunFolder, Callable[..., None]]]:
    """Open the folder of a run in a store, below one that another process may have leased.

    Args:
        stored: The run's folder.
        is_stale: Whether an existing folder is of another run; it is moved then.

    Yields:
        The folder with the records of an earlier start, and a function to be called with
        ``trains_here``, which copies what the run goes on with, except a checkpoint.

    Raises:
        RunFolderError: If the store cannot be reached.
    """
    with local_copy_of(stored.store.address) as path:
        copy = _DriverCopy(path, stored)
        copy.restore()
        folder = RunFolder(path, stored=copy)
        if folder.config.exists() and is_stale(folder):
            move_aside(stored.store, "run")
            copy.restore()  # which deletes what is gone
        with copy.published():
            yield folder, copy.restore_of


def restore_checkpoint(folder: RunFolder) -> None:
    """Copy the newest intact checkpoint of a run in a store; on a disk, it is there already."""
    if isinstance(folder.stored, _DriverCopy):
        folder.stored.restore_checkpoint()


def replaced_checkpoint(folder: RunFolder) -> None:
    """Delete the checkpoints in a store that those in the folder have replaced."""
    if isinstance(folder.stored, _DriverCopy):
        folder.stored.replaced_checkpoint()


def check_stored(config: RunConfig[Any]) -> None:
    """Reject a store that the processes of a run do not share.

    Raises:
        ConfigError: If it is in the memory of one process, and the run uses several.
    """
    check_reachable(config.output_dir, uses_ray=config.cluster.uses_ray)


class _DriverCopy(FolderCopy):
    """The driver's local copy of a run's folder in a store."""

    def __init__(self, path: Path, stored: StoredRun) -> None:
        super().__init__(path, stored, _RUN)
        self._trains_here = False

    def restore_of(self, *, trains_here: bool) -> None:
        """Copy what only the process that trains needs of an earlier start."""
        self._trains_here = trains_here
        if trains_here:
            self._mirror.pull(lambda name: name == _LAST_STEP or name.startswith(_EVALUATED))

    def restore_checkpoint(self) -> None:
        """Copy the newest checkpoint, and if it is damaged, older ones until one is intact."""
        checkpoints = self._path / CHECKPOINTS
        for step in reversed(checkpoint_steps(self._stored.store)):
            self._mirror.pull_checkpoint(step)
            if not is_damaged(checkpoints, step=step):
                break

    def replaced_checkpoint(self) -> None:
        """Copy the folder's checkpoints, and delete those that only the store holds."""
        self.publish(waits=True)
        self._mirror.drop_older()

    def publish(self, *, waits: bool) -> None:
        """Copy the folder's changes to the store; what workers wait for is waited for."""
        super().publish(waits=waits or not self._trains_here)

    def fetch(self, below: str = "") -> None:
        """Copy what the workers have written, except checkpoints."""
        if not self._trains_here:
            super().fetch(below)

    def _copy(self, patient: bool) -> None:
        if not self._trains_here:  # for the terminal and MLflow
            seen = {_METRICS, _EVENTS}
            self._mirror.pull(lambda name: name in seen, recursive=False, patient=patient)
        super()._copy(patient)


@contextmanager
def worker_folder(path: Path, stored: StoredRun | None) -> Iterator[RunFolder]:
    """Provide a run's folder in a worker: the folder itself, or a local copy of one in a store.

    Args:
        path: The folder; of one in a store, only its name matters.
        stored: The folder in a store; None if ``path`` is on a disk that all nodes share.

    Raises:
        RunFolderError: If the store cannot be reached.
    """
    if stored is None:
        yield RunFolder(path)
        return
    with scratch_folder(path.name) as scratch, ExitStack() as stack:
        yield RunFolder(scratch, stored=_WorkerCopy(scratch, stored, stack))


def start_worker(folder: RunFolder, *, agreed: Callable[[int], int], rank: int) -> int:
    """Return the step to start from, and copy what a worker needs for it.

    Args:
        folder: The folder that :func:`worker_folder` provided.
        agreed: Returns the step of rank 0, from each rank's own.
        rank: Rank of this worker.
    """
    copy = folder.stored
    if not isinstance(copy, _WorkerCopy):
        return agreed(latest_step(folder.checkpoints))
    step = agreed(copy.run.newest_step())
    copy.start(step, rank=rank)
    return step


@contextmanager
def shown_in_errors(folder: RunFolder) -> Iterator[None]:
    """Let errors of raysl in the block name the folder's address instead of its local copy."""
    if folder.stored is None:
        yield
        return
    with address_in_errors(folder.path, folder.stored.address):
        yield


@contextmanager
def named_after(
    given: Path | str, copy: Path
) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Provide a function that replaces a local copy's path in settings by the address.

    Other processes, and later commands, have other local copies. Errors in the block name the
    address too.

    Args:
        given: The argument of a command, a path or an address.
        copy: Its local copy; the same as a path.
    """
    if not is_address(given):
        yield lambda values: values
        return
    address, path = str(given).rstrip("/"), str(copy.resolve())
    places = {path: address}
    places[str(Path(path).parent)] = address.rpartition("/")[0]
    if copy.is_file():  # beside it are a projection head and the run's settings
        folder = Path(path).parent
        places[str(folder.parent)] = address.rsplit("/", 2)[0]

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(each) for key, each in value.items()}
        if not isinstance(value, str):
            return value
        for local, there in places.items():
            if value == local or value.startswith(f"{local}/"):
                return there + value.removeprefix(local)
        return value

    with address_in_errors(Path(path), address):
        yield replaced


class _WorkerCopy:
    """A worker's local copy of a folder in a store. Rank 0 copies what it writes to the store."""

    def __init__(self, path: Path, run: StoredRun, stack: ExitStack) -> None:
        self.address = run.store.address
        self.run = run
        self._path = path
        self._stack = stack
        self._publisher: Publisher | None = None
        self._mirror = Mirror(path, run.store, check=run.check)
        self._mirror.pull(lambda name: name in ("config.yaml", _ERROR), recursive=False)

    def start(self, step: int, *, rank: int) -> None:
        """Copy what this worker resumes from, and start to copy what it writes."""
        own = {_METRICS, _EVENTS, _LAST_STEP}
        own |= {"failed_evaluations.jsonl", "results.json", "labels.json"}
        self._mirror.pull(
            lambda name: (
                name == _BAD or (rank == 0 and (name in own or name.startswith(_EVALUATED)))
            )
        )
        if step:
            self._mirror.pull_checkpoint(step)
        if rank == 0:
            self._publisher = self._stack.enter_context(Publisher(self._copy))

    def publish(self, *, waits: bool) -> None:
        """Copy the changes of rank 0; of other ranks, and before the start, only errors."""
        if self._publisher is None:
            self._mirror.push(lambda name: name == _ERROR or name.startswith(_STACKS))
        else:
            self._publisher.publish(waits=waits)

    def fetch(self, below: str = "") -> None:
        """Do nothing: no other process writes what a worker reads."""

    def for_workers(self) -> StoredRun:
        """Return what another worker needs to open the folder."""
        return self.run

    def _copy(self, patient: bool) -> None:
        self._mirror.push(patient=patient)
        # The driver asks for a stop by a file.
        self._mirror.pull(lambda name: name == _STOP, recursive=False, patient=patient)

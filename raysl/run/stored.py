"""The run folder of a run whose ``output_dir`` is an address of an object store.

Every process that reads or writes the folder works on a local copy of its own, its scratch, and
copies what it changes. The driver holds the folder's lease and owns what describes the run; rank 0
of the workers owns metrics, checkpoints, networks and results. Without Ray the driver is rank 0.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from raysl.errors import ConfigError, RayslError, RunFolderError
from raysl.folder.address import below, is_address
from raysl.folder.claim import aside_name, set_aside
from raysl.report.terminal import say
from raysl.run.protocol_runs import protocols_to_train
from raysl.run.recipe import RunConfig
from raysl.store.lease import LEASE, Lease, check_lease
from raysl.store.mirror import CHECKPOINTS, Mirror, StoredRun, checkpoint_steps
from raysl.store.objects import Store
from raysl.store.publisher import Publisher
from raysl.store.scratch import scratch_folder
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.checkpoint import is_damaged

_INSTEAD = "give this run another name=..."
_EVALUATED = "to_evaluate/"
_ERROR, _STOP, _METRICS, _BAD = "error.json", "stop", "metrics.jsonl", "bad_images.jsonl"
_EVENTS, _LAST_STEP, _STACKS = "events.jsonl", "last_step", "stacks/"
# What the driver writes itself, on Ray too.
_OF_DRIVER = ("config.yaml", "source.json", "extensions.json", "mlflow.json", "report.html")
_FOLDERS_OF_OTHERS = (CHECKPOINTS, _EVALUATED, "pictures/", "ray/", "evaluations/", "exports/")
_SMALL = (".yaml", ".json", ".jsonl")
_IN_ONE_PROCESS = "memory://"


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
    if is_address(config.output_dir):
        with _stored_folder(config, fresh=fresh, extend=extend) as folder:
            yield folder
        return
    folder = RunFolder(home / Path(config.output_dir).expanduser() / config.name)
    if fresh and folder.path.exists():
        say(f"the earlier run is now in {set_aside(folder)}")
    with folder.locked():
        yield folder


@contextmanager
def _stored_folder(config: RunConfig[Any], *, fresh: bool, extend: bool) -> Iterator[RunFolder]:
    check_stored(config)
    store = Store(below(config.output_dir, config.name))
    here = config.cluster.num_train_workers == 0
    with (
        Lease(store, instead=_INSTEAD, tell=say) as lease,
        scratch_folder(config.name) as path,
        _shown_in_errors(path, store.address),
    ):
        if fresh and set(store.list()) - {LEASE}:
            aside = Store(aside_name(store.address))
            store.move_to(aside, without=[LEASE])
            say(f"the earlier run is now in {aside.address}")
        copy = _DriverCopy(path, store, lease, trains_here=here)
        folder = RunFolder(path, stored=copy)
        copy.restore()
        if extend or "run_dir" not in (folder.read_results() or {}):
            copy.restore_checkpoint()
        with copy.publisher:
            try:
                yield folder
            except RunFolderError:  # of the store, or before anything was changed
                raise
            except BaseException:
                copy.try_to_publish()
                raise
            copy.publish(waits=True)


def check_stored(config: RunConfig[Any]) -> None:
    """Reject what only works on a disk, if the run is in a store.

    Raises:
        ConfigError: If the run trains runs below its folder, or its processes share no store.
    """
    if not is_address(config.output_dir):
        return
    if names := protocols_to_train(config):
        raise ConfigError(
            f"evaluate.final={','.join(names)}: trains runs below the run folder, which needs an "
            f"output_dir on a disk; drop it, and run raysl finetune "
            f"{below(config.output_dir, config.name)} after this run"
        )
    if config.output_dir.startswith(_IN_ONE_PROCESS) and config.cluster.num_train_workers:
        raise ConfigError(
            f"output_dir={config.output_dir}: each process of Ray has a memory of its own; set "
            f"cluster.num_train_workers=0, or use a store that all processes reach"
        )


class _DriverCopy:
    """The driver's local copy of a folder in a store."""

    def __init__(self, path: Path, store: Store, lease: Lease, *, trains_here: bool) -> None:
        self.address = store.address
        self._path = path
        self._store = store
        self._token = lease.token
        self._trains_here = trains_here
        self._mirror = Mirror(path, store, check=lambda own: check_lease(own, lease.token))
        self.publisher = Publisher(self._copy)

    def restore(self) -> None:
        """Copy the records of an earlier start."""
        self._mirror.pull(
            lambda name: (
                name == _STOP
                or (name.endswith(_SMALL) and not name.startswith(_FOLDERS_OF_OTHERS))
                or (self._trains_here and (name == _LAST_STEP or name.startswith(_EVALUATED)))
            )
        )

    def restore_checkpoint(self) -> None:
        """Copy the newest checkpoint, and if it is damaged, older ones until one is intact."""
        checkpoints = self._path / CHECKPOINTS
        for step in reversed(checkpoint_steps(self._store)):
            self._mirror.pull_checkpoint(step)
            if not is_damaged(checkpoints, step=step):
                break

    def publish(self, *, waits: bool) -> None:
        """Copy the folder's changes to the store; what workers wait for is waited for."""
        self.publisher.publish(waits=waits or not self._trains_here)

    def try_to_publish(self) -> None:
        """Copy what can be copied; the error that ends the run is raised instead of another."""
        try:
            self.publish(waits=True)
        except RunFolderError as error:
            say(f"  {error}")

    def fetch(self) -> None:
        """Copy what the workers have written, except checkpoints."""
        if not self._trains_here:
            self._mirror.pull(lambda name: not name.startswith((*_FOLDERS_OF_OTHERS, *_OF_DRIVER)))

    def for_workers(self) -> StoredRun:
        """Return what workers need to open the folder."""
        return StoredRun(self._store, self._token)

    def _copy(self, patient: bool) -> None:
        if not self._trains_here:  # for the terminal and MLflow
            seen = {_METRICS, _EVENTS}
            self._mirror.pull(lambda name: name in seen, recursive=False, patient=patient)
        self._mirror.push(patient=patient)


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
    with _shown_in_errors(folder.path, folder.stored.address):
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

    with _shown_in_errors(Path(path), address):
        yield replaced


class _WorkerCopy:
    """A worker's local copy of a folder in a store. Rank 0 copies what it writes to the store."""

    def __init__(self, path: Path, run: StoredRun, stack: ExitStack) -> None:
        self.address = run.store.address
        self.run = run
        self._path = path
        self._stack = stack
        self._publisher: Publisher | None = None
        self._mirror = Mirror(path, run.store, check=lambda own: check_lease(own, run.token))
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

    def fetch(self) -> None:
        """Do nothing: no other process writes what a worker reads."""

    def for_workers(self) -> StoredRun:
        """Return what another worker needs to open the folder."""
        return self.run

    def _copy(self, patient: bool) -> None:
        self._mirror.push(patient=patient)
        # The driver asks for a stop by a file.
        self._mirror.pull(lambda name: name == _STOP, recursive=False, patient=patient)


@contextmanager
def _shown_in_errors(path: Path, address: str) -> Iterator[None]:
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

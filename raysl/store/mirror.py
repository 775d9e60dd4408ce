"""Copy a local folder to a store, and back, so that the store is consistent at any moment.

An upload is whole or absent, so the order of uploads is all that matters: first what a checkpoint
refers to (metrics, bad images, encoders to evaluate), then the checkpoint, then ``results.json``,
which ends a run; deletions last. Several processes may mirror one folder if each changes other
files: a mirror only replaces and deletes what it wrote or read itself.

Files that grow, ``*.jsonl``, are objects of ``PART_BYTES`` each: ``metrics.jsonl``,
``metrics.jsonl.000001``, ... A new line uploads the last of them, whatever the length of the file.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from raysl.folder.whole import UNFINISHED, write_bytes
from raysl.store.lease import check_lease
from raysl.store.objects import Entry, Store
from raysl.track.run_folder import checkpoint_path, list_steps

PART_BYTES = 1 << 20
"""Size of the objects of a file that grows."""

CHECKPOINTS = "checkpoints/"
STATE = "state.pt"
RESULTS = "results.json"
_STEPS = f"{CHECKPOINTS}step-"

_GROWS = ".jsonl"
_PART = re.compile(r"^(?P<file>.+\.jsonl)(?:\.(?P<number>\d{6}))?$")

Wanted = Callable[[str], bool]
"""Whether to copy the file of a name relative to the folder."""

_Signature = tuple[int, int, int]  # inode, bytes, nanoseconds of the last change


@dataclass
class _Grown:
    """What a mirror knows of a file that grows."""

    inode: int = -1
    size: int = 0  # bytes that the store holds
    digests: list[bytes] = field(default_factory=list)  # of each part
    entries: list[Entry] = field(default_factory=list)  # of the parts that were read


class Mirror:
    """A local folder and its copy in a store. Thread-safe.

    Args:
        folder: The local folder.
        store: The folder in the store.
        check: Raises if this process may no longer write; called before it does.
    """

    def __init__(self, folder: Path, store: Store, *, check: Callable[[Store], None]) -> None:
        self.folder = folder
        self.store = copy(store)  # its patience changes
        self._check = check
        self._lock = threading.RLock()
        self._files: dict[str, _Signature] = {}  # as they were when they were last copied
        self._read: dict[str, Entry] = {}  # objects as they were when they were last read
        self._grown: dict[str, _Grown] = {}
        self._older: list[str] = []  # objects of checkpoints that only the store holds

    def push(self, wanted: Wanted = lambda _: True, *, patient: bool = True) -> None:
        """Copy what has changed in the folder since the last copy to the store.

        Args:
            wanted: The files to copy.
            patient: Repeat requests for a while after transient errors.

        Raises:
            RunFolderError: If the store fails, or this process may no longer write.
        """
        with self._patience(patient):
            local = {name: each for name, each in _files(self.folder) if wanted(name)}
            known = [name for name in [*self._files, *self._grown] if wanted(name)]
            gone = [name for name in known if name not in local]
            changed = [name for name, each in local.items() if self._has_changed(name, each)]
            if not gone and not changed:
                return
            self._check(self.store)
            if RESULTS in gone:  # before anything of the run that goes on
                self._delete([RESULTS])
            for name in sorted(changed, key=_turn):
                self._upload(name, local[name])
            self._delete([name for name in gone if name != RESULTS])
            if self._older and len(_steps(local)) >= len(_steps(self._older)) + 1:
                # As many newer checkpoints are here as the store held: the older ones may go.
                self.drop_older()

    def pull(
        self, wanted: Wanted, *, below: str = "", recursive: bool = True, patient: bool = True
    ) -> None:
        """Copy what has changed in the store since the last copy to the folder.

        Wanted files that another process deleted from the store are deleted.

        Args:
            wanted: The files to copy. This process must not have changed them since the last copy.
            below: The folder in this one to look at; empty for the whole folder.
            recursive: Also look at files in folders below it.
            patient: Repeat requests for a while after transient errors.

        Raises:
            RunFolderError: If the store fails.
        """
        with self._patience(patient):
            entries = self.store.list(below, recursive=recursive)
            parts: dict[str, dict[int, Entry]] = {}
            for name, entry in entries.items():
                if any(map(_is_hidden, name.split("/"))):  # a lease, an upload that was cut
                    continue
                if (part := _PART.match(name)) and wanted(part["file"]):
                    parts.setdefault(part["file"], {})[int(part["number"] or 0)] = entry
                elif not part and wanted(name) and self._read.get(name) != entry:
                    self._download(name, entry)
            for name, numbered in parts.items():
                self._download_parts(name, numbered)
            for name in [*self._files, *self._grown]:
                if not _is_listed(name, below, recursive=recursive) or not wanted(name):
                    continue
                if name not in parts and name not in entries:
                    (self.folder / name).unlink(missing_ok=True)
                    self._forget(name)

    def pull_checkpoint(self, step: int) -> None:
        """Copy a checkpoint to the folder.

        Older ones stay in the store until as many newer ones are there.

        Raises:
            RunFolderError: If the store fails.
        """
        top = f"{_STEPS}{step:09d}/"
        self.pull(lambda name: name.startswith(top), below=CHECKPOINTS.rstrip("/"))
        held = self.store.list(CHECKPOINTS.rstrip("/"))
        self._older = [each for each in held if _STEPS <= each < top]

    def drop_older(self) -> None:
        """Delete the older checkpoints, which only the store holds.

        Raises:
            RunFolderError: If the store fails.
        """
        with self._lock:
            self.store.delete(name for name in self._older if name not in self._files)
            self._older = []

    @contextmanager
    def _patience(self, patient: bool) -> Iterator[None]:
        with self._lock:
            usual_s = self.store.retry_s
            self.store.retry_s = usual_s if patient else 0.0
            try:
                yield
            finally:
                self.store.retry_s = usual_s

    def _has_changed(self, name: str, signature: _Signature) -> bool:
        if name.endswith(_GROWS):
            grown = self._grown.get(name)
            return grown is None or (grown.inode, grown.size) != signature[:2]
        return self._files.get(name) != signature

    def _upload(self, name: str, signature: _Signature) -> None:
        try:
            if name.endswith(_GROWS):
                self._upload_parts(name)
            else:
                self.store.put_file(name, self.folder / name)
                self._files[name] = signature
        except FileNotFoundError:  # deleted meanwhile: the next copy sees it
            return

    def _upload_parts(self, name: str) -> None:
        """Upload the parts of a file that have changed, then delete those beyond its end."""
        grown = self._grown.setdefault(name, _Grown())
        with open(self.folder / name, "rb") as file:
            status = os.fstat(file.fileno())
            is_longer = status.st_ino == grown.inode and status.st_size >= grown.size
            number = min(grown.size // PART_BYTES if is_longer else 0, len(grown.digests))
            size = number * PART_BYTES
            file.seek(size)
            while True:
                content = file.read(PART_BYTES)
                if not content and number:
                    break
                size += len(content)
                digest = hashlib.blake2b(content).digest()
                if grown.digests[number : number + 1] != [digest]:
                    self.store.put(_part_name(name, number), content)
                    grown.digests[number : number + 1] = [digest]
                    del grown.entries[number:]
                number += 1
                if len(content) < PART_BYTES:
                    break
        surplus = range(number, len(grown.digests))
        self.store.delete(_part_name(name, each) for each in reversed(surplus))
        del grown.digests[number:]
        grown.inode, grown.size = status.st_ino, size

    def _download(self, name: str, entry: Entry) -> None:
        path = self.folder / name
        try:
            self.store.get_file(name, path)
        except FileNotFoundError:  # deleted since the listing
            return
        self._files[name], self._read[name] = _signature(path), entry

    def _download_parts(self, name: str, numbered: dict[int, Entry]) -> None:
        """Bring a file that grows up to date; readers that follow it see lines appended."""
        entries = [numbered[each] for each in range(len(numbered)) if each in numbered]
        grown = self._grown.setdefault(name, _Grown())
        same = 0
        while (
            entries[same : same + 1] and entries[same : same + 1] == grown.entries[same : same + 1]
        ):
            same += 1
        path = self.folder / name
        if same == len(entries) == len(grown.entries) and path.exists():
            return
        contents = [self.store.get(_part_name(name, each)) for each in range(same, len(entries))]
        new = b"".join(content or b"" for content in contents)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with open(path, "r+b") as file:
            file.seek(same * PART_BYTES)
            old = file.read()
            if new.startswith(old):
                file.write(new[len(old) :])
            else:
                file.seek(0)
                write_bytes(path, file.read(same * PART_BYTES) + new)
        grown.entries = entries
        grown.digests[same:] = [hashlib.blake2b(content or b"").digest() for content in contents]
        grown.inode, grown.size = _signature(path)[:2]

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            if name.endswith(_GROWS):
                count = len(self._grown.get(name, _Grown()).digests)
                self.store.delete(_part_name(name, each) for each in reversed(range(count)))
            else:
                self.store.delete([name])
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._files.pop(name, None)
        self._read.pop(name, None)
        self._grown.pop(name, None)


def _is_listed(name: str, below: str, *, recursive: bool) -> bool:
    """Return whether the listing of a folder includes the file of a name."""
    top = f"{below}/" if below else ""
    return name.startswith(top) and (recursive or "/" not in name.removeprefix(top))


def checkpoint_steps(store: Store) -> list[int]:
    """Return the steps of the complete checkpoints in a run's folder in a store, in order."""
    return _steps(store.list(CHECKPOINTS.rstrip("/")))


def copy_checkpoint(store: Store, step: int, folder: Path) -> None:
    """Copy a checkpoint of a run in a store to a local folder.

    Raises:
        RunFolderError: If the store fails.
    """
    top = checkpoint_path(Path(CHECKPOINTS), step).as_posix()
    for name in store.list(top):
        store.get_file(name, folder / name.removeprefix(f"{top}/"))


def _steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the complete checkpoints among names of files, in order."""
    states = (name.split("/") for name in names if name.startswith(CHECKPOINTS))
    return list_steps(parts[1] for parts in states if parts[-1] == STATE)


class StoredRun(NamedTuple):
    """A folder in a store, for workers and for Ray's controller, which loads no torch."""

    store: Store
    token: str
    """Token of the driver's lease."""
    leased: Store | None = None
    """The leased folder, if it is one above; None: this one."""

    def below(self, name: str) -> "StoredRun":
        """Return a folder in this one, which is written under the same lease."""
        store = Store(f"{self.store.address}/{name}", setting=self.store.setting)
        return StoredRun(store, self.token, self.leased or self.store)

    def check(self, own: Store) -> None:
        """Check that the folder is still leased to the driver of this process.

        Args:
            own: This folder, with the patience of the process that wants to write.

        Raises:
            RunFolderError: If the lease was taken over or has ended.
        """
        leased = copy(self.leased or own)
        leased.retry_s = own.retry_s
        check_lease(leased, self.token)

    def newest_step(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none."""
        return max(checkpoint_steps(self.store), default=0)


def _turn(name: str) -> tuple[int, str]:
    """Return a file's place in the order of uploads."""
    if name == RESULTS:
        return 3, name
    if name.startswith(CHECKPOINTS):
        return (2 if name.endswith(f"/{STATE}") else 1), name
    return 0, name


def _part_name(name: str, number: int) -> str:
    return f"{name}.{number:06d}" if number else name


def _files(folder: Path) -> Iterator[tuple[str, _Signature]]:
    """Yield the complete files below a folder."""
    for root, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not _is_hidden(each)]
        for name in names:
            if not _is_hidden(name):
                path = Path(root, name)
                try:
                    yield path.relative_to(folder).as_posix(), _signature(path)
                except FileNotFoundError:  # deleted meanwhile
                    continue


def _is_hidden(name: str) -> bool:
    return name.startswith((UNFINISHED, "."))


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns

"""A lease on a folder in a store: the lock of its driver, with an owner and an age."""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from raysl.errors import RunFolderError
from raysl.folder.whole import json_object
from raysl.store.objects import Store

LEASE = ".lease.json"
"""Name of the object that holds the lease."""

RENEW_S = 10.0
"""Seconds between two renewals."""

MISSED = 6
"""Missed renewals after which another process may take the lease over."""

# Clocks of two machines differ by less. A lease that is older by this is over; a younger one is
# watched, which needs no common clock.
_SKEW_S = 300.0
_FIRST_CHECK_S = 1.0
_WATCH_EVERY_S = 1.0


class Owner(NamedTuple):
    """The process that holds a lease."""

    host: str
    pid: int
    token: str
    """Random; differs between two leases of one process."""
    machine: str
    """Identifies the machine, since its start, and its process ids."""
    began: float
    """When the process began, in seconds since 1970."""
    renewed: float
    """Last renewal in seconds since 1970, by the owner's clock."""

    @property
    def age_s(self) -> float:
        """Seconds since the last renewal, by the clocks of both machines."""
        return max(0.0, time.time() - self.renewed)

    def text(self) -> str:
        """Describe the process and the age of its lease."""
        return f"process {self.pid} of {self.host} (lease renewed {self.age_s:.0f} s ago)"


class Lease:
    """Holds a folder's lease in a ``with`` block, renewed by a thread.

    A lease that its owner released, has not renewed for ``MISSED`` times ``RENEW_S`` seconds, or
    whose owner was a process of this machine that has ended, is free. Stores have no lock: two
    processes that take a free lease in the same instant see this at their first check, and the one
    that wrote first stops.

    Args:
        store: The folder.
        instead: Advice to the user other than to wait.
        tell: Receives a message if entering the block waits.
        renew_s: Seconds between two renewals; None takes ``RENEW_S``.
    """

    def __init__(
        self,
        store: Store,
        *,
        instead: str,
        tell: Callable[[str], None],
        renew_s: float | None = None,
    ) -> None:
        self.store = store
        self._instead = instead
        self._tell = tell
        self.renew_s = RENEW_S if renew_s is None else renew_s
        self._owner = _this_process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="raysl-lease", daemon=True)

    @property
    def token(self) -> str:
        """What identifies this lease."""
        return self._owner.token

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            RunFolderError: If another process holds it, or the store fails.
        """
        owner = read_owner(self.store)
        if owner is not None:
            self._wait_for_end(owner)
        self._write(self.store)
        check_lease(self.store, self.token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(RunFolderError):  # it ends by its age
            store = self.store.once()
            owner = read_owner(store)
            if owner is not None and owner.token == self.token:
                store.delete([LEASE])

    def _wait_for_end(self, owner: Owner) -> None:
        """Return when a lease has ended.

        Raises:
            RunFolderError: If its owner renews it.
        """
        lasts_s = MISSED * self.renew_s
        if owner.machine == _machine():
            if _runs(owner):
                raise self._refusal(owner)
            return
        if owner.age_s > lasts_s + _SKEW_S:
            return
        self._tell(
            f"{self.store.address}: {owner.text()}; waiting up to {lasts_s:.0f} s for its end"
        )
        until = time.monotonic() + lasts_s
        while time.monotonic() < until:
            time.sleep(min(_WATCH_EVERY_S, self.renew_s))
            now = read_owner(self.store)
            if now is None:
                return
            if now != owner:
                raise self._refusal(now)

    def _refusal(self, owner: Owner) -> RunFolderError:
        return RunFolderError(
            f"{self.store.address}: {owner.text()} works in this folder; wait for it, or "
            f"{self._instead}. If that process has ended, its lease ends "
            f"{MISSED * self.renew_s:.0f} s after its last renewal; the same command then takes "
            f"it over"
        )

    def _renew(self) -> None:
        store, pause_s = self.store.once(), min(_FIRST_CHECK_S, self.renew_s)
        while not self._ended.wait(pause_s):
            pause_s = self.renew_s
            with suppress(RunFolderError):  # the next renewal comes soon
                owner = read_owner(store)
                if owner is not None and owner.token != self.token:
                    return  # taken over; check() says so
                self._write(store)

    def _write(self, store: Store) -> None:
        self._owner = self._owner._replace(renewed=time.time())
        store.put(LEASE, json.dumps(self._owner._asdict(), indent=1).encode())


def check_lease(store: Store, token: str) -> None:
    """Check that a folder is still leased to the run of this process.

    Raises:
        RunFolderError: If the lease was taken over or has ended.
    """
    owner = read_owner(store)
    if owner is None or owner.token != token:
        by = "its driver has ended" if owner is None else f"{owner.text()} has taken it over"
        raise RunFolderError(
            f"{store.address}: this run no longer holds the folder: {by}. This process writes "
            f"nothing more"
        )


def read_owner(store: Store) -> Owner | None:
    """Return the owner of a folder's lease; None if it is free or damaged."""
    values: dict[str, Any] | None = json_object(store.get(LEASE) or b"")
    if values is None:
        return None
    try:
        return Owner(
            str(values["host"]),
            int(values["pid"]),
            str(values["token"]),
            str(values["machine"]),
            float(values["began"]),
            float(values["renewed"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _this_process() -> Owner:
    began = psutil.Process().create_time()
    return Owner(platform.node(), os.getpid(), uuid.uuid4().hex, _machine(), began, time.time())


def _machine() -> str:
    """Return what identifies this machine since its start, and a container on it."""
    parts = [platform.node()]
    with suppress(OSError):  # not on Linux: then the start of the process decides
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _runs(owner: Owner) -> bool:
    try:
        return bool(abs(psutil.Process(owner.pid).create_time() - owner.began) < 1.0)
    except psutil.Error:
        return False

"""Copy to and from a store in a thread, at intervals and on request."""

import threading
import time
from collections.abc import Callable

from raysl.errors import RunFolderError
from raysl.store.objects import RETRY_S

EVERY_S = 3.0
"""Seconds between two copies of what a run writes all the time, such as metrics."""


class Publisher:
    """Runs a copy in a thread in a ``with`` block.

    A copy at intervals that fails is repeated by the next. A requested copy is patient; if it fails
    all the same, the next request repeats it, waits for it and raises, without patience if it comes
    soon. A store that is down for less than the time between two checkpoints costs nothing.

    Args:
        copy: Copies what has changed; called with whether it is patient after transient errors.
        every_s: Seconds between two copies; None takes ``EVERY_S``.
    """

    def __init__(self, copy: Callable[[bool], None], *, every_s: float | None = None) -> None:
        self._copy = copy
        self._every_s = EVERY_S if every_s is None else every_s
        self._state = threading.Condition()
        self._asked = self._done = 0
        self._problem: RunFolderError | None = None
        self._failed_at = 0.0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="raysl-publish", daemon=True)

    def __enter__(self) -> "Publisher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread after the copies that were requested; errors are dropped."""
        with self._state:
            self._ended = True
            self._state.notify_all()
        self._thread.join()

    def publish(self, *, waits: bool) -> None:
        """Wait for the copy that was requested before, and request another.

        Args:
            waits: Also wait for the new copy.

        Raises:
            RunFolderError: If the new copy fails and is waited for.
        """
        with self._state:
            self._state.wait_for(lambda: self._done >= self._asked)
            waits = waits or self._problem is not None
            self._asked += 1
            self._state.notify_all()
            if waits:
                self._state.wait_for(lambda: self._done >= self._asked)
                if self._problem is not None:
                    raise self._problem

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(
                    lambda: self._ended or self._asked > self._done, timeout=self._every_s
                )
                asked = self._asked
                if self._ended and asked == self._done:
                    return
                soon = self._problem is not None and time.monotonic() - self._failed_at < RETRY_S
                patient = asked > self._done and not soon
            problem = self._try(patient)
            with self._state:
                if asked > self._done:
                    self._done, self._problem = asked, problem
                    self._failed_at = time.monotonic()
                    self._state.notify_all()

    def _try(self, patient: bool) -> RunFolderError | None:
        try:
            self._copy(patient)
        except RunFolderError as error:
            return error
        except Exception as error:  # whoever waits must learn of it, or would wait forever
            return RunFolderError(f"the copy to the store failed: {type(error).__name__}: {error}")
        return None

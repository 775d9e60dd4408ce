"""Stop a run after its current step, with a checkpoint, when Ctrl-C or SIGTERM asks for it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raysl.errors import StoppedError, Terminated

_SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_NOTICE = b"\nstopping after the current step, with a checkpoint; Ctrl-C stops at once\n"


@contextmanager
def stops_after_step(ask: Callable[[], None]) -> Iterator[None]:
    """Call ``ask`` at the first signal in the block, and raise at the second.

    A signal that the process ignores is left alone, and outside the main thread, where Python
    handles no signals, all are.

    Args:
        ask: Asks the training to write a checkpoint and to raise :class:`StoppedError`; a signal
            handler calls it.

    Raises:
        KeyboardInterrupt: At the second signal, or instead of StoppedError after a Ctrl-C.
        Terminated: The same after SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise _SIGNALS[signal.Signals(number)]
        asked.append(signal.Signals(number))
        os.write(2, _NOTICE)  # print may hold a lock that this handler interrupted
        ask()

    earlier: dict[signal.Signals, Any] = {}
    for kind in _SIGNALS:
        if signal.getsignal(kind) not in (signal.SIG_IGN, None):
            earlier[kind] = signal.signal(kind, handle)
    try:
        yield
    except StoppedError as error:
        stopped = _SIGNALS[asked[0]] if asked else KeyboardInterrupt
        raise stopped(str(error)) from None
    finally:
        for kind, handler in earlier.items():
            signal.signal(kind, handler)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` in the block, if the main thread runs it."""
    is_main = threading.current_thread() is threading.main_thread()
    earlier = signal.getsignal(signal.SIGTERM) if is_main else None
    if earlier in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


@contextmanager
def keeps_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM after a block that sets its own, as ``ray.init`` does."""
    earlier = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and earlier is not None:
        signal.signal(signal.SIGTERM, earlier)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated

"""End a training: by Ctrl-C or SIGTERM after its current step, or at once because it hangs."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raysl.errors import HungError, StoppedError, Terminated

_SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_HUNG = signal.SIGUSR2  # wakes up the main thread
_UNWINDING_S = 10.0  # how long a training that hangs has for ending by an exception
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
def ends_when_hung() -> Iterator[Callable[[str], None]]:
    """Provide a function that ends the training in the block from another thread.

    It raises HungError in the block. A block that does not end by that, because it is not in the
    main thread or not in Python, ends with the process, with status 1.

    Raises:
        HungError: If the function was called.
    """
    main, texts, is_over = threading.main_thread(), [], threading.Event()

    def end(text: str) -> None:
        texts.append(text)
        if is_main:
            signal.pthread_kill(main.ident or 0, _HUNG)
            if is_over.wait(_UNWINDING_S):
                return
        os.write(2, f"\nraysl: HungError: {text}\n".encode())
        os._exit(1)

    def handle(number: int, frame: FrameType | None) -> None:
        if texts and not is_over.is_set():
            raise HungError(texts[0])

    is_main = threading.current_thread() is main
    earlier = signal.signal(_HUNG, handle) if is_main else None
    try:
        yield end
    finally:
        is_over.set()
        if is_main and not texts:  # else the signal may still come
            signal.signal(_HUNG, earlier or signal.SIG_DFL)


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

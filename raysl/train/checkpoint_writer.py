"""Write checkpoints in a thread: training copies its state and goes on.

Memory: one copy of the state (weights, buffers and the optimizers' moments) on the CPU of the rank
that writes, allocated at the first checkpoint and used again for each later one. Behind GPUs it is
page-locked, for which torch rounds each tensor up to a power of two, so at most twice the state.
"""

import copy
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.errors import RunFolderError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0

Write = Callable[[Any, int], None]
"""Writes a state on the CPU as the checkpoint of a step; raises RunFolderError."""


class CheckpointWriter:
    """Writes one checkpoint at a time in its own thread.

    A checkpoint that cannot be written is tried again while training continues, unless a newer one
    takes its place. If that does not help, :attr:`problem` says why, and nothing more is written.

    Leaving the ``with`` block waits for the write that is in progress, except after an exception
    such as KeyboardInterrupt that must end the process at once.

    Args:
        write: Writes a checkpoint.
        patience_s: Seconds from the first failure on for which writing is tried again.
        lost: Why no further attempt can help, such as a deleted folder; None if one may.
        tell: Called in the thread with a step and a line for the user about a failed attempt, or
            about the first one that succeeded after it.
        first_pause_s: Seconds between the first two attempts; each pause is twice the one before,
            but at most a minute.
    """

    def __init__(
        self,
        write: Write,
        *,
        patience_s: float,
        lost: Callable[[], str | None] = lambda: None,
        tell: Callable[[int, str], None] = lambda step, line: None,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._write = write
        self._patience_s = patience_s
        self._lost = lost
        self._tell = tell
        self._first_pause_s = first_pause_s
        self.problem: str | None = None
        """Why the run must end; None as long as checkpoints are written."""
        self._copy = _HostCopy()
        self._changed = threading.Condition()
        self._waiting: tuple[Any, int] | None = None  # state and step; also while it is written
        self._is_writing = False
        self._failing_since: float | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if error is None or isinstance(error, Exception):
                self._changed.wait_for(lambda: self._thread is None)
                self._copy = _HostCopy()  # frees the memory

    def save(self, state: Mapping[str, Any], *, step: int) -> None:
        """Copy a state and return; the thread writes it.

        Waits while the thread writes an earlier state. One that waits for its next attempt is
        replaced. Does nothing once there is a :attr:`problem`.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_writing)
            if self.problem is not None:
                return
            self._waiting = self._copy.take(state), step
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="raysl-checkpoints", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the last state is written, or cannot be: see :attr:`problem`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None)

    def _run(self) -> None:
        try:
            while (waiting := self._next()) is not None:
                problem, is_final = self._attempt(*waiting)
                self._end_attempt(waiting, problem, is_final=is_final)
        finally:
            with self._changed:
                self._thread = None
                self._changed.notify_all()

    def _next(self) -> tuple[Any, int] | None:
        """Wait for a state to write; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            self._is_writing = self._waiting is not None
            return self._waiting

    def _attempt(self, state: Any, step: int) -> tuple[str | None, bool]:
        """Write a state; return the problem, and whether it will stay."""
        try:
            if (lost := self._lost()) is not None:
                return lost, True
            self._copy.wait()
            self._write(state, step)
        except RunFolderError as error:
            lost = self._lost()  # the folder may have gone meanwhile
            return lost or str(error), lost is not None
        except Exception as error:  # else it would be lost, and training would wait for ever
            return f"the checkpoint of step {step}: {type(error).__name__}: {error}", True
        return None, False

    def _end_attempt(
        self, written: tuple[Any, int], problem: str | None, *, is_final: bool
    ) -> None:
        """Note the outcome of an attempt; after a failure, wait for the time of the next one."""
        now, since = time.monotonic(), self._failing_since
        failing_s = 0.0 if since is None else now - since
        if problem is None and since is not None:
            self._tell(
                written[1],
                f"the checkpoint of step {written[1]} is written, after {failing_s:.0f} s of "
                f"failed attempts",
            )
        if problem is not None and since is None and not is_final and self._patience_s > 0:
            self._tell(
                written[1],
                f"{problem}. Training continues, and it is tried again for {self._patience_s:g} s",
            )
        with self._changed:
            self._is_writing = False
            is_final = is_final or failing_s >= self._patience_s or self._closed
            if problem is None:
                self._waiting, self._failing_since = None, None
            elif is_final:
                self._waiting, self.problem = None, problem
            else:
                self._failing_since = now - failing_s
            self._changed.notify_all()
            if self._waiting is not None:
                left_s = self._patience_s - failing_s
                pause_s = min(_LONGEST_PAUSE_S, max(self._first_pause_s, failing_s), left_s)
                self._changed.wait_for(
                    lambda: self._closed or self._waiting is not written, timeout=pause_s
                )


class _HostCopy:
    """A copy of a state on the CPU, whose memory is used again for the next one."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._event: torch.cuda.Event | None = None

    def take(self, state: Any) -> Any:
        """Copy a state of dicts, lists and tensors; the earlier copy is overwritten.

        Tensors that share their memory share it in the copy too. A copy from a GPU is only queued
        behind the work of the current stream, and before what follows: see :meth:`wait`.
        """
        earlier, self._memory = self._memory, []
        copies: dict[tuple[Any, ...], Tensor] = {}
        uses_cuda = False

        def copied(value: Any) -> Any:
            nonlocal uses_cuda
            if isinstance(value, Tensor):
                uses_cuda = uses_cuda or value.is_cuda
                key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
                if value.numel() == 0 or key not in copies:
                    copies[key] = self._store(value.detach(), earlier)
                return copies[key]
            if isinstance(value, dict):
                result = copy.copy(value)  # also what torch attaches to a state, such as versions
                result.update({name: copied(each) for name, each in value.items()})
                return result
            if isinstance(value, list):
                return [copied(each) for each in value]
            return copy.deepcopy(value)

        result = copied(state)
        self._event = None
        if uses_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        return result

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._event is not None:
            self._event.synchronize()

    def _store(self, value: Tensor, earlier: list[Tensor]) -> Tensor:
        number = len(self._memory)
        memory = earlier[number] if number < len(earlier) else None
        if memory is None or not _has_form(memory, value):
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        if value.is_cuda or memory.stride() != value.stride():
            memory.copy_(value, non_blocking=True)
        else:
            np.copyto(_bytes(memory), _bytes(value))
        self._memory.append(memory)
        return memory


def _has_form(memory: Tensor, value: Tensor) -> bool:
    return (
        memory.dtype == value.dtype
        and memory.shape == value.shape
        and memory.stride() == value.stride()
    )


def _bytes(dense: Tensor) -> npt.NDArray[np.uint8]:
    """Return the memory of a dense CPU tensor.

    NumPy copies it in one thread. Those of torch would wait for each other, tensor by tensor, which
    takes five times as long on a machine whose cores are busy with views.
    """
    flat = dense.as_strided((dense.numel(),), (1,))
    result: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return result

"""Fork the worker processes of a Ray of our own from a process that has imported everything.

A run on one machine has fifteen processes of Ray, most of which need one to six seconds of a core
to import ray, ray.data or torch. A fork has them at once, and shares their memory. Ray starts
:mod:`raysl.run.fork_client` for each worker process, which asks this server.

Three conditions make this possible. The server has no thread that might hold a lock in a fork: the
only ones belong to allocators and BLAS, which expect forks. It draws no random number of Ray, or
all workers would draw the same identifiers; :func:`_has_own_random_numbers` checks this before the
first fork and after each later import. And Ray reads some variables when it is imported, among them
the process id of the raylet, which does not run yet: workers end when that process has ended. They
watch :class:`_StandIn`, a process that ends with the raylet.
"""

import array
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

from raysl.run.fork_client import FORKED

# Imported before the first worker.
_RAY = (
    "ray._private.node",
    "ray._private.async_compat",
    "ray._private.runtime_env.setup_hook",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.iterator.stream_split_iterator",
    "ray.train.v2._internal.execution.controller",
    # Each worker imports these for its serializers when it connects.
    "pydantic.v1",
    "pyarrow.json",
    "starlette.datastructures",
)
# Imported one after the other while no worker is asked for, and then what the command line names.
_LATER = ("raysl.run.ray_data", "raysl.run.ray_group", "raysl.run.ray_streams")
_ANY_JOB = "f" * 8  # Ray's id of no job; a worker gets its own with its first task


class _Server:
    def __init__(self, path: str, stand_in: "_StandIn", more: Sequence[str]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(128)
        self._path = path
        self._wake, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._fork)
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._end)
        self._clients: dict[int, socket.socket] = {}  # by process id
        self._imports = [*_RAY, *_LATER, *more]
        self._stand_in = stand_in

    def serve(self) -> dict[str, Any]:
        """Serve until the process that started this one ends; return, in each fork, its request."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it writes to the pipe
        signal.set_wakeup_fd(self._write)
        while True:
            events = self._selector.select(0 if self._imports else None)
            if not events:
                self._import_next()
            for key, _ in events:
                request: dict[str, Any] | None = key.data()
                if request is not None:
                    return request

    def _import_next(self) -> None:
        name = self._imports.pop(0)
        with suppress(ImportError):  # whoever needs it will say so
            _import_without_random_numbers(name)
            self._check()
        if not self._imports:
            gc.collect()
            gc.freeze()  # a collection in a fork does not write to the shared pages

    def _check(self) -> None:
        if not _has_own_random_numbers():
            self._end()  # Ray's script takes over, for this request and later ones

    def _fork(self) -> dict[str, Any] | None:
        """Fork a worker for the next client; return its request in the fork, None in the server."""
        client, _ = self._listener.accept()
        request, output = _receive(client)
        if request is None:
            client.close()
            return None
        if not self._stand_in.is_for(int(request["environment"]["RAY_RAYLET_PID"])):
            client.close()
            return None
        while any(name in self._imports for name in _RAY):
            self._import_next()
        process = -1
        with suppress(OSError):  # no memory or process left
            process = os.fork()
        if process == 0:
            self._leave_to(output)
            client.close()
            return request
        for descriptor in output:
            os.close(descriptor)
        if process == -1:
            client.close()  # Ray's script takes over
            return None
        with suppress(OSError):
            client.sendall(FORKED)
        self._clients[process] = client
        self._selector.register(client, selectors.EVENT_READ, partial(self._abandon, process))
        return None

    def _abandon(self, process: int) -> None:
        """End a worker whose client Ray has ended: it does not want the worker any more."""
        if process in self._clients:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
            self._forget(process)

    def _leave_to(self, output: list[int]) -> None:
        """Make this process, which was just forked, independent of the server."""
        os.setpgrp()  # as Ray does, which kills the group of a worker that has ended
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for each in (self._listener, *self._clients.values()):
            each.close()
        for descriptor in (self._wake, self._write):
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((nothing, *output)):
            os.dup2(descriptor, number)
            os.close(descriptor)

    def _reap(self) -> None:
        os.read(self._wake, 4096)
        with suppress(ChildProcessError):
            while (process := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._forget(process)

    def _forget(self, process: int) -> None:
        client = self._clients.pop(process, None)
        if client is not None:
            self._selector.unregister(client)
            client.close()

    def _end(self) -> NoReturn:
        with suppress(OSError):
            os.unlink(self._path)
            os.rmdir(os.path.dirname(self._path))
        os._exit(0)


class _StandIn:
    """A process that ends when the raylet ends, or when the server ends without a raylet."""

    def __init__(self) -> None:
        self._raylet: int | None = None
        read, self._write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(self._write)
            _wait_for_raylet(read)
        os.close(read)
        os.environ |= {"RAY_RAYLET_PID": str(process), "RAY_JOB_ID": _ANY_JOB}

    def is_for(self, raylet: int) -> bool:
        """Return whether this process ends with that raylet: the first one that is given."""
        if self._raylet is None:
            self._raylet = raylet
            os.write(self._write, raylet.to_bytes(8, "little"))
            os.close(self._write)  # before a worker could inherit it
        return self._raylet == raylet


def _wait_for_raylet(read: int) -> NoReturn:
    """Read the process id of the raylet, and end this process when that process has ended."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # a reader of the server's output must not wait for this process
        os.dup2(nothing, number)
    raylet = int.from_bytes(os.read(read, 8), "little")
    with suppress(OSError):  # it has ended
        select.select([os.pidfd_open(raylet)], [], [])
    os._exit(0)


def _receive(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return a request and the files of the worker's output; no request if the client has gone."""
    output = array.array("i")
    left = 0
    parts: list[bytes] = []
    with suppress(OSError):
        head, ancillary, *_ = client.recvmsg(8, socket.CMSG_SPACE(2 * output.itemsize))
        for _, _, data in ancillary:
            output.frombytes(data)
        left = int.from_bytes(head, "little")
        while left > 0 and (part := client.recv(left)):
            parts.append(part)
            left -= len(part)
    if left > 0 or not parts:
        for descriptor in output:
            os.close(descriptor)
        return None, []
    return json.loads(b"".join(parts)), list(output)


def _import_without_random_numbers(name: str) -> None:
    """Import a module while Ray's actor classes get their identifiers from the system."""
    import ray.actor  # noqa: PLC0415 - only with the raylet's variables

    actor: Any = ray.actor
    real = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: real(os.urandom(real.size())))
    try:
        importlib.import_module(name)
    finally:
        actor.ActorClassID = real


def _has_own_random_numbers() -> bool:
    """Return whether two forks of this process draw different random identifiers of Ray."""
    from ray import ActorClassID  # noqa: PLC0415 - only with the raylet's variables

    drawn = []
    for _ in range(2):
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(write, ActorClassID.from_random().binary())
            os._exit(0)
        os.close(write)
        drawn.append(os.read(read, 64))
        os.close(read)
        os.waitpid(process, 0)
    return drawn[0] != drawn[1]


def main() -> None:
    """Serve, and in each fork run what Ray asked for."""
    path, scripts, *more = sys.argv[1:]
    sys.path[0] = scripts  # as in a process that runs Ray's script
    stand_in = _StandIn()  # before the socket, which it must not keep open
    request = _Server(path, stand_in, more).serve()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

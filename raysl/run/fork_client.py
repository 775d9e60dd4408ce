"""Ask the fork server for a worker process. Ray starts this script in place of its own.

It runs once for each worker process, so it imports little, and nothing of raysl. Where there is no
server, or a worker needs more of its runtime environment than variables, Ray's script takes over.
"""

import array
import json
import os
import socket
import sys
from contextlib import suppress

SERVER = "RAYSL_FORK_SERVER"  # the server's socket
OTHERWISE = "RAYSL_SETUP_WORKER"  # Ray's script
FORKED = b"1"  # the server's answer

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context", "--language"


def request(arguments: list[str], *, environment: dict[str, str]) -> bytes | None:
    """Return what the server needs to start a worker, or None if the server cannot start it.

    Args:
        arguments: What Ray passes to its script: the script of workers, and options of both.
        environment: The variables of this process.
    """
    options, worker = {_CONTEXT: "{}", _LANGUAGE: "PYTHON"}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in options:
            options[name] = value
        else:
            worker.append(argument)
    context = json.loads(options[_CONTEXT] or "{}")
    variables = context.pop("env_vars", None) or {}
    if context.get("py_executable") == sys.executable:
        del context["py_executable"]
    if options[_LANGUAGE] != "PYTHON" or any(context.values()) or not worker:
        return None
    text = {"arguments": worker, "environment": environment | variables, "folder": os.getcwd()}
    return json.dumps(text).encode()


def main() -> None:
    """Become a process that lasts as long as the worker, or Ray's script."""
    arguments = sys.argv[1:]
    message = request(arguments, environment=dict(os.environ))
    if message is not None and SERVER in os.environ and _is_forked(message):
        # Ray watches the process that it started. This one reads until the server hangs up, in
        # less memory than Python needs.
        os.execvp("cat", ["cat"])
    os.execv(sys.executable, [sys.executable, os.environ[OTHERWISE], *arguments])


def _is_forked(message: bytes) -> bool:
    """Ask the server for a worker; if it forks one, the connection becomes the standard input."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):
        server.connect(os.environ[SERVER])
        output = array.array("i", [1, 2])
        size = len(message).to_bytes(8, "little")
        server.sendmsg([size], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, output)])
        server.sendall(message)
        if server.recv(1) == FORKED:
            os.dup2(server.fileno(), 0)
            return True
    return False


if __name__ == "__main__":
    main()

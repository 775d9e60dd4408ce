"""What the fork server is asked for, and when Ray's own script takes over."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raysl.run import fork_client
from raysl.run.fork_client import request

WORKER = ["/ray/default_worker.py", "--node-id=1", "--language=PYTHON"]
CONTEXT = "--serialized-runtime-env-context="


def asked(*arguments: str) -> dict[str, object] | None:
    message = request([*WORKER, *arguments], environment={"A": "1", "B": "2"})
    return None if message is None else json.loads(message)


def test_a_worker_gets_its_arguments_and_the_variables_of_its_runtime_environment() -> None:
    context = {"env_vars": {"B": "3"}, "py_executable": sys.executable, "command_prefix": []}
    found = asked(CONTEXT + json.dumps(context), "--worker-id=2")
    assert found is not None
    assert found["arguments"] == ["/ray/default_worker.py", "--node-id=1", "--worker-id=2"]
    assert found["environment"] == {"A": "1", "B": "3"}
    plain = asked()
    assert plain is not None
    assert plain["environment"] == {"A": "1", "B": "2"}


def test_rays_script_starts_what_needs_more() -> None:
    assert asked(CONTEXT + json.dumps({"py_executable": "uv run"})) is None
    assert asked(CONTEXT + json.dumps({"command_prefix": ["source", "x", "&&"]})) is None
    assert asked(CONTEXT + json.dumps({"override_worker_entrypoint": "/other.py"})) is None
    assert request(["worker.jar", "--language=JAVA"], environment={}) is None
    assert request([], environment={}) is None  # the server of Ray Client


@pytest.mark.parametrize("server", ["not there", "hangs up", "hangs up after the request"])
def test_rays_script_starts_a_worker_that_the_server_did_not(server: str, tmp_path: Path) -> None:
    script = tmp_path / "setup_worker.py"
    script.write_text("import sys; print(*sys.argv[1:])")
    path = str(tmp_path / "fork")
    names = {fork_client.SERVER: path, fork_client.OTHERWISE: str(script)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(60)

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                if server != "hangs up":
                    client.recv(8)
                    client.recv(1 << 16)

        if server != "not there":
            listener.bind(path)
            listener.listen()
            threading.Thread(target=answer, daemon=True).start()
        done = subprocess.run(
            [sys.executable, fork_client.__file__, *WORKER],
            env=os.environ | names,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout.split() == WORKER

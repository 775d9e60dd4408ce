"""What the fork server is asked for, and when Ray's own script takes over."""

import json
import sys

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

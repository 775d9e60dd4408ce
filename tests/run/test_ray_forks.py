"""Worker processes of a Ray of our own are forks that know their modules and share no identity."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raysl.run import forks
from raysl.run.ray_cluster import connect, disconnect
from raysl.run.ray_forks import forked_workers

pytestmark = pytest.mark.ray


def actor_class() -> Any:
    """Return a class that is sent by value: workers cannot import this file."""
    import ray

    class Worker:
        def look(self) -> dict[str, Any]:
            import os
            import sys
            from pathlib import Path

            from ray import ActorClassID

            return {
                "pid": os.getpid(),
                "group": os.getpgid(0),
                "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text(),
                "knows_ray_data": "ray.data" in sys.modules,
                "random": ActorClassID.from_random().hex(),
                "variable": os.environ.get("SOME_VARIABLE"),
                "input": os.readlink("/proc/self/fd/0"),
                "path": [*sys.path],
                "arguments": sys.argv[:1],
                "names": set(os.environ),
            }

    return ray.remote(num_cpus=0)(Worker)


@pytest.mark.usefixtures("ray_cluster")
class TestWorkers:
    def test_are_forks_of_one_server_with_numbers_and_variables_of_their_own(self) -> None:
        import ray

        kind = actor_class()
        variables = {"env_vars": {"SOME_VARIABLE": "7"}}
        actors = [kind.remote() for _ in range(3)]
        actors.append(kind.options(runtime_env=variables).remote())
        found = ray.get([actor.look.remote() for actor in actors])
        assert all("raysl.run.ray_fork_server" in each["parent"] for each in found)
        assert len({each["pid"] for each in found}) == 4
        assert all(each["group"] == each["pid"] for each in found)
        assert len({each["random"] for each in found}) == 4
        assert [each["variable"] for each in found] == [None, None, None, "7"]
        assert all(each["input"] == os.devnull for each in found)
        assert all(each["knows_ray_data"] for each in found)  # torch may come later

    def test_end_each_on_its_own(self) -> None:
        import ray

        kind = actor_class()
        one, other = kind.remote(), kind.remote()
        pids = [each["pid"] for each in ray.get([one.look.remote(), other.look.remote()])]
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(one.look.remote())
        assert ray.get(other.look.remote())["pid"] == pids[1]
        ray.kill(other)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("draws", [False, True])
def test_numbers_that_were_drawn_before_a_fork_are_noticed(draws: bool) -> None:
    code = (
        "import ray; from raysl.run.ray_fork_server import _has_own_random_numbers\n"
        f"if {draws}: ray.ActorClassID.from_random()\n"
        "print(_has_own_random_numbers())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == [str(not draws)]


@pytest.mark.usefixtures("no_ray_cluster")
class TestServer:
    def test_if_it_ends_early_ray_starts_its_workers_as_usual(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(forks, "_knows_ray", lambda: False)  # as when a command starts
        with forks.early_server():
            early: Any = forks._server
            self.check_its_workers(early)
        assert forks._server is None
        assert not Path(early.folder).exists()

    def check_its_workers(self, early: Any) -> None:
        import ray

        assert connect()
        try:
            assert forks._server is early
            server = early.process
            kind = actor_class()
            actor = kind.remote()
            forked = ray.get(actor.look.remote())
            assert "ray_fork_server" in forked["parent"]
            server.kill()
            server.wait()
            variables = {"env_vars": {"SOME_VARIABLE": "8"}}  # so that no waiting process fits
            later = ray.get(kind.options(runtime_env=variables).remote().look.remote())
            assert "raylet" in later["parent"]
            assert later["variable"] == "8"
            assert later["names"] - forked["names"] == {"SOME_VARIABLE"}
            assert (later["path"], later["arguments"]) == (forked["path"], forked["arguments"])
            assert ray.get(actor.look.remote())["pid"] == forked["pid"]
        finally:
            disconnect()

    def test_is_not_started_where_it_is_not_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray._private import parameter

        monkeypatch.setenv(forks.SWITCH, "0")
        real = parameter.RayParams
        with forked_workers():
            assert parameter.RayParams is real
        assert forks._server is None

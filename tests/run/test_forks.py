"""The fork server that a command starts before its imports, and for which commands it does so."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from raysl.run import early, forks

NAMED = ["raysl.sources.builtin"]  # what opens the images that a name stands for


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The modules that each early server was asked to import; none is started."""
    asked: list[Sequence[str]] = []

    @contextmanager
    def record(modules: Sequence[str] = ()) -> Iterator[None]:
        asked.append([*modules])
        yield

    monkeypatch.setattr(early, "early_server", record)
    return asked


class TestEarly:
    @pytest.mark.parametrize(
        ("words", "modules"),
        [
            ("pretrain quickstart", NAMED),
            ("pretrain quickstart data.source=photos/", []),
            ("pretrain quickstart 'data.source={a: 1}'", []),
            ("pretrain --json quickstart train.epochs=2", NAMED),
            ("pretrain quickstart 'cluster.num_train_workers={min: 1, max: 2}'", NAMED),
            ("pretrain quickstart cluster=1", NAMED),  # the command says what is wrong
            ("pretrain s3://bucket/run.yaml", []),
            ("sweep simclr_temperature_batch", []),
            ("finetune RUN", []),
            ("distill RUN data.source=digits", NAMED),
        ],
    )
    def test_is_for_commands_that_train_on_ray(
        self, started: list[Sequence[str]], words: str, modules: list[str], run_folder: Path
    ) -> None:
        with early.early_server_for(shlex.split(words.replace("RUN", str(run_folder)))):
            pass
        assert started == [modules]

    @pytest.mark.parametrize(
        "words",
        [
            "pretrain",
            "pretrain quickstart --help",
            "pretrain no_such_configuration",
            "pretrain quickstart cluster.num_train_workers=0",
            "pretrain quickstart not-an-override",
            "sweep simclr_temperature_batch --dry-run",
            "finetune RUN cluster.num_train_workers=0",
        ],
    )
    def test_is_not_for_others(
        self, started: list[Sequence[str]], words: str, run_folder: Path
    ) -> None:
        with early.early_server_for(shlex.split(words.replace("RUN", str(run_folder)))):
            pass
        assert started == []

    @pytest.fixture
    def run_folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.yaml").write_text("data: {source: photos/}")
        return tmp_path


@pytest.mark.skipif(not forks.can_fork(), reason="this system forks no workers")
class TestServer:
    @pytest.fixture(autouse=True)
    def as_at_a_start(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(forks, "_knows_ray", lambda: False)
        monkeypatch.setattr(forks, "_FOR_TRAINING", ())
        yield
        forks.end_server()

    def test_that_was_started_early_is_taken_once(self) -> None:
        with forks.early_server():
            early = forks._server
            assert early is not None
            assert forks.serve_workers() == early.socket
            assert forks.serve_workers() != early.socket  # a server serves one Ray
        assert not Path(early.folder).exists()

    def test_is_taken_after_the_imports_of_a_command(self) -> None:
        code = (
            "from raysl.run import forks\n"
            "with forks.early_server():\n"
            "    early = forks._server\n"
            "    import raysl.run.pretrain\n"
            "    print(forks.serve_workers() == early.socket)\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        assert done.stdout.split() == ["True"]

    def test_is_not_taken_with_other_variables_of_ray(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with forks.early_server():
            early = forks._server
            assert early is not None
            monkeypatch.setenv("RAY_SOMETHING", "1")
            assert forks.serve_workers() != early.socket

    def test_is_not_started_early_for_a_cluster_or_after_ray(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
            with forks.early_server():
                assert forks._server is None
        monkeypatch.setattr(forks, "_knows_ray", lambda: True)
        with forks.early_server():
            assert forks._server is None


STAND_IN = """
import os, subprocess, sys
from raysl.run.ray_fork_server import _StandIn

stand_in = _StandIn()
process = int(os.environ["RAY_RAYLET_PID"])
"""


class TestStandIn:
    """Workers end when the process ends that they take for the raylet."""

    @pytest.fixture
    def run(self) -> Callable[[str], list[str]]:
        def run(code: str) -> list[str]:
            done = subprocess.run(
                [sys.executable, "-c", STAND_IN + code],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=60,  # a stand-in that lives on would keep the output open, and not end
            )
            return done.stdout.split()

        return run

    def test_ends_with_the_raylet(self, run: Callable[[str], list[str]]) -> None:
        code = (
            "raylet = subprocess.Popen(['sleep', '600'])\n"
            "print(stand_in.is_for(raylet.pid), stand_in.is_for(raylet.pid))\n"
            "print(stand_in.is_for(raylet.pid + 1))\n"
            "print(os.waitpid(process, os.WNOHANG) == (0, 0))\n"
            "raylet.kill()\n"
            "print(os.waitpid(process, 0) == (process, 0))\n"
        )
        assert run(code) == ["True", "True", "False", "True", "True"]

    def test_ends_with_a_server_that_has_no_raylet_yet(
        self, run: Callable[[str], list[str]]
    ) -> None:
        code = (
            "read, write = os.pipe()\n"
            "other = os.fork()\n"
            "if other == 0:\n"
            "    _StandIn()\n"
            "    os.write(write, os.environ['RAY_RAYLET_PID'].encode())\n"
            "    os._exit(0)\n"
            "os.waitpid(other, 0)\n"
            "import psutil\n"
            "process = int(os.read(read, 20))\n"
            "while psutil.pid_exists(process) and psutil.Process(process).status() != 'zombie':\n"
            "    pass\n"
            "print('ended')\n"
        )
        assert run(code) == ["ended"]

    def test_of_a_raylet_that_has_ended_already_ends(self, run: Callable[[str], list[str]]) -> None:
        code = (
            "raylet = subprocess.Popen(['true'])\n"
            "raylet.wait()\n"
            "print(stand_in.is_for(raylet.pid))\n"
            "print(os.waitpid(process, 0) == (process, 0))\n"
        )
        assert run(code) == ["True", "True"]

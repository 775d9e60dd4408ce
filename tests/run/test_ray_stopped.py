"""A train worker whose process is stopped: its beats end, and so does it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raysl.run import ray_stopped
from raysl.run.ray_stopped import beats, ends_stopped_workers, kill_worker
from raysl.track.run_folder import RunFolder, read_metrics

SOON_S = 10.0
STOPPED = {"rank": 0, "pid": 77, "node": "here", "time": 1.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_stopped, "_SHORTEST_BEAT_S", 0.02)
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    made.config.touch()
    return made


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


class Notes(dict[str, Any]):
    """The notes of a run's workers, without a cluster."""

    write = dict.__setitem__
    read = dict.get
    names = dict.copy

    def remove(self, name: str) -> None:
        self.pop(name, None)


class TestBeats:
    def test_go_on_as_long_as_the_process_runs_and_leave_nothing(self) -> None:
        notes = Notes()
        with beats(notes, rank=1, limit_s=0.2):
            until(lambda: "1" in notes)
            first = notes["1"]
            until(lambda: notes["1"] != first)
            assert first.keys() == {"rank", "pid", "node", "time"}
        assert not notes

    def test_without_a_limit_are_none(self) -> None:
        notes = Notes()
        with beats(notes, rank=0, limit_s=None):
            assert not notes


class TestStoppedWorkers:
    def test_are_ended_once_and_told(self, folder: RunFolder) -> None:
        killed: list[int] = []

        def kill(stopped: dict[str, Any]) -> bool:
            killed.append(stopped["pid"])
            return True

        notes = Notes()
        with ends_stopped_workers(folder, notes, limit_s=0.1, kill=kill):
            notes["0"] = STOPPED
            until(lambda: killed)
            time.sleep(0.4)
        assert killed == [77]
        (event,) = read_metrics(folder.events)
        assert event["text"].startswith("train worker 0 hangs: its process 77 has not run for")

    def test_that_are_not_there_any_more_are_not_told(self, folder: RunFolder) -> None:
        asked: list[int] = []
        notes = Notes()
        kill = lambda stopped: bool(asked.append(stopped["pid"]))  # noqa: E731
        with ends_stopped_workers(folder, notes, limit_s=0.1, kill=kill):
            notes["0"] = STOPPED
            until(lambda: asked)
        assert not folder.events.exists()

    def test_do_not_include_one_that_beats(self, folder: RunFolder) -> None:
        killed: list[int] = []
        notes = Notes()
        kill = lambda stopped: bool(killed.append(stopped["pid"]))  # noqa: E731
        with (
            ends_stopped_workers(folder, notes, limit_s=1.0, kill=kill),
            beats(notes, rank=0, limit_s=1.0),
        ):
            time.sleep(2.5)
        assert killed == []

    def test_of_an_earlier_start_are_forgotten(self, folder: RunFolder) -> None:
        killed: list[int] = []
        kill = lambda stopped: bool(killed.append(stopped["pid"]))  # noqa: E731
        notes = Notes({"0": STOPPED})
        with ends_stopped_workers(folder, notes, limit_s=0.1, kill=kill):
            time.sleep(0.5)
        assert killed == []


class TestKill:
    @pytest.fixture
    def start(self) -> Iterator[Callable[[str], int]]:
        started: list[subprocess.Popen[bytes]] = []

        def start(title: str) -> int:
            command = [sys.executable, "-c", "import time; time.sleep(60)", title]
            started.append(subprocess.Popen(command))
            line = Path(f"/proc/{started[-1].pid}/cmdline")
            until(lambda: title.encode() in line.read_bytes())  # empty while the process starts
            return started[-1].pid

        yield start
        for process in started:
            process.kill()
            process.wait()

    def test_ends_a_train_worker(self, start: Callable[[str], int]) -> None:
        assert kill_worker(start("ray::RayTrainWorker"))

    def test_spares_another_process_that_got_its_number(self, start: Callable[[str], int]) -> None:
        assert not kill_worker(start("another"))

    def test_of_one_that_has_ended_does_nothing(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        assert not kill_worker(process.pid)

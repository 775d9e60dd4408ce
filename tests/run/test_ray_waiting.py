"""A run that cannot go on says what it waits for, and ends when it has waited too long."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raysl.cli import main
from raysl.errors import Terminated
from raysl.run.pretrain import train_run
from raysl.run.ray_notes import Notes, first_batch_with_notes
from raysl.run.recipe import load_run
from raysl.run.waiting import Note

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "known_to_workers")]

ON_RAY = ["cluster.num_train_workers=1", "evaluate.every=null"]


class Holder:
    """Holds CPUs of the cluster, as another job would."""

    def is_there(self) -> bool:
        return True


class MakeItems:
    """Has the name of a data worker."""


@pytest.fixture
def hold() -> Iterator[Callable[[float], None]]:
    """Let an actor hold CPUs until the test ends."""
    holders: list[Any] = []

    def take(cpus: float) -> None:
        holders.append(ray.remote(Holder).options(num_cpus=cpus).remote())
        assert ray.get(holders[-1].is_there.remote())

    yield take
    for holder in holders:
        ray.kill(holder)


@pytest.fixture
def said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysl.run.waiting._SAY_AFTER_S", 1.0)
    monkeypatch.setattr("raysl.run.ray_train._LOOK_EVERY_S", 0.2)


class TestNotes:
    def test_are_read_by_other_processes_until_they_are_cleared(self) -> None:
        notes, other = Notes("runs/a"), Notes("runs/b")
        assert notes.read() is None
        write = ray.remote(num_cpus=0)(lambda: Notes("runs/a").write("place", "waits"))
        ray.get(write.remote())
        assert notes.read() == Note("place", "waits")
        assert other.read() is None
        notes.clear()
        notes.clear()
        assert notes.read() is None

    def test_also_ask_the_controller_to_stop(self) -> None:
        notes = Notes("runs/a")
        stops = ray.remote(num_cpus=0)(lambda: Notes("runs/a").is_to_stop())
        assert not ray.get(stops.remote())
        notes.ask_to_stop()
        assert ray.get(stops.remote())
        assert not Notes("runs/b").is_to_stop()
        notes.forget()
        assert not ray.get(stops.remote())

    def test_of_a_first_batch_count_the_data_workers_that_have_no_room(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysl.run.ray_notes._TELL_EVERY_S", 0.05)
        notes, first_batch = Notes("runs/a"), Late()
        waiting = first_batch_with_notes(notes)
        first_batch.looks = [lambda: ray.remote(MakeItems).options(num_cpus=100).remote()]
        assert waiting(first_batch) == "batch"  # type: ignore[arg-type] # a stand-in
        started, full = (note.text for note in first_batch.seen if note is not None)
        assert started.startswith("waits for Ray Data to start its data workers: ")
        assert full.startswith("waits for 1 of 1 data worker to start: ")
        assert "4 CPUs" in full
        assert notes.read() is None


class Late:
    """Stands for the future of a first batch that comes late; notes what is told meanwhile."""

    def __init__(self) -> None:
        self.looks: list[Callable[[], Any]] = []
        self.kept: list[Any] = []
        self.seen: list[Note | None] = []
        self.asked = 0

    def done(self) -> bool:
        return False

    def result(self, timeout: float) -> str:
        self.asked += 1
        if self.asked == 1:
            raise TimeoutError
        self.seen.append(Notes("runs/a").read())
        if self.asked == 3:
            return "batch"
        self.kept.append(self.looks[0]())
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any(
            a["ActorClassName"].endswith("MakeItems") for a in ray._private.state.actors().values()
        ):
            time.sleep(0.05)
        raise TimeoutError


@pytest.mark.usefixtures("said_soon", "undrawn")
def test_a_run_without_room_for_its_train_worker_says_so_and_ends(
    run_yaml: Callable[[str], Path],
    hold: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hold(3.0)
    overrides = [*ON_RAY, "cluster.cpus_per_train_worker=2", "cluster.max_wait_s=4"]
    assert main(["pretrain", str(run_yaml("crowded")), *overrides]) == 1
    told = "the run waits for room for 1 of 1 train worker, 2 CPUs each: "
    error = capsys.readouterr().err
    saying, _, ending = error.partition("ClusterError")
    assert told in saying
    assert told in ending
    assert "has 1 of 4 CPUs free" in ending
    assert "longer than cluster.max_wait_s=4. The same command resumes" in ending
    assert "max_failures" not in ending
    assert Notes(str(Path("runs/crowded").absolute())).read() is None


@pytest.mark.usefixtures("said_soon", "undrawn")
def test_sigterm_ends_a_run_that_waits_though_its_folder_is_the_drivers_own(
    run_yaml: Callable[[str], Path],
    hold: Callable[[float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hold(3.0)
    config = load_run(run_yaml("crowded"), [*ON_RAY, "cluster.cpus_per_train_worker=2"])
    stored = config.model_copy(update={"output_dir": f"file://{tmp_path}/store"})
    (tmp_path / "store").mkdir()

    def say(line: str) -> None:
        if "waits for room" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("raysl.run.ray_train.say", say)
    with pytest.raises(Terminated, match="while it waited for room"):
        train_run(stored, began_at=time.time())

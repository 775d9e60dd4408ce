"""Evaluations beside training, with a person instead of a process who measures."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import DataError
from raysl.run.online import MOST_WAITING, OnlineEvaluations, read_failures
from raysl.track.run_folder import MetricsFile, RunFolder, list_waiting, read_metrics, waiting_path

SETS: Any = object()


class Desk:
    """Takes evaluations, and ends them when the test says so."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.folder = RunFolder(path)
        self.begun: list[int] = []
        self.refuses: BaseException | None = None
        self._futures: dict[int, Future[Mapping[str, float]]] = {}

    def open(self, *, start_step: int = 0) -> OnlineEvaluations:
        self.metrics = MetricsFile(self.folder.metrics, start_step=start_step)
        self.online = OnlineEvaluations(
            self.folder,
            sets=SETS,
            begin=self._begin,
            log=lambda values, step: self.metrics.log(values, step=step),
            start_step=start_step,
        )
        return self.online

    def _begin(self, path: Path, sets: object) -> "Future[Mapping[str, float]]":
        assert sets is SETS
        if self.refuses is not None:
            raise self.refuses
        step = int(path.read_text())
        assert path == waiting_path(self.folder.to_evaluate, step)
        assert len(self.begun) == len(self._futures)
        assert all(future.done() for future in self._futures.values()), "one at a time"
        self.begun.append(step)
        self._futures[step] = Future()
        return self._futures[step]

    def add(self, *steps: int) -> None:
        for step in steps:
            self.online.add(step, writing(step))

    def end(self, step: int, error: BaseException | None = None) -> None:
        if error is None:
            self._futures[step].set_result({"eval/knn_top1": step / 100})
        else:
            self._futures[step].set_exception(error)

    @property
    def values(self) -> list[tuple[int, float]]:
        records = read_metrics(self.folder.metrics)
        return [(r["step"], r["eval/knn_top1"]) for r in records if "eval/knn_top1" in r]

    @property
    def waiting(self) -> list[int]:
        return list_waiting(self.folder.to_evaluate)

    @property
    def failures(self) -> dict[int, str]:
        return {record["step"]: record["problem"] for record in read_failures(self.folder)}


def writing(step: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(str(step))

    return write


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "run")


class TestOnlineEvaluations:
    def test_are_begun_one_after_the_other_and_logged_when_they_are_ready(self, desk: Desk) -> None:
        online = desk.open()
        desk.add(3, 6)
        assert (desk.begun, desk.values, desk.waiting) == ([3], [], [3, 6])
        online.collect()
        assert (desk.begun, desk.values) == ([3], [])
        desk.metrics.log({"train/loss": 1.0}, step=7)
        desk.end(3)
        online.collect()
        assert (desk.begun, desk.values, desk.waiting) == ([3, 6], [(3, 0.03)], [6])
        desk.end(6)
        online.collect()
        assert (desk.values, desk.waiting) == ([(3, 0.03), (6, 0.06)], [])
        assert desk.failures == {}

    def test_are_waited_for_at_the_end(self, desk: Desk) -> None:
        online = desk.open()
        desk.add(3, 6)
        desk.end(3)
        original = desk._begin

        def begin_and_end(path: Path, sets: object) -> "Future[Mapping[str, float]]":
            future = original(path, sets)
            desk.end(int(path.read_text()))
            return future

        online._begin = begin_and_end
        online.finish()
        assert desk.values == [(3, 0.03), (6, 0.06)]
        assert not desk.folder.to_evaluate.exists()

    def test_one_that_fails_is_listed_and_the_next_one_goes_on(self, desk: Desk) -> None:
        online = desk.open()
        desk.add(3, 6)
        desk.end(3, DataError("no such image\nand more"))
        online.collect()
        desk.end(6)
        online.finish()
        assert desk.values == [(6, 0.06)]
        assert desk.failures == {3: "DataError: no such image"}
        assert desk.waiting == []

    def test_none_that_cannot_even_begin_stops_the_training(self, desk: Desk) -> None:
        online = desk.open()
        desk.refuses = RuntimeError("no cluster")
        desk.add(3)

        def full(path: Path) -> None:
            path.with_name(f".{path.name}.tmp").write_text("half")
            raise OSError(28, "No space left on device")

        online.add(6, full)
        online.finish()
        assert desk.values == []
        assert desk.failures[3] == "RuntimeError: no cluster"
        assert "No space left on device" in desk.failures[6]

    def test_the_oldest_of_too_many_gives_way(self, desk: Desk) -> None:
        online = desk.open()
        steps = list(range(1, MOST_WAITING + 4))
        desk.add(*steps)
        # The first is under way; of those that wait, the newest are kept.
        assert desk.waiting == [1, *steps[-MOST_WAITING:]]
        assert set(desk.failures) == {2, 3}
        for step in [1, *steps[-MOST_WAITING:]]:
            desk.end(step)
            online.collect()
        assert [step for step, _ in desk.values] == [1, *steps[-MOST_WAITING:]]


class TestAfterAKill:
    def test_what_waited_is_measured_and_what_comes_again_is_thrown_away(self, desk: Desk) -> None:
        desk.open()
        desk.add(2, 4, 6, 8)
        desk.end(2)
        desk.online.collect()
        desk.metrics.close()
        half_written = desk.folder.to_evaluate / ".step-000000009.safetensors.tmp"
        half_written.write_text("half")

        again = Desk(desk.folder.path)
        again.open(start_step=6)  # the newest checkpoint
        assert (again.begun, again.waiting) == ([4], [4, 6])
        assert not half_written.exists()
        again.end(4)
        again.online.collect()
        again.end(6)
        again.add(8)
        again.end(8)
        again.online.finish()
        assert again.values == [(2, 0.02), (4, 0.04), (6, 0.06), (8, 0.08)]

    def test_one_whose_value_was_logged_already_is_not_measured_again(self, desk: Desk) -> None:
        desk.open()
        desk.add(2)
        desk.metrics.log({"eval/knn_top1": 0.02}, step=2)  # killed before its file was deleted
        again = Desk(desk.folder.path)
        again.open(start_step=4)
        assert (again.begun, again.waiting) == ([], [])
        assert again.values == [(2, 0.02)]

    def test_failures_of_steps_that_come_again_are_forgotten(self, desk: Desk) -> None:
        desk.open()
        desk.refuses = RuntimeError("no")
        desk.add(2, 6)
        with desk.folder.failed_evaluations.open("a") as file:
            file.write(json.dumps({"step": 3, "problem": "cut sh"})[:-3])
        again = Desk(desk.folder.path)
        again.open(start_step=4)
        assert set(again.failures) == {2}

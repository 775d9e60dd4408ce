"""Who is stopped, paused or changed at a rung: schedulers fed with results, without Ray running."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from raysl.sweep.config import AshaScheduler, HyperBandScheduler, MetricConfig, PbtScheduler
from raysl.sweep.ray_schedulers import Asha, HyperBand, Pbt
from raysl.sweep.trial import Trial
from raysl.sweep.trial_run import AGAIN, LAST

METRIC = MetricConfig()
NAME = METRIC.name


class FakeTrial(SimpleNamespace):
    """What a scheduler looks at of a trial."""

    __hash__ = object.__hash__

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"


class Controller:
    """What a scheduler asks of Tune: the trials, and to stop one."""

    search_alg = None

    def __init__(self, scheduler: Any, count: int, settings: Sequence[Any] = ()) -> None:
        self.scheduler = scheduler
        self.stopped: list[int] = []
        self.saved: list[int] = []
        self.checkpoint: Any = None
        self.trials = [
            FakeTrial(
                trial_id=f"t{number}",
                config={"number": number, **({"lr": settings[number]} if settings else {})},
                status="PENDING",
                experiment_tag="",
                run_metadata=SimpleNamespace(
                    checkpoint_manager=SimpleNamespace(
                        checkpoint_config=SimpleNamespace(num_to_keep=None)
                    )
                ),
            )
            for number in range(count)
        ]

    def get_trials(self) -> list[Any]:
        return self.trials

    def add(self, *numbers: int) -> None:
        for number in numbers or range(len(self.trials)):
            self.scheduler.on_trial_add(self, self.trials[number])

    def stop_trial(self, trial: Any) -> None:
        self.stopped.append(trial.config["number"])
        trial.status = "TERMINATED"
        self.scheduler.on_trial_remove(self, trial)

    def _schedule_trial_save(self, trial: Any, result: Any) -> Any:
        """What population based training asks for of the best trials when it exchanges."""
        self.saved.append(trial.config["number"])
        return self.checkpoint

    def pause_trial(self, trial: Any, should_checkpoint: bool) -> None:
        trial.status = "PAUSED"

    def report(self, number: int, epoch: float, value: float, **marks: float) -> str:
        trial = self.trials[number]
        trial.status = "RUNNING"
        told = {"epoch": epoch, NAME: value, **marks}
        said: str = self.scheduler.on_trial_result(self, trial, told)
        trial.status = {"STOP": "TERMINATED", "PAUSE": "PAUSED"}.get(said, "RUNNING")
        if said == "STOP":
            self.scheduler.on_trial_complete(self, trial, told)
        return said

    def end(self, number: int) -> None:
        self.trials[number].status = "TERMINATED"
        self.scheduler.on_trial_complete(self, self.trials[number], {})

    def next(self) -> int | None:
        found = self.scheduler.choose_trial_to_run(self)
        return None if found is None else int(found.config["number"])


class TestAsha:
    def told(self, *curves: Sequence[tuple[float, float]], **settings: Any) -> list[list[str]]:
        """What is said to trials that come one after the other."""
        controller = Controller(Asha(AshaScheduler(**settings), METRIC), len(curves))
        return [
            [controller.report(number, epoch, value) for epoch, value in curve]
            for number, curve in enumerate(curves)
        ]

    def test_stops_who_is_worse_than_most_at_a_rung(self) -> None:
        good, bad, better = [(1.0, 0.5), (2.0, 0.6)], [(1.0, 0.4)], [(1.0, 0.6), (2.0, 0.5)]
        assert self.told(good, bad, better, grace_epochs=1.0, reduction_factor=2.0) == [
            ["CONTINUE", "CONTINUE"],
            ["STOP"],
            ["CONTINUE", "STOP"],
        ]

    def test_the_smallest_is_the_best_where_asked(self) -> None:
        metric = METRIC.model_copy(update={"mode": "min"})
        controller = Controller(Asha(AshaScheduler(reduction_factor=2.0), metric), 3)
        assert [controller.report(n, 1.0, v) for n, v in enumerate((0.5, 0.6, 0.4))] == [
            "CONTINUE",
            "STOP",
            "CONTINUE",
        ]

    def test_judges_each_batch_size_at_its_evaluation_nearest_to_the_rung(self) -> None:
        controller = Controller(
            Asha(AshaScheduler(grace_epochs=0.5, reduction_factor=2.0), METRIC), 2
        )
        for step in (2, 4):  # of 5 an epoch: 0.4, 0.8
            assert controller.report(0, step / 5, 0.1 * step) == "CONTINUE"
        # Better than what the other one had at 0.4, worse than what it had at 0.8.
        assert controller.report(1, 2 / 4, 0.3) == "CONTINUE"
        assert controller.report(1, 4 / 4, 0.1) == "CONTINUE"  # nobody was at 1 epoch before

    def test_a_rung_counts_once(self) -> None:
        curve = [(1.0, 0.9), (1.0, 0.1), (1.5, 0.1)]
        assert (
            self.told([(1.0, 0.5)], curve[:1] + curve[1:], reduction_factor=2.0)[1]
            == ["CONTINUE"] * 3
        )

    def test_what_is_not_finite_is_worst(self) -> None:
        nan = float("nan")
        assert self.told([(1.0, nan)], [(1.0, 0.1)], [(1.0, float("-inf"))]) == [
            ["STOP"],
            ["CONTINUE"],
            ["STOP"],
        ]

    def test_compares_with_trials_of_earlier_starts(self, make_trial: Any) -> None:
        scheduler = Asha(AshaScheduler(reduction_factor=2.0), METRIC)
        scheduler.add_earlier([make_trial(0, {}, [0.5, 0.8])])
        controller = Controller(scheduler, 2)
        assert controller.report(0, 1.0, 0.4) == "STOP"
        assert controller.report(1, 1.0, 0.6) == "CONTINUE"
        assert controller.report(1, 2.0, 0.7) == "STOP"


class TestHyperBand:
    def controller(
        self, count: int, *, known: Sequence[Trial] = (), ended: Sequence[int] = (), **more: Any
    ) -> Controller:
        settings = {"max_evaluations": 4, "reduction_factor": 2.0}
        scheduler = HyperBand(HyperBandScheduler(**(settings | more.pop("settings", {}))), METRIC)
        scheduler.expect(count, max_running=more.pop("max_running", None))
        scheduler.add_earlier(known, ended=ended)
        return Controller(scheduler, count)

    def test_halves_a_bracket_when_its_last_trial_is_there_one_after_the_other(self) -> None:
        """4 trials, R = 4: all in the first bracket, with rungs at 1 and 2 evaluations."""
        c = self.controller(4)
        c.add()
        for number, value in enumerate((0.1, 0.4, 0.3)):
            assert c.next() == number
            assert c.report(number, 1.0, value) == "PAUSE"
        assert c.next() == 3
        assert c.report(3, 1.0, 0.2) == "STOP"
        assert c.next() == 1
        assert c.stopped == [0]
        assert c.report(1, 1.0, 0.4) == "CONTINUE"  # it tells again what it told before
        assert c.report(1, 2.0, 0.5) == "PAUSE"
        assert c.next() == 2
        assert c.report(2, 2.0, 0.6) == "CONTINUE"
        assert c.next() is None
        assert c.stopped == [0, 1]
        assert [c.report(2, epoch, 0.0) for epoch in (3.0, 4.0)] == ["CONTINUE", "CONTINUE"]

    def test_later_trials_are_in_brackets_that_begin_later(self) -> None:
        """R = 4, eta = 2: brackets of 4, 3 and 3 trials with two, one and no rungs."""
        c = self.controller(10)
        c.add()
        assert [c.report(number, 1.0, 0.1 * number) for number in range(3, 10)] == [
            "PAUSE",
            *["CONTINUE"] * 6,
        ]
        assert [c.report(number, 2.0, 0.1 * number) for number in (4, 5, 6)] == [
            "PAUSE",
            "PAUSE",
            "CONTINUE",  # of three, one goes on
        ]
        c.next()
        assert c.stopped == [4, 5]
        assert c.report(7, 2.0, 0.0) == "CONTINUE"

    def test_does_not_wait_for_who_failed(self) -> None:
        c = self.controller(4)
        c.add()
        for number in range(3):
            c.report(number, 1.0, 0.1 * number)
        assert c.next() == 3
        c.end(3)
        assert c.next() == 1
        assert c.stopped == [0]

    def test_nor_for_numbers_that_make_no_run(self) -> None:
        c = self.controller(4)
        c.add(0, 2)
        c.report(0, 1.0, 0.1)
        c.report(2, 1.0, 0.2)
        assert c.next() is None or c.trials[c.next() or 0].status == "PENDING"
        assert c.stopped == []  # number 3 may still come
        c.scheduler.all_added()
        assert c.scheduler.choose_trial_to_run(c).config["number"] in (0, 2)

    def test_a_trial_that_is_tried_again_is_waited_for(self) -> None:
        c = self.controller(2)
        c.add()
        c.report(0, 1.0, 0.1)
        c.scheduler.on_trial_error(c, c.trials[1])
        c.add(1)
        c.trials[1].status = "PENDING"
        assert c.next() == 1
        assert c.report(1, 1.0, 0.2) == "CONTINUE"

    def test_a_resume_decides_as_if_there_had_been_none(self, make_trial: Any) -> None:
        """The second rung is decided by the values there, not by those told again."""
        known = [
            make_trial(0, {}, [0.1], status="stopped"),
            make_trial(1, {}, [0.4, 0.5], status="running"),
            make_trial(2, {}, [0.5], status="running"),
            make_trial(3, {}, [0.2], status="stopped"),
        ]
        c = self.controller(4, known=known, ended=[0, 3])
        c.add(1, 2)
        assert c.report(1, 1.0, 0.4, **{AGAIN: 1.0}) == "PAUSE"  # it waits at the second rung
        assert c.report(2, 1.0, 0.5, **{AGAIN: 1.0}) == "CONTINUE"
        assert c.report(2, 2.0, 0.4) == "STOP"
        assert c.next() == 1
        assert c.report(1, 1.0, 0.4, **{AGAIN: 1.0}) == "CONTINUE"
        assert c.report(1, 2.0, 0.5, **{AGAIN: 1.0}) == "CONTINUE"

    def test_a_trial_that_was_out_before_the_start_ends_at_its_first_word(
        self, make_trial: Any
    ) -> None:
        known = [make_trial(n, {}, [value], status="running") for n, value in enumerate((0.4, 0.3))]
        c = self.controller(2, known=known)
        c.add()
        assert c.report(1, 1.0, 0.3) == "STOP"
        assert c.report(0, 1.0, 0.4) == "CONTINUE"

    def test_what_is_not_finite_is_out(self) -> None:
        c = self.controller(2)
        c.add()
        assert c.report(0, 1.0, float("nan")) == "PAUSE"
        assert c.report(1, 1.0, 0.2) == "CONTINUE"
        c.next()
        assert c.stopped == [0]

    def test_no_more_go_on_than_may_run_at_a_time(self) -> None:
        c = self.controller(4, max_running=1)
        c.add()
        for number in range(3):
            c.report(number, 1.0, 0.1)
        assert c.report(3, 1.0, 0.2) == "CONTINUE"
        assert c.next() is None
        c.end(3)
        assert c.next() == 0

    def test_a_finished_trial_does_not_wait(self) -> None:
        c = self.controller(2)
        c.add()
        assert c.report(0, 1.0, 0.2, **{LAST: 1.0}) == "CONTINUE"


class TestPbt:
    @pytest.fixture
    def controller(self) -> Controller:
        """Four trials, of which two are worse."""
        config = PbtScheduler(perturb_every_epochs=0.1, quantile=0.5)
        scheduler = Pbt(config, METRIC, mutations={"lr": tune.uniform(1, 4)}, bounds={"lr": (1, 4)})
        controller = Controller(scheduler, 4, settings=(1.0, 2.0, 3.0, 4.0))
        controller.add()
        return controller

    def exchanges(self, controller: Controller, steps: Sequence[int], **marks: float) -> int:
        """How often the best trial hands itself on, at steps of ten an epoch."""
        controller.saved = []
        for step in steps:
            for number in range(4):
                controller.report(number, step / 10, 0.1 * number, **marks)
        return controller.saved.count(3)

    def test_exchanges_as_often_as_asked(self, controller: Controller) -> None:
        assert self.exchanges(controller, range(1, 10)) == 9

    def test_not_by_what_is_told_again(self, controller: Controller) -> None:
        assert self.exchanges(controller, range(1, 5), **{AGAIN: 1.0}) == 0
        assert self.exchanges(controller, [5]) == 1

    def test_not_at_the_end(self, controller: Controller) -> None:
        assert self.exchanges(controller, [1, 2]) == 2
        assert self.exchanges(controller, [3], **{LAST: 1.0}) == 0

    def test_what_it_changes_stays_in_its_range(self, controller: Controller) -> None:
        """Tune multiplies by 0.8 or 1.2, whatever the range."""
        controller.checkpoint = "of the best"
        settings = []
        for step in range(1, 30):
            for number in range(4):
                controller.report(number, step / 10, 0.1 * number)
            settings += [trial.config["lr"] for trial in controller.trials]
        assert min(settings) >= 1
        assert max(settings) <= 4
        assert len(set(settings)) > 8

import itertools
import math
import random
from typing import Any

import pytest

from raysl.sweep.config import MetricConfig
from raysl.sweep.summary import (
    means_over_seeds,
    ranked,
    summarise,
    varied_parameters,
    visible_range,
)

HIGH = MetricConfig(mode="max")
LOW = MetricConfig(mode="min")


class TestBest:
    def test_is_the_finished_trial_with_the_best_last_value(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"x": 1}, [0.9, 0.5]),
            make_trial(1, {"x": 2}, [0.1, 0.7]),
            make_trial(2, {"x": 3}, [0.1, 0.6]),
        ]
        best = {metric: summarise(trials, metric).best for metric in (HIGH, LOW)}
        assert best == {HIGH: trials[1], LOW: trials[0]}

    def test_is_no_trial_that_failed_or_was_stopped_if_any_finished(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"x": 1}, [0.9], status="failed"),
            make_trial(1, {"x": 2}, [0.8], status="stopped"),
            make_trial(2, {"x": 3}, [0.1, 0.2]),
        ]
        assert summarise(trials, HIGH).best == trials[2]

    def test_is_the_one_that_came_furthest_if_none_has_finished(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"x": 1}, [0.9], status="stopped"),
            make_trial(1, {"x": 2}, [0.2, 0.3], status="running"),
            make_trial(2, {"x": 3}, [], status="running", epoch=7.0),
            make_trial(3, {"x": 4}, [0.9, 0.9, 0.9], status="failed"),
        ]
        assert summarise(trials, HIGH).best == trials[1]

    def test_is_nothing_if_nothing_was_measured(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"x": 1}, [], status="waiting"),
            make_trial(1, {"x": 2}, [0.5], status="failed"),
        ]
        assert summarise(trials, HIGH).best is None
        assert summarise([], HIGH).best is None

    def test_belongs_to_the_candidate_with_the_best_mean_over_seeds(self, make_trial: Any) -> None:
        lucky = [make_trial(n, {"x": 1, "seed": n}, [v]) for n, v in enumerate([0.95, 0.7, 0.7])]
        steady = [make_trial(3 + n, {"x": 2, "seed": n}, [v]) for n, v in enumerate([0.8, 0.85])]
        steady.append(make_trial(5, {"x": 2, "seed": 2}, [0.81]))
        assert summarise(lucky + steady, HIGH).best == steady[1]

    def test_is_no_candidate_of_which_fewer_seeds_finished(self, make_trial: Any) -> None:
        once = make_trial(0, {"x": 1, "seed": 0}, [0.9])
        failed = make_trial(1, {"x": 1, "seed": 1}, [0.1], status="failed")
        twice = [make_trial(2 + n, {"x": 2, "seed": n}, [0.8]) for n in (0, 1)]
        assert summarise([once, failed, *twice], HIGH).best == twice[0]


class TestRanking:
    def test_finished_then_how_far_then_how_good_and_failed_last(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {}, [0.9] * 3, status="failed"),
            make_trial(1, {}, [], status="waiting"),
            make_trial(2, {}, [0.5], status="stopped"),
            make_trial(3, {}, [0.6], status="stopped"),
            make_trial(4, {}, [0.1, 0.2], status="running"),
            make_trial(5, {}, [0.3] * 4),
            make_trial(6, {}, [0.4] * 4),
            make_trial(7, {}, []),
        ]
        numbers = [trial.number for trial in summarise(trials, HIGH).ranking]
        assert numbers == [6, 5, 7, 4, 3, 2, 1, 0]
        assert [trial.number for trial in ranked(trials, LOW)] == [5, 6, 7, 4, 2, 3, 1, 0]

    def test_counts_each_status(self, make_trial: Any) -> None:
        statuses = ["finished", "stopped", "stopped", "failed"]
        trials = [make_trial(n, {}, [0.5], status=status) for n, status in enumerate(statuses)]
        counts = {"finished": 1, "stopped": 2, "failed": 1}
        assert summarise(trials, HIGH).counts == counts


class TestMeansOverSeeds:
    def test_mean_and_deviation_of_a_sample_best_first(self, make_trial: Any) -> None:
        values = {1: [0.1, 0.2, 0.3], 2: [0.4, 0.6], 3: [0.3]}
        trials = [
            make_trial(10 * x + n, {"x": x, "seed": n}, [value])
            for x, row in values.items()
            for n, value in enumerate(row)
        ]
        means = means_over_seeds(trials, HIGH)
        assert [group.params for group in means] == [{"x": 2}, {"x": 3}, {"x": 1}]
        assert [group.mean for group in means] == pytest.approx([0.5, 0.3, 0.2])
        assert means[0].std == pytest.approx(math.sqrt(0.02))
        assert means[1].std is None
        assert means[2].std == pytest.approx(0.1)
        assert [trial.number for trial in means[2].trials] == [12, 11, 10]

    def test_leaves_out_what_did_not_finish(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"x": 1, "seed": 0}, [0.5]),
            make_trial(1, {"x": 1, "seed": 1}, [0.1], status="stopped"),
            make_trial(2, {"x": 1, "seed": 2}, [0.1], status="failed"),
        ]
        (group,) = means_over_seeds(trials, HIGH)
        assert (group.mean, group.trials) == (0.5, (trials[0],))


def grid(make_trial: Any, value: Any) -> list[Any]:
    """Return finished trials over two numbers and a label, with a value for each."""
    places = itertools.product([0.1, 0.2, 0.5, 1.0], [64, 128, 256], ["a", "b"])
    return [
        make_trial(n, {"t": t, "batch": batch, "label": label}, [value(t, batch, label)])
        for n, (t, batch, label) in enumerate(places)
    ]


class TestImportance:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("t", lambda t, batch, label: t),
            ("batch", lambda t, batch, label: batch / 256),
            ("label", lambda t, batch, label: float(label == "b")),
        ],
    )
    def test_what_decides_alone_has_nearly_all(self, make_trial: Any, key: str, value: Any) -> None:
        importance = summarise(grid(make_trial, value), HIGH).importance
        assert next(iter(importance)) == key
        assert importance[key] > 0.95

    def test_shares_sum_to_one_and_the_larger_effect_comes_first(self, make_trial: Any) -> None:
        trials = grid(make_trial, lambda t, batch, label: 3 * t + (label == "b"))
        importance = summarise(trials, HIGH).importance
        assert sum(importance.values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in importance.values())
        assert list(importance)[:2] == ["t", "label"]
        assert importance["batch"] < 0.05

    def test_does_not_depend_on_the_order_or_the_direction(self, make_trial: Any) -> None:
        trials = grid(make_trial, lambda t, batch, label: t + batch / 999)
        shuffled = random.Random(0).sample(trials, len(trials))
        assert summarise(shuffled, HIGH).importance == summarise(trials, HIGH).importance
        up, down = (summarise(trials, metric).importance for metric in (HIGH, LOW))
        assert list(up) == list(down)

    def test_one_collapsed_trial_does_not_hide_the_rest(self, make_trial: Any) -> None:
        trials = grid(make_trial, lambda t, batch, label: 0.8 + t / 100)
        trials[5] = trials[5]._replace(curve=((1.0, 0.1),), metric=0.1)
        assert summarise(trials, HIGH).importance["t"] > 0.8

    def test_is_measured_where_all_still_ran_if_some_were_stopped(self, make_trial: Any) -> None:
        """Those that finished all have the good value, so that they alone could not tell."""
        trials = [
            make_trial(
                n, {"t": t, "batch": batch}, [t, t + 0.1 * batch, t + batch][: 3 if t else 1]
            )
            for n, (t, batch) in enumerate(itertools.product([0, 1], [1, 2, 3, 4, 5]))
        ]
        trials = [t if t.params["t"] else t._replace(status="stopped") for t in trials]
        summary = summarise(trials, HIGH)
        assert summary.compared_at_epoch == 1
        assert summary.importance["t"] > 0.95
        finished = [trial for trial in trials if trial.status == "finished"]
        assert summarise(finished, HIGH).importance == {"batch": 1.0}
        assert summarise(finished, HIGH).compared_at_epoch is None

    def test_a_condition_matters_and_not_what_depends_on_it(self, make_trial: Any) -> None:
        trials = [make_trial(n, {"method": "a", "t": 0.1 * n}, [0.9]) for n in range(1, 7)]
        trials += [make_trial(n, {"method": "b", "decay": 0.1 * n}, [0.1]) for n in range(7, 13)]
        importance = summarise(trials, HIGH).importance
        assert importance["method"] > 0.95

    def test_is_empty_below_four_trials_or_without_differences(self, make_trial: Any) -> None:
        three = [make_trial(n, {"x": n}, [0.1 * n]) for n in range(3)]
        unmeasured = [make_trial(n, {"x": n}, []) for n in range(3, 9)]
        failed = [make_trial(n, {"x": n}, [0.5], status="failed") for n in range(9, 12)]
        assert summarise([*three, *unmeasured, *failed], HIGH).importance == {}
        equal = [make_trial(n, {"x": n}, [0.5]) for n in range(9)]
        assert summarise(equal, HIGH).importance == {}
        same = [make_trial(n, {"x": 1}, [0.1 * n]) for n in range(9)]
        assert summarise(same, HIGH).importance == {}


class TestVisibleRange:
    def test_keeps_all_that_lie_together(self) -> None:
        assert visible_range([0.3, 0.1, 0.2], HIGH) == (0.1, 0.3)

    def test_leaves_out_what_is_far_worse_and_nothing_that_is_far_better(self) -> None:
        values = [0.80, 0.81, 0.82, 0.83]
        assert visible_range([*values, 0.1], HIGH) == (0.80, 0.83)
        assert visible_range([*values, 0.99], HIGH) == (0.80, 0.99)
        assert visible_range([*values, 0.99], LOW) == (0.80, 0.83)


class TestVaried:
    def test_keeps_the_order_and_leaves_out_what_is_the_same(self, make_trial: Any) -> None:
        trials = [
            make_trial(0, {"c": 1, "b": 1, "a": 1}, []),
            make_trial(1, {"c": 2, "b": 1, "a": 1, "only_here": 3}, []),
        ]
        assert varied_parameters(trials) == ["c", "only_here"]

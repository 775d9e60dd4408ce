"""A step is measured as training does it, with the same batches in each form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.benchmark import step as benchmark_step
from raysl.benchmark.step import (
    DDP,
    FORMS,
    LOOP,
    RUN,
    TORCH,
    StepCost,
    StepRequest,
    measure,
    measure_in_own_processes,
    request_for,
    slowest,
)
from raysl.benchmark.step_command import step_table, summarise
from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.errors import ClusterError, ConfigError
from raysl.run.recipe import RunConfig, load_run

RunYaml = Callable[[str], Path]


@pytest.fixture
def config(run_yaml: RunYaml) -> RunConfig[Any]:
    return load_run(run_yaml("small"), ["train.log_every=2"])


@pytest.fixture
def request_(config: RunConfig[Any]) -> StepRequest:
    return request_for(config, steps=3)


class TestRequest:
    def test_whole_logging_intervals_are_timed_after_one_of_warm_up(
        self, request_: StepRequest
    ) -> None:
        assert (request_.warm_up, request_.steps) == (2, 4)
        assert request_.config["train"]["steps"] == 6
        assert (request_.num_workers, request_.threads) == (1, 1)

    def test_a_logging_interval_longer_than_the_steps_is_cut(self, config: RunConfig[Any]) -> None:
        request = request_for(config, steps=1)
        assert (request.warm_up, request.steps) == (1, 1)
        assert request.config["train"]["log_every"] == 1

    def test_nothing_but_training_is_left(self, request_: StepRequest) -> None:
        values = request_.config
        assert (values["evaluate"]["every"], values["evaluate"]["final"]) == (None, ["knn"])
        assert values["track"]["mlflow"] is False
        assert values["train"]["checkpoint_every"]["steps"] == 6

    def test_gpus_that_are_asked_for_must_be_there(
        self, config: RunConfig[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        cluster = {"device": "cuda", "num_train_workers": 2}
        two = config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})
        with pytest.raises(ClusterError, match=r"2 train worker\(s\) need as many GPUs.* has 1"):
            request_for(two, steps=1)

    def test_workers_that_cannot_share_the_batch_are_refused(self, config: RunConfig[Any]) -> None:
        cluster = config.cluster.model_copy(update={"num_train_workers": 3})
        with pytest.raises(ConfigError, match="global_batch_size"):
            request_for(config.model_copy(update={"cluster": cluster}), steps=1)


class TestMeasure:
    @pytest.mark.parametrize("form", [TORCH, LOOP])
    def test_each_form_takes_all_steps_of_the_first_batches(
        self, request_: StepRequest, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[int]] = []
        backward = benchmark_step.backward

        def spied(method: Any, batch: Any, *rest: Any, **named: Any) -> Any:
            seen.append(batch.index.tolist())
            return backward(method, batch, *rest, **named)

        monkeypatch.setattr("raysl.benchmark.step.backward", spied)
        monkeypatch.setattr("raysl.train.loop.backward", spied)
        cost = measure(request_._replace(form=form))
        assert len(seen) == 6
        assert seen[0] == seen[2] == seen[4]
        assert seen[1] == seen[3] == seen[5] != seen[0]
        assert cost.ms > 0
        assert cost.peak_bytes > 50 << 20
        assert cost.wait_share is None

    def test_only_the_steps_after_the_warm_up_count(
        self, request_: StepRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = iter([10.0, 18.0])
        monkeypatch.setattr("raysl.benchmark.step.time.perf_counter", lambda: next(now))
        clock = benchmark_step._Clock(request_, torch.device("cpu"))
        given = [batch for batch in clock.over(["a", "b"])]
        assert given == ["a", "b", "a", "b", "a", "b"]
        assert clock.ms() == 2000.0

    def test_two_workers_average_their_gradients_in_processes_of_their_own(
        self, config: RunConfig[Any]
    ) -> None:
        cluster = config.cluster.model_copy(update={"num_train_workers": 2})
        two = request_for(config.model_copy(update={"cluster": cluster}), steps=2)
        cost = measure_in_own_processes(two._replace(form=DDP))
        assert cost.ms > 0

    def test_all_workers_wait_for_the_slowest(self) -> None:
        assert slowest([StepCost(2.0, 5), StepCost(3.0, 4)]) == StepCost(3.0, 5)


class TestCommand:
    def test_forms_take_turns_and_are_compared_within_a_round(
        self,
        run_yaml: RunYaml,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        forms: list[str] = []

        def measured(request: StepRequest) -> StepCost:
            forms.append(request.form)
            slow = 1 + len(forms) // 3  # the machine gets slower
            return StepCost(slow * (10.0 if request.form == TORCH else 11.0), 1 << 20)

        monkeypatch.setattr("raysl.benchmark.step_command.measure_in_own_processes", measured)
        command = ["benchmark", "step", str(run_yaml("small")), "--forms=loop,torch"]
        assert main([*command, "--repeats=2", "--json"]) == 0
        out, err = capsys.readouterr()
        results = json.loads(out.splitlines()[-1])
        assert forms == [TORCH, LOOP, TORCH, LOOP]
        assert results["forms"][LOOP]["ms"] == pytest.approx((11 + 22) / 2)
        assert results["global_batch_size"] == 32
        assert FORMS[LOOP] in out
        assert "repeat 2 of 2" in err

    def test_a_form_that_does_not_exist_is_a_usage_error(self) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["benchmark", "step", "quickstart", "--forms=jax"])


def test_ratios_are_medians_of_the_rounds() -> None:
    rounds = [
        {TORCH: StepCost(ms, 1), RUN: StepCost(ms * ratio, 2, 0.5)}
        for ms, ratio in [(10.0, 1.1), (30.0, 1.2), (20.0, 1.6)]
    ]
    summary = summarise(rounds, images=100)
    assert summary[TORCH]["images_per_s"] == pytest.approx(5000)
    assert summary[TORCH]["ratio"] == 1
    assert summary[RUN]["ratio"] == pytest.approx(1.2)
    assert (summary[RUN]["min_ms"], summary[RUN]["max_ms"]) == pytest.approx((11.0, 36.0))
    assert summary[RUN]["wait_share"] == 0.5
    facts = {"global_batch_size": 100, "num_workers": 1, "load_before": 0.0, "forms": summary}
    assert step_table(facts).row_count == 2


def test_the_results_of_a_run_tell_its_peak_memory(run_yaml: RunYaml, undrawn: None) -> None:
    assert main(["pretrain", str(run_yaml("memory")), "train.steps=1"]) == 0
    results = read_mapping(Path("runs/memory/results.json"))
    assert results["peak_memory_bytes"] > 50 << 20

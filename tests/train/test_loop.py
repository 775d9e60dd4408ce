import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from raysl.errors import CollapsedError, DivergedError, RayslError, StoppedError
from raysl.methods.base import Batch, LossOutput, Method, MethodConfig, Progress, TrainingSet
from raysl.nn.backbones import Backbone
from raysl.optim.build import Rates, ScheduledOptimizer
from raysl.train.batches import NumpyBatch
from raysl.train.checkpoint import load_checkpoint, save_checkpoint
from raysl.train.health import HealthCheck, HealthConfig
from raysl.train.keep import newest
from raysl.train.loop import Hooks, Schedule, Trainer

EMBED_DIM = 4


class TinyConfig(MethodConfig):
    name: Literal["tiny"] = "tiny"


class Tiny(Method):
    """Pulls two views together through a network with dropout; notes what the loop does to it."""

    Config = TinyConfig

    def __init__(self, config: TinyConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.backbone = backbone
        self.seen: list[Progress] = []
        self.modes: list[bool] = []
        self.after: list[int] = []
        self.autocast: torch.dtype | None = None
        self.spoil: Callable[[int, Tensor], Tensor] = lambda step, value: value

    @property
    def encoder(self) -> Backbone:
        return self.backbone

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        self.seen.append(progress)
        self.modes.append(self.training)
        on = torch.is_autocast_enabled("cpu")
        self.autocast = torch.get_autocast_dtype("cpu") if on else None
        first, second = (self.spoil(progress.step, self.backbone(view)) for view in batch.views)
        loss = (first - second).float().square().mean() + (first.float().std(0) - 1).square().mean()
        metrics = {"tiny/size": first.detach().abs().mean()} if progress.is_logged else {}
        return LossOutput(loss, first.detach(), metrics)

    def after_optimizer_step(self, progress: Progress) -> None:
        self.after.append(progress.step)


def tiny(*, seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    data = TrainingSet(num_images=24, global_batch_size=6, view_sizes_px=(4, 4))
    return Tiny(TinyConfig(), Backbone(net, embed_dim=EMBED_DIM), data)


def batch_of(step: int, *, n: int = 6) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(step)
    return {
        "views_0": rng.integers(0, 256, (n, 2, 4, 4, 3), dtype=np.uint8),
        "index": np.arange(n),
        "step": np.full(n, step),
    }


def batches(start: int, end: int) -> Iterator[NumpyBatch]:
    return (batch_of(step) for step in range(start, end))


def to_batch(batch: NumpyBatch) -> Batch:
    views = torch.from_numpy(batch["views_0"]).float() / 255
    images = [view.permute(0, 3, 1, 2) for view in views.unbind(1)]
    return Batch(images, torch.from_numpy(batch["index"]))


def constant(_: int) -> float:
    return 0.1


class Run:
    """A trainer of a tiny method, and everything that it called."""

    def __init__(self, method: Tiny | None = None, **settings: Any) -> None:
        self.method = method or tiny()
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=123.0, momentum=0.9)
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.checkpoints: list[int] = []
        self.evaluations: list[int] = []
        self.calls: list[str] = []
        self.bad: list[tuple[int, dict[int, int]]] = []
        schedule = {
            "total_steps": 10,
            "steps_per_epoch": 4,
            "log_every": 1,
            "checkpoint_every": 100,
            "evaluate_every": None,
            "seed": 0,
        }
        lr = settings.pop("lr", constant)
        options = {"precision": "fp32", "max_grad_norm": None, "health": HealthConfig()}
        options |= {key: settings.pop(key) for key in list(settings) if key in options}
        options["health"] = HealthCheck(options["health"])
        self.trainer = Trainer(
            self.method,
            [ScheduledOptimizer(self.optimizer, lambda step: Rates(lr(step), 0.0, 0.0))],
            model=self.method,
            schedule=Schedule(**(schedule | settings)),
            to_batch=to_batch,
            **options,
        )

    def start(
        self,
        stream: Iterator[NumpyBatch] | None = None,
        *,
        start_step: int = 0,
        rank: int = 0,
        checkpoint: Callable[[int], None] | None = None,
        stops: Callable[[], bool] = lambda: False,
        **more: Callable[..., Any],
    ) -> "Run":
        total = self.trainer.schedule.total_steps
        hooks = Hooks(
            log=self._log,
            checkpoint=checkpoint or self._checkpoint,
            evaluate=self._evaluate,
            bad_images=self._bad_images,
            evaluated=self._evaluated,
            stops=stops,
            **more,
        )
        stream = batches(start_step, total) if stream is None else stream
        self.trainer.run(stream, start_step=start_step, rank=rank, hooks=hooks)
        return self

    def _bad_images(self, found: Mapping[int, int], step: int) -> float:
        self.bad.append((step, dict(found)))
        return float(sum(len(part) for _, part in self.bad))

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))
        self.calls.append(f"log {step}")

    def _checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)
        self.calls.append(f"checkpoint {step}")

    def _evaluated(self, metrics: Mapping[str, float], step: int) -> None:
        assert metrics["eval/knn_top1"] == step / 100
        assert {"train/loss", "train/epoch"} <= set(metrics)
        self.calls.append(f"tell {step}")

    def _evaluate(self, step: int) -> dict[str, float]:
        self.method.eval()
        self.evaluations.append(step)
        self.calls.append(f"evaluate {step}")
        return {"eval/knn_top1": step / 100}

    def values(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.logged if name in metrics}


class _KilledError(Exception):
    pass


class TestResume:
    def test_ten_steps_equal_five_a_checkpoint_and_five_bit_for_bit(self, tmp_path: Path) -> None:
        whole = Run().start()

        def save_and_die(step: int) -> None:
            state = {
                "method": killed.method.state_dict(),
                "optimizer": killed.optimizer.state_dict(),
            }
            save_checkpoint(tmp_path, state, step=step, keep=newest(1))
            raise _KilledError

        killed = Run(checkpoint_every=5)
        with pytest.raises(_KilledError):
            killed.start(checkpoint=save_and_die)

        resumed = Run(tiny(seed=99))
        state = load_checkpoint(tmp_path, step=5, device=torch.device("cpu"))
        resumed.method.load_state_dict(state["method"])
        resumed.optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(12345)  # a new process has drawn other numbers before
        resumed.start(start_step=5)

        losses = killed.values("train/loss") | resumed.values("train/loss")
        assert losses == whole.values("train/loss")
        for name, value in whole.method.state_dict().items():
            assert torch.equal(resumed.method.state_dict()[name], value), name
        momenta = [
            [state["momentum_buffer"] for state in run.optimizer.state.values()]
            for run in (whole, resumed)
        ]
        assert all(map(torch.equal, *momenta))

    def test_dropout_is_a_function_of_seed_step_and_rank(self) -> None:
        def losses(*, seed: int = 0, rank: int = 0) -> list[float]:
            torch.seed()
            run = Run(total_steps=3, seed=seed, lr=lambda _: 0.0)
            run.start((batch_of(0) | {"step": np.full(6, step)} for step in range(3)), rank=rank)
            return list(run.values("train/loss").values())

        assert losses() == losses()
        assert losses() != losses(seed=1)
        assert losses() != losses(rank=1)  # ranks must not drop the same units
        assert len(set(losses())) == 3  # the same images and weights, other units at each step

    def test_a_finished_run_takes_no_batch(self) -> None:
        run = Run().start(iter([]), start_step=10)
        assert run.calls == []


class TestStop:
    def test_a_step_that_is_asked_to_be_the_last_leaves_metrics_and_a_checkpoint(self) -> None:
        run = Run(log_every=100)
        with pytest.raises(StoppedError, match=r"^after step 4 of 10$"):
            run.start(stops=lambda: len(run.method.after) == 3)
        assert run.calls[-2:] == ["log 4", "checkpoint 4"]
        assert run.checkpoints == [4]
        assert "stops" not in run.logged[-1][1]
        whole = Run().start()
        assert run.values("train/loss")[4] == whole.values("train/loss")[4]

    def test_nothing_is_left_to_stop_after_the_last_step(self) -> None:
        run = Run()
        run.start(stops=lambda: len(run.method.after) == 9)
        assert run.checkpoints == [10]


class TestStream:
    @pytest.mark.parametrize("found", [[3] * 6, [0, 0, 0, 0, 0, 1]])
    def test_a_batch_of_another_step_is_refused(self, found: list[int]) -> None:
        wrong = batch_of(0) | {"step": np.array(found)}
        run = Run()
        before = copy.deepcopy(run.method.state_dict())
        with pytest.raises(RayslError, match="expected the batch of step 0, got one of step"):
            run.start(iter([wrong]))
        assert all(torch.equal(before[name], v) for name, v in run.method.state_dict().items())

    def test_a_stream_that_ends_early_is_an_error(self) -> None:
        run = Run()
        with pytest.raises(RayslError, match="the stream of batches ended before the last step"):
            run.start(batches(0, 4))
        assert len(run.method.seen) == 4
        assert run.checkpoints == []

    def test_no_batch_after_the_last_is_taken(self) -> None:
        stream = batches(0, 12)
        Run().start(stream)
        assert next(stream)["step"][0] == 10


class TestStep:
    def test_the_method_is_told_where_training_stands(self) -> None:
        run = Run(total_steps=3, seed=5).start()
        assert run.method.seen == [Progress(step, 3, 4, 5) for step in range(3)]
        assert run.method.after == [0, 1, 2]

    def test_each_step_takes_the_rate_of_its_place_and_logs_it(self) -> None:
        rates: list[float] = []
        run = Run(total_steps=4, lr=lambda step: 0.1 / (step + 1))
        original = run.optimizer.step
        run.optimizer.step = lambda: (  # type: ignore[method-assign, assignment]
            rates.append(run.optimizer.param_groups[0]["lr"]),
            original(),
        )
        run.start()
        assert rates == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4]
        assert list(run.values("train/lr").values()) == pytest.approx(rates)

    def test_gradients_are_clipped_to_the_norm_and_logged_as_they_were(self) -> None:
        moved, norms = [], []
        for limit in (None, 1e-3):
            method = tiny()
            before = nn.utils.parameters_to_vector(method.parameters()).detach()
            run = Run(method, total_steps=1, max_grad_norm=limit).start()
            after = nn.utils.parameters_to_vector(method.parameters()).detach()
            moved.append(float((after - before).norm()))
            norms.append(run.values("train/grad_norm")[1])
        assert norms[0] == norms[1] > 1e-2
        assert moved == pytest.approx([0.1 * norms[0], 0.1 * 1e-3], rel=1e-3)

    @pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", None)])
    def test_precision_decides_on_autocast(self, precision: str, dtype: torch.dtype | None) -> None:
        run = Run(total_steps=1, precision=precision).start()
        assert run.method.autocast == dtype
        assert all(p.grad.dtype == torch.float32 for p in run.method.parameters())


class TestCadence:
    def test_a_checkpoint_comes_with_metrics_of_its_step(self) -> None:
        run = Run(total_steps=10, log_every=4, checkpoint_every=3).start()
        assert list(run.values("train/loss")) == [3, 4, 6, 8, 9, 10]

    def test_metrics_come_every_so_many_steps_and_with_the_last(self) -> None:
        run = Run(total_steps=8, log_every=3).start()
        assert list(run.values("train/loss")) == [3, 6, 8]
        expected = {
            *("train/loss", "train/grad_norm", "train/lr", "train/epoch", "tiny/size"),
            *("train/feature_std", "train/effective_rank"),
            *("train/images_per_s", "data/wait_share", "time/train_s"),
        }
        assert all(set(m) == expected for _, m in run.logged if "train/loss" in m)
        assert run.values("train/epoch") == {3: 0.75, 6: 1.5, 8: 2.0}

    @pytest.mark.parametrize("evaluation_s", [0.0, 10_000.0])
    def test_rates_count_waiting_and_working_but_not_evaluating(
        self, monkeypatch: pytest.MonkeyPatch, evaluation_s: float
    ) -> None:
        """By a made-up clock: a batch is waited for 1 s, and a view takes 1.5 s."""
        now = [0.0]

        def takes(seconds: float, value: Any) -> Any:
            now[0] += seconds
            return value

        monkeypatch.setattr("raysl.train.loop.time.perf_counter", lambda: now[0])
        run = Run(total_steps=6, log_every=3, evaluate_every=2, checkpoint_every=3)
        run.method.spoil = lambda _, features: takes(1.5, features)
        for name in ("_evaluate", "_checkpoint"):
            hook = getattr(run, name)
            setattr(run, name, lambda step, hook=hook: takes(evaluation_s, hook(step)))
        run.start(takes(1.0, batch) for batch in batches(0, 6))
        seconds = {2: 4, 3: 4, 4: 4, 6: 2 * 4}  # since the line before; not of the first step
        assert run.values("time/train_s") == pytest.approx(seconds)
        assert run.values("train/images_per_s") == pytest.approx(dict.fromkeys(seconds, 6 / 4))
        assert run.values("data/wait_share") == pytest.approx(dict.fromkeys(seconds, 1 / 4))

    def test_the_time_of_the_first_step_is_logged_once(self) -> None:
        run = Run(log_every=5).start(start_step=3)
        assert list(run.values("time/first_step_at")) == [4]

    def test_evaluations_come_on_their_steps_and_training_goes_on_in_training_mode(self) -> None:
        run = Run(total_steps=7, evaluate_every=3, log_every=100).start()
        assert run.evaluations == [3, 6, 7]  # and the last one, whatever it is
        assert run.values("eval/knn_top1") == {3: 0.03, 6: 0.06, 7: 0.07}
        assert run.method.modes == [True] * 7

    def test_checkpoints_come_on_their_steps_and_once_at_the_end(self) -> None:
        assert Run(total_steps=7, checkpoint_every=3).start().checkpoints == [3, 6, 7]
        assert Run(total_steps=6, checkpoint_every=3).start().checkpoints == [3, 6]
        assert Run(total_steps=6, checkpoint_every=3).start(start_step=4).checkpoints == [6]

    def test_the_method_is_told_which_steps_are_logged_and_its_metrics_are_of_these(self) -> None:
        run = Run(log_every=4, checkpoint_every=3, evaluate_every=5).start()
        expected = [3, 4, 5, 6, 8, 9, 10]  # also before each checkpoint and with each evaluation
        assert [p.step + 1 for p in run.method.seen if p.is_logged] == expected
        assert list(run.values("tiny/size")) == expected

    def test_metrics_are_written_before_the_checkpoint_of_their_step_and_told_after_it(
        self,
    ) -> None:
        """Else a run killed in between would go on from a step whose line is missing.

        And one that is ended by whom it tells would have no checkpoint to go on from.
        """
        run = Run(total_steps=4, evaluate_every=2, checkpoint_every=2, log_every=2).start()
        assert run.calls == [
            "log 1",  # the time of the first step
            *("evaluate 2", "log 2", "checkpoint 2", "tell 2"),
            *("evaluate 4", "log 4", "checkpoint 4", "tell 4"),
        ]


class TestHealth:
    def spoilt(self, value: float, *, at: int, **settings: Any) -> Run:
        run = Run(**settings)
        run.method.spoil = lambda step, x: x * value if step >= at else x
        return run

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_the_run_and_names_settings(self, value: float) -> None:
        run = self.spoilt(value, at=4, checkpoint_every=2)
        with pytest.raises(DivergedError) as caught:
            run.start()
        assert "train/loss is nan at step 5 (learning rate 0.1)" in str(caught.value)
        for setting in ("optim.base_lr", "optim.warmup", "optim.max_grad_norm"):
            assert setting in str(caught.value)
        assert run.checkpoints == [2, 4]
        assert math.isnan(run.values("train/loss")[5])  # the record shows what happened

    def test_weights_that_are_not_finite_are_never_in_a_checkpoint(self) -> None:
        """The message promises that the last finite checkpoint is kept."""
        run = self.spoilt(math.nan, at=4, checkpoint_every=3, log_every=10)
        with pytest.raises(DivergedError, match="at step 6"):
            run.start()
        assert run.checkpoints == [3]

    def test_equal_features_stop_the_run_after_patience(self) -> None:
        run = self.spoilt(0.0, at=2, health=HealthConfig(patience=3))
        with pytest.raises(CollapsedError, match="train/feature_std is 0 at step 5"):
            run.start()


class TestBadImages:
    def test_are_reported_where_metrics_are_logged_and_only_when_there_are_new_ones(self) -> None:
        def stream() -> Iterator[NumpyBatch]:
            for step in range(10):
                bad = np.full(6, -1)
                if step in (1, 2, 7):
                    bad[step % 6] = 100 + step
                yield {**batch_of(step), "bad": bad, "flaw": np.where(bad >= 0, 3, 0)}

        run = Run(log_every=4).start(stream())
        assert run.bad == [(4, {101: 3, 102: 3}), (8, {107: 3})]
        counts = [(step, m["data/bad_images"]) for step, m in run.logged if "data/bad_images" in m]
        assert counts == [(4, 2.0), (8, 3.0)]
        assert not any("data/new_bad_images" in metrics for _, metrics in run.logged)


class TestTrouble:
    @pytest.mark.parametrize(("log_every", "at"), [(1, 4), (3, 6), (100, 10)])
    def test_ends_the_run_at_the_next_logging_step_before_anything_is_written(
        self, log_every: int, at: int
    ) -> None:
        run = Run(log_every=log_every)

        def raise_trouble() -> None:
            raise RayslError("the disk")

        with pytest.raises(RayslError, match="the disk"):
            run.start(troubled=lambda: len(run.method.after) >= 4, raise_trouble=raise_trouble)
        assert len(run.method.after) == at
        assert not any(call.startswith(f"log {at}") for call in run.calls)
        assert run.checkpoints == []

    def test_that_there_is_not_is_in_no_record(self) -> None:
        assert not any("trouble" in metrics for _, metrics in Run().start().logged)

"""The training loop: one optimizer step for each batch, with metrics and checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Config, Duration, NonNegativeFloat, PositiveInt
from raysl.data.block import BAD, FLAW, INDEX, STEP
from raysl.errors import RayslError, StoppedError
from raysl.methods.base import Batch, Method, Progress
from raysl.nn.collectives import mean_over_ranks, rank_and_size
from raysl.nn.geometry import effective_rank, feature_std
from raysl.optim.build import ScheduledOptimizer
from raysl.train.batches import NumpyBatch
from raysl.train.gradient import backward
from raysl.train.health import HealthCheck
from raysl.train.keep import KeepBest
from raysl.train.rank_check import RankCheck

FIRST_BATCH = "waiting for the first batch"
"""What a start does for as long as the cluster and the source take; see ``Hooks.doing``."""
_NEW_BAD = "data/new_bad_images"
_STOPS = "stops"
_TROUBLE = "trouble"


class TrainConfig(Config):
    """Length of training, batch sizes and precision."""

    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Number of epochs; set this or steps."""
    steps: PositiveInt | None = None
    """Number of optimizer steps; set this or epochs."""
    global_batch_size: PositiveInt = 256
    """Images of one optimizer step, over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Images of one forward pass of a worker; null takes all. Contrastive methods cache their
    gradient (GradCache), so that every image of the global batch is still compared with every
    other; methods whose loss is a mean over images accumulate. The gradient equals that of the
    whole batch, except that batch norm takes its statistics from each micro-batch."""
    precision: Literal["by_device", "fp32", "bf16"] = "by_device"
    """bf16 autocasts to bfloat16; by_device takes bf16 on GPUs and fp32 on CPUs, where bf16 is
    often slower."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on GPUs and on CPUs."""
    log_every: PositiveInt = 10
    """Optimizer steps between two lines of metrics; each checkpoint has a line too."""
    checkpoint_every: Duration = Duration(epochs=1.0)
    """Interval between checkpoints; the last step always has one."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: KeepBest | None = None
    """Also keep the checkpoints that are best by a metric, each with its encoder; null keeps
    none."""
    keep_every: Duration | None = None
    """Also keep the first checkpoint at or after each multiple of this, with its encoder; null
    keeps none."""
    checkpoint_retry_s: NonNegativeFloat = 300.0
    """Seconds for which a checkpoint that cannot be written (a full disk, a store that is down) is
    tried again while training continues; then the run ends with an error."""


CHECKPOINT_KEYS = (
    *("checkpoint_every", "checkpoint_retry_s"),
    *("keep_checkpoints", "keep_best", "keep_every"),
)
"""Settings of :class:`TrainConfig` that do not change what is trained."""
Log = Callable[[Mapping[str, float], int], None]
"""Receives metrics and their step."""
Doing = Callable[[int, str], None]
"""Told which work begins, and for which step, counted from 1."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop. All are collective: every rank calls them at the same step."""

    log: Log
    checkpoint: Callable[[int], None]  # steps done
    evaluate: Callable[[int], Mapping[str, float]]  # steps done -> metrics
    bad_images: Callable[[Mapping[int, int], int], float]  # {row: flaw} since the last call, step
    # Receives a step's evaluation results after the step's checkpoint; may raise to end the run.
    evaluated: Log | None = None
    # Whether to stop after this step, with a checkpoint. One rank is asked after every step;
    # several agree at logging steps, where they exchange metrics anyway.
    stops: Callable[[], bool] = lambda: False
    # Whether something on this rank must end the run, such as a checkpoint that could not be
    # written. Not collective; the ranks tell each other at logging steps.
    troubled: Callable[[], bool] = lambda: False
    # Raises the trouble of any rank on every rank.
    raise_trouble: Callable[[], None] = lambda: None
    # Told what begins on this rank. Not collective.
    doing: Doing = lambda step, what: None


@dataclass(frozen=True)
class Schedule:
    """When to log, save and evaluate, in optimizer steps; derived from the configuration."""

    total_steps: int
    steps_per_epoch: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    seed: int

    def progress(self, step: int, *, is_logged: bool) -> Progress:
        """Return the state of training before a step."""
        return Progress(step, self.total_steps, self.steps_per_epoch, self.seed, is_logged)


class Trainer:
    """Train a method on an iterator of batches.

    Args:
        method: The method, on its device.
        optimizers: The optimizer of the method's parameters, then that of its adversary, if any.
        model: What the loop calls: the method, or its data-parallel wrapper.
        schedule: When to log, save and evaluate.
        to_batch: Converts a batch of the stream to the method's.
        precision: ``fp32`` or ``bf16``.
        max_grad_norm: Clip the gradient of the first optimizer's parameters to this norm, or None.
        micro_batch_size: Images of one forward pass, or None for all.
        health: Raises if the run has diverged or collapsed.
        check_ranks: Logging steps between two comparisons of the ranks, or None for no comparison.
    """

    def __init__(
        self,
        method: Method,
        optimizers: Sequence[ScheduledOptimizer],
        *,
        model: nn.Module,
        schedule: Schedule,
        to_batch: Callable[[NumpyBatch], Batch],
        precision: Literal["fp32", "bf16"],
        max_grad_norm: float | None,
        health: HealthCheck,
        micro_batch_size: int | None = None,
        check_ranks: int | None = None,
    ) -> None:
        self.method = method
        self.optimizers = optimizers
        self.model = model
        self.schedule = schedule
        self.to_batch = to_batch
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.health = health
        self.micro_batch_size = micro_batch_size
        self.rank_check = RankCheck(method, optimizers, every=check_ranks)
        self.device = next(method.parameters()).device
        self._bad: dict[int, int] = {}  # {row: flaw} on this rank since the last report

    def run(
        self, batches: Iterator[NumpyBatch], *, start_step: int, rank: int, hooks: Hooks
    ) -> None:
        """Train from ``start_step`` to the last step, which is known beforehand.

        Raises:
            StoppedError: If ``hooks.stops`` asked for it, after a checkpoint.
            RayslError: If a batch does not belong to the step, or the ranks differ.
            DivergedError: If a loss is not finite at a logging step.
            CollapsedError: If the features of all images have been equal for too long.
            RayslError: If ``hooks.troubled`` on some rank.
        """
        schedule = self.schedule
        meter = _Meter()
        is_alone = rank_and_size()[1] == 1
        self.method.train()
        for step in range(start_step, schedule.total_steps):
            steps_done = step + 1
            hooks.doing(steps_done, FIRST_BATCH if step == start_step else "waiting for its batch")
            batch = meter.wait_for(batches)
            hooks.doing(steps_done, "training")
            _check_step(batch, step)
            self._bad.update(_bad_images(batch))
            is_checkpoint, is_evaluation, is_read = self._due_after(steps_done)
            stops = (is_read or is_alone) and hooks.stops()
            is_read = is_read or stops
            _seed_step(schedule.seed, step, rank)
            metrics, features = self._step(
                self.to_batch(batch), schedule.progress(step, is_logged=is_read)
            )
            meter.count(len(batch[INDEX]))
            if steps_done == start_step + 1:
                self._synchronize()
                hooks.log({"time/first_step_at": time.time()}, steps_done)
                meter = _Meter()  # speed is measured from the first step on, not from the start
            logged: dict[str, float] = {}
            if is_read:
                metrics[_STOPS] = torch.tensor(float(stops))
                metrics[_TROUBLE] = torch.tensor(float(hooks.troubled()))
                logged = self._read(metrics, features, meter)
                stops = logged.pop(_STOPS) > 0  # on some rank: all of them stop
                self._tell_all_ranks(logged, steps_done, hooks)
                logged["train/lr"] = self.optimizers[0].rates(step).lr
                logged["train/epoch"] = steps_done / schedule.steps_per_epoch
            if is_evaluation:
                hooks.doing(steps_done, "evaluating")
                logged |= meter.pause(lambda steps_done=steps_done: hooks.evaluate(steps_done))  # type: ignore[misc]
                self.method.train()
            if logged:
                hooks.log(logged, steps_done)
            if "train/loss" in logged:
                self._check(logged, steps_done)
            if is_checkpoint or stops:
                hooks.doing(steps_done, "saving a checkpoint")
                meter.pause(lambda steps_done=steps_done: hooks.checkpoint(steps_done))  # type: ignore[misc]
            if is_evaluation and (report := hooks.evaluated) is not None:
                meter.pause(lambda steps_done=steps_done, values=logged: report(values, steps_done))  # type: ignore[misc]
            self._end_if(stops, steps_done)

    def _tell_all_ranks(self, logged: dict[str, float], steps_done: int, hooks: Hooks) -> None:
        """Replace what some rank has to tell, in the means over ranks, by what all of them do."""
        if logged.pop(_TROUBLE) > 0:
            hooks.raise_trouble()
        if logged.pop(_NEW_BAD) > 0:
            logged["data/bad_images"] = hooks.bad_images(self._bad, steps_done)
            self._bad = {}

    def _check(self, logged: Mapping[str, float], steps_done: int) -> None:
        self.health(logged, step=steps_done)
        self.rank_check(steps_done)

    def _end_if(self, stops: bool, steps_done: int) -> None:
        if stops and steps_done < self.schedule.total_steps:  # else nothing is left to stop
            raise StoppedError(f"after step {steps_done} of {self.schedule.total_steps}")

    def _step(self, batch: Batch, progress: Progress) -> tuple[dict[str, Tensor], Tensor]:
        for optimizer in self.optimizers:
            optimizer.prepare(progress.step)
        output = backward(
            self.method,
            batch,
            progress,
            model=self.model,
            autocast=self._autocast,
            micro_batch_size=self.micro_batch_size,
        )
        self.method.before_optimizer_step(progress)
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.optimizers[0].parameters, limit, foreach=True)
        for optimizer in self.optimizers:
            optimizer.optimizer.step()
        self.method.after_optimizer_step(progress)
        metrics = {"train/loss": output.loss, "train/grad_norm": grad_norm.detach()}
        if output.adversary_loss is not None:
            metrics["train/adversary_loss"] = output.adversary_loss
        return metrics | output.metrics, output.features

    def _read(
        self, metrics: dict[str, Tensor], features: Tensor, meter: "_Meter"
    ) -> dict[str, float]:
        """Wait for the device and return the means over ranks (for images per second, the sum)."""
        metrics = metrics | {
            "train/feature_std": feature_std(features),
            "train/effective_rank": effective_rank(features),
        }
        self._synchronize()
        _, world_size = rank_and_size()
        images, elapsed_s, waited_s = meter.read()
        metrics["train/images_per_s"] = torch.tensor(images * world_size / elapsed_s)
        metrics["data/wait_share"] = torch.tensor(min(1.0, waited_s / elapsed_s))
        metrics["time/train_s"] = torch.tensor(elapsed_s)
        metrics[_NEW_BAD] = torch.tensor(float(len(self._bad)))
        values = torch.stack([value.float().to(self.device) for value in metrics.values()])
        return dict(zip(metrics, mean_over_ranks(values).tolist(), strict=True))

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.precision, self.device)

    def _due_after(self, steps_done: int) -> tuple[bool, bool, bool]:
        """Return whether to save, to evaluate and to read the metrics after a step.

        The last step has a checkpoint, and an evaluation if others have. Metrics are also read with
        each checkpoint, before it: a diverged state must not replace a good one.
        """
        schedule, is_last = self.schedule, steps_done == self.schedule.total_steps
        saves = is_last or self._due(steps_done, schedule.checkpoint_every)
        every = schedule.evaluate_every
        evaluates = every is not None and (is_last or self._due(steps_done, every))
        return saves, evaluates, saves or evaluates or self._due(steps_done, schedule.log_every)

    def _due(self, steps_done: int, every: int | None) -> bool:
        return every is not None and every > 0 and steps_done % every == 0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass in a precision, ``fp32`` or ``bf16``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


class _Meter:
    """Count images, and the time spent waiting for them, between logging steps."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited_s = 0.0
        self._images = 0

    def wait_for(self, batches: Iterator[NumpyBatch]) -> NumpyBatch:
        start = time.perf_counter()
        batch = next(batches, None)
        self._waited_s += time.perf_counter() - start
        if batch is None:
            raise RayslError("the stream of batches ended before the last step")
        return batch

    def count(self, images: int) -> None:
        self._images += images

    def pause(self, work: Callable[[], Any]) -> Any:
        """Run something whose time does not count as training time."""
        start = time.perf_counter()
        result = work()
        self._start += time.perf_counter() - start
        return result

    def read(self) -> tuple[int, float, float]:
        """Return this worker's images, seconds of training and of waiting for data; then reset."""
        elapsed_s = max(time.perf_counter() - self._start, 1e-9)
        result = self._images, elapsed_s, self._waited_s
        self._reset()
        return result


def _check_step(batch: NumpyBatch, step: int) -> None:
    """Raise if a batch belongs to another step: stream and model would be out of sync."""
    steps = np.unique(batch[STEP])
    if len(steps) != 1 or steps[0] != step:
        raise RayslError(
            f"expected the batch of step {step}, got one of step {steps.tolist()}: the stream "
            f"began at another checkpoint than the model. Run the same command again"
        )


def _bad_images(batch: NumpyBatch) -> dict[int, int]:
    """Return the bad rows that were replaced in the batch, and the flaw of each."""
    if BAD not in batch:
        return {}
    places = np.flatnonzero(batch[BAD] >= 0)
    return dict(zip(batch[BAD][places].tolist(), batch[FLAW][places].tolist(), strict=True))


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed everything random inside a network (dropout) by seed, step and rank.

    No generator state needs saving: a run resumed from a checkpoint draws the same numbers.
    """
    sequence = np.random.SeedSequence([seed, step, rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))

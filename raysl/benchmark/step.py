"""Measure the training step of a run, from torch alone to the whole run on Ray.

Each measurement runs in new processes (``python -m raysl.benchmark.step REQUEST``), so that none
inherits threads, memory or caches of another.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raysl.benchmark.own_process import run_in_own_process
from raysl.data.block import STEP
from raysl.data.stream import ItemMaker, iterate
from raysl.errors import ClusterError
from raysl.evaluate.training_source import open_training_source
from raysl.run.build import (
    build_method,
    build_optimizers,
    build_trainer,
    schedule_of,
)
from raysl.run.pretrain import train_run
from raysl.run.recipe import (
    RunConfig,
    block_spec,
    derive_for,
    plan_of,
    run_from_values,
    training_set,
)
from raysl.sources.source import Source
from raysl.track.run_folder import RunFolder, read_metrics
from raysl.train.batches import NumpyBatch
from raysl.train.gradient import backward
from raysl.train.loop import Hooks, Trainer, autocast
from raysl.train.memory import peak_bytes

TORCH, DDP, LOOP, RAY, RUN = "torch", "ddp", "loop", "ray", "run"
FORMS = {
    TORCH: "torch alone, tensors in memory",
    DDP: "the same in DDP",
    LOOP: "raysl's loop, views in memory",
    RAY: "the same in actors of Ray",
    RUN: "raysl pretrain, views streamed",
}
"""What is measured. Each form adds one thing to the form before it."""
_BATCHES = 2  # batches in memory, used in turn
_TIMEOUT_S = 3600.0
_JOIN_WITHIN = timedelta(minutes=5)


class StepRequest(NamedTuple):
    """What to measure, and how long."""

    form: str
    """A key of :data:`FORMS`."""
    config: dict[str, Any]
    """The run, as plain values. Its length is ``warm_up`` and ``steps``."""
    steps: int
    """Number of steps that are timed."""
    warm_up: int
    """Number of steps before them."""
    num_workers: int
    threads: int
    """Threads of torch in a worker on CPU."""
    use_gpu: bool
    rank: int = 0
    rendezvous: str = ""
    """Where the workers meet: ``init_method`` of torch's process group; empty without a group."""


class StepCost(NamedTuple):
    """Time and memory of a step."""

    ms: float
    """Mean milliseconds of a step, with its share of the logging."""
    peak_bytes: int
    """Peak memory of a train worker: of the process, or on its GPU."""
    wait_share: float | None = None
    """Share of the time in which a worker waits for its batch; None if batches are in memory."""


def request_for(config: RunConfig[Any], *, steps: int) -> StepRequest:
    """Return the request for a run's step, without its form.

    The run is cut to the steps of the measurement, without evaluation, checkpoints and MLflow.

    Args:
        config: The run's configuration, with absolute paths.
        steps: Number of steps to time, rounded up to whole logging intervals.

    Raises:
        ConfigError: If the run cannot have so many train workers.
        ClusterError: If ``cluster.device=cuda`` and this machine has too few GPUs.
    """
    counts = config.worker_counts or config.cluster.counts
    num_workers = max(1, counts[-1])
    log_every = min(config.train.log_every, steps)
    steps = log_every * math.ceil(steps / log_every)
    total = log_every + steps  # the first interval is the warm-up
    values = config.model_dump(mode="json")
    values["name"] = "step"
    values["train"] |= {
        "steps": total,
        "epochs": None,
        "log_every": log_every,
        "checkpoint_every": {"steps": total},
        "keep_best": None,
        "keep_every": None,
    }
    # A low learning rate, because training on two batches alone could diverge.
    values["optim"] |= {"warmup": {"steps": total - 1}}
    values["evaluate"] |= {"every": None, "final": ["knn"]}  # at least one, after the steps
    values["cluster"] |= {"num_train_workers": num_workers}
    values["track"] |= {"mlflow": False}
    run_from_values(values, where="raysl benchmark")
    return StepRequest(
        form="",
        config=values,
        steps=steps,
        warm_up=log_every,
        num_workers=num_workers,
        threads=config.cluster.threads_per_train_worker
        or max(1, (os.cpu_count() or 1) // num_workers),
        use_gpu=_uses_gpu(config, num_workers),
    )


def _uses_gpu(config: RunConfig[Any], num_workers: int) -> bool:
    wanted, count = config.cluster.device, torch.cuda.device_count()
    if wanted == "cuda" and count < num_workers:
        raise ClusterError(
            f"cluster.device=cuda: {num_workers} train worker(s) need as many GPUs, and this "
            f"machine has {count}; lower cluster.num_train_workers, or set cluster.device=cpu"
        )
    return wanted != "cpu" and count >= num_workers


def measure_in_own_processes(request: StepRequest) -> StepCost:
    """Measure a form in new processes: one for each worker, or one that starts workers on Ray.

    Raises:
        DataError: If a process fails; the message is the last line that it wrote.
    """
    if request.form in (RAY, RUN):
        return _measure_in_own_process(request)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(request.num_workers) as pool:
        rendezvous = f"file://{folder}/rendezvous"
        ranks = range(request.num_workers)
        requests = [request._replace(rank=rank, rendezvous=rendezvous) for rank in ranks]
        return slowest(list(pool.map(_measure_in_own_process, requests)))


def slowest(costs: Sequence[StepCost]) -> StepCost:
    """Return the cost of a step of several workers, which all wait for the slowest."""
    return StepCost(max(cost.ms for cost in costs), max(cost.peak_bytes for cost in costs))


def _measure_in_own_process(request: StepRequest) -> StepCost:
    text = json.dumps(request._asdict())
    return StepCost(**run_in_own_process(__name__, text, timeout_s=_TIMEOUT_S))


def measure(request: StepRequest) -> StepCost:
    """Measure a form with batches in memory, in this process, as one of its workers."""
    config = run_from_values(request.config, where="the benchmark")
    device = torch.device("cuda" if request.use_gpu else "cpu")
    if request.use_gpu:  # an actor of Ray sees only its own
        device = torch.device("cuda", request.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(request.threads)
    with _process_group(request, device):
        source = open_training_source(config.data, config.evaluate, config.method)
        trainer = _trainer(config, source, device)
        batches = _first_batches(config, source, request)
        clock = _Clock(request, device)
        if request.form in (TORCH, DDP):
            _run_torch(trainer, [trainer.to_batch(batch) for batch in batches], clock, request)
        else:
            numbered = (_of_step(batch, step) for step, batch in enumerate(clock.over(batches)))
            trainer.run(numbered, start_step=0, rank=request.rank, hooks=_hooks())
        return StepCost(clock.ms(), peak_bytes(device))


def _trainer(config: RunConfig[Any], source: Source, device: torch.device) -> Trainer:
    derived = derive_for(config, source)
    method = build_method(config, training_set(config, source), device=device)
    return build_trainer(
        config,
        method,
        build_optimizers(method, config, derived),
        schedule=schedule_of(config, derived),
        source=source,
        device=device,
    )


def _hooks() -> Hooks:
    """Return hooks that do nothing, because evaluations and checkpoints are not measured."""
    return Hooks(
        log=lambda values, step: None,
        checkpoint=lambda step: None,
        evaluate=lambda step: {},
        bad_images=lambda flaws, step: 0.0,
    )


def _first_batches(
    config: RunConfig[Any], source: Source, request: StepRequest
) -> list[NumpyBatch]:
    """Return this worker's first batches of the run."""
    made = iterate(
        ItemMaker(source, plan_of(config, source), block_spec(config.data)),
        start_step=0,
        rank=request.rank,
        world_size=request.num_workers,
        num_threads=request.threads,
    )
    return list(islice(made, _BATCHES))


def _of_step(batch: NumpyBatch, step: int) -> NumpyBatch:
    return {**batch, STEP: np.full_like(batch[STEP], step)}


def _run_torch(
    trainer: Trainer, batches: Sequence[Any], clock: "_Clock", request: StepRequest
) -> None:
    """Train with a plain loop: no schedule, no metrics, no checks."""
    method, model = trainer.method, _torch_model(trainer, request)
    method.train()
    for optimizer in trainer.optimizers:
        optimizer.prepare(0)
    for step, batch in enumerate(clock.over(batches)):
        progress = trainer.schedule.progress(step, is_logged=False)
        for optimizer in trainer.optimizers:
            optimizer.optimizer.zero_grad(set_to_none=True)
        backward(
            method,
            batch,
            progress,
            model=model,
            autocast=lambda: autocast(trainer.precision, trainer.device),
            micro_batch_size=trainer.micro_batch_size,
        )
        method.before_optimizer_step(progress)
        if trainer.max_grad_norm is not None:
            parameters = trainer.optimizers[0].parameters
            nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm, foreach=True)
        for optimizer in trainer.optimizers:
            optimizer.optimizer.step()
        method.after_optimizer_step(progress)


def _torch_model(trainer: Trainer, request: StepRequest) -> nn.Module:
    if request.form != DDP or trainer.micro_batch_size is not None:
        return trainer.method
    if isinstance(trainer.model, DistributedDataParallel):
        return trainer.model
    return DistributedDataParallel(trainer.method, broadcast_buffers=False)  # of one worker


class _Clock:
    """Times the steps after the warm-up."""

    def __init__(self, request: StepRequest, device: torch.device) -> None:
        self._request, self._device = request, device
        self._began = self._ended = 0.0

    def over(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield batches in turn, one for each step, and note when the timed steps begin and end."""
        for step in range(self._request.warm_up + self._request.steps):
            if step == self._request.warm_up:
                self._began = self._now()
            yield batches[step % len(batches)]
        self._ended = self._now()

    def ms(self) -> float:
        """Return the mean milliseconds of a timed step."""
        ended = self._ended or self._now()  # raysl's loop stops without exhausting the iterator
        return 1000 * (ended - self._began) / self._request.steps

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def _process_group(request: StepRequest, device: torch.device) -> Iterator[None]:
    """Start the workers together; only torch alone then trains without a process group."""
    is_alone = request.num_workers == 1
    if is_alone and request.form != DDP:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=request.rendezvous,
        rank=request.rank,
        world_size=request.num_workers,
        timeout=_JOIN_WITHIN,
    )
    dist.barrier()
    try:
        if request.form == TORCH:
            dist.destroy_process_group()
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def measure_run(request: StepRequest) -> StepCost:
    """Measure a whole run on Ray, by the metrics that it logs."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        values = {**request.config, "output_dir": folder}
        config = run_from_values(values, where="the benchmark")
        results = train_run(config, began_at=time.time())
        records = read_metrics(RunFolder(Path(results["run_dir"])).metrics)
    timed = [r for r in records if r["step"] > request.warm_up and "time/train_s" in r]
    seconds = sum(r["time/train_s"] for r in timed)
    waited = sum(r["data/wait_share"] * r["time/train_s"] for r in timed)
    return StepCost(1000 * seconds / request.steps, results["peak_memory_bytes"], waited / seconds)


def _measure_by_form(request: StepRequest) -> StepCost:
    if request.form == RUN:
        return measure_run(request)
    if request.form == RAY:
        from raysl.benchmark.ray_step import measure_on_ray  # noqa: PLC0415 - loads Ray

        return measure_on_ray(request)
    return measure(request)


def main() -> None:
    """Measure what the argument describes in JSON; print one line of JSON."""
    cost = _measure_by_form(StepRequest(**json.loads(sys.argv[1])))
    sys.stdout.write(json.dumps(cost._asdict()) + "\n")


if __name__ == "__main__":
    main()

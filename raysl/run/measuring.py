"""Evaluate the encoder during training, in the train workers or from a file of weights."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.encoder.file import load_encoder, save_encoder
from raysl.evaluate.features import EvalImages, embed, embed_alone
from raysl.evaluate.online import OnlineFeatures, OnlineSets, online_metrics, open_online
from raysl.evaluate.protocol import LabelledSets
from raysl.methods.base import Method
from raysl.nn.batchnorm import average_statistics
from raysl.nn.collectives import rank_and_size
from raysl.run.build import describe
from raysl.run.online import EvaluationStarter, OnlineEvaluations, is_evaluated, read_failures
from raysl.run.recipe import RunConfig, derive_for
from raysl.sources.source import Source
from raysl.track.run_folder import MetricsFile, RunFolder, list_waiting, read_metrics
from raysl.train.batches import input_converter

ToInput = Callable[[npt.NDArray[np.uint8]], Tensor]


class Place(NamedTuple):
    """Device and threads of a worker."""

    device: torch.device
    threads: int  # of torch, and of decoding during evaluation


class Measuring:
    """Evaluates the encoder during training, either in all train workers or in the background.

    Args:
        config: The run's configuration.
        method: The method whose encoder is evaluated.
        folder: The run folder.
        source: The training images.
        labelled: The labelled images; None evaluates without labels.
        to_input: Converts ``(B, S, S, 3)`` uint8 to the encoder's input on its device.
        place: This worker's device and threads.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        method: Method,
        *,
        folder: RunFolder,
        source: Source,
        labelled: LabelledSets | None,
        to_input: ToInput,
        place: Place,
    ) -> None:
        self._config = config
        self._method = method
        self._folder = folder
        self._to_input = to_input
        self._place = place
        self._total_steps = derive_for(config, source).total_steps
        self._sets = open_online(
            config.evaluate,
            labelled,
            source,
            size_px=config.image_size_px,
            num_threads=place.threads,
        )
        self._in_background = False
        self._metrics: MetricsFile | None = None
        self._online: OnlineEvaluations | None = None
        self._last_measured: tuple[int, dict[str, float]] = (-1, {})

    def open(
        self, metrics: MetricsFile | None, begin: EvaluationStarter | None, *, start_step: int
    ) -> None:
        """Resume the evaluations that an earlier process left pending.

        Args:
            metrics: The metrics file on rank 0, None on the others.
            begin: Starts an evaluation in the background; None evaluates in the train workers.
                Every rank passes the same; only rank 0 calls it.
            start_step: Number of steps already done.
        """
        self._in_background = begin is not None
        self._metrics = metrics
        # If the workers evaluate, pending evaluations stem from a start with other settings.
        if metrics is not None and (begin is not None or list_waiting(self._folder.to_evaluate)):
            self._online = OnlineEvaluations(
                self._folder,
                sets=self._sets,
                begin=begin or self._begin_here,
                log=lambda values, step: metrics.log(values, step=step),
                start_step=start_step,
            )

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Evaluate the encoder, or start its evaluation; return the metrics that are ready.

        Collective. ``time/evaluate_s`` is the time in seconds for which training paused.
        """
        began = time.perf_counter()
        metrics: Mapping[str, float] = {}
        if not self._in_background:
            metrics = self.metrics_at(step)
        elif step < self._total_steps:  # the last step is evaluated after training
            average_statistics(self._method)
            if self._online is not None:
                self._online.add(step, self._save)
        return {**metrics, "time/evaluate_s": time.perf_counter() - began}

    def collect(self) -> None:
        """Log the background evaluations that have finished; never waits."""
        if self._online is not None:
            self._online.collect()

    def measure_last(self) -> None:
        """Evaluate the last step if :meth:`evaluate` postponed it. Collective."""
        if self._in_background and self._config.evaluate.every is not None:
            self.metrics_at(self._total_steps)

    def finish(self) -> int:
        """Wait for the background evaluations and log them, then the last step's; on rank 0.

        Returns:
            Number of evaluations that failed or were skipped.
        """
        if self._online is None or self._metrics is None:
            return 0
        self._online.finish()
        step, metrics = self._last_measured
        logged = read_metrics(self._folder.metrics)
        if metrics and not any(r["step"] == step and is_evaluated(r) for r in logged):
            self._metrics.log(metrics, step=step)
        return len(read_failures(self._folder))

    def metrics_at(self, step: int) -> Mapping[str, float]:
        """Return the metrics of the encoder after ``step`` steps. Collective."""
        if self._last_measured[0] != step:
            average_statistics(self._method)
            metrics = _measure(
                lambda images: embed(self._method.encoder, images, to_input=self._to_input),
                self._sets,
                self._config,
            )
            self._last_measured = step, metrics
        return self._last_measured[1]

    def _save(self, path: Path) -> None:
        save_encoder(path, self._method.encoder, description=describe(self._config))

    def _begin_here(self, path: Path, sets: OnlineSets) -> "Future[Mapping[str, float]]":
        _, size = rank_and_size()
        future: Future[Mapping[str, float]] = Future()
        future.set_result(
            measure_file(path, sets, self._config, device=self._place.device, num_ranks=size)
        )
        return future


def measure_file(
    path: Path,
    sets: OnlineSets,
    config: RunConfig[Any],
    *,
    device: torch.device,
    num_ranks: int,
) -> dict[str, float]:
    """Evaluate the encoder in a file exactly as ``num_ranks`` train workers would.

    Args:
        path: A file written by :func:`raysl.encoder.file.save_encoder`.
        sets: The images to evaluate on.
        config: The run's configuration.
        device: Device of the encoder.
        num_ranks: Number of train workers of the run.
    """
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    encoder = load_encoder(path).to(device=device, memory_format=layout)  # type: ignore[call-overload]
    to_input = input_converter(
        device=device,
        mean=config.data.mean,
        std=config.data.std,
        channels_last=config.train.channels_last,
    )
    return _measure(
        lambda images: embed_alone(encoder, images, to_input=to_input, num_ranks=num_ranks),
        sets,
        config,
    )


def _measure(
    embed_all: Callable[[EvalImages], Tensor], sets: OnlineSets, config: RunConfig[Any]
) -> dict[str, float]:
    test = None if sets.labelled is None else embed_all(sets.labelled.test)
    features = OnlineFeatures(embed_all(sets.train), embed_all(sets.pairs), test)
    return online_metrics(config.evaluate, sets, features)

"""Run a trial in Tune's process: open its images, train, report its evaluations."""

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import torch
from ray import tune

from raysl.config.load import read_mapping, set_key
from raysl.errors import ClusterError
from raysl.evaluate.protocol import LabelledSets
from raysl.evaluate.training_source import open_training_source
from raysl.folder.whole import read_json, write_json
from raysl.run.labelled_sets import open_sets
from raysl.run.local import pretrain_here
from raysl.run.protocol_runs import train_protocols
from raysl.run.ray_cluster import in_background, plan_layout
from raysl.run.ray_train import pretrain_on_ray
from raysl.run.recipe import RunConfig, derive_for, run_from_values
from raysl.run.stored import opened_part, restore_checkpoint, shown_in_errors
from raysl.sources.source import Source
from raysl.store.mirror import StoredRun
from raysl.sweep.config import Dimension
from raysl.sweep.space import TRIALS
from raysl.sweep.trial import Change, newest_change, write_change
from raysl.sweep.trial_run import run_trial, take_over
from raysl.track.follow import MetricsReader
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.loop import Log

NUMBER = "number"
"""Key of a trial's number in the point that Tune passes to it."""

_POLL_S = 0.5
# The only file of a checkpoint for Tune; it names a checkpoint in the trial's folder.
_POINTER = "checkpoint.json"


def source_key(config: RunConfig[Any]) -> str:
    """Return a key that is equal for configurations with the same training images and labels."""
    data = config.data
    facts = {k: v for k, v in data.model_dump(mode="json").items() if k != "views"}
    method = config.method
    if data.labels is not None or method.uses_labels:  # the visible labels depend on these too
        facts["seen"] = [method.uses_labels, method.needs_labels, config.evaluate.source]
    return json.dumps(facts, sort_keys=True)


# Training images and labelled images that a process keeps for later trials, by their settings.
_SOURCES: dict[str, Source] = {}
_SETS: dict[str, LabelledSets | None] = {}


def trial_in_process(
    point: dict[str, Any],
    *,
    sweep: Path | StoredRun,
    sources: Mapping[str, Source],
    metrics: tuple[str, ...],
    exchanges: bool,
    space: Mapping[str, Dimension] = MappingProxyType({}),
) -> None:
    """Run one trial in Tune's process.

    Args:
        point: The trial's number, and the displayed values of settings that may change in flight.
        sweep: The sweep's folder, on a disk that all nodes share or in a store.
        sources: Training images by :func:`source_key`; others are opened here.
        metrics: Keys of the metrics file to report, the sweep's metric first.
        exchanges: Whether trials are paused or copy checkpoints of others.
        space: The dimensions of the settings in ``point``.
    """
    name = str(tune.get_context().get_trial_name())
    try:
        with _opened(sweep, name) as folder:
            source = _source_of(_config_of(folder), sources)
            total_steps = derive_for(_config_of(folder), source).total_steps
            if exchanges:
                _exchange(folder, point, space, total_steps=total_steps)
            _run(folder, source, metrics=metrics, total_steps=total_steps, exchanges=exchanges)
    finally:  # the next trial reuses this process, also if this trial was stopped
        _free_memory()


@contextmanager
def _opened(sweep: Path | StoredRun, name: str) -> Iterator[RunFolder]:
    """Provide a trial's run folder: the folder itself, or a local copy of one in a store."""
    if isinstance(sweep, Path):
        yield RunFolder(sweep / TRIALS / name)
        return
    with opened_part(sweep.below(f"{TRIALS}/{name}")) as (folder, restore_of):
        restore_of(trains_here=not _is_nested(_config_of(folder)))
        restore_checkpoint(folder)
        yield folder


def _run(
    folder: RunFolder,
    source: Source,
    *,
    metrics: tuple[str, ...],
    total_steps: int,
    exchanges: bool,
) -> None:
    """Run a trial in its folder, and report its evaluations to Tune."""
    config = _config_of(folder)
    cpus = tune.get_context().get_trial_resources().head_cpus or 1.0

    def report(values: Mapping[str, float]) -> None:
        folder.publish(waits=True)  # the driver reads the folder when it is told
        if not exchanges:
            tune.report(dict(values))
            return
        with tempfile.TemporaryDirectory() as pointer:
            place = {"folder": folder.shown(), "step": int(values["step"])}
            write_json(Path(pointer) / _POINTER, place)
            tune.report(dict(values), checkpoint=tune.Checkpoint.from_directory(pointer))

    def train(evaluated: Log) -> Results:
        with shown_in_errors(folder):
            return _train(
                config, folder, source, evaluated, metrics=metrics, num_cpus=max(1, int(cpus))
            )

    run_trial(folder, metrics=metrics, total_steps=total_steps, report=report, train=train)
    folder.publish(waits=True)


def _is_nested(config: RunConfig[Any]) -> bool:
    """Return whether a trial starts train workers of its own."""
    return config.cluster.counts[-1] > 1


def _train(
    config: RunConfig[Any],
    folder: RunFolder,
    source: Source,
    evaluated: Log,
    *,
    metrics: tuple[str, ...],
    num_cpus: int,
) -> Results:
    """Train a trial, then the protocols of its ``evaluate.final`` that train, on its resources."""

    def train_run(run: RunConfig[Any], run_folder: RunFolder, images: Source) -> Results:
        log = evaluated if run_folder is folder else None
        if _is_nested(run):
            return _train_nested(run, run_folder, images, log, metrics)
        sets = _sets_of(run, images, num_threads=num_cpus) if run_folder is folder else None
        return pretrain_here(
            run, folder=run_folder, source=images, num_cpus=num_cpus, evaluated=log, sets=sets
        )

    results = train_run(config, folder, source)
    return train_protocols(
        config,
        results,
        folder=folder,
        source=source,
        train=train_run,
        trains_here=not _is_nested(config),
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _config_of(folder: RunFolder) -> RunConfig[Any]:
    """Return a trial's run with the settings that changed in flight."""
    if not folder.config.exists():
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()} does not see {folder.shown()}: on several "
            f"nodes output_dir must be on a disk that all share, or an address of an object store, "
            f"such as s3://BUCKET/FOLDER"
        )
    values = read_mapping(folder.config)
    change = newest_change(folder)
    for key, value in ({} if change is None else change.values).items():
        set_key(values, key, value)
    return run_from_values(values, where=str(folder.config))


def _source_of(config: RunConfig[Any], sources: Mapping[str, Source]) -> Source:
    """Return the training images: of an earlier trial, else of the driver, else opened here."""
    key = source_key(config)
    if key not in _SOURCES:
        source = sources.get(key)
        _SOURCES[key] = (
            open_training_source(config.data, config.evaluate, config.method)
            if source is None
            else source
        )
    return _SOURCES[key]


def _sets_of(config: RunConfig[Any], source: Source, *, num_threads: int) -> LabelledSets | None:
    """Return the labelled images of a run, decoded once for all trials of this process."""
    facts = config.evaluate.model_dump(mode="json"), config.image_size_px
    key = source_key(config) + json.dumps(facts, sort_keys=True)
    if key not in _SETS:
        _SETS[key] = open_sets(config, source, num_threads=num_threads)
    return _SETS[key]


def _exchange(
    folder: RunFolder,
    point: Mapping[str, Any],
    space: Mapping[str, Dimension],
    *,
    total_steps: int,
) -> None:
    """Apply the checkpoint and the settings with which Tune resumes a trial.

    A finished trial is not changed. If the donor's checkpoint no longer exists, its settings are
    not applied either.
    """
    if folder.read_results() is not None:
        return
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as pointer:
            origin = read_json(Path(pointer) / _POINTER) or {}
        donor, step = str(origin["folder"]), int(origin["step"])
        if donor != folder.shown() and not take_over(
            folder, donor, step=step, total_steps=total_steps
        ):
            return
    params = {key: value for key, value in point.items() if key != NUMBER}
    if params:
        values = {k: space[k].value_of(v) if k in space else v for k, v in params.items()}
        write_change(folder, Change(latest_step(folder.checkpoints), params, values))


def _train_nested(
    config: RunConfig[Any],
    folder: RunFolder,
    source: Source,
    evaluated: Log | None,
    metrics: tuple[str, ...],
) -> Results:
    """Run Ray Train inside the trial, and report the evaluations from its metrics file."""
    reader = MetricsReader(folder.metrics, only_new=True)
    work = in_background(
        lambda: pretrain_on_ray(config, folder=folder, source=source, layout=plan_layout(config)),
        name="raysl-nested",
    )
    while True:
        ended = work.done()
        for record in reader.read():
            if evaluated is not None and metrics[0] in record:
                evaluated(record, int(record["step"]))
        if ended:
            return work.result()
        time.sleep(_POLL_S)

"""Check whether a run can start, before anything is started.

`raysl config`, every start of a run and the check of a sweep use these functions.
"""

import math
from collections.abc import Iterator
from typing import Any

from raysl.config.base import Duration
from raysl.errors import ConfigError
from raysl.evaluate.labelled import Labelling
from raysl.nn.backbones import check_model_name
from raysl.run.check_network import check_network
from raysl.run.labelled_sets import labelling_of
from raysl.run.protocol_runs import check_protocol_runs
from raysl.run.recipe import Derived, RunConfig, derive_for
from raysl.run.stored import check_stored
from raysl.sources.source import Source
from raysl.track.uri import check_tracking_uri

_OF_CLASSIFIERS = "eval/top1"
_MOST_IMAGES = 10**15  # a million epochs of a billion images


def check_names(config: RunConfig[Any]) -> None:
    """Check the model's name, the tracking URI and a store's address; nothing is opened or built.

    Raises:
        ConfigError: If torchvision or timm do not have the model, MLflow does not support the
            URI's scheme, or the run cannot be in a store.
    """
    check_stored(config)
    check_model_name(config.backbone)
    if config.track.mlflow:
        check_tracking_uri(config.track.tracking_uri)


def check_start(config: RunConfig[Any], source: Source) -> Derived:
    """Check that a run can start on its images and has no error that would only appear later.

    Labels are read and the network is built on the meta device; no image is decoded.

    Args:
        config: The run, with absolute paths of its files.
        source: The training images.

    Returns:
        The derived values.

    Raises:
        ConfigError: If durations exceed the run, the method cannot be built for these images,
            batch norm gets too few of them, memory is too small, or too few labels are left for
            fine-tuning at the end.
        DataError: If weights do not fit, or the run needs labels that the images do not have.
    """
    derived = check_lengths(config, source)
    for problem in _best_problems(config, labelling_of(config, source)):
        raise ConfigError(problem)
    check_protocol_runs(config, source)
    check_network(config, source, derived)
    return derived


def check_lengths(config: RunConfig[Any], source: Source) -> Derived:
    """Check that warm-up and other durations fit into the run; return the derived values.

    Raises:
        ConfigError: If a duration is longer than the run, an interval is zero, or the run would
            never end.
    """
    derived = derive_for(config, source)
    for find_problems in (_run_problems, _length_problems, _keep_problems):
        for problem in find_problems(config, derived):
            raise ConfigError(problem)
    return derived


def _run_problems(config: RunConfig[Any], derived: Derived) -> Iterator[str]:
    """Yield a message for a length or an interval that makes no sense."""
    train, total = config.train, derived.total_steps
    if total * train.global_batch_size > _MOST_IMAGES:
        key = "train.epochs" if train.steps is None else "train.steps"
        yield (
            f"{key} makes {total:,} steps of {train.global_batch_size} images; a run has at most "
            f"{_MOST_IMAGES:,} images in all"
        )
    intervals = {
        "train.checkpoint_every": train.checkpoint_every,
        "evaluate.every": config.evaluate.every,
    }
    for key, interval in intervals.items():
        if interval is not None and not any(interval.model_dump(exclude_none=True).values()):
            yield f"{key}={_as_yaml(interval)} is no interval; give one of at least one step"


def _length_problems(config: RunConfig[Any], derived: Derived) -> Iterator[str]:
    """Yield a message for each initial phase that would be longer than the run."""
    method, total = config.method, derived.total_steps
    durations: list[tuple[str, Duration]] = [("optim.warmup", config.optim.warmup)]
    if config.adversary_optim is not None:
        durations.append(("adversary_optim.warmup", config.adversary_optim.warmup))
    for name in method.beginnings:
        if getattr(method, name) != type(method).model_fields[name].default:
            durations.append((f"method.{name}", getattr(method, name)))
    for name, needed_by in method.starts.items():
        if getattr(method, needed_by) is not None:
            durations.append((f"method.{name}", getattr(method, name)))
    for key, duration in durations:
        steps = duration.in_steps(
            steps_per_epoch=derived.steps_per_epoch, total_steps=derived.total_steps
        )
        if steps > total:
            yield (
                f"{key}={_as_yaml(duration)} is {steps:,} steps, longer than the run of {total:,} "
                f"({derived.steps_per_epoch:,} per epoch); use at most {total:,} steps, such as "
                f"{key}={{fraction: 0.1}}, or a longer run"
            )


def _keep_problems(config: RunConfig[Any], derived: Derived) -> Iterator[str]:
    """Yield a message if the metric of ``keep_best`` is never measured at a checkpoint's step."""
    best, every = config.train.keep_best, derived.evaluate_every_steps
    if best is None or not best.metric.startswith("eval/"):
        return
    classifies, name = config.method.classifies, config.method.name
    if classifies != (best.metric == _OF_CLASSIFIERS):
        trains, other = ("a", _OF_CLASSIFIERS) if classifies else ("no", "eval/knn_top1")
        yield (
            f"train.keep_best.metric={best.metric}: method {name} trains {trains} classifier, so "
            f"this is never measured; use {other} or train/loss"
        )
    where, saved_every = f"train.keep_best.metric={best.metric}", derived.checkpoint_every_steps
    if every is None:
        yield (
            f"{where} is measured during training, which evaluate.every=null leaves out; set "
            f"evaluate.every"
        )
    elif math.lcm(every, saved_every) >= derived.total_steps:
        yield (
            f"{where}: evaluations every {every:,} steps and checkpoints every {saved_every:,} "
            f"never fall on the same step before the end, at {derived.total_steps:,}; set "
            f"train.checkpoint_every to {{steps: {every}}}, or evaluate.every to a multiple of it"
        )


def _best_problems(config: RunConfig[Any], labelling: Labelling) -> Iterator[str]:
    """Yield a message if the best checkpoints are chosen by a metric that needs missing labels."""
    best = config.train.keep_best
    if best is None or best.metric not in ("eval/knn_top1", _OF_CLASSIFIERS):
        return
    if labelling.train is None:
        why = "; ".join(labelling.notes) or "there are no labels"
        yield (
            f"train.keep_best.metric={best.metric} is never measured, so no checkpoint would be "
            f"kept: {why}\n  Set evaluate.source to labelled images, or the metric to one that "
            f"needs no labels, such as eval/rankme"
        )


def _as_yaml(duration: Duration) -> str:
    (unit, length), *_ = duration.model_dump(exclude_none=True).items()
    return f"{{{unit}: {length:g}}}"

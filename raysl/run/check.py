"""Check whether a run can start, before anything is started.

`raysl config`, every start of a run and the check of a sweep's runs ask here.
"""

from collections.abc import Iterator
from typing import Any

from raysl.config.base import Duration
from raysl.errors import ConfigError
from raysl.nn.backbones import check_model_name
from raysl.run.check_network import check_network
from raysl.run.labelled_sets import labelling_notes
from raysl.run.protocol_runs import check_protocol_runs
from raysl.run.recipe import Derived, RunConfig, derive_for
from raysl.sources.source import Source
from raysl.track.uri import check_tracking_uri


def check_names(config: RunConfig[Any]) -> None:
    """Refuse names that nobody knows; nothing is opened or built.

    Raises:
        ConfigError: If torchvision or timm have no such model, or MLflow no such kind of address.
    """
    check_model_name(config.backbone)
    if config.track.mlflow:
        check_tracking_uri(config.track.tracking_uri)


def check_start(config: RunConfig[Any], source: Source) -> Derived:
    """Refuse a run that could not start on its images, or would end in an error behind that.

    Labels are read, and the network is laid out without memory; no image is decoded.

    Args:
        config: The run, with its files by absolute paths.
        source: Its training images.

    Returns:
        What follows from both.

    Raises:
        ConfigError: If lengths do not fit each other, the method cannot be built for these images,
            its batch norm has too few of them, no memory holds it, or too few labels are left to
            fine-tune it with at the end.
        DataError: If the given weights do not fit, or the labels are not what the run needs.
    """
    derived = check_lengths(config, source)
    labelling_notes(config, source)
    check_protocol_runs(config, source)
    check_network(config, source, derived)
    return derived


def check_lengths(config: RunConfig[Any], source: Source) -> Derived:
    """Refuse what would not be over by the end of the run; return what follows from both.

    Raises:
        ConfigError: Says how long the run is.
    """
    derived = derive_for(config, source)
    for problem in _lengths(config, derived):
        raise ConfigError(problem)
    return derived


def _lengths(config: RunConfig[Any], derived: Derived) -> Iterator[str]:
    """Yield what is to happen at the beginning of a run and would not be over at its end."""
    method, total = config.method, derived.total_steps
    given: list[tuple[str, Duration]] = [("optim.warmup", config.optim.warmup)]
    if config.adversary_optim is not None:
        given.append(("adversary_optim.warmup", config.adversary_optim.warmup))
    for name in method.beginnings:
        if getattr(method, name) != type(method).model_fields[name].default:
            given.append((f"method.{name}", getattr(method, name)))
    for name, needed_by in method.starts.items():
        if getattr(method, needed_by) is not None:
            given.append((f"method.{name}", getattr(method, name)))
    for key, duration in given:
        steps = duration.in_steps(
            steps_per_epoch=derived.steps_per_epoch, total_steps=derived.total_steps
        )
        if steps > total:
            yield (
                f"{key}={_said(duration)} is {steps:,} steps, longer than the run of {total:,} "
                f"({derived.steps_per_epoch:,} an epoch); use at most {total:,} steps, such as "
                f"{key}={{fraction: 0.1}}, or a longer run"
            )


def _said(duration: Duration) -> str:
    (unit, length), *_ = duration.model_dump(exclude_none=True).items()
    return f"{{{unit}: {length:g}}}"

"""Run one trial of a sweep in its own run folder, reporting its metric to a scheduler."""

import shutil
from collections.abc import Callable, Mapping

from raysl.errors import RayslError
from raysl.folder.whole import appears_whole
from raysl.run.error_record import forget_error, write_error
from raysl.track.results import Results
from raysl.track.run_folder import (
    RunFolder,
    checkpoint_path,
    latest_step,
    list_checkpoints,
    read_metrics,
)
from raysl.train.loop import Log

AGAIN = "again"
"""Told, as 1.0, with an evaluation of an earlier start."""
LAST = "last"
"""Told, as 1.0, with the evaluation of the last step: the trial is finished."""

Report = Callable[[Mapping[str, float]], None]
"""Gets ``step``, ``epoch`` and the metrics of an evaluation; may raise to end the trial."""


def run_trial(
    folder: RunFolder,
    *,
    metrics: tuple[str, ...],
    total_steps: int,
    report: Report,
    train: Callable[[Log], Results],
) -> None:
    """Run a trial from wherever it stands to its end.

    Evaluations up to the newest checkpoint are reported again first: a scheduler that was started
    anew has not heard of them. That of the last step is reported once the results are written, so
    that a trial that is stopped there is finished all the same. An error of raysl's own ends the
    trial and stays in ``error.json``: it would come again.

    Args:
        folder: The trial's run folder.
        metrics: Keys of the metrics file to report, the deciding one first.
        total_steps: Optimizer steps of the whole trial.
        report: Tells the scheduler.
        train: Does the work, and calls what it is given after each evaluation.
    """
    last: list[Mapping[str, float]] = []

    def tell(logged: Mapping[str, float], step: int, mark: Mapping[str, float]) -> None:
        told = {**_told(logged, step, metrics), **mark}
        if step < total_steps:
            report(told)
        else:
            last.append({**told, LAST: 1.0})

    forget_error(folder)
    done = latest_step(folder.checkpoints)
    for record in read_metrics(folder.metrics):
        if record["step"] <= done and metrics[0] in record:
            tell(record, int(record["step"]), {AGAIN: 1.0})
    try:
        train(lambda logged, step: tell(logged, step, {}))
    except RayslError as error:
        write_error(folder, error)
        return
    for told in last[-1:]:
        report(told)


def _told(logged: Mapping[str, float], step: int, metrics: tuple[str, ...]) -> dict[str, float]:
    known = {name: float(logged[name]) for name in metrics if name in logged}
    return {"step": float(step), "epoch": float(logged.get("train/epoch", 0.0)), **known}


def take_over(folder: RunFolder, donor: RunFolder, *, step: int, total_steps: int) -> int:
    """Make a trial go on from another one's checkpoint (population based training).

    Args:
        folder: The trial that goes on.
        donor: Whose state it takes.
        step: The checkpoint meant; if it is gone by now, the newest one before it or else any.
        total_steps: Of a trial: the last checkpoint leaves nothing to train, and is never taken.

    Returns:
        The step it goes on from; 0 if the donor has no such checkpoint any more, and the trial
        stays as it is.
    """
    known = [each for each in list_checkpoints(donor.checkpoints) if each < total_steps]
    chosen = max((s for s in known if s <= step), default=min(known, default=0))
    if not chosen:
        return 0
    with appears_whole(checkpoint_path(folder.checkpoints, chosen)) as arriving:
        shutil.copytree(checkpoint_path(donor.checkpoints, chosen), arriving)
        for own in list_checkpoints(folder.checkpoints):
            shutil.rmtree(checkpoint_path(folder.checkpoints, own))
    return chosen

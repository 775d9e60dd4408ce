"""Run one trial of a sweep in its own run folder, reporting its metric to a scheduler."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from raysl.errors import RayslError, RunFolderError
from raysl.folder.address import is_address
from raysl.folder.whole import appears_whole
from raysl.run.stored import replaced_checkpoint
from raysl.store.mirror import checkpoint_steps, copy_checkpoint
from raysl.store.objects import Store
from raysl.track.results import Results
from raysl.track.run_folder import (
    RunFolder,
    checkpoint_path,
    forget_error,
    latest_step,
    list_checkpoints,
    read_metrics,
    write_error,
)
from raysl.train.checkpoint import set_damaged_aside
from raysl.train.loop import Log

AGAIN = "again"
"""Key of a report, 1.0 for an evaluation of an earlier start."""
LAST = "last"
"""Key of a report, 1.0 for the evaluation of the last step: the trial is finished."""

Report = Callable[[Mapping[str, float]], None]
"""Called with ``step``, ``epoch`` and the metrics of an evaluation; may raise to end the trial."""


def run_trial(
    folder: RunFolder,
    *,
    metrics: tuple[str, ...],
    total_steps: int,
    report: Report,
    train: Callable[[Log], Results],
) -> None:
    """Run a trial from its newest checkpoint to its end.

    Evaluations up to the newest checkpoint are reported again first, since a restarted scheduler
    does not have them. The evaluation of the last step is reported after the results are written,
    so that a trial that is stopped there is finished. An error of raysl ends the trial and is
    written to ``error.json``, since a retry would repeat it; one of a store is raised.

    Args:
        folder: The trial's run folder.
        metrics: Keys of the metrics file to report, the sweep's metric first.
        total_steps: Optimizer steps of the whole trial.
        report: Reports an evaluation to the scheduler.
        train: Trains the run, and calls its argument after each evaluation.
    """
    last: list[Mapping[str, float]] = []

    def report_step(logged: Mapping[str, float], step: int, mark: Mapping[str, float]) -> None:
        values = {**_report_values(logged, step, metrics), **mark}
        if step < total_steps:
            report(values)
        else:
            last.append({**values, LAST: 1.0})

    forget_error(folder)
    set_damaged_aside(folder.checkpoints)  # the log of a trial is not on any screen
    resumed_step = latest_step(folder.checkpoints)
    for record in read_metrics(folder.metrics):
        if record["step"] <= resumed_step and metrics[0] in record:
            report_step(record, int(record["step"]), {AGAIN: 1.0})
    try:
        train(lambda logged, step: report_step(logged, step, {}))
    except RayslError as error:
        if folder.stored is not None and isinstance(error, RunFolderError):
            raise  # a store that is down may be up again at a retry
        write_error(folder, error)
        return
    for values in last[-1:]:
        report(values)


def _report_values(
    logged: Mapping[str, float], step: int, metrics: tuple[str, ...]
) -> dict[str, float]:
    values = {name: float(logged[name]) for name in metrics if name in logged}
    return {"step": float(step), "epoch": float(logged.get("train/epoch", 0.0)), **values}


def take_over(folder: RunFolder, donor: str, *, step: int, total_steps: int) -> int:
    """Replace a trial's checkpoints by one of another trial (population based training).

    Args:
        folder: The trial that continues.
        donor: Path, or address in a store, of the trial whose checkpoint is copied.
        step: Step of the checkpoint; if it no longer exists, the newest one before it, else the
            oldest, is copied.
        total_steps: Steps of a trial; the last checkpoint leaves no step to train and is never
            copied.

    Returns:
        The step of the copied checkpoint; 0 if the donor has none, and the trial is unchanged.
    """
    store = Store(donor) if is_address(donor) else None
    local = RunFolder(Path(donor)).checkpoints
    held = list_checkpoints(local) if store is None else checkpoint_steps(store)
    steps = [each for each in held if each < total_steps]
    chosen = max((s for s in steps if s <= step), default=min(steps, default=0))
    if not chosen:
        return 0
    target = checkpoint_path(folder.checkpoints, chosen)
    with appears_whole(target) as temporary:
        if store is None:
            shutil.copytree(checkpoint_path(local, chosen), temporary)
        else:
            copy_checkpoint(store, chosen, temporary)
        for old_step in list_checkpoints(folder.checkpoints):
            shutil.rmtree(checkpoint_path(folder.checkpoints, old_step))
    replaced_checkpoint(folder)
    return chosen

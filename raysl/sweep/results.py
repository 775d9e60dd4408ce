"""Write and print the results of a sweep: the best run's configuration, results, failures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.config.load import get_key, read_mapping, set_key
from raysl.config.yaml_text import to_yaml
from raysl.errors import DivergedError
from raysl.evaluate.old_keys import resolve_final
from raysl.evaluate.registry import FINAL
from raysl.folder.whole import write_text
from raysl.report.terminal import console
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.shell import command
from raysl.sweep.config import SweepConfig
from raysl.sweep.space import trial_name
from raysl.sweep.summary import Summary
from raysl.sweep.trial import SweepFolder, Trial, change_before, last_measured
from raysl.sweep.watch import params_text, placed_seconds, trials_table
from raysl.track.results import SweepResults
from raysl.track.run_folder import RunFolder, working_folder
from raysl.track.uri import compare_line

_BEST_SHOWN = 10  # rows of the printed table
_LONGER = 10  # factor on the length of the best trial's run
_DIVERGED = DivergedError.__name__


def write_best(sweep: SweepConfig, folder: SweepFolder, summary: Summary) -> None:
    """Write the best trial as a run configuration for `raysl pretrain`."""
    if summary.best is None:
        return
    config = best_run(sweep, RunFolder(summary.best.path))
    lines = [
        f"# The best trial of the sweep {sweep.name}: {sweep.metric.name} "
        f"{summary.best.metric:.4g} at epoch {summary.best.epoch:g}.",
        f"# Train it for long: {next_line(sweep, folder, summary)}",
    ]
    text = "\n".join(lines) + "\n" + to_yaml(config.model_dump(mode="json"))
    write_text(folder.best, text)


def next_line(sweep: SweepConfig, folder: SweepFolder, summary: Summary) -> str | None:
    """Return the command that trains the best trial ten times as long; None without a best one."""
    if summary.best is None:
        return None
    train = best_run(sweep, RunFolder(summary.best.path)).train
    if train.epochs is not None:
        longer = f"train.epochs={_LONGER * train.epochs:g}"
    else:
        longer = f"train.steps={_LONGER * (train.steps or 1)}"
    best, here = folder.best, Path.cwd()
    is_near = folder.stored is None and best.is_relative_to(here)
    path = best.relative_to(here) if is_near else folder.shown(best)
    return command("pretrain", path, longer)


def results_of(
    sweep: SweepConfig, folder: SweepFolder, trials: Sequence[Trial], summary: Summary
) -> SweepResults:
    """Return the results for `--json` and ``summary.json``."""
    best = summary.best
    placed = sum(placed_seconds(trial) for trial in trials)
    return {
        "sweep_dir": folder.shown(),
        "parent_run_id": None,
        "trials": len(trials),
        "finished": summary.counts.get("finished", 0),
        "failed": summary.counts.get("failed", 0),
        "stopped_early": summary.counts.get("stopped", 0),
        "metric": sweep.metric.name,
        "best_trial": None if best is None else best.number,
        "best_params": None if best is None else best.params,
        "best_metric": None if best is None else best.metric,
        "best_config": None if best is None else folder.shown(folder.best),
        "importance": summary.importance,
        # Seconds for which trials held resources, and the share spent in training steps.
        "placed_s": placed,
        "training_share": sum(trial.seconds for trial in trials) / placed if placed else None,
    }


def print_results(
    sweep: SweepConfig,
    folder: SweepFolder,
    trials: Sequence[Trial],
    summary: Summary,
) -> None:
    """Print the best trials, the errors of failed ones, and the next command."""
    out = console()
    out.print(trials_table(sweep, list(trials), rows=_BEST_SHOWN))
    for trial in trials:
        if trial.status == "failed":
            out.print(f"trial {trial.number:04d} failed: {trial.error}", markup=False)
    lines = [f"report    {folder.shown(folder.report)}"]
    if sweep.track.mlflow:
        lines.append(f"compare   {compare_line(sweep.track.tracking_uri, folder=working_folder())}")
    if summary.best is not None:
        lines.append(f"best      {params_text(summary.best.params)}")
        lines.append(f"next      {next_line(sweep, folder, summary)}")
    out.print("\n".join(lines), markup=False)


def failures_of(sweep: SweepConfig, trials: Sequence[Trial], lost: Mapping[int, str]) -> list[str]:
    """List the failures of a sweep, one line each; diverged trials alone are no failure.

    Args:
        sweep: The sweep.
        trials: All of its trials, after it ended.
        lost: Numbers of the trials that Ray gave up, and the reasons.
    """
    problems = []
    if lost:
        problems.append(f"trials were lost: {by_reason(lost)}; the same command resumes them")
    failed = {trial.number: str(trial.error) for trial in trials if trial.status == "failed"}
    other_failures = {n: error for n, error in failed.items() if not error.startswith(_DIVERGED)}
    if other_failures:
        problems.append(
            f"{len(other_failures)} of {len(trials)} trials failed: {by_reason(other_failures)}"
        )
    if all(trial.metric is None or trial.status == "failed" for trial in trials):
        text = f"no trial has {sweep.metric.name}, so none is the best"
        if failed and not other_failures:
            text += f": {len(failed)} of {len(trials)} diverged; lower optim.base_lr"
        problems.append(text)
    return problems


def by_reason(reasons: Mapping[int, str]) -> str:
    """Return one text that groups the trials by reason."""
    groups: dict[str, list[str]] = {}
    for number, reason in sorted(reasons.items()):
        groups.setdefault(reason, []).append(trial_name(number))
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


def best_run(sweep: SweepConfig, trial: RunFolder) -> RunConfig[Any]:
    """Return a trial's configuration as an independent run, tracked and with all final protocols.

    If its settings changed in flight, the run has those that trained the last measured weights.
    """
    values = read_mapping(trial.config)
    change = change_before(trial, last_measured(trial, sweep.metric))
    for key, value in ({} if change is None else change.values).items():
        set_key(values, key, value)
    values |= {
        "name": f"{sweep.name}-best",
        "output_dir": sweep.output_dir,
        "track": sweep.track.model_dump(mode="json"),
    }
    values = resolve_final(values)
    final = get_key(values, "evaluate.final")
    set_key(values, "evaluate.final", list(dict.fromkeys([*FINAL, *final])))
    set_key(values, "evaluate.online", "auto")
    return run_from_values(values, where=str(trial.config))

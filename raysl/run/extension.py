"""Extend a run: continue from its last checkpoint to a larger number of steps.

The order of the images does not depend on the length of a run, so the added steps read the images
that a longer run would read. Values that depend on the length (learning rate, weight decay, a
method's momentum or temperature) are those of the longer run at that step: a cosine that had
reached its end rises again. With ``optim.schedule=constant`` and no other such value, an extended
run equals a run of the full length bit for bit.
"""

from collections.abc import Mapping
from typing import Any

from raysl.config.load import drop_key, plain_copy
from raysl.errors import RunFolderError
from raysl.folder.whole import read_json, write_json
from raysl.optim.build import lr_at, peak_lr
from raysl.run.differences import differences
from raysl.run.recipe import Derived, RunConfig
from raysl.track.run_folder import RunFolder, latest_step

LENGTH = ("train.epochs", "train.steps")

_RECORDS = "extensions"


def differences_besides_length(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the settings other than the length that differ between two runs, one line each."""
    plain = [plain_copy(old), plain_copy(new)]
    for values in plain:
        for key in LENGTH:
            drop_key(values, key)
    return differences(*plain)


def extend(
    folder: RunFolder, old: tuple[RunConfig[Any], Derived], new: tuple[RunConfig[Any], Derived]
) -> list[str]:
    """Record that a run continues to a new length, and delete its results.

    After an interruption, the same command repeats both.

    Args:
        folder: The run folder, locked by this process; its ``config.yaml`` is still the old one.
        old: The configuration and its derived values before the extension.
        new: The configuration and its derived values after the extension.

    Returns:
        Messages to print, one per line.

    Raises:
        RunFolderError: If the new length is not longer, or there is no checkpoint to resume from.
    """
    (_, old_derived), (config, new_derived) = old, new
    steps_done, results = latest_step(folder.checkpoints), folder.read_results()
    if new_derived.total_steps <= old_derived.total_steps:
        raise RunFolderError(
            f"{folder.path}: --extend makes a run longer: it has {old_derived.total_steps} steps, "
            f"and {_length(config)} is {new_derived.total_steps}; give more, or leave --extend out"
        )
    if not steps_done and results is not None:
        raise RunFolderError(
            f"{folder.path}: --extend resumes from a checkpoint, but {folder.checkpoints} contains "
            f"none; --fresh trains the whole length"
        )
    record = {
        "after_step": steps_done,
        "total_steps": [old_derived.total_steps, new_derived.total_steps],
        "learning_rate": [
            _lr(old, max(0, steps_done - 1)),
            _lr(new, min(steps_done, new_derived.total_steps - 1)),
        ],
        "length": _length(config),
        "results": results,
    }
    if steps_done:
        earlier = [each for each in records_of(folder) if not _is_same(each, record)]
        write_json(folder.extensions, {_RECORDS: [*earlier, record]})
    folder.results.unlink(missing_ok=True)
    return [_summary(record), _schedule_note(config)] if steps_done else []


def records_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of a run's extensions, oldest first."""
    return list((read_json(folder.extensions) or {}).get(_RECORDS, []))


def tags_of_extensions(folder: RunFolder) -> dict[str, str]:
    """Return the extensions as MLflow tags; MLflow's parameters keep the initial length."""
    records = records_of(folder)
    tags = {f"extended.{number}": _summary(each) for number, each in enumerate(records, 1)}
    if records:
        key, _, value = str(records[-1]["length"]).partition("=")
        tags[key] = value
    return tags


def _is_same(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    return all(earlier.get(key) == record[key] for key in ("after_step", "total_steps"))


def _summary(record: Mapping[str, Any]) -> str:
    (old_steps, new_steps), (old_lr, new_lr) = record["total_steps"], record["learning_rate"]
    return (
        f"extended after step {record['after_step']} from {old_steps} to {new_steps} steps "
        f"({record['length']}); learning rate {old_lr:.4g} before, {new_lr:.4g} from there on"
    )


def _schedule_note(config: RunConfig[Any]) -> str:
    if config.optim.schedule == "constant":
        return (
            "  values that depend on the length of the run are those of the new length from here on"
        )
    return (
        "  the learning rate's cosine, and all other values that depend on the length of the run, "
        "are those of the new length from here on"
    )


def _lr(run: tuple[RunConfig[Any], Derived], step: int) -> float:
    config, derived = run
    return lr_at(
        config.optim,
        step,
        peak=peak_lr(config.optim, global_batch_size=config.train.global_batch_size),
        steps_per_epoch=derived.steps_per_epoch,
        total_steps=derived.total_steps,
    )


def _length(config: RunConfig[Any]) -> str:
    train = config.train
    return f"train.steps={train.steps}" if train.steps else f"train.epochs={train.epochs:g}"

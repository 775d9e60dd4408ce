"""Record a run's images in ``source.json``, and check whether they have changed.

A resumed run reads the same images in the same order as an uninterrupted run, as long as the images
have not changed.
"""

from collections.abc import Mapping
from typing import Any

from raysl.errors import RunFolderError
from raysl.folder.whole import read_json, write_json
from raysl.run.recipe import RunConfig, derive_for
from raysl.sources.source import Source
from raysl.sources.subset import whole_source
from raysl.track.run_folder import RunFolder, latest_step

FROM_STEP = "from_step"
"""Key of a record: the step from which on training reads these images."""

_MOST_NAMES = 1000
_SHOWN = 5


def source_facts(source: Source) -> dict[str, Any]:
    """Return the record of the training images: names, counts and fingerprints.

    Args:
        source: Result of :func:`raysl.evaluate.training_source.open_training_source`.
    """
    whole = whole_source(source)
    names = list(whole.class_names)
    return {
        "name": source.name,
        "fingerprint": whole.fingerprint,
        # Fingerprint of the images and labels that training sees; the same if it sees all.
        "seen": source.fingerprint,
        "images": int(whole.group_sizes.sum()),
        "seen_images": int(source.group_sizes.sum()),
        "groups": len(whole.group_sizes),
        "classes": len(names),
        "class_names": names if len(names) <= _MOST_NAMES else None,
        "notes": list(source.notes),
    }


def record_source(folder: RunFolder, source: Source, config: RunConfig[Any]) -> list[str]:
    """Check that the images are those the run began with, and record them before training.

    Args:
        folder: The run folder, locked by this process.
        source: The training images.
        config: The run; ``data.if_changed`` says whether other images are accepted.

    Returns:
        Messages to print, one per line.

    Raises:
        RunFolderError: If the images have changed since the run began.
    """
    facts, steps_done = source_facts(source), latest_step(folder.checkpoints)
    records = _records(folder)
    # Records without a trained step do not count: their images may still be replaced.
    trained = [each for each in records if each[FROM_STEP] < steps_done]
    lines: list[str] = []
    if trained and not is_same(trained[-1], facts):
        changed = "\n  ".join(what_changed(trained[-1], facts))
        if config.data.if_changed == "stop":
            raise RunFolderError(_refusal(folder, changed, steps_done))
        lines = [_continues(steps_done, derive_for(config, source).total_steps), f"  {changed}"]
        _write(folder, facts | {FROM_STEP: steps_done}, earlier=trained)
    else:
        since = trained[-1][FROM_STEP] if trained else 0
        _write(folder, facts | {FROM_STEP: since}, earlier=trained[:-1])
    if records and not is_same(records[-1], facts):
        _set_bad_images_aside(folder, records[-1])
        if not trained:
            lines = ["the images have changed since the first start, which wrote no checkpoint"]
    return lines


def _refusal(folder: RunFolder, changed: str, steps_done: int) -> str:
    return (
        f"{folder.path}: the images have changed since this run began:\n  {changed}\n"
        f"Restore them, or start another run with name=..., or start over with --fresh, which "
        f"renames the old folder, or resume after step {steps_done} with the current images: "
        f"data.if_changed=go_on"
    )


def _records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the folder's records of its images, oldest first."""
    newest = read_json(folder.source)
    if newest is None:
        return []
    return [{FROM_STEP: 0} | each for each in [*newest.pop("earlier", []), newest]]


def _write(folder: RunFolder, facts: Mapping[str, Any], *, earlier: list[dict[str, Any]]) -> None:
    write_json(folder.source, {**facts, **({"earlier": earlier} if earlier else {})})


def _set_bad_images_aside(folder: RunFolder, earlier: Mapping[str, Any]) -> None:
    """Rename the list of bad images: its rows refer to the earlier images."""
    if folder.bad_images.exists():
        name = f"bad_images.{earlier['fingerprint']}.jsonl"
        folder.bad_images.replace(folder.bad_images.with_name(name))


def is_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether two records are of the same images and labels."""
    return all(old.get(key) == new[key] for key in ("fingerprint", "seen"))


def what_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences between two records, one line each."""
    if old.get("fingerprint") == new["fingerprint"]:
        return [
            f"{new['name']}: the same images, but training uses another part of them or of their "
            f"labels: {old.get('seen_images', 0):,} then, {new['seen_images']:,} now "
            f"(evaluate.source determines what is held out for testing)"
        ]
    was, now = int(old.get("images", 0)), new["images"]
    same = "; the same number, but other files, other file sizes, or another selection"
    lines = [f"images of {new['name']}: {was:,} then, {now:,} now" + (same if was == now else "")]
    if old.get("groups") != new["groups"]:
        lines.append(f"files or row groups: {old.get('groups')} then, {new['groups']} now")
    if _classes(old) != _classes(new):
        lines.append(f"classes: {old.get('classes')} then, {new['classes']} now")
        before, after = (each.get("class_names") or [] for each in (old, new))
        lines[-1] += _name_some("new", [n for n in after if n not in set(before)])
        lines[-1] += _name_some("gone", [n for n in before if n not in set(after)])
    return [*lines, f"fingerprint: {old.get('fingerprint')} then, {new['fingerprint']} now"]


def _classes(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    return facts.get("classes"), facts.get("class_names")


def _name_some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"; {title}: {', '.join(names[:_SHOWN])}{more}"


def _continues(steps_done: int, total: int) -> str:
    beyond = (
        f"; step {steps_done} is beyond that, so nothing is left to train"
        if steps_done >= total
        else ""
    )
    return (
        f"the images have changed, and data.if_changed=go_on: from step {steps_done} on, order and "
        f"length are those of the current images, {total} steps in total{beyond}"
    )

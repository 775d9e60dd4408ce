"""Record a run's images in ``source.json``, and check whether they have changed.

A run reads the same images in the same order to its end, however often it is stopped; that holds as
long as the images are the same.
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
"""Of a record: the step after which training saw these images."""

_MOST_NAMES = 1000
_SHOWN = 5


def source_facts(source: Source) -> dict[str, Any]:
    """Return what a run folder keeps of its training images.

    Args:
        source: What :func:`raysl.evaluate.training_source.open_training_source` returned.
    """
    whole = whole_source(source)
    names = list(whole.class_names)
    return {
        "name": source.name,
        "fingerprint": whole.fingerprint,
        # Which of them, and of their labels, training sees; the same where it sees all.
        "seen": source.fingerprint,
        "images": int(whole.group_sizes.sum()),
        "seen_images": int(source.group_sizes.sum()),
        "groups": len(whole.group_sizes),
        "classes": len(names),
        "class_names": names if len(names) <= _MOST_NAMES else None,
        "notes": list(source.notes),
    }


def hold_to_source(folder: RunFolder, source: Source, config: RunConfig[Any]) -> list[str]:
    """Write down what a run is trained on, before it is; refuse other images than it began with.

    Args:
        folder: The run's folder, held by this process.
        source: The training images.
        config: The run; ``data.if_changed`` says what to do about other images.

    Returns:
        Lines to say.

    Raises:
        RunFolderError: If the images have changed since the run began.
    """
    facts, done = source_facts(source), latest_step(folder.checkpoints)
    records = _records(folder)
    # Those that nothing was trained on do not count: they may be put back, or changed again.
    trained = [each for each in records if each[FROM_STEP] < done]
    lines: list[str] = []
    if trained and not is_same(trained[-1], facts):
        changed = "\n  ".join(what_changed(trained[-1], facts))
        if config.data.if_changed == "stop":
            raise RunFolderError(_refusal(folder, changed, done))
        lines = [_going_on(done, derive_for(config, source).total_steps), f"  {changed}"]
        _write(folder, facts | {FROM_STEP: done}, earlier=trained)
    else:
        since = trained[-1][FROM_STEP] if trained else 0
        _write(folder, facts | {FROM_STEP: since}, earlier=trained[:-1])
    if records and not is_same(records[-1], facts):
        _set_bad_images_aside(folder, records[-1])
        if not trained:
            lines = ["the images have changed since the first start, which came to no checkpoint"]
    return lines


def _refusal(folder: RunFolder, changed: str, done: int) -> str:
    return (
        f"{folder.path}: the images have changed since this run began:\n  {changed}\n"
        f"Put them back as they were, or give this run another name=..., or --fresh to start anew "
        f"and set the old one aside, or data.if_changed=go_on to go on after step {done} with the "
        f"images that are there now"
    )


def _records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what the folder knows of its images, the present ones last."""
    known = read_json(folder.source)
    if known is None:
        return []
    return [{FROM_STEP: 0} | each for each in [*known.pop("earlier", []), known]]


def _write(folder: RunFolder, facts: Mapping[str, Any], *, earlier: list[dict[str, Any]]) -> None:
    write_json(folder.source, {**facts, **({"earlier": earlier} if earlier else {})})


def _set_bad_images_aside(folder: RunFolder, of: Mapping[str, Any]) -> None:
    """Give the list of bad images another name: its rows are those of other images."""
    if folder.bad_images.exists():
        name = f"bad_images.{of['fingerprint']}.jsonl"
        folder.bad_images.replace(folder.bad_images.with_name(name))


def is_same(known: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Return whether two records are of the same images and labels."""
    return all(known.get(key) == facts[key] for key in ("fingerprint", "seen"))


def what_changed(known: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Say what differs between two records, a line each."""
    if known.get("fingerprint") == facts["fingerprint"]:
        return [
            f"{facts['name']}: the same images, but training sees others of them or of their "
            f"labels: {known.get('seen_images', 0):,} then, {facts['seen_images']:,} now "
            f"(evaluate.source decides what is held out to test on)"
        ]
    was, now = int(known.get("images", 0)), facts["images"]
    same = "; as many, but other files, or of other sizes, or another choice of them"
    lines = [f"images of {facts['name']}: {was:,} then, {now:,} now" + (same if was == now else "")]
    if known.get("groups") != facts["groups"]:
        lines.append(f"files or row groups: {known.get('groups')} then, {facts['groups']} now")
    if _classes(known) != _classes(facts):
        lines.append(f"classes: {known.get('classes')} then, {facts['classes']} now")
        before, after = (each.get("class_names") or [] for each in (known, facts))
        lines[-1] += _named("new", [n for n in after if n not in set(before)])
        lines[-1] += _named("gone", [n for n in before if n not in set(after)])
    return [*lines, f"fingerprint: {known.get('fingerprint')} then, {facts['fingerprint']} now"]


def _classes(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    return facts.get("classes"), facts.get("class_names")


def _named(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"; {what}: {', '.join(names[:_SHOWN])}{more}"


def _going_on(done: int, total: int) -> str:
    beyond = f"; step {done} is beyond that, so nothing is left to train" if done >= total else ""
    return (
        f"the images have changed, and data.if_changed=go_on: from step {done} on, order and "
        f"length are those of the images that are there now, {total} steps in all{beyond}"
    )

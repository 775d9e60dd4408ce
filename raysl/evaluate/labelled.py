"""Choose the labelled images that train the probes of a run, and those that test them.

Missing labels do not stop a pretraining: measurements without enough labels are skipped with a
note. Only explicit requests (``evaluate.source``, fine-tuning in ``evaluate.final``) raise an error
if they cannot be fulfilled.
"""

from typing import NamedTuple

import numpy as np

from raysl.errors import DataError, counted
from raysl.evaluate.features import EvalImages, Rows
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets
from raysl.sources.labels import hold_out
from raysl.sources.open import open_source
from raysl.sources.source import BUILT_IN, DataConfig, Labels, Source
from raysl.sources.splits import HELD_OUT, TRAIN, canonical

_SUBSET_SEED = 0
_FEWEST_CLASSES = 2
_SHOWN = 5
_FEW_SHOT = "evaluate.few_shot.labels_per_class"


class ImageKeys(NamedTuple):
    """Names of the settings of the test images, for error messages."""

    section: str = "evaluate"
    source: str = "evaluate.source"
    unlabelled: str = ", or set data.labels=none to measure within evaluate.source alone"
    """Advice for error messages if the training images have other classes."""


OF_RUN = ImageKeys()


class Part(NamedTuple):
    """Labelled images of a source."""

    source: Source
    labels: Labels
    """A class number for each row of the source, ``(num_images,)``."""
    rows: Rows
    """The rows in use."""

    @property
    def row_labels(self) -> Labels:
        """The class numbers of the rows in use."""
        return self.labels[self.rows]

    def cut(self, most: int) -> "Part":
        """Return at most ``most`` of the rows, as a fixed random subset."""
        if len(self.rows) <= most:
            return self
        order = np.random.default_rng(_SUBSET_SEED).permutation(self.rows)
        return self._replace(rows=np.sort(order[:most]))


class Labelling(NamedTuple):
    """The chosen labelled images of a run; none is decoded yet."""

    train: Part | None
    """None if nothing can be measured; then ``test`` is None too."""
    test: Part | None
    class_names: list[str]
    """Class names by number, for both parts."""
    few_shot: bool
    """Whether there are enough labels for the few-shot probe."""
    within: bool
    """Whether both parts are images of ``evaluate.source``, none of them training images."""
    notes: tuple[str, ...]
    """What is skipped or used unexpectedly, one line each."""


class _Candidates(NamedTuple):
    """The two parts before they are cut and checked."""

    train: Part
    test: Part
    class_names: list[str]
    within: bool = False
    notes: tuple[str, ...] = ()


def choose_labelled(
    config: EvaluateConfig, data: DataConfig, source: Source, *, keys: ImageKeys = OF_RUN
) -> Labelling:
    """Choose the labelled images of a run, without decoding any.

    Args:
        config: The evaluation settings.
        data: The settings of the training data.
        source: All training images.
        keys: Names of the settings of the test images, for error messages.

    Raises:
        DataError: If a given test source has no labels, or shares only some of its classes with the
            training images, or if ``evaluate.final`` fine-tunes and there are no labels for it.
    """
    numbers = source.labels()
    labels = np.empty(0, np.int64) if numbers is None else numbers
    if config.source is not None:
        candidates = _test_on_source(config, data, source, labels, keys)
    elif _num_classes(labels) < _FEWEST_CLASSES:
        return _skip_measurement(config, _too_few_classes_note(source, labels))
    else:
        candidates = _test_on_split(data, source, labels)
    if candidates.within:
        _check_finetune(config, candidates.notes[0])
    train = candidates.train.cut(config.max_train_images)
    test = candidates.test.cut(config.max_test_images)
    if len(test.rows) == 0 or _num_classes(train.row_labels) < _FEWEST_CLASSES:
        return _skip_measurement(
            config,
            f"{train.source.name} has too few labels, so that no accuracy is measured: "
            f"{counted(len(train.rows), 'image')} would train the probes and {len(test.rows):,} "
            f"test them; at least two classes to train on and one test image are needed",
        )
    few_shot, note = _check_few_shot(config, train.row_labels, candidates.class_names)
    is_wanted = not few_shot and "few_shot" in config.final
    notes = (*candidates.notes, *_unseen_note(train, test), *([note] if is_wanted else []))
    return Labelling(train, test, candidates.class_names, few_shot, candidates.within, notes)


def open_labelled(
    config: EvaluateConfig, data: DataConfig, source: Source, *, size_px: int, num_threads: int
) -> LabelledSets | None:
    """Open the labelled images of a run; None if nothing can be measured on them.

    Args:
        config: The evaluation settings.
        data: The settings of the training data.
        source: All training images.
        size_px: Side of the encoder's input.
        num_threads: Number of decoding threads.

    Raises:
        DataError: If the labels do not fit the settings, as in :func:`choose_labelled`.
    """
    chosen = choose_labelled(config, data, source)
    return open_chosen(config, chosen, size_px=size_px, num_threads=num_threads)


def open_chosen(
    config: EvaluateConfig, chosen: Labelling, *, size_px: int, num_threads: int
) -> LabelledSets | None:
    """Open the labelled images that were chosen; None if there are none."""
    if chosen.train is None or chosen.test is None:
        return None
    train, test = (
        EvalImages(
            part.source,
            part.rows,
            part.row_labels,
            size_px=size_px,
            crop_fraction=config.crop_fraction,
            num_threads=num_threads,
        )
        for part in (chosen.train, chosen.test)
    )
    return LabelledSets(train, test, chosen.class_names, few_shot=chosen.few_shot)


def has_test_set(config: EvaluateConfig, data: DataConfig, source: Source) -> bool:
    """Return whether the test images are separate from the training images.

    Otherwise some training images are held out. Supervised training calls this function to decide
    which labels it may use, because it agrees with :func:`choose_labelled`.

    Args:
        config: The evaluation settings.
        data: The settings of the training data.
        source: All training images.
    """
    return config.source is not None or _held_out_split(data, source)[0] is not None


def _test_on_source(
    config: EvaluateConfig, data: DataConfig, source: Source, labels: Labels, keys: ImageKeys
) -> _Candidates:
    """Test on ``evaluate.source``; also train probes on it if the training images cannot."""
    images = config.test_images(data).called(keys.section, source=keys.source)
    where = images.named
    test = open_source(images, held_out=True, data=data)
    test_labels = test.labels()
    if test_labels is None or not (test_labels >= 0).any():
        raise DataError(f"{where}: no labels; {test.label_advice}")
    labelled = np.flatnonzero(test_labels >= 0)
    unknown, shared = _compare(test, test_labels, source)
    if shared and unknown and _num_classes(labels) >= _FEWEST_CLASSES:
        raise DataError(
            f"{where}: {_name_some(unknown)} not among the classes of {source.name}: "
            f"{_name_some(source.class_names)}. Classes are matched by name: give them the same "
            f"names, leave those images out ({keys.section}.filter){keys.unlabelled}"
        )
    if not unknown and _num_classes(labels) >= _FEWEST_CLASSES:
        train = Part(source, labels, np.flatnonzero(labels >= 0))
        numbers = _numbers_like(test, test_labels, source)
        return _Candidates(train, Part(test, numbers, labelled), source.class_names)
    classes = _num_classes(labels)
    why = ("no labels", "labels of one class only", "no labels of its classes")[min(classes, 2)]
    train_rows, test_rows = hold_out(labelled)
    note = (
        f"{source.name} has {why}, so that the probes are trained within {where}: "
        f"{len(train_rows):,} of its labelled images train them and {len(test_rows):,} test them"
    )
    parts = Part(test, test_labels, train_rows), Part(test, test_labels, test_rows)
    return _Candidates(*parts, test.class_names, within=True, notes=(note,))


def _test_on_split(data: DataConfig, source: Source, labels: Labels) -> _Candidates:
    """Test on another split of the source, or on a held-out fifth of the training images."""
    rows = np.flatnonzero(labels >= 0)
    test, note = _held_out_split(data, source)
    if test is None:
        train_rows, test_rows = hold_out(rows)
        parts = Part(source, labels, train_rows), Part(source, labels, test_rows)
        return _Candidates(*parts, source.class_names, notes=(note,) if note else ())
    test_labels = test.labels()
    assert test_labels is not None  # a split without labels is not used
    numbers = _numbers_like(test, test_labels, source)
    labelled = np.flatnonzero(numbers >= 0)
    parts = Part(source, labels, rows), Part(test, numbers, labelled)
    return _Candidates(*parts, source.class_names, notes=(note,) if note else ())


def _held_out_split(data: DataConfig, source: Source) -> tuple[Source | None, str]:
    """Open the test split if it has labels of the training images' classes.

    Returns:
        The split or None, and a note about an unused split.
    """
    name = _split_beside(data, source)
    if name is None:
        return None, ""
    test = open_source(data.model_copy(update={"limit": None}), split=name, data=data)
    labels = test.labels()
    instead = "a fifth of the labelled training images is held out to test the probes"
    if labels is None or not (labels >= 0).any():
        return None, f"{source.name}: the split {name} has no labels; {instead}"
    unknown, _ = _compare(test, labels, source)
    if unknown:
        return None, (
            f"{source.name}: {_name_some(unknown)} of the split {name} not among the classes of "
            f"the training images; {instead}"
        )
    if data.source in BUILT_IN:  # their test split is the standard choice
        return test, ""
    tested = counted(int((labels >= 0).sum()), "labelled image")
    return test, f"{source.name}: accuracy is measured on the split {name} ({tested})"


def _split_beside(data: DataConfig, source: Source) -> str | None:
    """Return the name of the split to test on; never the training split."""
    own_split = data.split
    if own_split is None:
        trained = source.splits[0] if len(source.splits) == 1 else TRAIN
    else:
        trained = own_split if own_split in source.splits else canonical(own_split) or own_split
    return next((n for n in HELD_OUT if n in source.splits and n != trained), None)


def _compare(test: Source, labels: Labels, train: Source) -> tuple[list[str], int]:
    """Return the test classes missing in the training images, and the number of shared classes.

    Only classes with images count: a source may have names without images.
    """
    names = [test.class_names[number] for number in np.unique(labels[labels >= 0]).tolist()]
    ours = set(train.class_names)
    unknown = [name for name in names if name not in ours]
    return unknown, len(names) - len(unknown)


def _numbers_like(test: Source, labels: Labels, train: Source) -> Labels:
    """Renumber the test images' labels by the training source's classes."""
    numbers = {name: number for number, name in enumerate(train.class_names)}
    # One more entry, so that -1 (no label) maps to -1.
    lookup = np.array([*(numbers.get(name, -1) for name in test.class_names), -1], dtype=np.int64)
    return lookup[np.maximum(labels, -1)]


def _check_few_shot(config: EvaluateConfig, labels: Labels, names: list[str]) -> tuple[bool, str]:
    """Return whether each class has enough labels for the few-shot probe, and a note if not."""
    numbers, counts = np.unique(labels, return_counts=True)
    wanted = config.few_shot.labels_per_class
    few = int((counts < wanted).sum())
    if not few:
        return True, ""
    fewest = int(counts.min())
    name = names[int(numbers[counts.argmin()])]
    return False, (
        f"{few:,} of {len(numbers):,} classes {'has' if few == 1 else 'have'} fewer labelled "
        f"images for the probes than {_FEW_SHOT}={wanted} ({name!r} has {fewest}): the few-shot "
        f"accuracy is left out; {_FEW_SHOT}={fewest} measures it"
    )


def _unseen_note(train: Part, test: Part) -> list[str]:
    missing = int((~np.isin(test.row_labels, np.unique(train.row_labels))).sum())
    if not missing:
        return []
    return [
        f"{missing:,} of {len(test.rows):,} test images are of classes without training images; "
        f"they count as wrong"
    ]


def _too_few_classes_note(source: Source, labels: Labels) -> str:
    what = "has no labels" if _num_classes(labels) == 0 else "has labels of one class only"
    return f"{source.name} {what}, so that no accuracy is measured; {source.label_advice}"


def _skip_measurement(config: EvaluateConfig, note: str) -> Labelling:
    _check_finetune(config, note)
    return Labelling(None, None, [], few_shot=False, within=False, notes=(note,))


def _check_finetune(config: EvaluateConfig, why: str) -> None:
    for name in config.trained:
        raise DataError(f"evaluate.{name}: {why}. Leave {name} out of evaluate.final")


def _num_classes(labels: Labels) -> int:
    return len(np.unique(labels[labels >= 0]))


def _name_some(names: list[str]) -> str:
    examples = ", ".join(repr(name) for name in names[:_SHOWN])
    return f"{examples}, ... ({len(names):,})" if len(names) > _SHOWN else examples

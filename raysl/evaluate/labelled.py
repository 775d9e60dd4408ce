"""Which labelled images train the probes of a run, and which test them.

No label decides whether a pretraining may start: what the labels do not reach for is left out, and
a note says so. Only what was asked for by name (``evaluate.source``, ``evaluate.finetune``) is
refused where it cannot be.
"""

import re
from typing import NamedTuple

import numpy as np

from raysl.errors import DataError, counted
from raysl.evaluate.features import EvalImages, Rows
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets
from raysl.sources.labels import hold_out
from raysl.sources.open import open_source
from raysl.sources.source import BUILT_IN, DataConfig, Labels, Source, SourceConfig
from raysl.sources.splits import HELD_OUT, TRAIN, canonical

_SUBSET_SEED = 0
_FEWEST_CLASSES = 2
_SHOWN = 5
# Keys of the data section where evaluate.source is opened, not paths.
_DATA = re.compile(rf"(?<![\w/.-])data(?=\.({'|'.join(SourceConfig.model_fields)})\b)")


class Part(NamedTuple):
    """Labelled images of a source."""

    source: Source
    labels: Labels
    """A class number for each row of the source, ``(num_images,)``."""
    rows: Rows
    """Those that are used."""

    @property
    def known(self) -> Labels:
        """The class numbers of the rows that are used."""
        return self.labels[self.rows]

    def cut(self, most: int) -> "Part":
        """Return at most so many of the rows, a random subset that is always the same."""
        if len(self.rows) <= most:
            return self
        order = np.random.default_rng(_SUBSET_SEED).permutation(self.rows)
        return self._replace(rows=np.sort(order[:most]))


class Labelling(NamedTuple):
    """The labelled images of a run; nothing of them is read yet."""

    train: Part | None
    """None where nothing can be measured; then ``test`` is too."""
    test: Part | None
    class_names: list[str]
    """By number, of both parts."""
    few_shot: bool
    """Whether the few-shot probe has labels enough."""
    within: bool
    """Whether both parts are images of ``evaluate.source``, and none are training images."""
    notes: tuple[str, ...]
    """What is left out or taken otherwise than one may think, a line each."""


class _Found(NamedTuple):
    """The two parts before they are cut and looked at."""

    train: Part
    test: Part
    class_names: list[str]
    within: bool = False
    notes: tuple[str, ...] = ()


def choose_labelled(config: EvaluateConfig, data: DataConfig, source: Source) -> Labelling:
    """Choose the labelled images of a run; nothing is decoded.

    Args:
        config: What to evaluate on.
        data: The training data's configuration.
        source: The training images, all of them.

    Raises:
        DataError: If a test source is given but has no labels, or some classes that the training
            images do not have besides others that they have, or if there are no labels to
            fine-tune with although ``evaluate.finetune`` asks for it.
    """
    numbers = source.labels()
    labels = np.empty(0, np.int64) if numbers is None else numbers
    if config.source is not None:
        found = _given(config, data, source, labels)
    elif _num_classes(labels) < _FEWEST_CLASSES:
        return _nothing(config, _too_few_classes(source, labels))
    else:
        found = _beside(data, source, labels)
    if found.within:
        _check_finetune(config, found.notes[0])
    train = found.train.cut(config.max_train_images)
    test = found.test.cut(config.max_test_images)
    if len(test.rows) == 0 or _num_classes(train.known) < _FEWEST_CLASSES:
        return _nothing(
            config,
            f"{train.source.name} has too few labels, so that no accuracy is measured: "
            f"{counted(len(train.rows), 'image')} would train the probes and {len(test.rows):,} "
            f"test them; two classes to train with and one image to test on are the least",
        )
    few_shot, note = _few_shot(config, train.known, found.class_names)
    asked = not few_shot and config.final == "full"
    notes = (*found.notes, *_unseen(train, test), *([note] if asked else []))
    return Labelling(train, test, found.class_names, few_shot, found.within, notes)


def open_labelled(
    config: EvaluateConfig, data: DataConfig, source: Source, *, size_px: int, num_threads: int
) -> LabelledSets | None:
    """Open the labelled images of a run, or return None if nothing can be measured on them.

    Args:
        config: What to evaluate on.
        data: The training data's configuration.
        source: The training images, all of them.
        size_px: Side of the encoder's input.
        num_threads: Threads that decode.

    Raises:
        DataError: As :func:`choose_labelled`.
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
            part.known,
            size_px=size_px,
            crop_fraction=config.crop_fraction,
            num_threads=num_threads,
        )
        for part in (chosen.train, chosen.test)
    )
    return LabelledSets(train, test, chosen.class_names, few_shot=chosen.few_shot)


def has_test_set(config: EvaluateConfig, data: DataConfig, source: Source) -> bool:
    """Whether test images lie apart from the training images, so that none need be held out.

    It says what :func:`choose_labelled` does: whoever trains on labels asks here which are free.

    Args:
        config: What to evaluate on.
        data: The training data's configuration.
        source: The training images, all of them.
    """
    return config.source is not None or _held_out_split(data, source)[0] is not None


def _given(config: EvaluateConfig, data: DataConfig, source: Source, labels: Labels) -> _Found:
    """Take ``evaluate.source`` for testing, or for both where the training images are no help."""
    where = f"evaluate.source={config.source}"
    try:
        test = open_source(config.test_images(data), held_out=True, data=data)
    except DataError as error:
        raise DataError(_DATA.sub("evaluate", str(error))) from None
    test_labels = test.labels()
    if test_labels is None or not (test_labels >= 0).any():
        raise DataError(f"{where}: no labels; {_DATA.sub('evaluate', test.label_advice)}")
    known = np.flatnonzero(test_labels >= 0)
    unknown, shared = _compare(test, test_labels, source)
    if shared and unknown and _num_classes(labels) >= _FEWEST_CLASSES:
        raise DataError(
            f"{where}: {_some(unknown)} not among the classes of {source.name}: "
            f"{_some(source.class_names)}. Evaluation goes by names: give the classes the same "
            f"names, leave those images out (evaluate.filter), or set data.labels=none to measure "
            f"within evaluate.source alone"
        )
    if not unknown and _num_classes(labels) >= _FEWEST_CLASSES:
        there = Part(source, labels, np.flatnonzero(labels >= 0))
        numbers = _numbers_like(test, test_labels, source)
        return _Found(there, Part(test, numbers, known), source.class_names)
    classes = _num_classes(labels)
    why = ("no labels", "labels of one class only", "no labels of its classes")[min(classes, 2)]
    train_rows, test_rows = hold_out(known)
    note = (
        f"{source.name} has {why}, so that the probes are trained within {where}: "
        f"{len(train_rows):,} of its labelled images train them and {len(test_rows):,} test them"
    )
    parts = Part(test, test_labels, train_rows), Part(test, test_labels, test_rows)
    return _Found(*parts, test.class_names, within=True, notes=(note,))


def _beside(data: DataConfig, source: Source, labels: Labels) -> _Found:
    """Take a split that lies beside the training images for testing, or hold a fifth out."""
    rows = np.flatnonzero(labels >= 0)
    test, note = _held_out_split(data, source)
    if test is None:
        train_rows, test_rows = hold_out(rows)
        parts = Part(source, labels, train_rows), Part(source, labels, test_rows)
        return _Found(*parts, source.class_names, notes=(note,) if note else ())
    test_labels = test.labels()
    assert test_labels is not None  # a split without is not taken
    numbers = _numbers_like(test, test_labels, source)
    known = np.flatnonzero(numbers >= 0)
    parts = Part(source, labels, rows), Part(test, numbers, known)
    return _Found(*parts, source.class_names, notes=(note,) if note else ())


def _held_out_split(data: DataConfig, source: Source) -> tuple[Source | None, str]:
    """Open the split that tests, if there is one with labels of the training images' classes.

    Returns:
        The split or None, and a note of one that lies there.
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
            f"{source.name}: {_some(unknown)} of the split {name} not among the classes of the "
            f"training images; {instead}"
        )
    if data.source in BUILT_IN:  # whose test split everybody tests on
        return test, ""
    tested = counted(int((labels >= 0).sum()), "labelled image")
    return test, f"{source.name}: accuracy is measured on the split {name} ({tested})"


def _split_beside(data: DataConfig, source: Source) -> str | None:
    """Return the name of the split that tests: never the one that is trained on."""
    asked = data.split
    if asked is None:
        trained = source.splits[0] if len(source.splits) == 1 else TRAIN
    else:
        trained = asked if asked in source.splits else canonical(asked) or asked
    return next((n for n in HELD_OUT if n in source.splits and n != trained), None)


def _compare(test: Source, labels: Labels, train: Source) -> tuple[list[str], int]:
    """Return the classes of test images that the training images do not have, and how many both.

    Classes count that occur: a source may have names that none of its images bears.
    """
    names = [test.class_names[number] for number in np.unique(labels[labels >= 0]).tolist()]
    ours = set(train.class_names)
    unknown = [name for name in names if name not in ours]
    return unknown, len(names) - len(unknown)


def _numbers_like(test: Source, labels: Labels, train: Source) -> Labels:
    """Return the test images' labels as the training source numbers its classes."""
    numbers = {name: number for number, name in enumerate(train.class_names)}
    # One place more: -1, an image without a label, stays what it is.
    places = np.array([*(numbers.get(name, -1) for name in test.class_names), -1], dtype=np.int64)
    return places[np.maximum(labels, -1)]


def _few_shot(config: EvaluateConfig, labels: Labels, names: list[str]) -> tuple[bool, str]:
    """Return whether each class has the labels of the few-shot probe, and what to say if not."""
    numbers, counts = np.unique(labels, return_counts=True)
    wanted = config.few_shot_labels
    few = int((counts < wanted).sum())
    if not few:
        return True, ""
    fewest = int(counts.min())
    name = names[int(numbers[counts.argmin()])]
    return False, (
        f"{few:,} of {len(numbers):,} classes {'has' if few == 1 else 'have'} fewer labelled "
        f"images for the probes than evaluate.few_shot_labels={wanted} ({name!r} has {fewest}): "
        f"the few-shot accuracy is left out; evaluate.few_shot_labels={fewest} measures it"
    )


def _unseen(train: Part, test: Part) -> list[str]:
    missing = int((~np.isin(test.known, np.unique(train.known))).sum())
    if not missing:
        return []
    return [
        f"{missing:,} of {len(test.rows):,} test images are of classes of which no image trains "
        f"the probes; they count as wrong"
    ]


def _too_few_classes(source: Source, labels: Labels) -> str:
    of = "has no labels" if _num_classes(labels) == 0 else "has labels of one class only"
    return f"{source.name} {of}, so that no accuracy is measured; {source.label_advice}"


def _nothing(config: EvaluateConfig, note: str) -> Labelling:
    _check_finetune(config, note)
    return Labelling(None, None, [], few_shot=False, within=False, notes=(note,))


def _check_finetune(config: EvaluateConfig, why: str) -> None:
    if config.finetune is not None:
        raise DataError(f"evaluate.finetune: {why}. Set evaluate.finetune=null to train without it")


def _num_classes(labels: Labels) -> int:
    return len(np.unique(labels[labels >= 0]))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return f"{shown}, ... ({len(names):,})" if len(names) > _SHOWN else shown

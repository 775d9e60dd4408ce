"""Measure how well label-free measures rank encoders by accuracy."""

import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raysl.config.base import Config
from raysl.encoder.file import load_encoder, read_description
from raysl.errors import ConfigError, DataError
from raysl.evaluate.features import EvalImages, embed
from raysl.evaluate.label_free import label_free, positive_pairs
from raysl.evaluate.labelled import open_labelled
from raysl.evaluate.probes import measure_lbfgs
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets, knn_top1, probe_sets
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.run.build import build_method
from raysl.run.places import read_run
from raysl.run.recipe import training_set
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig
from raysl.track.run_folder import RunFolder, checkpoint_path, list_checkpoints
from raysl.train.batches import input_converter
from raysl.train.checkpoint import load_checkpoint

UNTRAINED = "untrained"
"""Stands for the method of an encoder with random weights."""

DIRECTIONS = {
    "rankme": "higher is better",
    "alpha_req": "better near 1",
    "alignment": "lower is better",
    "uniformity": "lower is better",
    "feature_std": "higher is better",
    "knn_top1": "needs labels",
}
"""What is correlated with linear accuracy, and which way it should go."""

_RESAMPLES = 2000
_FEWEST = 5
_NOT_SHAPE = ("weights", "batch_norm", "batch_norm_splits")  # of a backbone's section


class StudyConfig(Config):
    """The labelled images of the study; RUN's own settings of data do not count."""

    data: DataConfig
    """Labelled images: they train the linear classifier, and what needs no labels sees them too."""
    evaluate: EvaluateConfig
    """Test images, most images of both, settings of the protocols."""


DEFAULTS = {"evaluate": {"max_train_images": 5000, "max_test_images": 2000}}


class Subject(NamedTuple):
    """One encoder of the study."""

    name: str
    method: str
    encoder: Backbone
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size_px: int
    backbone: str
    """Its section of the configuration, as JSON, less what does not shape it: encoders are compared
    within one as well."""


class EncoderScores(NamedTuple):
    """The scores of one encoder, with labels and without."""

    name: str
    method: str
    backbone: str
    measures: Mapping[str, float]
    """By the names of :data:`DIRECTIONS`; what could not be computed is missing."""
    linear_top1: float
    seconds: float


class Correlation(NamedTuple):
    """How a measure goes with linear accuracy over encoders."""

    measure: str
    num_encoders: int
    spearman: float
    """Of ranks, signed so that 1 is what the measure promises."""
    spearman_interval: tuple[float, float]
    """95 % by resampling encoders."""
    pearson: float
    pearson_interval: tuple[float, float]


def find_subjects(paths: Sequence[Path], *, checkpoints: bool) -> list[tuple[str, Path]]:
    """Return what is to be measured: name and encoder file, or folder of a checkpoint.

    Args:
        paths: Run folders, encoder files, or ``RUN/checkpoints/step-N``.
        checkpoints: Of a run folder take every checkpoint that it kept, not its encoder.

    Raises:
        ConfigError: If there is nothing to measure under a path, or one is given twice.
    """
    found: list[Path] = []
    for path in paths:
        folder = RunFolder(path)
        if path.parent.name == "checkpoints" and path.is_dir():
            found.append(path)
        elif checkpoints and list_checkpoints(folder.checkpoints):
            steps = list_checkpoints(folder.checkpoints)
            found += [checkpoint_path(folder.checkpoints, step) for step in steps]
        elif path.is_file() or folder.encoder.is_file():
            found.append(path if path.is_file() else folder.encoder)
        else:
            raise ConfigError(f"{path}: neither a run folder with an encoder nor an encoder file")
    twice = sorted({str(path) for path in found if found.count(path) > 1})
    if twice:
        raise ConfigError(f"given twice: {', '.join(twice)}")
    names = [_short_name(path) for path in found]
    return [
        (name if names.count(name) == 1 else f"{_run_of(path).parent.name}/{name}", path)
        for name, path in zip(names, found, strict=True)
    ]


def _run_of(path: Path) -> Path:
    path = path.absolute()
    return path.parents[1] if path.parent.name == "checkpoints" else path.parent


def _short_name(path: Path) -> str:
    if path.parent.name == "checkpoints":
        return f"{_run_of(path).name}@{int(path.name.partition('-')[2])}"
    return _run_of(path).name if path.name == "encoder.safetensors" else path.stem


def open_subject(name: str, path: Path) -> Subject:
    """Load an encoder from its file, or from a checkpoint with the configuration of its run.

    Raises:
        DataError: If it is no encoder of raysl, or does not say how its input is normalised.
        ConfigError: If the run's configuration is not one of this version.
    """
    if path.parent.name == "checkpoints":
        return _from_checkpoint(name, path)
    description = read_description(path)
    missing = [key for key in ("mean", "std", "image_size_px") if key not in description]
    if missing:
        raise DataError(f"{path}: its header lacks {', '.join(missing)}")
    encoder = load_encoder(path)
    assert isinstance(encoder, Backbone)
    red, green, blue = description["mean"]
    red_std, green_std, blue_std = description["std"]
    return Subject(
        name,
        str(description.get("method", "unknown")),
        encoder,
        (red, green, blue),
        (red_std, green_std, blue_std),
        description["image_size_px"],
        _shape_of(description.get("backbone", {})),
    )


def _from_checkpoint(name: str, path: Path) -> Subject:
    folder = RunFolder(_run_of(path))
    config = read_run(folder)
    source = open_source(config.data, data=config.data)
    method = build_method(config, training_set(config, source), device=torch.device("cpu"))
    step = int(path.name.partition("-")[2])
    state = load_checkpoint(folder.checkpoints, step=step, device=torch.device("cpu"))
    method.load_state_dict(state["method"])
    return Subject(
        name,
        config.method.name,
        method.encoder.eval(),
        config.data.mean,
        config.data.std,
        config.image_size_px,
        _shape_of(config.backbone.model_dump(mode="json")),
    )


def _shape_of(section: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in section.items() if key not in _NOT_SHAPE}
    return json.dumps(kept, sort_keys=True)


def untrained_like(subject: Subject, *, seed: int) -> Subject:
    """Return the same encoder with random weights."""
    config = BackboneConfig.model_validate(json.loads(subject.backbone))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_backbone(config, image_size_px=subject.size_px)
    shape = f", {config.stem} stem, width {config.width:g}" if config.family == "resnet" else ""
    name = f"{UNTRAINED} {config.name}{shape}, norm {config.norm}, seed {seed}"
    return subject._replace(name=name, method=UNTRAINED, encoder=encoder.eval())


class Study:
    """The images of a study, opened once for each size that encoders take.

    Args:
        config: Which images, and the settings of the protocols.
        num_threads: Threads that decode.
    """

    def __init__(self, config: StudyConfig, *, num_threads: int) -> None:
        self.config = config
        self.num_threads = num_threads
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.source = open_source(config.data, data=config.data)
        self._sets: dict[int, LabelledSets] = {}

    def sets(self, size_px: int) -> LabelledSets:
        """Return the images at a size.

        Raises:
            DataError: If they have no labels.
        """
        if size_px not in self._sets:
            found = open_labelled(
                self.config.evaluate,
                self.config.data,
                self.source,
                size_px=size_px,
                num_threads=self.num_threads,
            )
            if found is None:
                raise DataError(f"{self.source.name}: no labels to rank the encoders by")
            self._sets[size_px] = found
        return self._sets[size_px]

    def measure(self, subject: Subject) -> EncoderScores:
        """Measure an encoder: without labels on the training images, with them on the test images.

        RankMe's authors, too, take images of the set that the encoder was trained on.
        """
        began = time.monotonic()
        sets = self.sets(subject.size_px)
        encoder = subject.encoder.to(self.device)
        to_input = input_converter(
            device=self.device, mean=subject.mean, std=subject.std, channels_last=False
        )

        def features_of(images: EvalImages) -> torch.Tensor:
            return embed(encoder, images, to_input=to_input)

        train, test = features_of(sets.train), features_of(sets.test)
        if not (train.isfinite().all() and test.isfinite().all()):
            raise DataError(f"{subject.name}: its features are not all finite")
        pairs = positive_pairs(encoder, sets.train, to_input=to_input)
        lbfgs, arrays = self.config.evaluate.linear_lbfgs, probe_sets(sets, train, test)
        accuracy = measure_lbfgs(lbfgs, arrays, seed=0, device="cpu").top1
        knn = knn_top1(self.config.evaluate, sets, train, test)
        measures = label_free(train, pairs) | {"knn_top1": knn}
        seconds = time.monotonic() - began
        return EncoderScores(
            subject.name, subject.method, subject.backbone, measures, accuracy, seconds
        )


def correlations(measured: Sequence[EncoderScores], *, seed: int = 0) -> list[Correlation]:
    """Return how each measure goes with linear accuracy.

    Signed by what the measure promises: of ``alignment``, ``uniformity`` and the distance of
    ``alpha_req`` from 1, less is better.

    Args:
        measured: Encoders; those without a measure do not count for it, and a measure that fewer
            than five have is left out.
        seed: Of the resampling.
    """
    found = []
    for measure in DIRECTIONS:
        rows = [each for each in measured if measure in each.measures]
        if len(rows) < _FEWEST:
            continue
        x = np.array([promise(measure, each.measures[measure]) for each in rows])
        y = np.array([each.linear_top1 for each in rows])
        drawn = np.random.default_rng(seed).integers(len(rows), size=(_RESAMPLES, len(rows)))
        ranked = [pearson(ranks(x[each]), ranks(y[each])) for each in drawn]
        plain = [pearson(x[each], y[each]) for each in drawn]
        found.append(
            Correlation(
                measure,
                len(rows),
                pearson(ranks(x), ranks(y)),
                _interval(ranked),
                pearson(x, y),
                _interval(plain),
            )
        )
    return found


def promise(measure: str, value: float) -> float:
    """Return a measure so that more of it promises more accuracy."""
    if measure == "alpha_req":
        return -abs(value - 1)
    return -value if measure in ("alignment", "uniformity") else value


def groups_of(measured: Sequence[EncoderScores]) -> dict[str, list[EncoderScores]]:
    """Return the encoders to correlate over: all, the trained, and methods with five or more.

    Across architectures ranks and alignments need not mean the same: the trained ones are those of
    the backbone that most of them have.
    """
    trained = [each for each in measured if each.method != UNTRAINED]
    backbones = [each.backbone for each in trained]
    usual = max(backbones, key=backbones.count, default="")
    like = [each for each in trained if each.backbone == usual]
    groups = {"all": list(measured), "trained, one backbone": like}
    for method in sorted({each.method for each in like}):
        groups[method] = [each for each in like if each.method == method]
    return {name: rows for name, rows in groups.items() if len(rows) >= _FEWEST}


def pearson(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Return the correlation of two vectors; nan if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length > 0 else float("nan")


def ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[places]


def _interval(values: Iterable[float]) -> tuple[float, float]:
    with warnings.catch_warnings():  # of a measure that all encoders have alike: nan
        warnings.filterwarnings("ignore", message="All-NaN slice")
        low, high = np.nanquantile(np.fromiter(values, dtype=np.float64), (0.025, 0.975))
    return float(low), float(high)


def markdown_table(groups: Mapping[str, Sequence[Correlation]]) -> str:
    """Return correlations as a Markdown table, a line a measure and a column a group."""
    heads = [f"{name} ({rows[0].num_encoders})" for name, rows in groups.items() if rows]
    lines = [
        "| measure | promise | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for measure, direction in DIRECTIONS.items():
        cells = []
        for rows in groups.values():
            row = next((each for each in rows if each.measure == measure), None)
            cells.append("-" if row is None else interval_text(row))
        lines.append(f"| {measure} | {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval_text(row: Correlation) -> str:
    """Return Spearman's correlation with its interval."""
    low, high = row.spearman_interval
    return f"{row.spearman:+.2f} [{low:+.2f}, {high:+.2f}]"

"""Run an evaluation: compute features once, then measure each protocol and seed.

A *unit* is one seed of a protocol (:class:`raysl.evaluate.registry.ProtocolRun`). Features and
results of units are stored as soon as they exist, so that the same command resumes after a crash.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raysl.downstream.evaluation_config import EncoderOrigin, EvaluationConfig
from raysl.downstream.evaluation_folder import EvaluationFolder
from raysl.downstream.evaluation_label_free import measure_label_free
from raysl.downstream.evaluation_record import (
    EvaluationResult,
    ProtocolResult,
    read_evaluation_result,
    write_evaluation_result,
)
from raysl.downstream.evaluation_sets import EvaluationSets
from raysl.errors import DataError
from raysl.evaluate.embedding import EmbeddingSpec, encoder_digest
from raysl.evaluate.probes import ProbeResult, ProbeSets
from raysl.evaluate.registry import PROTOCOLS, ProtocolRun, key_of, measure_unit, units_of
from raysl.sources.source import digest

Embedder = Callable[..., tuple[npt.NDArray[np.float32], dict[int, str]]]
"""``(source, rows, spec, *, advance)`` -> features ``(M, D)``, and reasons of bad images by row."""


class FinishedUnit(NamedTuple):
    """A measured unit."""

    unit: ProtocolRun
    result: ProbeResult
    seconds: float
    """Wall time."""


UnitRunner = Callable[[Sequence[ProtocolRun], ProbeSets], Iterable[FinishedUnit]]
"""Measures units on features; yields them in any order."""

UnitTrainer = Callable[[ProtocolRun], ProbeResult]
"""Trains the whole network of a unit and returns its result."""


class EvaluationRequest(NamedTuple):
    """What to evaluate, and where to store it."""

    config: EvaluationConfig
    protocols: tuple[str, ...]
    """Names in the registry; empty computes only the measures that need no labels."""
    origin: EncoderOrigin
    sets: EvaluationSets
    folder: EvaluationFolder


class EvaluationBackend(NamedTuple):
    """The functions that do the work, in this process or on a cluster."""

    embed: Embedder
    run_units: UnitRunner
    train_unit: UnitTrainer
    advance: Callable[[int], None]
    """Called with the number of images embedded since the last call."""
    say: Callable[[str], None]


def evaluate(request: EvaluationRequest, backend: EvaluationBackend) -> EvaluationResult:
    """Evaluate an encoder, or resume its evaluation; return the content of ``evaluation.json``.

    Raises:
        RunFolderError: If the folder contains an evaluation of another encoder or other images.
        RayslError: If a protocol fails.
    """
    arrays, feature_info = _features(request, backend)
    _write_record(request, feature_info)
    probe_sets = ProbeSets(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
    )
    units = [unit for name in request.protocols for unit in units_of(request.config, name)]
    missing = [unit for unit in units if request.folder.read_unit(key_of(unit)) is None]
    if len(missing) < len(units):
        backend.say(f"{len(units) - len(missing)} of {len(units)} measurements are already done")
    on_features = [unit for unit in missing if PROTOCOLS[unit.protocol].measure is not None]
    for unit, result, seconds in backend.run_units(on_features, probe_sets) if on_features else ():
        _store_result(request, unit, result, seconds, backend.say)
        _write_record(request, feature_info)
    for unit in missing:
        if PROTOCOLS[unit.protocol].measure is None:
            began = time.monotonic()
            result = backend.train_unit(unit)
            _store_result(request, unit, result, time.monotonic() - began, backend.say)
            _write_record(request, feature_info)
    record = _write_record(request, feature_info)
    request.folder.write_predictions(dict(_predictions(request)))
    return record


def run_here(units: Sequence[ProtocolRun], probe_sets: ProbeSets) -> Iterator[FinishedUnit]:
    """Measure units one after the other in this process, on its GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for unit in units:
        yield FinishedUnit(unit, *measure_unit(unit, probe_sets, device=device))


def _features(
    request: EvaluationRequest, backend: EvaluationBackend
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the arrays of ``evaluation.npz`` and the facts about them; compute missing ones.

    Raises:
        DataError: If features are not finite.
    """
    folder, sets = request.folder, request.sets
    identity = _identity(request)
    feature_info = folder.claim(identity)
    arrays = None if feature_info is None else folder.read_arrays()
    if feature_info is not None and arrays is not None:
        backend.say(
            f"the features of {len(sets.train) + len(sets.test):,} images are already computed"
        )
        return arrays, feature_info
    features = request.config.features
    spec = EmbeddingSpec(
        str(request.origin.encoder), sets.train.size_px, features.crop_fraction, features.precision
    )
    arrays, num_bad = {}, 0
    began = time.monotonic()
    for name, images in (("train", sets.train), ("test", sets.test)):
        embedded, bad_images = backend.embed(
            images.source, images.rows, spec, advance=backend.advance
        )
        num_bad += len(bad_images)
        if not np.isfinite(embedded).all():
            raise DataError(
                f"{request.origin.place}: returns features that are not finite; it has diverged, "
                f"or features.precision={features.precision} is too narrow for it"
            )
        arrays |= {
            f"{name}_features": embedded,
            f"{name}_labels": images.labels,
            f"{name}_rows": images.rows,
        }
    seconds = time.monotonic() - began
    total = len(sets.train) + len(sets.test)
    feature_info = {
        "identity": identity,
        "seconds": seconds,
        "images_per_s": total / seconds,
        "train": len(sets.train),
        "test": len(sets.test),
        "width": int(arrays["test_features"].shape[1]),
        "bad_images": num_bad,
        "label_free": measure_label_free(request.origin, arrays["test_features"], sets.test),
    }
    folder.write_features(arrays, feature_info)
    return arrays, feature_info


def _identity(request: EvaluationRequest) -> dict[str, Any]:
    sets, features = request.sets, request.config.features
    return {
        "encoder": encoder_digest(request.origin.encoder),
        "train": _images_digest(sets.train),
        "test": _images_digest(sets.test),
        "size_px": sets.train.size_px,
        "crop_fraction": features.crop_fraction,
        "precision": features.precision,
    }


def _images_digest(images: Any) -> str:
    parts = (np.ascontiguousarray(x, dtype=np.int64).data for x in (images.rows, images.labels))
    return digest(images.source.fingerprint, *(bytes(part) for part in parts))


def _store_result(
    request: EvaluationRequest,
    unit: ProtocolRun,
    result: ProbeResult,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    values = {"top1": result.top1, "seconds": seconds, "facts": result.facts}
    request.folder.write_unit(key_of(unit), values, result.predictions)
    seed = "" if unit.seed is None else f" seed {unit.seed}"
    say(f"{unit.protocol}{seed}: {result.top1:.2%} in {seconds:.1f} s")


def _write_record(request: EvaluationRequest, feature_info: Mapping[str, Any]) -> EvaluationResult:
    """Write the results so far, with those of earlier commands on the same features."""
    sets = request.sets
    earlier = _earlier_protocols(request)
    record: EvaluationResult = {
        "encoder": request.origin.place,
        "source": request.config.data.source,
        "test_source": sets.test.source.name,
        "protocols": earlier | dict(_protocols(request)),
        "label_free": feature_info["label_free"],
        "features": {
            "seconds": feature_info["seconds"],
            "images_per_s": feature_info["images_per_s"],
            "train": feature_info["train"],
            "test": feature_info["test"],
            "width": feature_info["width"],
        },
        "classes": sets.class_names,
        "bad_images": feature_info["bad_images"],
    }
    write_evaluation_result(request.folder.record, record)
    return record


def _earlier_protocols(request: EvaluationRequest) -> dict[str, ProtocolResult]:
    """Return the recorded results, without those of other versions of a protocol."""
    return {
        name: values
        for name, values in _read_protocols(request.folder).items()
        if name not in PROTOCOLS or values.get("version") == PROTOCOLS[name].version
    }


def _read_protocols(folder: EvaluationFolder) -> dict[str, ProtocolResult]:
    record = read_evaluation_result(folder.record)
    return {} if record is None else record.get("protocols") or {}


def _protocols(request: EvaluationRequest) -> Iterator[tuple[str, ProtocolResult]]:
    """Yield the result of each protocol whose seeds are all measured."""
    images = len(request.sets.train) + len(request.sets.test)
    for name in request.protocols:
        units = units_of(request.config, name)
        stored = [request.folder.read_unit(key_of(unit)) for unit in units]
        results = [each.values for each in stored if each is not None]
        if len(results) == len(units):
            yield name, _protocol_result(request.config, units, results, images=images)


def _protocol_result(
    config: EvaluationConfig,
    units: Sequence[ProtocolRun],
    results: Sequence[Mapping[str, Any]],
    *,
    images: int,
) -> ProtocolResult:
    protocol = PROTOCOLS[units[0].protocol]
    settings = getattr(config, protocol.name)
    values = [each["top1"] for each in results]
    seconds = sum(each["seconds"] for each in results)
    return {
        "version": protocol.version,
        "text": protocol.text(settings),
        "mean": float(np.mean(values)),
        # Standard deviation of the population of seeds, as for few_shot_top1_std of a run.
        "deviation": float(np.std(values)),
        "values": values,
        "seeds": [unit.seed for unit in units if unit.seed is not None],
        "seconds": seconds,
        "images_per_s": images * len(results) / seconds if seconds > 0 else 0.0,
        "settings": settings.model_dump(mode="json"),
        "facts": [each["facts"] for each in results],
    }


def _predictions(request: EvaluationRequest) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield the predictions of the first seed of every protocol in the record."""
    for name, values in _read_protocols(request.folder).items():
        if name not in PROTOCOLS:
            continue
        seed = next(iter(values["seeds"]), None)
        stored = request.folder.read_unit(key_of(ProtocolRun(name, values["settings"], seed)))
        if stored is not None and stored.predictions is not None:
            yield name, stored.predictions

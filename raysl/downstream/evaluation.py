"""Run an evaluation: compute features once, then measure each protocol and seed.

Whatever is done is on the disk when it is done, so that the same command goes on after a crash.
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

Embed = Callable[..., tuple[npt.NDArray[np.float32], dict[int, str]]]
"""``(source, rows, embedding, *, advance)`` -> features ``(M, D)`` and the bad rows' reasons."""


Finished = tuple[ProtocolRun, ProbeResult, float]
"""A protocol run, its result, and its wall time in seconds."""

RunUnits = Callable[[Sequence[ProtocolRun], ProbeSets], Iterable[Finished]]
"""Measures units on features, in any order."""

TrainUnit = Callable[[ProtocolRun], ProbeResult]
"""Measures a unit that trains the whole network."""


class EvaluationRequest(NamedTuple):
    """What to evaluate, and where to store it."""

    config: EvaluationConfig
    protocols: tuple[str, ...]
    """Names in the registry; empty measures without labels alone."""
    origin: EncoderOrigin
    sets: EvaluationSets
    folder: EvaluationFolder


class EvaluationBackend(NamedTuple):
    """The functions that do the work, in this process or on a cluster."""

    embed: Embed
    run_units: RunUnits
    train_unit: TrainUnit
    advance: Callable[[int], None]
    """Called with the number of images embedded since the last call."""
    say: Callable[[str], None]


def evaluate(request: EvaluationRequest, backend: EvaluationBackend) -> EvaluationResult:
    """Evaluate an encoder, or go on with it, and return the record: ``evaluation.json``.

    Raises:
        RunFolderError: If the folder holds an evaluation of something else.
        RayslError: What the protocols raise.
    """
    arrays, about = _features(request, backend)
    _write_record(request, about)
    probes = ProbeSets(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
    )
    units = [unit for name in request.protocols for unit in units_of(request.config, name)]
    missing = [unit for unit in units if request.folder.read_unit(key_of(unit)) is None]
    if len(missing) < len(units):
        backend.say(f"{len(units) - len(missing)} of {len(units)} measurements are there already")
    on_features = [unit for unit in missing if PROTOCOLS[unit.protocol].measure is not None]
    for unit, measured, seconds in backend.run_units(on_features, probes) if on_features else ():
        _keep(request, unit, measured, seconds, backend.say)
        _write_record(request, about)
    for unit in missing:
        if PROTOCOLS[unit.protocol].measure is None:
            began = time.monotonic()
            measured = backend.train_unit(unit)
            _keep(request, unit, measured, time.monotonic() - began, backend.say)
            _write_record(request, about)
    record = _write_record(request, about)
    request.folder.write_predictions(dict(_predictions(request)))
    return record


def run_here(units: Sequence[ProtocolRun], sets: ProbeSets) -> Iterator[Finished]:
    """Measure units one after the other in this process, on its GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for unit in units:
        yield (unit, *measure_unit(unit, sets, device=device))


def _features(
    request: EvaluationRequest, backend: EvaluationBackend
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the arrays of ``evaluation.npz``, computed unless they are there, and what they are.

    Raises:
        DataError: If features are not finite.
    """
    folder, sets = request.folder, request.sets
    identity = _identity(request)
    about = folder.claim(identity)
    arrays = None if about is None else folder.read_arrays()
    if about is not None and arrays is not None:
        backend.say(
            f"the features of {len(sets.train) + len(sets.test):,} images are there already"
        )
        return arrays, about
    features = request.config.features
    embedding = EmbeddingSpec(
        str(request.origin.encoder), sets.train.size_px, features.crop_fraction, features.precision
    )
    arrays, bad = {}, 0
    began = time.monotonic()
    for name, images in (("train", sets.train), ("test", sets.test)):
        found, broken = backend.embed(
            images.source, images.rows, embedding, advance=backend.advance
        )
        bad += len(broken)
        if not np.isfinite(found).all():
            raise DataError(
                f"{request.origin.encoder}: gives features that are not finite; it has diverged, "
                f"or features.precision={features.precision} is too narrow for it"
            )
        arrays |= {
            f"{name}_features": found,
            f"{name}_labels": images.labels,
            f"{name}_rows": images.rows,
        }
    seconds = time.monotonic() - began
    total = len(sets.train) + len(sets.test)
    about = {
        "identity": identity,
        "seconds": seconds,
        "images_per_s": total / seconds,
        "train": len(sets.train),
        "test": len(sets.test),
        "width": int(arrays["test_features"].shape[1]),
        "bad_images": bad,
        "label_free": measure_label_free(request.origin, arrays["test_features"], sets.test),
    }
    folder.write_features(arrays, about)
    return arrays, about


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


def _keep(
    request: EvaluationRequest,
    unit: ProtocolRun,
    measured: ProbeResult,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    values = {"top1": measured.top1, "seconds": seconds, "facts": measured.facts}
    request.folder.write_unit(key_of(unit), values, measured.predictions)
    seed = "" if unit.seed is None else f" seed {unit.seed}"
    say(f"{unit.protocol}{seed}: {measured.top1:.2%} in {seconds:.1f} s")


def _write_record(request: EvaluationRequest, about: Mapping[str, Any]) -> EvaluationResult:
    """Write what is known by now, with what earlier commands measured on the same features."""
    sets = request.sets
    before = _kept_protocols(request)
    record: EvaluationResult = {
        "encoder": str(request.origin.encoder),
        "source": request.config.data.source,
        "test_source": sets.test.source.name,
        "protocols": before | dict(_protocols(request)),
        "label_free": about["label_free"],
        "features": {
            "seconds": about["seconds"],
            "images_per_s": about["images_per_s"],
            "train": about["train"],
            "test": about["test"],
            "width": about["width"],
        },
        "classes": sets.class_names,
        "bad_images": about["bad_images"],
    }
    write_evaluation_result(request.folder.record, record)
    return record


def _kept_protocols(request: EvaluationRequest) -> dict[str, ProtocolResult]:
    from_before = _read_protocols(request.folder)
    return {
        name: values
        for name, values in from_before.items()
        if name not in PROTOCOLS or values.get("version") == PROTOCOLS[name].version
    }


def _read_protocols(folder: EvaluationFolder) -> dict[str, ProtocolResult]:
    record = read_evaluation_result(folder.record)
    return {} if record is None else record.get("protocols") or {}


def _protocols(request: EvaluationRequest) -> Iterator[tuple[str, ProtocolResult]]:
    """Yield each protocol that all seeds of are done."""
    images = len(request.sets.train) + len(request.sets.test)
    for name in request.protocols:
        units = units_of(request.config, name)
        kept = [request.folder.read_unit(key_of(unit)) for unit in units]
        done = [each[0] for each in kept if each is not None]
        if len(done) == len(units):
            yield name, _summary(request.config, units, done, images=images)


def _summary(
    config: EvaluationConfig,
    units: Sequence[ProtocolRun],
    done: Sequence[Mapping[str, Any]],
    *,
    images: int,
) -> ProtocolResult:
    protocol = PROTOCOLS[units[0].protocol]
    settings = getattr(config, protocol.name)
    values = [each["top1"] for each in done]
    seconds = sum(each["seconds"] for each in done)
    return {
        "version": protocol.version,
        "text": protocol.text(settings),
        "mean": float(np.mean(values)),
        # Of the seeds themselves, as few_shot_top1_std of a run is.
        "deviation": float(np.std(values)),
        "values": values,
        "seeds": [unit.seed for unit in units if unit.seed is not None],
        "seconds": seconds,
        "images_per_s": images * len(done) / seconds if seconds > 0 else 0.0,
        "settings": settings.model_dump(mode="json"),
        "facts": [each["facts"] for each in done],
    }


def _predictions(request: EvaluationRequest) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield the predictions of the first seed of every protocol in the record."""
    for name, values in _read_protocols(request.folder).items():
        if name not in PROTOCOLS:
            continue
        seed = next(iter(values["seeds"]), None)
        kept = request.folder.read_unit(key_of(ProtocolRun(name, values["settings"], seed)))
        if kept is not None and kept[1] is not None:
            yield name, kept[1]

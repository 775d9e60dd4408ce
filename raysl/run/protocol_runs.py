"""Run the protocols of ``evaluate.final`` that train the network, as runs below a run's folder.

Each seed of a protocol is a run of method ``supervised``, as ``raysl finetune`` makes it, in
``protocols`` of the run's folder. It starts when the workers of the pretraining have ended, on the
same cluster. An interrupted run resumes from its last checkpoint.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError, DivergedError
from raysl.evaluate.embedding import encoder_digest
from raysl.evaluate.protocol import mean_and_std, protocol_texts
from raysl.evaluate.registry import ProtocolRun, key_of, settings_of, units_of
from raysl.evaluate.training_source import seen_part
from raysl.folder.whole import read_json, write_bytes, write_json, write_text
from raysl.methods import load_method
from raysl.report.terminal import say
from raysl.run.from_run import finetune_from, origin_of
from raysl.run.held import place_of
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.stored import opened_below, restore_checkpoint
from raysl.sources.source import LabelsConfig, Source
from raysl.sources.subset import whole_source
from raysl.store.reading import local_copy
from raysl.track.results import Results, accuracies_of
from raysl.track.run_folder import PROTOCOLS, MetricsFile, RunFolder
from raysl.train.checkpoint import set_damaged_aside

TrainFunction = Callable[[RunConfig[Any], RunFolder, Source], Results]
"""Trains or resumes a run in its folder, and returns its results."""

_FEWEST_LABELS = 2


def protocols_to_train(config: RunConfig[Any]) -> tuple[str, ...]:
    """Return the protocols that train a copy of the network after a run; empty for a classifier."""
    return () if config.method.classifies else config.evaluate.trained


def train_protocols(
    config: RunConfig[Any],
    results: Results,
    *,
    folder: RunFolder,
    source: Source,
    train: TrainFunction,
    trains_here: bool,
) -> Results:
    """Run the training protocols of ``evaluate.final``, and write the results of the whole run.

    If there are none, nothing is written: the run's worker has already written the results.

    Args:
        config: The configuration of the pretraining.
        results: The results of the pretraining's worker.
        folder: The pretraining's run folder, which contains the encoder.
        source: The training images of the pretraining.
        train: Trains each run.
        trains_here: Whether it does in this process.

    Returns:
        The results with ``PROTOCOL_top1`` and ``PROTOCOL_labels``, the number of labels used.

    Raises:
        DivergedError: If a loss is not finite.
    """
    names = protocols_to_train(config)
    if not names:
        return results
    measured: dict[str, Any] = {}
    for name in names:
        seed_results = [
            _train_seed(
                config, unit, folder=folder, source=source, train=train, trains_here=trains_here
            )
            for unit in units_of(config.evaluate, name)
        ]
        measured |= mean_and_std(name, [each["top1"] for each in seed_results])
        measured[f"{name}_labels"] = seed_results[0]["num_labels"]
    texts = results.get("protocols", {}) | protocol_texts(config.evaluate, names)
    results = Results(**{**results, **measured, "protocols": texts})  # type: ignore[typeddict-item]
    metrics = MetricsFile(folder.metrics, start_step=results["steps"])
    accuracies = accuracies_of(Results(**measured))  # type: ignore[typeddict-item]
    metrics.log({f"final/{key}": value for key, value in accuracies.items()}, step=results["steps"])
    metrics.close()
    folder.write_results(results)
    return results


def check_protocol_runs(config: RunConfig[Any], source: Source) -> None:
    """Check before a run that its training protocols can run after it.

    Raises:
        ConfigError: If their settings are not valid, or leave too few labels.
    """
    place = place_of(config.output_dir, config.name, Path())
    for name in protocols_to_train(config):
        first, *_ = units_of(config.evaluate, name)
        protocol_run(config, first, place=place, source=source)


def protocol_run(
    config: RunConfig[Any], unit: ProtocolRun, *, place: Path | str, source: Source
) -> RunConfig[Any]:
    """Return the run that is one seed of a protocol.

    Args:
        config: The pretraining's configuration.
        unit: The protocol, its settings and seed.
        place: Path or address of the pretraining's run folder.
        source: The training images of the pretraining.

    Raises:
        ConfigError: If the settings are not valid, or leave too few labels.
    """
    settings, where = settings_of(unit), f"evaluate.{unit.protocol}"
    whole = whole_source(source)
    labelled = config.data.model_copy(update={"labels": LabelsConfig(only=True)})
    supervised = load_method("supervised").Config(name="supervised")
    num_images = int(seen_part(whole, labelled, config.evaluate, supervised).group_sizes.sum())
    if round(settings.label_fraction * num_images) < _FEWEST_LABELS:
        raise ConfigError(
            f"{where}.label_fraction={settings.label_fraction:g}: leaves fewer than "
            f"{_FEWEST_LABELS} of {num_images:,} labels; raise it"
        )
    values = {
        "name": key_of(unit).replace("@", "."),
        "output_dir": f"{place}/{PROTOCOLS}",
        "evaluate.every": None,
        "track.mlflow": False,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    overrides += settings.overrides(
        is_vit=config.backbone.is_vit,
        size_px=config.image_size_px,
        num_images=num_images,
        batch_multiple=config.cluster.batch_multiple,
        seed=unit.seed,
    )
    origin = origin_of(config, place)
    return run_from_values(finetune_from(origin, overrides, whole=whole), where=where)


def train_in(
    folder: RunFolder,
    config: RunConfig[Any],
    open_images: Callable[[], Source],
    train: TrainFunction,
) -> Results:
    """Train or resume a run in its folder; return the stored results of a finished run.

    Args:
        folder: The folder, which this process has opened.
        config: The run's configuration.
        open_images: Opens the training images.
        train: Trains the run.
    """
    results = folder.read_results()
    if results is not None:
        return results
    restore_checkpoint(folder)
    write_text(folder.config, to_yaml(config.model_dump(mode="json")))
    for line in set_damaged_aside(folder.checkpoints):
        say(line)
    return train(config, folder, open_images())


def _train_seed(
    config: RunConfig[Any],
    unit: ProtocolRun,
    *,
    folder: RunFolder,
    source: Source,
    train: TrainFunction,
    trains_here: bool,
) -> Results:
    run = protocol_run(config, unit, place=folder.shown(), source=source)
    path = folder.protocols / run.name
    encoder = {"encoder": encoder_digest(local_copy(folder.shown(folder.encoder)))}

    def is_stale(old: RunFolder) -> bool:
        """Return whether a run began with other settings or encoder, as before ``--extend``."""
        values = run.model_dump(mode="json")
        stored = read_mapping(old.config) if old.config.exists() else values
        is_same = _fixed_values(stored) == _fixed_values(values)
        return read_json(_claim(old)) != encoder or not is_same

    def open_images() -> Source:
        return seen_part(whole_source(source), run.data, run.evaluate, run.method)

    with opened_below(folder, path, trains_here=trains_here, is_stale=is_stale) as run_folder:
        say(f"training {run.name}: {run_folder.shown()}")
        write_json(_claim(run_folder), encoder)
        try:
            results = train_in(run_folder, run, open_images, train)
        except DivergedError as error:
            lower = f"lower {'vit_' * run.backbone.is_vit}base_lr of evaluate.{unit.protocol}"
            raise DivergedError(f"evaluate.{unit.protocol}: {error}; {lower}") from None
        keep_labels(run_folder, path)
    return results


def keep_labels(folder: RunFolder, path: Path) -> None:
    """Copy the list of labels of a run in a store to ``path``, from where MLflow gets it."""
    if folder.path != path and folder.labels.exists():  # of a run in a store
        write_bytes(path / folder.labels.name, folder.labels.read_bytes())


def _claim(folder: RunFolder) -> Path:
    """Return the file that names the encoder from which the run of a protocol started."""
    return folder.path / "encoder.json"


def _fixed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("cluster", "track")}

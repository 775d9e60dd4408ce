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
from raysl.folder.claim import set_aside
from raysl.folder.whole import read_json, write_json, write_text
from raysl.methods import load_method
from raysl.report.terminal import say
from raysl.run.from_run import finetune_from, origin_of
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sources.source import LabelsConfig, Source
from raysl.sources.subset import whole_source
from raysl.track.results import Results, accuracies_of
from raysl.track.run_folder import MetricsFile, RunFolder
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
) -> Results:
    """Run the training protocols of ``evaluate.final``, and write the results of the whole run.

    If there are none, nothing is written: the run's worker has already written the results.

    Args:
        config: The configuration of the pretraining.
        results: The results of the pretraining's worker.
        folder: The pretraining's run folder, which contains the encoder.
        source: The training images of the pretraining.
        train: Trains each run.

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
            _train_seed(config, unit, folder=folder, source=source, train=train)
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
    folder = RunFolder(Path(config.output_dir) / config.name)
    for name in protocols_to_train(config):
        first, *_ = units_of(config.evaluate, name)
        protocol_run(config, first, folder=folder, source=source)


def protocol_run(
    config: RunConfig[Any], unit: ProtocolRun, *, folder: RunFolder, source: Source
) -> RunConfig[Any]:
    """Return the run that is one seed of a protocol.

    Args:
        config: The pretraining's configuration.
        unit: The protocol, its settings and seed.
        folder: The pretraining's run folder.
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
        "output_dir": str(folder.protocols),
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
    origin = origin_of(config, folder.path)
    return run_from_values(finetune_from(origin, overrides, whole=whole), where=where)


def train_in(
    folder: RunFolder,
    config: RunConfig[Any],
    open_images: Callable[[], Source],
    train: TrainFunction,
) -> Results:
    """Train or resume a run in its folder; return the stored results of a finished run."""
    with folder.locked():
        write_text(folder.config, to_yaml(config.model_dump(mode="json")))
        for line in set_damaged_aside(folder.checkpoints):
            say(line)
        results = folder.read_results()
        return train(config, folder, open_images()) if results is None else results


def _train_seed(
    config: RunConfig[Any],
    unit: ProtocolRun,
    *,
    folder: RunFolder,
    source: Source,
    train: TrainFunction,
) -> Results:
    run = protocol_run(config, unit, folder=folder, source=source)
    run_folder = RunFolder(folder.protocols / run.name)
    _set_stale_run_aside(run_folder, run, encoder=encoder_digest(folder.encoder))
    say(f"training {run.name}: {run_folder.path}")

    def open_images() -> Source:
        return seen_part(whole_source(source), run.data, run.evaluate, run.method)

    try:
        return train_in(run_folder, run, open_images, train)
    except DivergedError as error:
        lower = f"lower {'vit_' * run.backbone.is_vit}base_lr of evaluate.{unit.protocol}"
        raise DivergedError(f"evaluate.{unit.protocol}: {error}; {lower}") from None


def _set_stale_run_aside(folder: RunFolder, config: RunConfig[Any], *, encoder: str) -> None:
    """Set aside a run that began with other settings or another encoder, as before ``--extend``."""
    claim = folder.path / "encoder.json"
    wanted = {"encoder": encoder}
    values = config.model_dump(mode="json")
    stored = read_mapping(folder.config) if folder.config.exists() else values
    if folder.path.exists() and (
        read_json(claim) != wanted or _fixed_values(stored) != _fixed_values(values)
    ):
        say(f"the earlier {folder.path.name} is now in {set_aside(folder)}")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(claim, wanted)


def _fixed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("cluster", "track")}

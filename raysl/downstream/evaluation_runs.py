"""Train the whole network for the protocols that need it, as runs below the evaluation's folder."""

import json
from typing import Any

from raysl.downstream.evaluation import EvaluationRequest
from raysl.downstream.evaluation_config import images_of
from raysl.downstream.evaluation_sets import evaluate_config
from raysl.encoder.file import read_description
from raysl.evaluate.probes import ProbeResult
from raysl.evaluate.registry import ProtocolRun, key_of, settings_of
from raysl.evaluate.training_source import open_training_source
from raysl.nn.backbones import BackboneConfig
from raysl.run.from_run import finetune_values
from raysl.run.protocol_runs import TrainFunction, keep_labels, train_in
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.stored import named_after, opened_below
from raysl.sources.source import Source


def train_unit(
    request: EvaluationRequest, unit: ProtocolRun, *, train: TrainFunction
) -> ProbeResult:
    """Train or resume the network of a unit, and return the accuracy after its last step.

    ``labels.json`` in the folder of its run lists the rows used with labels.
    """
    config = run_of(request, unit)
    path = request.folder.runs / key_of(unit)

    def open_images() -> Source:
        return open_training_source(config.data, config.evaluate, config.method)

    here = not config.cluster.uses_ray
    with opened_below(request.folder, path, trains_here=here) as folder:
        results = train_in(folder, config, open_images, train)
        keep_labels(folder, path)
    facts = {"num_labels": results["num_labels"], "run": request.folder.shown(path)}
    return ProbeResult(float(results["top1"]), None, facts)


def run_of(request: EvaluationRequest, unit: ProtocolRun) -> RunConfig[Any]:
    """Return the configuration of the run that trains a unit.

    Raises:
        ConfigError: If the settings do not fit the encoder, such as too many head layers.
    """
    config, data, origin = request.config, request.config.data, request.origin
    backbone = BackboneConfig.model_validate(read_description(origin.encoder)["backbone"])
    tested = evaluate_config(data, crop_fraction=config.features.crop_fraction)
    evaluate = tested.model_dump(mode="json") | {"every": None, "pixel_baseline": False}
    values = {
        "name": key_of(unit).replace("@", "."),
        "output_dir": request.folder.shown(request.folder.runs),
        "evaluate": evaluate,
        "cluster": config.cluster.model_dump(mode="json"),
        "track": {"mlflow": False},
    }
    values |= {f"data.{key}": value for key, value in images_of(data).items()}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    overrides += settings_of(unit).overrides(
        is_vit=backbone.is_vit,
        size_px=request.sets.train.size_px,
        num_images=len(request.sets.train),
        batch_multiple=config.cluster.batch_multiple,
        seed=unit.seed,
    )
    with named_after(origin.address or origin.start, origin.start) as names:
        values = names(finetune_values(origin.start, overrides))
    return run_from_values(values, where=unit.protocol)

"""Report an evaluation as a table, as JSON and to MLflow."""

import re
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from raysl.downstream.evaluation import EvaluationRequest
from raysl.downstream.evaluation_folder import EvaluationFolder
from raysl.downstream.evaluation_record import EvaluationResult
from raysl.evaluate.registry import PROTOCOLS
from raysl.run.environment import git_state
from raysl.run.tracking import print_problem
from raysl.sources.source import digest
from raysl.track.mlflow_record import (
    TrackedEvaluation,
    read_tracked_evaluation,
    read_tracked_run,
    run_key,
    write_tracked_evaluation,
)
from raysl.track.run_folder import RunFolder
from raysl.track.uri import tracking_uri, without_password

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._ -]+")


def evaluation_table(record: EvaluationResult) -> Table:
    """Return the table of protocols."""
    features = record["features"]
    table = Table(
        title=escape(f"Accuracy on {features['test']:,} test images of {record['test_source']}")
    )
    table.add_column("protocol")
    table.add_column("accuracy", justify="right")
    table.add_column("runs", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("images/s", justify="right")
    for name, values in record["protocols"].items():
        protocol = PROTOCOLS.get(name)
        title = (
            f"{protocol.title}  " if protocol is not None else f"transfer to {values['source']}  "
        )
        spread = f" +- {100 * values['deviation']:.2f}" if len(values["values"]) > 1 else ""
        table.add_row(
            escape(title + values["text"]),
            f"{values['mean']:.2%}{spread}",
            str(len(values["values"])) if values["seeds"] else "1, deterministic",
            f"{values['seconds']:,.1f}",
            f"{values['images_per_s']:,.0f}",
        )
    table.caption = (
        f"features of {features['train']:,} training and {features['test']:,} test images: "
        f"{features['seconds']:,.1f} s, {features['images_per_s']:,.0f} images/s; accuracy: mean "
        f"and standard deviation over seeds"
    )
    return table


def json_of(record: EvaluationResult) -> dict[str, Any]:
    """Return the result of each protocol by name; without protocols, the label-free measures."""
    if record["protocols"]:
        return dict(record["protocols"])
    return {"label_free": record["label_free"]}


def metrics_of(record: EvaluationResult) -> dict[str, float]:
    """Return the metrics for MLflow, named ``evaluate/SOURCE/PROTOCOL``."""
    place = f"evaluate/{_mlflow_name(record['source'])}"
    metrics = {}
    for name, values in record["protocols"].items():
        at = f"{place}/{name}"
        if name not in PROTOCOLS:
            at = f"evaluate/{_mlflow_name(values['source'])}/{name}"
        metrics[at] = values["mean"]
        metrics[f"{at}_deviation"] = values["deviation"]
    return metrics | {f"{place}/{name}": value for name, value in record["label_free"].items()}


def send(request: EvaluationRequest, record: EvaluationResult, *, home: Path) -> None:
    """Send an evaluation to the MLflow run that trained the encoder; print a failure."""
    track, folder = request.config.track, request.folder
    if not track.mlflow:
        return
    run = request.origin.run
    trained_in = None if run is None else read_tracked_run(RunFolder(run).mlflow)
    sent = read_tracked_evaluation(folder.mlflow)
    run_uri = trained_in and trained_in.whole_uri
    uri = tracking_uri(track.tracking_uri if run_uri is None else run_uri, folder=home)
    tracked = trained_in or sent
    metrics = metrics_of(record)
    what = digest(repr(sorted(metrics.items())), without_password(uri))
    if sent is not None and sent.what == what:
        return
    # MLflow takes seconds to load.
    from raysl.track.mlflow_evaluation import EvaluationRecord, send_evaluation  # noqa: PLC0415
    from raysl.track.mlflow_problem import problem_of  # noqa: PLC0415

    texts = {f"evaluate.{name}": v["text"] for name, v in record["protocols"].items()}
    try:
        run_id = send_evaluation(
            EvaluationRecord(
                metrics=metrics,
                tags=texts | {f"evaluate.{key}": value for key, value in git_state().items()},
                artifacts=_artifacts(folder),
                root=folder.path,
                place=f"evaluations/{folder.path.name}",
            ),
            uri=uri,
            run_id=None if tracked is None else tracked.run_id,
            experiment=track.experiment,
            run_name=f"{str(request.origin.folder).rpartition('/')[2]}-evaluation",
            key=run_key(folder.mlflow),
        )
    except Exception as error:  # a store may raise anything, and the numbers are on the disk
        trouble = problem_of(error, uri=uri, experiment=track.experiment)
        print_problem(trouble, uri, ended=True)
        return
    write_tracked_evaluation(folder.mlflow, TrackedEvaluation(run_id, without_password(uri), what))


def _artifacts(folder: EvaluationFolder) -> list[Path]:
    """Return the small files; features stay in the folder."""
    labels = sorted(folder.runs.glob("*/labels.json"))
    return [folder.record, folder.report, *sorted(folder.pictures.glob("*.png")), *labels]


def _mlflow_name(source: str) -> str:
    return _NOT_IN_A_NAME.sub("-", source.rstrip("/").rpartition("/")[2]).strip("-") or "images"

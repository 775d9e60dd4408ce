"""Start and end the MLflow tracking of a run, and report its problems."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysl.encoder.file import load_encoder, read_description
from raysl.report.terminal import say
from raysl.run.environment import packages
from raysl.track.config import TrackConfig
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder
from raysl.track.uri import without_password

if TYPE_CHECKING:  # MLflow takes seconds to load, and not every run needs it
    from raysl.track.mlflow_problem import MlflowProblem
    from raysl.track.mlflow_tracker import MlflowTracker

# Creating a new store takes about 6 s on two busy cores; no start waits longer than this.
_FIRST_ANSWER_S = 15.0


def load_mlflow(uri: str) -> threading.Thread:
    """Import MLflow and open its store in a thread, which takes seconds, while Ray starts."""

    def load() -> None:
        from raysl.track.mlflow_tracker import warm_up  # noqa: PLC0415 - imports mlflow

        warm_up(uri)

    thread = threading.Thread(target=load, name="raysl-load-mlflow", daemon=True)
    thread.start()
    return thread


def start_tracker(
    folder: RunFolder,
    track: TrackConfig,
    *,
    uri: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    patience_s: float = _FIRST_ANSWER_S,
    tell: Callable[[str], None] | None = say,
) -> "MlflowTracker":
    """Start sending a run to MLflow; warn if MLflow does not accept it.

    Args:
        folder: The run folder.
        track: The run's section ``track``.
        uri: MLflow tracking URI.
        run_name: Name of the run in MLflow.
        params: The settings, flattened to dotted names.
        tags: Tags of the run in MLflow.
        patience_s: Seconds to wait for MLflow's first answer.
        tell: Takes the warning; None if only :func:`end_tracker` warns, as the run has ended.

    Returns:
        The started tracker.
    """
    from raysl.track.mlflow_tracker import MlflowTracker  # noqa: PLC0415 - mlflow takes seconds

    tracker = MlflowTracker(
        folder, uri=uri, experiment=track.experiment, run_name=run_name, params=params, tags=tags
    )
    tracker.start()
    tracker.wait_for_run(patience_s)
    if tell is not None:
        print_problem(tracker.trouble, uri, ended=False, tell=tell)
    return tracker


def print_problem(
    trouble: "MlflowProblem | None", uri: str, *, ended: bool, tell: Callable[[str], None] = say
) -> None:
    """Print why MLflow does not accept records, when they are sent again, and the remedy, if any.

    Args:
        trouble: The problem; None prints nothing.
        uri: MLflow tracking URI.
        ended: Whether the run has ended; otherwise it continues untracked.
        tell: Prints the message.
    """
    if trouble is None:
        return
    text, cure = trouble
    if ended:
        what = f"MLflow did not accept everything: {text}. Nothing is lost: "
        then = "the same command sends the rest"
    else:
        what = f"MLflow ({without_password(uri)}) accepts nothing: {text}. Work continues: "
        then = "records are stored, and sent when MLflow accepts them or by the same command"
    tell(f"  {what}{then}" if cure is None else f"  {what}{then}. What to do: {cure}")


def end_tracker(
    tracker: "MlflowTracker | None",
    folder: RunFolder,
    track: TrackConfig,
    *,
    artifacts: Sequence[Path],
) -> Results:
    """Send the rest of a finished run, its files and its encoder.

    Args:
        tracker: The run's tracker; None if the run is not tracked.
        folder: The run folder.
        track: The run's section ``track``.
        artifacts: Files to send; missing ones are skipped.

    Returns:
        The entries of ``results.json`` about MLflow.
    """
    if tracker is None:
        return {"mlflow_run_id": None}
    say(f"sending the rest to MLflow ({without_password(tracker.uri)})")
    tracker.finish(
        status="FINISHED", artifacts=list(artifacts), log_model=_model_logger(folder, track)
    )
    print_problem(tracker.trouble, tracker.uri, ended=True)
    return {"mlflow_run_id": tracker.run_id, "mlflow_problem": tracker.problem}


def run_artifacts(folder: RunFolder) -> list[Path]:
    """Return the files of a run that are sent to MLflow; some of them may not exist."""
    return [
        folder.config,
        folder.source,
        folder.extensions,
        folder.metrics,
        folder.results,
        folder.report,
        folder.encoder,
        folder.bad_images,
        folder.labels,
        *sorted(folder.protocols.glob("*/labels.json"))[:1],
        folder.projection_head,
        folder.classifier,
        *sorted(folder.pictures.glob("*.png")),
    ]


def _model_logger(
    folder: RunFolder, track: TrackConfig
) -> "Callable[[MlflowTracker], None] | None":
    if not track.log_model:
        return None

    def log(tracker: "MlflowTracker") -> None:
        from raysl.track.mlflow_model import log_encoder  # noqa: PLC0415 - imports mlflow

        description = read_description(folder.encoder)
        log_encoder(
            load_encoder(folder.encoder),
            uri=tracker.uri,
            run_id=tracker.run_id,
            size_px=description["image_size_px"],
            embed_dim=description["embed_dim"],
            packages=packages("torch", "torchvision"),
            registered_as=track.registered_model,
        )

    return log

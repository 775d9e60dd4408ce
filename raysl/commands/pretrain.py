"""`raysl pretrain`: open the run folder, start the workers, follow them, report."""

import argparse
import importlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from raysl.commands.record import flat, packages, tags_of
from raysl.commands.terminal import ProgressView, accuracy_table, console, print_json, say
from raysl.config.load import read_mapping, to_yaml
from raysl.encoder import load_encoder, read_description
from raysl.errors import DataError, RunFolderError
from raysl.jobs.local import pretrain_here
from raysl.jobs.online import read_failures
from raysl.nn.backbones import check_model_name
from raysl.recipe import (
    Derived,
    RunConfig,
    TrackConfig,
    derive_for,
    differences,
    load_run,
    size_defaults,
)
from raysl.runtime.cluster import connect, describe_cluster, disconnect, plan_layout
from raysl.runtime.ray_train import pretrain_on_ray
from raysl.sources.open import open_source
from raysl.sources.source import BUILT_IN, Source
from raysl.track.follow import Follower, MetricsReader, Record
from raysl.track.run_folder import (
    RunFolder,
    latest_step,
    list_waiting,
    read_metrics,
    write_atomically,
    write_json,
)
from raysl.track.uri import tracking_uri, without_password

_PROGRESS_EVERY_S = 0.5
# Below this folder Ray unpacks the working directory of a job, and deletes it afterwards.
_JOB_FOLDER = "/runtime_resources/"


class Opened(NamedTuple):
    """A run that is ready to start."""

    config: RunConfig[Any]
    folder: RunFolder
    source: Source
    derived: Derived
    home: Path  # what relative paths are relative to
    config_file: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run's folder is renamed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, or go on with, the run that the configuration names."""
    config = load_run(arguments.config, arguments.overrides)
    home = working_folder()
    config = with_absolute_weights(config, home)
    folder = RunFolder(home / Path(config.output_dir).expanduser() / config.name)
    if arguments.fresh and folder.path.exists():
        _set_aside(folder)
    with folder.locked():
        _claim(folder, config)
        check_model_name(config.backbone)
        source = open_source(config.data, data=config.data)
        derived = derive_for(config, source)
        opened = Opened(config, folder, source, derived, home, arguments.config)
        results = folder.read_results()
        if results is None or "run_dir" not in results:
            results = _train(opened)
        else:
            say(f"{folder.path}: this run is finished; --fresh starts it anew, name=... another")
            results = _send_again(opened, results)
    _say_results(opened, results)
    if arguments.json:
        print_json(results)
    return 0


def working_folder() -> Path:
    """Return the folder that runs and mlflow.db go to: the current one, or a lasting one in a job.

    The working directory of a Ray job is a copy that Ray deletes, so a job's results go to
    ``RAYSL_HOME``, else to ``~/raysl`` of the node the job runs on.
    """
    if "RAYSL_HOME" in os.environ:
        return Path(os.environ["RAYSL_HOME"]).expanduser().absolute()
    current = Path.cwd()
    return Path.home() / "raysl" if _JOB_FOLDER in f"{current}/" else current


def with_absolute_weights(config: RunConfig[Any], home: Path) -> RunConfig[Any]:
    """Return the run with ``backbone.weights`` as an absolute path: workers have other folders.

    A relative one is looked for in the current folder, then where runs are.

    Raises:
        DataError: If there is no such file or folder.
    """
    given = config.backbone.weights
    if given is None:
        return config
    places = [folder / Path(given).expanduser() for folder in (Path.cwd(), home)]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise DataError(
            f"backbone.weights={given}: no such file or folder (looked for "
            f"{' and '.join(dict.fromkeys(map(str, places)))}); give a run folder or a file of "
            f"weights"
        )
    backbone = config.backbone.model_copy(update={"weights": str(found)})
    return config.model_copy(update={"backbone": backbone})


def _set_aside(folder: RunFolder) -> None:
    with folder.locked():
        aside = folder.path.with_name(f"{folder.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.path.rename(aside)
    say(f"the earlier run is now in {aside}")


def _claim(folder: RunFolder, config: RunConfig[Any]) -> None:
    """Write the configuration into a new folder; in an old one, refuse another configuration."""
    values = config.model_dump(mode="json")
    if folder.config.exists():
        changed = differences(read_mapping(folder.config), values)
        if changed:
            raise RunFolderError(
                f"{folder.path} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive this run another name=..., or --fresh to set the old one aside"
            )
    write_atomically(folder.config, to_yaml(values))


def _train(opened: Opened) -> dict[str, Any]:
    config, folder, derived = opened.config, opened.folder, opened.derived
    done = latest_step(folder.checkpoints)
    _say_start(opened, done)
    began_at = time.time()
    if config.track.mlflow:  # while Ray starts
        threading.Thread(target=_load_mlflow, name="raysl-load-mlflow", daemon=True).start()
    with ExitStack() as stack:
        start: Callable[[], dict[str, Any]] = lambda: pretrain_here(  # noqa: E731
            config, folder=folder, source=opened.source
        )
        facts: dict[str, str] = {}
        if config.cluster.num_train_workers > 0:
            if connect():
                stack.callback(disconnect)
            layout = plan_layout(config)
            facts = describe_cluster()
            say(
                f"  {layout.num_train_workers} train worker(s) on "
                f"{'GPU' if layout.use_gpu else f'CPU ({layout.threads_per_train_worker} threads)'}"
                f", {layout.num_data_workers} data worker(s), {layout.num_nodes} node(s)"
            )
            start = lambda: pretrain_on_ray(  # noqa: E731
                config, folder=folder, source=opened.source, layout=layout
            )
        tracker = _start_tracker(opened, facts)
        progress = ProgressView(total_steps=derived.total_steps, done=done)
        reader = MetricsReader(folder.metrics, dict.fromkeys((), done))
        try:
            with Follower(reader, _showing(progress, folder), every_s=_PROGRESS_EVERY_S):
                results = start()
        except BaseException as error:
            progress.close()
            if tracker is not None:
                killed = isinstance(error, KeyboardInterrupt)
                tracker.finish(
                    status="KILLED" if killed else "FAILED", artifacts=[], log_model=None
                )
            raise
        progress.close()
    return _finish(opened, results, tracker, began_at)


def _showing(progress: ProgressView, folder: RunFolder) -> Callable[[list[Record]], None]:
    return lambda records: progress.update(
        records, num_evaluations=len(list_waiting(folder.to_evaluate))
    )


def _by_size(opened: Opened) -> dict[str, float]:
    found = size_defaults(opened.config, opened.source)
    return {name: default.value for name, default in found.items()}


def _load_mlflow() -> Any:
    """Return raysl's MLflow module; loading it takes seconds that a start need not wait for."""
    return importlib.import_module("raysl.track.mlflow_tracker")


def _start_tracker(opened: Opened, facts: dict[str, str]) -> Any:
    track = opened.config.track
    if not track.mlflow:
        return None
    tracker = _load_mlflow().MlflowTracker(
        opened.folder,
        uri=tracking_uri(track.tracking_uri, folder=opened.home),
        experiment=track.experiment,
        run_name=opened.config.name,
        params=flat(opened.config.model_dump(mode="json"))
        | flat({"derived": opened.derived._asdict() | _by_size(opened)}),
        tags=tags_of(opened.config, opened.source, facts),
    )
    tracker.start()
    return tracker


def _finish(
    opened: Opened, results: dict[str, Any], tracker: Any, began_at: float
) -> dict[str, Any]:
    """Draw the report, end the MLflow run, and write the results with all that is known now."""
    folder = opened.folder
    records = read_metrics(folder.metrics)
    results = {"run_dir": str(folder.path), **results, **_speed(records, began_at)}
    write_json(folder.results, {k: v for k, v in results.items() if k != "run_dir"})
    say("drawing the report")
    report = importlib.import_module("raysl.report.page")  # late: matplotlib takes a second
    for picture, problem in report.draw_all(
        folder, source=opened.source, config=opened.config, derived=opened.derived
    ):
        say(f"  {picture} could not be drawn: {problem}")
    results |= _end_tracking(opened, tracker)
    write_json(folder.results, results)
    return results


def _end_tracking(opened: Opened, tracker: Any) -> dict[str, Any]:
    if tracker is None:
        return {"mlflow_run_id": None}
    folder = opened.folder
    artifacts = [folder.config, folder.metrics, folder.results, folder.report, folder.encoder]
    artifacts += [folder.bad_images, folder.finetune_labels]
    artifacts += sorted(folder.pictures.glob("*.png"))
    say(f"sending the rest to MLflow ({without_password(tracker.uri)})")
    tracker.finish(
        status="FINISHED",
        artifacts=artifacts,
        log_model=_model_logger(folder, opened.config.track),
    )
    if tracker.problem is not None:
        say(
            f"  MLflow did not take everything: {tracker.problem}. Nothing is lost: the same "
            f"command sends the rest"
        )
    return {"mlflow_run_id": tracker.run_id, "mlflow_problem": tracker.problem}


def _model_logger(folder: RunFolder, track: TrackConfig) -> Callable[[Any], None] | None:
    if not track.log_model:
        return None

    def log(tracker: Any) -> None:
        description = read_description(folder.encoder)
        _load_mlflow().log_encoder(
            tracker,
            load_encoder(folder.encoder),
            size_px=description["image_size_px"],
            embed_dim=description["embed_dim"],
            packages=packages("torch", "torchvision"),
            registered_as=track.registered_model,
        )

    return log


def _send_again(opened: Opened, results: dict[str, Any]) -> dict[str, Any]:
    """Send to MLflow what it could not take when the run ended."""
    if results.get("mlflow_problem") is None:
        return results
    tracker = _start_tracker(opened, {})
    results = results | _end_tracking(opened, tracker)
    write_json(opened.folder.results, results)
    return results


def _speed(records: list[dict[str, Any]], began_at: float) -> dict[str, float]:
    """Return images a second and the share of waiting from the first to the last step."""
    timed = [r for r in records if r.get("time/train_s")]
    seconds = sum(r["time/train_s"] for r in timed)
    images = sum(r["train/images_per_s"] * r["time/train_s"] for r in timed)
    waited = sum(r["data/wait_share"] * r["time/train_s"] for r in timed)
    firsts = [r["time/first_step_at"] for r in records if "time/first_step_at" in r]
    started = psutil.Process().create_time()
    recent = [first - started for first in firsts if first >= began_at]
    return {
        "images_per_s": images / seconds if seconds else 0.0,
        "data_wait": waited / seconds if seconds else 0.0,
        **({"seconds_to_first_step": recent[0]} if recent else {}),
        "seconds": time.time() - started,
    }


def _say_start(opened: Opened, done: int) -> None:
    config, derived = opened.config, opened.derived
    what = f"goes on after step {done}" if done else "starts"
    say(
        f"{config.name} {what}: {config.method.name}, {config.backbone.name}, "
        f"{derived.num_images:,} images from {opened.source.name}, {derived.total_steps} steps of "
        f"{config.train.global_batch_size} images\n  {opened.folder.path}"
    )
    for name, default in size_defaults(config, opened.source).items():
        say(f"  {name}: {default.formula}")


def _say_results(opened: Opened, results: dict[str, Any]) -> None:
    folder, config = opened.folder, opened.config
    out = console()
    if "linear_top1" in results:
        out.print(accuracy_table(results))
    elif "knn_top1" in results:  # evaluate.final=knn
        out.print(f"accuracy  {results['knn_top1']:.1%} by nearest neighbours of frozen features")
    if results.get("num_bad_images"):
        say(f"{results['num_bad_images']:,} bad images, listed in {folder.bad_images}")
    failures = read_failures(folder)
    if failures:
        say(
            f"{len(failures)} evaluation(s) on the way failed or were left out, listed in "
            f"{folder.failed_evaluations}; the last one: step {failures[-1]['step']}: "
            f"{failures[-1]['problem']}"
        )
    lines = [
        f"encoder   {folder.encoder}",
        f"report    {folder.report}",
        f"metrics   {folder.metrics}",
    ]
    if config.track.mlflow:
        uri = without_password(tracking_uri(config.track.tracking_uri, folder=opened.home))
        lines.append(f"compare   mlflow ui --backend-store-uri {uri}")
    lines.append(f"next      {_next_command(opened)}")
    out.print("\n".join(lines), markup=False)


def _next_command(opened: Opened) -> str:
    """Return the line that trains on images of one's own, or, if these are, on more of them."""
    photos = opened.config_file.with_name("simclr_resnet18_photos.yaml")
    if opened.config.data.source in BUILT_IN and photos.exists():
        return f"raysl pretrain {photos} data.source=FOLDER_OF_IMAGES name=mine"
    train = opened.config.train
    twice = 2 * (train.steps or train.epochs or 1)
    longer = f"{'steps' if train.steps else 'epochs'}={twice:g}"
    return f"raysl pretrain {opened.config_file} name=longer train.{longer}"

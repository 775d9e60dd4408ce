"""`raysl pretrain`: open the run folder, start the workers, follow them, report."""

import argparse
import importlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from raysl.commands.absolute_files import with_absolute_files
from raysl.commands.record import flat, packages, tags_of
from raysl.commands.terminal import (
    ProgressView,
    accuracy_table,
    classifier_line,
    console,
    print_json,
    say,
)
from raysl.config.load import read_mapping, to_yaml
from raysl.encoder import load_encoder, read_description
from raysl.errors import RunFolderError
from raysl.evaluate.training_source import open_training_source
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
    run_or_problems,
    size_defaults,
)
from raysl.runtime.cluster import connect, describe_cluster, disconnect, plan_layout
from raysl.runtime.ray_train import pretrain_on_ray
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
    config_file: Path | None
    tags: Mapping[str, str]  # of its MLflow run, besides those that every run has
    began_at: float  # in seconds since 1970


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
    began_at = psutil.Process().create_time()
    results = train_run(
        config, began_at=began_at, config_file=arguments.config, fresh=arguments.fresh
    )
    if arguments.json:
        print_json(results)
    return 0


def train_run(
    config: RunConfig[Any],
    *,
    began_at: float,
    config_file: Path | None = None,
    fresh: bool = False,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train a run in its folder, or go on with it; one that is finished only tells its results.

    Args:
        config: The run.
        began_at: What its seconds are counted from, in seconds since 1970.
        config_file: Where it was read from, if from a file.
        fresh: Start anew; an earlier run's folder is renamed.
        tags: For its MLflow run, besides those that every run has.

    Returns:
        The results, as ``--json`` prints them.
    """
    home = working_folder()
    config = with_absolute_files(config, home)
    folder = RunFolder(home / Path(config.output_dir).expanduser() / config.name)
    if fresh and folder.path.exists():
        set_aside(folder)
    with folder.locked():
        _claim(folder, config)
        check_model_name(config.backbone)
        source = open_training_source(config.data, config.evaluate, config.method)
        derived = derive_for(config, source)
        opened = Opened(config, folder, source, derived, home, config_file, tags or {}, began_at)
        results = folder.read_results()
        if results is None or "run_dir" not in results:
            results = _train(opened)
        else:
            say(f"{folder.path}: this run is finished; --fresh starts it anew, name=... another")
            results = _send_again(opened, results)
    _say_results(opened, results)
    return results


def working_folder() -> Path:
    """Return the folder that runs and mlflow.db go to: the current one, or a lasting one in a job.

    The working directory of a Ray job is a copy that Ray deletes, so a job's results go to
    ``RAYSL_HOME``, else to ``~/raysl`` of the node the job runs on.
    """
    if "RAYSL_HOME" in os.environ:
        return Path(os.environ["RAYSL_HOME"]).expanduser().absolute()
    current = Path.cwd()
    return Path.home() / "raysl" if _JOB_FOLDER in f"{current}/" else current


def set_aside(folder: RunFolder) -> None:
    """Rename a folder that something else is to take the place of."""
    with folder.locked():
        aside = folder.path.with_name(f"{folder.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.path.rename(aside)
    say(f"the earlier run is now in {aside}")


def _claim(folder: RunFolder, config: RunConfig[Any]) -> None:
    """Write the configuration into a new folder; in an old one, refuse another configuration."""
    values = config.model_dump(mode="json")
    if folder.config.exists():
        changed = differences(_with_new_defaults(read_mapping(folder.config)), values)
        if changed:
            raise RunFolderError(
                f"{folder.path} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive this run another name=..., or --fresh to set the old one aside"
            )
    write_atomically(folder.config, to_yaml(values))


def _with_new_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill up the settings of an old folder: one that is newer than it has its default there."""
    found = run_or_problems(values)
    return values if isinstance(found, list) else found.model_dump(mode="json")


def _train(opened: Opened) -> dict[str, Any]:
    config, folder, derived = opened.config, opened.folder, opened.derived
    done = latest_step(folder.checkpoints)
    _say_start(opened, done)
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
    return _finish(opened, results, tracker)


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
        tags={**tags_of(opened.config, opened.source, facts), **opened.tags},
    )
    tracker.start()
    return tracker


def _finish(opened: Opened, results: dict[str, Any], tracker: Any) -> dict[str, Any]:
    """Draw the report, end the MLflow run, and write the results with all that is known now."""
    folder = opened.folder
    records = read_metrics(folder.metrics)
    results = {"run_dir": str(folder.path), **results, **_speed(records, opened.began_at)}
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
    artifacts += [folder.bad_images, folder.labels, folder.finetune / "labels.json"]
    artifacts += [folder.projection_head, folder.classifier]
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
        model = importlib.import_module("raysl.track.mlflow_model")  # late, as the tracker is
        model.log_encoder(
            load_encoder(folder.encoder),
            uri=tracker.uri,
            run_id=tracker.run_id,
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
    recent = [first - began_at for first in firsts if first >= began_at]
    return {
        "images_per_s": images / seconds if seconds else 0.0,
        "data_wait": waited / seconds if seconds else 0.0,
        **({"seconds_to_first_step": recent[0]} if recent else {}),
        "seconds": time.time() - began_at,
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
        out.print(f"nearest neighbours: right in {results['knn_top1']:.1%} of the test images")
    if "top1" in results:
        out.print(classifier_line(results), markup=False)
    if results.get("num_bad_images"):
        say(f"{results['num_bad_images']:,} bad images, listed in {folder.bad_images}")
    failures = read_failures(folder)
    if failures:
        say(
            f"{len(failures)} evaluation(s) on the way failed or were left out, listed in "
            f"{folder.failed_evaluations}; the last one: step {failures[-1]['step']}: "
            f"{failures[-1]['problem']}"
        )
    lines = [f"model     {folder.classifier}"] if config.method.classifies else []
    lines += [
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
    """Return the line that goes one step further with this run."""
    config, file = opened.config, opened.config_file
    if config.method.classifies:
        return f"raysl distill {opened.folder.path}"
    if file is None:
        return f"raysl finetune {opened.folder.path} data.labels.fraction=0.1"
    photos = file.with_name("simclr_resnet18_photos.yaml")
    if config.data.source in BUILT_IN and photos.exists():
        return f"raysl pretrain {photos} data.source=FOLDER_OF_IMAGES name=mine"
    train = config.train
    twice = 2 * (train.steps or train.epochs or 1)
    longer = f"{'steps' if train.steps else 'epochs'}={twice:g}"
    return f"raysl pretrain {file} name=longer train.{longer}"

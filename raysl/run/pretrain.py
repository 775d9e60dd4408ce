"""Drive a run: open its folder, start the workers, follow their metrics, write the report."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.data.first_look import first_look
from raysl.errors import RayslError, RunFolderError, listed
from raysl.evaluate.training_source import open_training_source
from raysl.folder.claim import OR_FRESH, refusal
from raysl.folder.whole import read_json, write_text
from raysl.report.terminal import ProgressView, say, say_notes
from raysl.run.build import precision_note
from raysl.run.check import check_names, check_start
from raysl.run.differences import differences
from raysl.run.environment import flatten_mapping, tags_of
from raysl.run.extension import differences_besides_length, tags_of_extensions
from raysl.run.extension import extend as extend_run
from raysl.run.labelled_sets import labelling_of
from raysl.run.local import pretrain_here, uses_gpu
from raysl.run.places import start_folder, with_absolute_files, with_absolute_sources
from raysl.run.protocol_runs import TrainFunction, train_protocols
from raysl.run.ray_cluster import connect, describe_cluster, disconnect, in_background, plan_layout
from raysl.run.ray_preflight import check_cluster, wait_for_roles
from raysl.run.ray_train import pretrain_on_ray
from raysl.run.recipe import (
    Derived,
    RunConfig,
    derive_for,
    derived_facts,
    drop_idle,
    run_or_problems,
    size_defaults,
)
from raysl.run.results import Run, print_results, speed
from raysl.run.shell import Typed
from raysl.run.source_record import is_same, record_source, source_facts, what_changed
from raysl.run.stored import opened_folder
from raysl.run.tracking import end_tracker, load_mlflow, run_artifacts, start_tracker
from raysl.sources.open import open_source
from raysl.sources.source import Source
from raysl.sources.subset import whole_source
from raysl.track.events import EventsReader
from raysl.track.follow import Follower, MetricsReader, Record
from raysl.track.results import Results
from raysl.track.run_folder import (
    RunFolder,
    latest_step,
    list_waiting,
    read_metrics,
    working_folder,
)
from raysl.track.uri import tracking_uri
from raysl.train.checkpoint import set_damaged_aside

if TYPE_CHECKING:  # MLflow takes seconds to load, and not every run needs it
    from raysl.track.mlflow_tracker import MlflowTracker

_PROGRESS_EVERY_S = 0.5


class Opened(NamedTuple):
    """A run that is ready to start."""

    run: Run
    source: Source
    derived: Derived

    @property
    def config(self) -> RunConfig[Any]:
        """Return the settings of the run."""
        return self.run.config

    @property
    def folder(self) -> RunFolder:
        """Return the run folder."""
        return self.run.folder

    @property
    def uri(self) -> str:
        """Return the MLflow tracking URI."""
        return tracking_uri(self.config.track.tracking_uri, folder=self.run.home)


def train_run(
    config: RunConfig[Any],
    *,
    began_at: float,
    typed: Typed | None = None,
    fresh: bool = False,
    extend: bool = False,
    tags: Mapping[str, str] | None = None,
    notes_printed: Collection[str] = (),
) -> Results:
    """Train or resume a run in its folder; if it is finished, print its results again.

    Args:
        config: The run's configuration.
        began_at: Start of the run in seconds since 1970; its durations are measured from here.
        typed: The configuration file and overrides of the command line; None from Python.
        fresh: Start from step 0; an earlier run's folder is renamed.
        extend: Continue the run in the folder, finished or not, to the length of ``config``.
        tags: Additional tags of its MLflow run.
        notes_printed: Fingerprints of sources whose notes are already printed.

    Returns:
        The results, as ``--json`` prints them.

    Raises:
        RunFolderError: If the folder holds a run with other settings or images.
        RayslError: If the run fails otherwise; the subclass names the kind of failure.
    """
    home = working_folder()
    config = with_absolute_files(config, home)
    with opened_folder(config, home, fresh=fresh, extend=extend) as folder:
        shorter = _run_to_extend(folder, config, extend=extend)
        run = Run(config, folder, home, typed, tags or {}, began_at)
        results = folder.read_results()
        if shorter is not None or results is None or "run_dir" not in results:
            results = _train(_open(run, shorter), notes_printed)
        else:
            results = _finished(run, results)
        print_results(run, results)
    return results


def _open(run: Run, shorter: RunConfig[Any] | None) -> Opened:
    """Open and check the images, and record run and images in the folder, before training."""
    config = run.config
    check_names(config)
    source = open_training_source(config.data, config.evaluate, config.method)
    derived = check_start(config, source)
    lines = set_damaged_aside(run.folder.checkpoints)
    lines += record_source(run.folder, source, config)
    if shorter is not None:
        lines += extend_run(run.folder, (shorter, derive_for(shorter, source)), (config, derived))
    for line in lines:
        say(line)
    write_text(run.folder.config, to_yaml(config.model_dump(mode="json")))
    return Opened(run, source, derived)


def _run_to_extend(
    folder: RunFolder, config: RunConfig[Any], *, extend: bool
) -> RunConfig[Any] | None:
    """Return the folder's run if ``config`` extends it, or None if both have the same length.

    Raises:
        RunFolderError: If the folder holds a run with other settings, or no run to extend.
    """
    if not folder.config.exists():
        if extend:
            raise RunFolderError(f"{folder.path}: no run to extend; leave --extend out to start it")
        return None
    old, values = _with_new_defaults(folder), config.model_dump(mode="json")
    old_values = old if isinstance(old, dict) else old.model_dump(mode="json")
    changed = differences(old_values, values)
    more = differences_besides_length(old_values, values)
    if not changed:
        return None
    if more or not extend or isinstance(old, dict):
        length = "" if more else ", or --extend to continue this run to the new length"
        listed = more if extend and more else changed
        text = refusal(
            folder.path, "holds a run with other settings", listed, instead=OR_FRESH + length
        )
        raise RunFolderError(text)
    return old


def _with_new_defaults(folder: RunFolder) -> RunConfig[Any] | dict[str, Any]:
    """Return the settings of a folder; settings added in later versions have their defaults.

    Settings that this version does not accept are returned as plain values.
    """
    values = drop_idle({}, read_mapping(folder.config), ())  # without settings that had no effect
    run = run_or_problems(values)
    if isinstance(run, list):
        return values
    return with_absolute_sources(run, first=start_folder(folder, run.output_dir))


def _finished(run: Run, results: Results) -> Results:
    """Report that a run is finished, and whether its images have changed since."""
    folder, config = run.folder, run.config
    write_text(folder.config, to_yaml(config.model_dump(mode="json")))
    say(
        f"{folder.shown()}: this run is finished; --extend with a larger train.epochs or "
        f"train.steps continues it, --fresh starts over, name=... starts another run"
    )
    try:
        source = open_training_source(config.data, config.evaluate, config.method)
        opened = Opened(run, source, derive_for(config, source))
    except RayslError as error:
        say(f"  its results are unchanged, but its images can no longer be opened: {error}")
        return results
    recorded, facts = read_json(folder.source), source_facts(source)
    if recorded is not None and not is_same(recorded, facts):
        changed = "\n    ".join(what_changed(recorded, facts))
        text = "its results are unchanged, but its images have changed since it began"
        say(f"  {text}:\n    {changed}")
    return _send_again(opened, results)


def _train(opened: Opened, notes_printed: Collection[str]) -> Results:
    config, folder, derived = opened.config, opened.folder, opened.derived
    steps_done = latest_step(folder.checkpoints)
    _say_start(opened, steps_done, notes_printed)
    if config.track.mlflow and config.cluster.uses_ray:
        load_mlflow(opened.uri)
    with ExitStack() as stack:
        train: TrainFunction = lambda run, place, images: pretrain_here(  # noqa: E731
            run, folder=place, source=images
        )
        facts: dict[str, str] = {}
        use_gpu = uses_gpu(config.cluster)
        if config.cluster.uses_ray:
            if connect():
                stack.callback(disconnect)
            wait_for_roles(config)
            layout = plan_layout(config)
            use_gpu = layout.use_gpu
            facts = describe_cluster()
            say(
                f"  {layout.num_train_workers}{_other_counts(config)} train worker(s) on "
                f"{'GPU' if layout.use_gpu else f'CPU ({layout.threads_per_train_worker} threads)'}"
                f", {layout.num_data_workers} data worker(s), {layout.num_nodes} node(s)"
            )
            for line in check_cluster(config, opened.source, layout):
                say(f"  {line}")
            train = lambda run, place, images: pretrain_on_ray(  # noqa: E731
                run, folder=place, source=images, layout=plan_layout(run)
            )
        if note := precision_note(config, use_gpu=use_gpu):
            say(f"  {note}")
        progress = ProgressView(total_steps=derived.total_steps, done=steps_done)
        tracking = _start_tracking(opened, facts, progress.note)
        reader = MetricsReader(folder.metrics, only_new=True)
        try:
            with Follower(reader, _show_progress(progress, folder), every_s=_PROGRESS_EVERY_S):
                results = train(config, folder, opened.source)
            results = train_protocols(
                config,
                results,
                folder=folder,
                source=opened.source,
                train=train,
                trains_here=not config.cluster.uses_ray,
            )
        except BaseException as error:
            progress.close()
            if (tracker := tracking.result()) is not None:
                killed = isinstance(error, KeyboardInterrupt)
                tracker.finish(
                    status="KILLED" if killed else "FAILED", artifacts=[], log_model=None
                )
            raise
        progress.close()
    return _finish(opened, results, tracking.result())


def _other_counts(config: RunConfig[Any]) -> str:
    """Return the numbers of train workers that the run may have, if it is not one."""
    counts = config.worker_counts
    return f" (of {listed(counts, last='or')})" if len(counts) > 1 else ""


def _show_progress(progress: ProgressView, folder: RunFolder) -> Callable[[list[Record]], None]:
    events = EventsReader(folder.events)

    def show(records: list[Record]) -> None:
        progress.update(records, num_evaluations=len(list_waiting(folder.to_evaluate)))
        for event in events.read():
            progress.note(event["text"])

    return show


def _start_tracking(
    opened: Opened, facts: dict[str, str], tell: Callable[[str], None]
) -> "Future[MlflowTracker | None]":
    """Start the tracker; on Ray in a thread: workers start while MLflow is loaded and answers."""
    start = partial(_start_tracker, opened, facts, tell=tell)
    if opened.config.cluster.uses_ray:
        return in_background(start, name="raysl-start-tracker")
    started: Future[MlflowTracker | None] = Future()
    started.set_result(start())
    return started


def _start_tracker(
    opened: Opened, facts: dict[str, str], *, tell: Callable[[str], None] | None = say
) -> "MlflowTracker | None":
    track = opened.config.track
    if not track.mlflow:
        return None
    defaults = size_defaults(opened.config, opened.source)
    by_size = {name: default.value for name, default in defaults.items()}
    return start_tracker(
        opened.folder,
        track,
        uri=opened.uri,
        run_name=opened.config.name,
        params=flatten_mapping(opened.config.model_dump(mode="json"))
        | flatten_mapping({"derived": derived_facts(opened.config, opened.derived) | by_size}),
        tags={
            **tags_of(opened.config, opened.source, facts),
            **tags_of_extensions(opened.folder),
            **opened.run.tags,
        },
        tell=tell,
    )


def _finish(opened: Opened, results: Results, tracker: "MlflowTracker | None") -> Results:
    """Draw the report, end the MLflow run, and write the complete results."""
    folder = opened.folder
    records = read_metrics(folder.metrics)
    results = results | speed(records, opened.run.began_at)
    folder.write_results(results)
    say("drawing the report")
    from raysl.run.page import draw_all  # noqa: PLC0415 - matplotlib takes a second

    for picture, problem in draw_all(
        folder, source=opened.source, config=opened.config, derived=opened.derived
    ):
        say(f"  {picture} could not be drawn: {problem}")
    place: Results = {"run_dir": folder.shown()}
    results = place | results | _end_tracker(opened, tracker)
    folder.write_results(results)
    return results


def _end_tracker(opened: Opened, tracker: "MlflowTracker | None") -> Results:
    folder = opened.folder
    return end_tracker(tracker, folder, opened.config.track, artifacts=run_artifacts(folder))


def _send_again(opened: Opened, results: Results) -> Results:
    """Send to MLflow what it did not accept when the run ended."""
    if results.get("mlflow_problem") is None:
        return results
    opened.folder.fetch()
    tracker = _start_tracker(opened, {}, tell=None)  # a problem is told at the end
    results = results | _end_tracker(opened, tracker)
    opened.folder.write_results(results)
    return results


def _say_start(opened: Opened, steps_done: int, notes_printed: Collection[str]) -> None:
    config, derived = opened.config, opened.derived
    what = f"resumes after step {steps_done}" if steps_done else "starts"
    say(
        f"{config.name} {what}: {config.method.name}, {config.backbone.name}, "
        f"{derived.num_images:,} images from {opened.source.name}, {derived.total_steps} steps of "
        f"{config.train.global_batch_size} images\n  {opened.folder.shown()}"
    )
    for name, default in size_defaults(config, opened.source).items():
        say(f"  {name}: {default.formula}")
    _say_sources(opened, notes_printed)


def _say_sources(opened: Opened, notes_printed: Collection[str]) -> None:
    """Print notes on the training and test images, once per source."""
    config = opened.config
    whole = whole_source(opened.source)
    if whole.fingerprint not in notes_printed:
        say_notes(whole, first_look(whole))
    if config.evaluate.source is not None:
        settings = config.evaluate.test_images(config.data)
        test = open_source(settings, held_out=True, data=config.data)
        if test.fingerprint not in {*notes_printed, whole.fingerprint}:
            say_notes(test, title=f"evaluate.source={test.name}")
    for note in labelling_of(config, opened.source).notes:
        say(f"  {note}")

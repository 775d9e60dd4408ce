"""`raysl pipeline`: pretrain, fine-tune and distil by one configuration, and compare."""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.downstream.pipeline import PipelineConfig, RunConfigs, Step, load_pipeline, plan_steps
from raysl.errors import RunFolderError
from raysl.evaluate.training_source import seen_part
from raysl.folder.claim import changes, refusal
from raysl.folder.whole import write_json, write_text
from raysl.report.terminal import console, print_json, say, say_notes
from raysl.run.environment import flatten_mapping, git_state
from raysl.run.held import Kind, check_reachable, held_folder, place_of
from raysl.run.places import with_absolute_files
from raysl.run.pretrain import train_run
from raysl.run.ray_cluster import connect, disconnect
from raysl.run.recipe import RunConfig, derive_for
from raysl.run.tracking import print_problem, start_tracker
from raysl.sources.open import open_source
from raysl.sources.place import absolute_config, as_place
from raysl.sources.subset import whole_source
from raysl.track.results import PipelineResults, Results, StepResult
from raysl.track.run_folder import RunFolder, working_folder
from raysl.track.uri import tracking_uri, without_password

if TYPE_CHECKING:  # MLflow takes seconds to load, and not every pipeline needs it
    from raysl.track.mlflow_tracker import MlflowTracker

# Wait for the pipeline's MLflow run, to which its steps refer; creating a database takes long.
_PATIENCE_S = 45.0
# A step's folder is that of a run, which its own driver writes.
_PIPELINE = Kind("pipeline", restored=lambda name: "/" not in name or name.startswith("pictures/"))
# Sections that must not change between starts of a pipeline, and the key that still may.
_LASTING, _FREE = ("base", "pretrain"), "pretrain.data.if_changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config",
        type=Path,
        help="a YAML file, or the name of a shipped pipeline, such as simclr_v2_cifar10",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the pipeline (pretrain.train.epochs=5), or of all its runs "
        "(data.source=FOLDER)",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and list the steps without starting"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; rename an earlier pipeline's folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run or resume a pipeline."""
    config = load_pipeline(arguments.config, arguments.overrides)
    home = working_folder()
    place = place_of(config.output_dir, config.name, home)
    steps = plan_steps(config)
    needs_ray, notes_printed = _check(steps, RunConfigs(config, place))
    check_reachable(config.output_dir, uses_ray=needs_ray)
    if arguments.dry_run:
        _say_steps(steps)
        return 0
    with held_folder(place, RunFolder, _PIPELINE, fresh=arguments.fresh) as folder:
        _claim(folder, config)
        pipeline = _Pipeline(config, folder, steps, home=home, notes_printed=notes_printed)
        results = pipeline.run_missing(needs_ray=needs_ray)
    if arguments.json:
        print_json(results)
    return 0


def _check(steps: Sequence[Step], runs: RunConfigs) -> tuple[bool, set[str]]:
    """Check all runs before the first one starts.

    Returns:
        Whether any run needs Ray, and the fingerprints of the images whose notes are printed.
    """
    first = runs.config(steps[0])
    # Later steps learn from labels, even if the pretraining ignores them.
    data = absolute_config(first.data).model_copy(update={"labels": None})
    whole = whole_source(open_source(data, data=data))
    say_notes(whole, title=f"{whole.name}:")
    configs = [first]
    configs += [
        runs.config(s, s.teachers[0] if s.teachers else None, whole=whole) for s in steps[1:]
    ]
    for config in configs:
        derive_for(config, seen_part(whole, config.data, config.evaluate, config.method))
    needs_ray = any(config.cluster.uses_ray for config in configs)
    return needs_ray, {whole.fingerprint}


class _Pipeline:
    """One start of a pipeline.

    Args:
        config: The pipeline's configuration.
        folder: The pipeline's folder, locked.
        steps: The steps in order.
        home: Base folder of relative output paths.
        notes_printed: Fingerprints of images whose notes are already printed.
    """

    def __init__(
        self,
        config: PipelineConfig,
        folder: RunFolder,
        steps: Sequence[Step],
        *,
        home: Path,
        notes_printed: set[str],
    ) -> None:
        self._config = config
        self._folder = folder
        self._steps = steps
        self._runs = RunConfigs(config, folder.shown())
        self._home = home
        self._notes_printed = notes_printed
        self._rows: list[StepResult] = []
        self._uri = tracking_uri(config.track.tracking_uri, folder=home)
        self._tracker = self._start_tracker()

    def run_missing(self, *, needs_ray: bool) -> PipelineResults:
        """Run the steps that are not finished; return the results of all."""
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            with ExitStack() as stack:
                if needs_ray and connect():
                    stack.callback(disconnect)
                for number, step in enumerate(self._steps, start=1):
                    self._rows.append(self._run(step, number))
                    self._write()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._end_tracking(status)
        results = self._write()
        console().print(_table(self._rows))
        console().print(f"report    {self._folder.shown(self._folder.report)}", markup=False)
        return results

    def _run(self, step: Step, number: int) -> StepResult:
        teacher = self._teacher(step)
        config = self._runs.config(step, teacher)
        say(f"\nstep {number} of {len(self._steps)}: {step.name}")
        parent = None if self._tracker is None else self._tracker.run_id
        tags = {"raysl.kind": "step", "pipeline": self._config.name, "step": step.name}
        results = train_run(
            with_absolute_files(config, self._home),
            began_at=time.time(),
            tags=tags | ({"mlflow.parentRunId": parent} if parent else {}),
            notes_printed=self._notes_printed,
        )
        return _row(step, teacher, config, results)

    def _teacher(self, step: Step) -> str | None:
        """Return the most accurate candidate teacher of a step; None if it has none."""
        rows = [row for row in self._rows if row["step"] in step.teachers]
        return max(rows, key=lambda row: row["top1"] or 0.0)["step"] if rows else None

    def _write(self) -> PipelineResults:
        """Write the results so far: table, picture and page."""
        finished = len(self._rows)
        results: PipelineResults = {
            "pipeline_dir": self._folder.shown(),
            "finished": finished,
            "steps": list(self._rows),
            "mlflow_run_id": None if self._tracker is None else self._tracker.run_id,
        }
        write_json(self._folder.path / "pipeline.json", results)
        # Matplotlib takes a second.
        from raysl.downstream.pipeline_page import draw_pipeline  # noqa: PLC0415

        for picture, problem in draw_pipeline(
            self._folder.path,
            name=self._config.name,
            rows=self._rows,
            settings=to_yaml(self._config.model_dump(mode="json")),
            shown=self._folder.shown(),
        ):
            say(f"  {picture} could not be drawn: {problem}")
        self._folder.publish()
        return results

    def _start_tracker(self) -> "MlflowTracker | None":
        config = self._config
        if not config.track.mlflow:
            return None
        settings = config.model_dump(
            mode="json", exclude={"finetune", "distill", "set", "pretrain"}
        )
        return start_tracker(
            self._folder,
            config.track,
            uri=self._uri,
            run_name=config.name,
            params=flatten_mapping(settings)
            | {f"set.{key}": value for key, value in config.set.items()}
            | {f"pretrain.{key}": value for key, value in config.pretrain.items()}
            | {"steps": ", ".join(step.name for step in self._steps)},
            tags={"raysl.kind": "pipeline", **git_state()},
            patience_s=_PATIENCE_S,
        )

    def _end_tracking(self, status: str) -> None:
        if self._tracker is None:
            return
        say(f"sending the pipeline to MLflow ({without_password(self._uri)})")
        folder = self._folder
        tags = {
            f"top1.{r['step']}": f"{r['top1']:.4f}" for r in self._rows if r["top1"] is not None
        }
        self._tracker.finish(
            status=status,
            artifacts=[
                folder.path / "pipeline.yaml",
                folder.path / "pipeline.json",
                folder.report,
                *sorted(folder.pictures.glob("*.png")),
            ],
            log_model=None,
            tags=tags,
        )
        print_problem(self._tracker.trouble, self._uri, ended=True)


def _row(step: Step, teacher: str | None, config: RunConfig[Any], results: Results) -> StepResult:
    """Return the row of the table for a finished step."""
    accuracies = results.get("top1"), results.get("linear_lbfgs_top1"), results.get("knn_top1")
    top1 = next((value for value in accuracies if value is not None), None)
    width = f" {config.backbone.width:g}x" if config.backbone.width != 1 else ""
    return {
        "step": step.name,
        "kind": step.kind,
        "labels": step.labels,
        "num_labels": None if step.labels is None else results.get("num_labels"),
        "head_layers": step.head_layers,
        "teacher": teacher,
        "student": step.name.rpartition("percent-")[2] if step.kind == "distill" else None,
        "backbone": f"{config.backbone.name}{width}",
        "top1": top1,
        "seconds": results["seconds"],
        "run_dir": results["run_dir"],
        "mlflow_run_id": results.get("mlflow_run_id"),
    }


def _table(rows: Sequence[StepResult]) -> Table:
    table = Table(title="Accuracy on the test images")
    table.add_column("step")
    for column in ("labels", "head layer", "network", "top-1", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["step"],
            "" if row["labels"] is None else f"{100 * row['labels']:g} %",
            "" if row["head_layers"] is None else str(row["head_layers"]),
            row["backbone"],
            "" if row["top1"] is None else f"{row['top1']:.1%}",
            f"{row['seconds']:,.0f}",
        )
    return table


def _say_steps(steps: Sequence[Step]) -> None:
    table = Table(title=f"{len(steps)} steps, none started")
    for column in ("step", "labels", "head layer", "teacher"):
        table.add_column(column)
    for step in steps:
        table.add_row(
            step.name,
            "" if step.labels is None else f"{100 * step.labels:g} %",
            "" if step.head_layers is None else str(step.head_layers),
            " or ".join(step.teachers),
        )
    console().print(table)


def _claim(folder: RunFolder, config: PipelineConfig) -> None:
    """Write the configuration; refuse a folder whose pretraining has other settings.

    Steps may be added. Each run compares its settings with its own folder.
    """
    path = folder.path / "pipeline.yaml"
    values = config.model_dump(mode="json")
    if path.exists():
        old = read_mapping(path)
        before, after = (
            flatten_mapping({key: each.get(key) for key in _LASTING}) for each in (old, values)
        )
        keys = [key for key in {**before, **after} if key != _FREE]
        changed = changes(before, after, keys=keys, compared=_as_place)
        which = [key for key in _LASTING if any(line.startswith(key) for line in changed)]
        if changed:
            holds = f"holds a pipeline with another {' and '.join(which)}"
            raise RunFolderError(refusal(folder.shown(), holds, changed))
    write_text(path, to_yaml(values))


def _as_place(key: str, value: Any) -> Any:
    return as_place(key.rpartition(".")[2], value)

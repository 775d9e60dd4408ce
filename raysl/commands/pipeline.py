"""`raysl pipeline`: pretrain, fine-tune and distil by one configuration, and compare."""

import argparse
import importlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from raysl.commands.absolute_files import with_absolute_files
from raysl.commands.pretrain import set_aside, train_run
from raysl.commands.record import flat, git_state
from raysl.commands.run_tracking import say_trouble, start_tracker
from raysl.commands.terminal import console, print_json, say, say_notes
from raysl.config.load import read_mapping, to_yaml
from raysl.errors import RunFolderError
from raysl.evaluate.training_source import seen_part
from raysl.jobs.pipeline import PipelineConfig, Runs, Step, load_pipeline, plan_steps
from raysl.recipe import RunConfig, derive_for
from raysl.runtime.cluster import connect, disconnect
from raysl.sources.open import open_source
from raysl.sources.place import absolute_config, as_place
from raysl.sources.subset import whole_source
from raysl.track.run_folder import RunFolder, working_folder, write_atomically, write_json
from raysl.track.uri import tracking_uri, without_password

# For MLflow's run of the pipeline, which those of its steps refer to; a new database takes a while.
_PATIENCE_S = 45.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config", type=Path, help="a YAML file, such as configs/pipelines/simclr_v2_cifar10.yaml"
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
    """Run, or go on with, the pipeline that the configuration names."""
    config = load_pipeline(arguments.config, arguments.overrides)
    home = working_folder()
    folder = RunFolder((home / Path(config.output_dir).expanduser() / config.name).absolute())
    steps = plan_steps(config)
    runs = Runs(config, folder.path)
    needs_ray, told_of = _check(steps, runs)
    if arguments.dry_run:
        _say_steps(steps)
        return 0
    if arguments.fresh and folder.path.exists():
        set_aside(folder)
    with folder.locked():
        _claim(folder, config)
        pipeline = _Pipeline(config, folder, steps, home=home, told_of=told_of)
        results = pipeline.go_on(needs_ray=needs_ray)
    if arguments.json:
        print_json(results)
    return 0


def _check(steps: Sequence[Step], runs: Runs) -> tuple[bool, set[str]]:
    """Refuse what could not run before anything does.

    Returns:
        Whether any run needs Ray, and the fingerprints of the images whose notes were said.
    """
    first = runs.config(steps[0])
    # With its labels, which later steps learn from, whatever the pretraining leaves out.
    data = absolute_config(first.data).model_copy(update={"labels": None})
    whole = whole_source(open_source(data, data=data))
    say_notes(whole, title=f"{whole.name}:")
    configs = [first]
    configs += [
        runs.config(s, s.teachers[0] if s.teachers else None, whole=whole) for s in steps[1:]
    ]
    for config in configs:
        derive_for(config, seen_part(whole, config.data, config.evaluate, config.method))
    needs_ray = any(config.cluster.num_train_workers > 0 for config in configs)
    return needs_ray, {whole.fingerprint}


class _Pipeline:
    """One start of a pipeline.

    Args:
        config: The pipeline.
        folder: Its folder, locked.
        steps: What it does, in order.
        home: What relative paths are relative to.
        told_of: Fingerprints of images whose notes were said.
    """

    def __init__(
        self,
        config: PipelineConfig,
        folder: RunFolder,
        steps: Sequence[Step],
        *,
        home: Path,
        told_of: set[str],
    ) -> None:
        self._config = config
        self._folder = folder
        self._steps = steps
        self._runs = Runs(config, folder.path)
        self._home = home
        self._told_of = told_of
        self._rows: list[dict[str, Any]] = []
        self._uri = tracking_uri(config.track.tracking_uri, folder=home)
        self._tracker = self._start_tracker()

    def go_on(self, *, needs_ray: bool) -> dict[str, Any]:
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
        console().print(f"report    {self._folder.report}", markup=False)
        return results

    def _run(self, step: Step, number: int) -> dict[str, Any]:
        teacher = self._teacher(step)
        config = self._runs.config(step, teacher)
        say(f"\nstep {number} of {len(self._steps)}: {step.name}")
        parent = None if self._tracker is None else self._tracker.run_id
        tags = {"raysl.kind": "step", "pipeline": self._config.name, "step": step.name}
        results = train_run(
            with_absolute_files(config, self._home),
            began_at=time.time(),
            tags=tags | ({"mlflow.parentRunId": parent} if parent else {}),
            told_of=self._told_of,
        )
        return _row(step, teacher, config, results)

    def _teacher(self, step: Step) -> str | None:
        """Return the step that teaches: the one, or the one whose accuracy is best."""
        of = [row for row in self._rows if row["step"] in step.teachers]
        return max(of, key=lambda row: row["top1"] or 0.0)["step"] if of else None

    def _write(self) -> dict[str, Any]:
        """Write what is known by now: table, picture, page."""
        finished = len(self._rows)
        results = {
            "pipeline_dir": str(self._folder.path),
            "finished": finished,
            "steps": [dict(row) for row in self._rows],
            "mlflow_run_id": None if self._tracker is None else self._tracker.run_id,
        }
        write_json(self._folder.path / "pipeline.json", results)
        page = importlib.import_module("raysl.report.pipeline_page")  # late: loads matplotlib
        for picture, problem in page.draw_pipeline(
            self._folder.path,
            name=self._config.name,
            rows=self._rows,
            settings=to_yaml(self._config.model_dump(mode="json")),
        ):
            say(f"  {picture} could not be drawn: {problem}")
        return results

    def _start_tracker(self) -> Any:
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
            params=flat(settings)
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
        say_trouble(self._tracker.trouble, self._uri, ended=True)


def _row(
    step: Step, teacher: str | None, config: RunConfig[Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the table says of a finished step."""
    measured = ("top1", "linear_top1", "knn_top1")
    top1 = next((results[name] for name in measured if name in results), None)
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


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
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
    """Write the configuration into a new folder; in an old one, refuse other pretraining.

    Steps may be added: each run refuses other settings than its folder has by itself.
    """
    path = folder.path / "pipeline.yaml"
    values = config.model_dump(mode="json")
    if path.exists():
        old = read_mapping(path)
        changed = [
            key for key in ("base", "pretrain") if _placed(old.get(key)) != _placed(values[key])
        ]
        if changed:
            raise RunFolderError(
                f"{folder.path} holds a pipeline with another {' and '.join(changed)}; give this "
                f"one another name=..., or --fresh to set the old one aside"
            )
    write_atomically(path, to_yaml(values))


def _placed(settings: Any) -> Any:
    """Return dotted settings with images by their places, without what is there to change."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: value for key, value in settings.items() if key != "data.if_changed"}
    return {key: as_place(key.rpartition(".")[2], value) for key, value in kept.items()}

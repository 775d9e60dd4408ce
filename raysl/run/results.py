"""Print the results of a run, its speed, and the next command to try."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raysl.report.terminal import accuracy_table, classifier_line, console, say, trained_lines
from raysl.run.online import read_failures
from raysl.run.recipe import RunConfig
from raysl.run.shell import Typed, command, longer_command
from raysl.sources.source import BUILT_IN
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder
from raysl.track.uri import compare_line

_LONGER = 2
_PHOTOS = "simclr_resnet18_photos"


class Run(NamedTuple):
    """A requested run."""

    config: RunConfig[Any]
    folder: RunFolder
    home: Path  # base of relative paths
    typed: Typed | None  # the command line; None if the run was started from Python
    tags: Mapping[str, str]  # additional tags of its MLflow run
    began_at: float  # seconds since 1970


def speed(records: list[dict[str, Any]], began_at: float) -> Results:
    """Return the throughput in images/s and the share of time spent waiting for data."""
    timed = [r for r in records if r.get("time/train_s")]
    seconds = sum(r["time/train_s"] for r in timed)
    images = sum(r["train/images_per_s"] * r["time/train_s"] for r in timed)
    waited = sum(r["data/wait_share"] * r["time/train_s"] for r in timed)
    firsts = [r["time/first_step_at"] for r in records if "time/first_step_at" in r]
    recent = [first - began_at for first in firsts if first >= began_at]
    results: Results = {
        "images_per_s": images / seconds if seconds else 0.0,
        "data_wait": waited / seconds if seconds else 0.0,
    }
    if recent:
        results["seconds_to_first_step"] = recent[0]
    results["seconds"] = time.time() - began_at
    return results


def print_results(run: Run, results: Results) -> None:
    """Print the results of a run, its files, and commands to run next."""
    folder, config = run.folder, run.config
    out = console()
    if "num_train_labels" in results:
        out.print(accuracy_table(results))
    else:
        if "knn_top1" in results:  # measured by the evaluation of the last step
            out.print(
                f"nearest neighbours: {results['knn_top1']:.1%} top-1 accuracy on the test images"
            )
        for line in trained_lines(results):
            out.print(line)
    if "top1" in results:
        out.print(classifier_line(results), markup=False)
    if results.get("num_bad_images"):
        say(
            f"{results['num_bad_images']:,} bad images, listed in {folder.shown(folder.bad_images)}"
        )
    failures = read_failures(folder)
    if failures:
        say(
            f"{len(failures)} evaluation(s) during training failed or were skipped, listed in "
            f"{folder.shown(folder.failed_evaluations)}; the last: step {failures[-1]['step']}: "
            f"{failures[-1]['problem']}"
        )
    lines = [f"model     {folder.shown(folder.classifier)}"] if config.method.classifies else []
    lines += [
        f"encoder   {folder.shown(folder.encoder)}",
        f"report    {folder.shown(folder.report)}",
        f"metrics   {folder.shown(folder.metrics)}",
    ]
    if config.track.mlflow:
        lines.append(f"compare   {compare_line(config.track.tracking_uri, folder=run.home)}")
    lines.append(f"next      {_next_command(run, results)}")
    if photos := _photos_command(run):
        lines.append(f"photos    {photos}")
    out.print("\n".join(lines), markup=False)


def _next_command(run: Run, results: Results) -> str:
    """Return a complete command for the next step with this run."""
    if run.config.method.classifies:
        return command("distill", run.folder.shown())
    if run.typed is not None:
        return longer_command(run.typed, run.config, times=_LONGER)
    if "knn_top1" in results:  # there are labels
        return command("finetune", run.folder.shown(), "data.labels.fraction=0.1")
    return command("evaluate", run.folder.shown())


def _photos_command(run: Run) -> str:
    """Return the command that trains on the user's own images; empty if this run already does."""
    if run.typed is None or run.config.data.source not in BUILT_IN:
        return ""
    photos = Path(run.typed.config_file).with_name(f"{_PHOTOS}.yaml")
    if not photos.exists():
        photos = Path(_PHOTOS)  # raysl ships it
    return command("pretrain", photos, "data.source=FOLDER_OF_IMAGES", "name=mine")

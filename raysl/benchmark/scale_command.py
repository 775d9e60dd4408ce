"""`raysl benchmark scale`: images per second over the number of train workers."""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rich.table import Table

from raysl.benchmark.arguments import (
    add_benchmark,
    add_json,
    add_repeats,
    add_run,
    add_steps,
    wholes,
)
from raysl.benchmark.step import LOOP, RUN, StepCost, StepRequest, measure_in_own_processes
from raysl.benchmark.step import request_for as step_request_for
from raysl.errors import ConfigError
from raysl.report.figure import BLUE, INK, ORANGE, new_figure, save_png, style_axes
from raysl.report.terminal import console, say
from raysl.run.places import with_absolute_files
from raysl.run.recipe import RunConfig, load_run
from raysl.track.run_folder import working_folder

STRONG, WEAK = "strong", "weak"
_LABELS = {STRONG: "strong: one batch for all", WEAK: "weak: one batch for each"}
_COLORS = {STRONG: BLUE, WEAK: ORANGE}


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure images per second over the number of train workers, and draw the efficiency"
    parser = add_benchmark(kinds, "scale", summary)
    add_run(parser)
    parser.add_argument(
        "--workers", type=wholes, default=[1, 2], help="numbers of train workers (1,2)"
    )
    parser.add_argument(
        "--scaling",
        choices=[STRONG, WEAK, "both"],
        default="both",
        help="divide the batch of the run among the workers, give it to each, or do both (both)",
    )
    parser.add_argument(
        "--without-ray",
        action="store_true",
        help="measure processes on this machine, with views in memory and without Ray",
    )
    add_steps(parser)
    add_repeats(parser)
    parser.add_argument("--figure", type=Path, help="PNG for a figure of the results")
    add_json(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of workers in turn, in rounds; print a table, and draw if requested.

    On CPU each worker has one thread unless ``cluster.threads_per_train_worker`` says otherwise. A
    single worker would otherwise have all cores, and more workers could not be faster.

    Raises:
        ConfigError: If a setting is wrong, or a batch cannot be divided by a number of workers.
        ClusterError: If the workers do not fit.
        DataError: If a measurement fails.
    """
    form = LOOP if arguments.without_ray else RUN
    counts = sorted(set(arguments.workers))
    scalings = [STRONG, WEAK] if arguments.scaling == "both" else [arguments.scaling]
    overrides = ["cluster.threads_per_train_worker=1", *arguments.overrides]
    config = with_absolute_files(load_run(arguments.config, overrides), working_folder())
    requests = {
        (scaling, count): request_for(config, count, scaling, steps=arguments.steps, form=form)
        for scaling in scalings
        for count in counts
    }
    load = os.getloadavg()[0]
    rounds: list[dict[tuple[str, int], StepCost]] = []
    for number in range(arguments.repeats):
        costs = {}
        for (scaling, count), request in requests.items():
            say(
                f"measuring {count} train worker(s), {scaling} scaling, repeat {number + 1} of "
                f"{arguments.repeats}"
            )
            costs[scaling, count] = measure_in_own_processes(request)
        rounds.append(costs)
    batches = {key: each.config["train"]["global_batch_size"] for key, each in requests.items()}
    results = {
        "method": config.method.name,
        "backbone": config.backbone.name,
        "form": form,
        "load_before": load,
        "points": summarise(rounds, batches),
    }
    console().print(scale_table(results))
    if arguments.figure is not None:
        draw_scale(arguments.figure, results["points"])
        say(f"drawn: {arguments.figure}")
    return results


def request_for(
    config: RunConfig[Any], num_workers: int, scaling: str, *, steps: int, form: str
) -> StepRequest:
    """Return the request for a run with a number of train workers.

    Args:
        config: The run's configuration, with absolute paths.
        num_workers: Number of train workers.
        scaling: ``strong`` divides the run's batch between them, ``weak`` gives it to each.
        steps: Number of steps to time, rounded up to whole logging intervals.
        form: A key of :data:`raysl.benchmark.step.FORMS`.

    Raises:
        ConfigError: If the batch cannot be divided.
        ClusterError: If ``cluster.device=cuda`` and this machine has too few GPUs.
    """
    batch = config.train.global_batch_size * (num_workers if scaling == WEAK else 1)
    if batch % num_workers:
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be divided by {num_workers} train workers; "
            f"change it or --workers, or measure --scaling={WEAK}"
        )
    changed = config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch_size": batch}),
            "cluster": config.cluster.model_copy(update={"num_train_workers": num_workers}),
        }
    )
    return step_request_for(changed, steps=steps)._replace(form=form)


def summarise(
    rounds: Sequence[Mapping[tuple[str, int], StepCost]], batches: Mapping[tuple[str, int], int]
) -> list[dict[str, Any]]:
    """Return medians over the rounds for each scaling and number of workers.

    The efficiency is a worker's images per second, divided by those of a worker in the measurement
    with the fewest workers. Both are of the same round, as the machine's speed may drift.
    """
    fewest = {scaling: min(n for s, n in rounds[0] if s == scaling) for scaling, _ in rounds[0]}
    points = []
    for key in rounds[0]:
        scaling, count = key
        base = scaling, fewest[scaling]
        rates = [1000 * batches[key] / costs[key].ms for costs in rounds]
        bases = [1000 * batches[base] / costs[base].ms for costs in rounds]
        efficiencies = [
            (rate / count) / (first / base[1]) for rate, first in zip(rates, bases, strict=True)
        ]
        waits = [w for costs in rounds if (w := costs[key].wait_share) is not None]
        points.append(
            {
                "scaling": scaling,
                "num_workers": count,
                "global_batch_size": batches[key],
                "ms": statistics.median(costs[key].ms for costs in rounds),
                "images_per_s": statistics.median(rates),
                "efficiency": statistics.median(efficiencies),
                "min_efficiency": min(efficiencies),
                "max_efficiency": max(efficiencies),
                "peak_bytes": max(costs[key].peak_bytes for costs in rounds),
                "wait_share": statistics.median(waits) if waits else None,
            }
        )
    return points


def scale_table(results: Mapping[str, Any]) -> Table:
    """Return the table of scalings and numbers of workers."""
    table = Table(
        title=f"Images per second over train workers: {results['method']}, {results['backbone']}",
        title_justify="left",
        caption=(
            f"{'; '.join(_LABELS.values())}. Efficiency: images/s of a worker, divided by those "
            f"with the fewest workers. System load {results['load_before']:.1f} before."
        ),
        caption_justify="left",
    )
    table.add_column("scaling")
    for column in ("workers", "batch", "ms", "images/s", "efficiency", "min-max", "waits for data"):
        table.add_column(column, justify="right")
    for point in results["points"]:
        wait = point["wait_share"]
        table.add_row(
            point["scaling"],
            str(point["num_workers"]),
            str(point["global_batch_size"]),
            f"{point['ms']:,.1f}",
            f"{point['images_per_s']:,.0f}",
            f"{point['efficiency']:.2f}",
            f"{point['min_efficiency']:.2f}-{point['max_efficiency']:.2f}",
            "" if wait is None else f"{wait:.0%}",
        )
    return table


def draw_scale(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw the efficiency, with its range, and the images per second over the workers.

    Args:
        path: PNG to write.
        points: The points of :func:`summarise`.
    """
    figure = new_figure(height_in=2.9)
    rates, efficiencies = figure.subplots(1, 2)
    counts = sorted({point["num_workers"] for point in points})
    style_axes(rates, title="Images per second")
    style_axes(efficiencies, title="Efficiency of a worker")
    for scaling in {point["scaling"]: None for point in points}:
        chosen = [point for point in points if point["scaling"] == scaling]
        x = [point["num_workers"] for point in chosen]
        look = {"color": _COLORS[scaling], "marker": "o", "markersize": 4}
        rates.plot(x, [point["images_per_s"] for point in chosen], label=_LABELS[scaling], **look)
        y = [point["efficiency"] for point in chosen]
        below = [point["efficiency"] - point["min_efficiency"] for point in chosen]
        above = [point["max_efficiency"] - point["efficiency"] for point in chosen]
        efficiencies.errorbar(x, y, yerr=[below, above], capsize=3, **look)
    for axes in (rates, efficiencies):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room above the highest marker
    rates.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    figure.supxlabel("train workers", fontsize=9, color=INK)
    save_png(figure, path)

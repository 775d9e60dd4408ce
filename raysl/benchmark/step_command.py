"""`raysl benchmark step`: what raysl, DDP, Ray and the stream add to a training step of torch."""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from raysl.benchmark.arguments import add_benchmark, add_json, add_repeats, add_run, add_steps
from raysl.benchmark.step import FORMS, StepCost, measure_in_own_processes, request_for
from raysl.report.terminal import console, say
from raysl.run.places import with_absolute_files
from raysl.run.recipe import load_run
from raysl.track.run_folder import working_folder

_MIB = 1 << 20


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure a training step: torch alone, in DDP, in raysl's loop, on Ray, with its data"
    parser = add_benchmark(kinds, "step", summary)
    add_run(parser)
    add_steps(parser)
    parser.add_argument(
        "--forms",
        type=_forms,
        default=list(FORMS),
        help=f"what to measure, of {','.join(FORMS)} (all)",
    )
    add_repeats(parser)
    add_json(parser)


def _forms(text: str) -> list[str]:
    forms = text.split(",")
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such form: {unknown[0]}; give {', '.join(FORMS)}")
    return [form for form in FORMS if form in forms]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each form in turn, in rounds; print a table.

    Raises:
        ConfigError: If a setting is wrong.
        ClusterError: If ``cluster.device=cuda`` and this machine has too few GPUs.
        DataError: If a measurement fails.
    """
    config = load_run(arguments.config, arguments.overrides)
    config = with_absolute_files(config, working_folder())
    request = request_for(config, steps=arguments.steps)
    device = torch.cuda.get_device_name() if request.use_gpu else "CPU"
    say(
        f"raysl benchmark step: {config.method.name}, {config.backbone.name}, "
        f"{config.train.global_batch_size} images a step, {request.num_workers} worker(s) on "
        f"{device}, {request.threads} thread(s) each, {request.steps} steps after "
        f"{request.warm_up}"
    )
    load = os.getloadavg()[0]
    rounds: list[dict[str, StepCost]] = []
    for number in range(arguments.repeats):
        costs = {}
        for form in arguments.forms:
            say(f"measuring {FORMS[form]}, repeat {number + 1} of {arguments.repeats}")
            costs[form] = measure_in_own_processes(request._replace(form=form))
        rounds.append(costs)
    results = {
        "method": config.method.name,
        "backbone": config.backbone.name,
        "global_batch_size": config.train.global_batch_size,
        "device": device,
        "num_workers": request.num_workers,
        "threads": request.threads,
        "steps": request.steps,
        "load_before": load,
        "forms": summarise(rounds, images=config.train.global_batch_size),
    }
    console().print(step_table(results))
    return results


def summarise(
    rounds: Sequence[Mapping[str, StepCost]], *, images: int
) -> dict[str, dict[str, Any]]:
    """Return medians over the rounds by form, and the ratio of each to the first form.

    Ratios are taken within each round, so that a machine whose speed drifts does not change them.
    """
    first = next(iter(rounds[0]))
    summary = {}
    for form in rounds[0]:
        costs = [costs[form] for costs in rounds]
        ms = [cost.ms for cost in costs]
        waits = [cost.wait_share for cost in costs if cost.wait_share is not None]
        summary[form] = {
            "ms": statistics.median(ms),
            "min_ms": min(ms),
            "max_ms": max(ms),
            "images_per_s": 1000 * images / statistics.median(ms),
            "ratio": statistics.median(each[form].ms / each[first].ms for each in rounds),
            "peak_bytes": max(cost.peak_bytes for cost in costs),
            "wait_share": statistics.median(waits) if waits else None,
        }
    return summary


def step_table(results: Mapping[str, Any]) -> Table:
    """Return the table of the forms."""
    first = next(iter(results["forms"]))
    images, workers = results["global_batch_size"], results["num_workers"]
    table = Table(
        title=f"A step of {images} images, {workers} worker(s)",
        title_justify="left",
        caption=(
            f"Medians of the repeats; ratio to the time of {FORMS[first]} in the same repeat. "
            f"Memory of a train worker. System load {results['load_before']:.1f} before."
        ),
        caption_justify="left",
    )
    table.add_column("form")
    for column in ("ms", "min-max of ms", "images/s", "ratio", "peak memory", "waits for data"):
        table.add_column(column, justify="right")
    for form, cost in results["forms"].items():
        wait = cost["wait_share"]
        table.add_row(
            FORMS[form],
            f"{cost['ms']:,.1f}",
            f"{cost['min_ms']:,.1f}-{cost['max_ms']:,.1f}",
            f"{cost['images_per_s']:,.0f}",
            f"{cost['ratio']:.2f}",
            f"{cost['peak_bytes'] / _MIB:,.0f} MiB",
            "" if wait is None else f"{wait:.0%}",
        )
    return table

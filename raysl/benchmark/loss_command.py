"""`raysl benchmark loss`: compare tiled NT-Xent with the matrix of all pairs."""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from raysl.benchmark.arguments import add_benchmark, add_json, add_repeats, whole, wholes
from raysl.benchmark.loss import FORMS, device_name, measure_in_own_process
from raysl.report.terminal import console, say

_LONG_MS = 20_000.0  # a form with slower steps is measured once
_MIB = 1 << 20


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure time and memory of NT-Xent, in tiles and with the matrix of all pairs"
    loss = add_benchmark(kinds, "loss", summary)
    loss.add_argument(
        "--batches",
        type=wholes,
        default=[512, 4096, 32768],
        help="batch sizes (512,4096,32768)",
    )
    loss.add_argument("--dim", type=whole, default=128, help="width of an embedding (128)")
    add_repeats(loss)
    add_json(loss)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both forms at each batch size, in turns; print a table."""
    load = os.getloadavg()[0]
    measured: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for repeat in range(arguments.repeats):
        for batch_size in arguments.batches:
            for form in FORMS:
                earlier = measured.setdefault((batch_size, form), [])
                if earlier and (earlier[-1]["ms"] is None or earlier[-1]["ms"] > _LONG_MS):
                    continue
                say(
                    f"measuring {form} at batch size {batch_size:,}, repeat {repeat + 1} of "
                    f"{arguments.repeats}"
                )
                earlier.append(measure_in_own_process(form, batch_size, arguments.dim))
    results = {
        "device": device_name(),
        "num_threads": torch.get_num_threads(),
        "load_before": load,
        "dim": arguments.dim,
        "cases": [summarise(repeats) for repeats in measured.values()],
    }
    console().print(loss_table(results))
    return results


def summarise(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median time and the largest memory of the repeats of a form and batch size."""
    good = [repeat for repeat in repeats if repeat["problem"] is None]
    if not good:
        return {**repeats[0], "num_repeats": 0, "min_ms": None, "max_ms": None}
    times = [repeat["ms"] for repeat in good]
    return {
        **good[0],
        "ms": statistics.median(times),
        "peak_bytes": max(repeat["peak_bytes"] for repeat in good),
        "num_repeats": len(good),
        "min_ms": min(times),
        "max_ms": max(times),
    }


def loss_table(results: Mapping[str, Any]) -> Table:
    """Return the table of both forms over the batch size."""
    table = Table(
        title=f"NT-Xent forward and backward, {results['dim']} dimensions, {results['device']}",
        title_justify="left",
        caption=(
            "plain: a matrix of all pairs of the 2N views; tiled: the form that methods use. "
            "Median of the repeats; memory without the inputs. "
            f"{results['num_threads']} thread(s), system load {results['load_before']:.1f} before."
        ),
        caption_justify="left",
    )
    table.add_column("form")
    for column in ("batch size", "ms", "min-max of ms", "peak memory", "KiB per image"):
        table.add_column(column, justify="right")
    for case in results["cases"]:
        cells = [case["form"], f"{case['batch_size']:,}"]
        if case["problem"] is not None:
            table.add_row(*cells, case["problem"])
            continue
        table.add_row(
            *cells,
            f"{case['ms']:,.1f}",
            f"{case['min_ms']:,.1f}-{case['max_ms']:,.1f}",
            f"{case['peak_bytes'] / _MIB:,.1f} MiB",
            f"{case['peak_bytes'] / 1024 / case['batch_size']:,.1f}",
        )
    return table

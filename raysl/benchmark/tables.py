"""Format the results of `raysl benchmark` as tables and sentences."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from raysl.benchmark.input_peer import PEERS
from raysl.benchmark.plan import KINDS
from raysl.benchmark.view_function import STAGES

_MIB = 1 << 20
_GPU_IMAGES_PER_S = 1000.0


def sizing(results: Mapping[str, Any], gpu_images_per_s: float | None) -> dict[str, str]:
    """Return two sentences: which stage binds, and how many cores feed a GPU."""
    costs = results["core_ms_per_image"]
    parts = ", ".join(f"{STAGES[stage]} {ms:.2f}" for stage, ms in costs.items())
    stage = STAGES[results["binding_stage"]]
    per_core = results["ray_images_per_s"] / results["cores"]
    gpu = gpu_images_per_s or _GPU_IMAGES_PER_S
    return {
        "binding_sentence": f"What binds: {stage} (core-milliseconds an image: {parts}).",
        "sizing": (
            f"A GPU that trains at {gpu:,.0f} images/s needs about {gpu / per_core:.1f} CPU cores "
            f"of this kind to feed it ({per_core:,.0f} images/s a core through Ray)."
        ),
    }


def input_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the tables of rates and of everything else."""
    return [_rates(results), _rest(results)]


def _rates(results: Mapping[str, Any]) -> Table:
    repeats, cores = results["repeats"], results["cores"]
    count = len(repeats)
    table = Table(
        title=f"Images a second, median of {count} repeat{'s' if count > 1 else ''}",
        title_justify="left",
    )
    for column in ("", "images/s", "images/s/core", "min-max of images/s"):
        table.add_column(column, justify="left" if not column else "right")

    def add(label: str, key: str, on: int, scale: int = 1) -> None:
        values = [repeat[key] for repeat in repeats if repeat.get(key) is not None]
        if not values:
            return
        middle = statistics.median(values)
        low, high = scale * min(values), scale * max(values)
        table.add_row(
            label,
            f"{scale * middle:,.0f}",
            f"{scale * middle / on:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
        )

    add("decoding alone, one core", "decode_images_per_s", 1)
    add("function of a data worker, one core", "function_images_per_s", 1)
    add(f"function, {cores} core(s) at once, without Ray Data", "busy_images_per_s", cores, cores)
    add(f"through Ray Data, {cores} core(s)", "ray_images_per_s", cores)
    for peer, values in results["peers"].items():
        label = f"{PEERS[peer]}, {results['peer_cores']} worker(s)"
        if values["is_installed"]:
            add(label, f"{peer}_images_per_s", results["peer_cores"])
        else:
            table.add_row(label, "not installed", "", "")
    return table


def _rest(results: Mapping[str, Any]) -> Table:
    table = Table(title="The stream through Ray Data", title_justify="left", show_header=False)
    shares = results["function_shares"]
    peers = [
        f"{peer} {values['first_batch_s']:.1f} s"
        for peer, values in results["peers"].items()
        if values["first_batch_s"] is not None
    ]
    spilled = results["spilled_bytes"]
    rows = {
        "efficiency": (
            f"{results['ray_efficiency']:.0%} of cores x function on one core; "
            f"{results['ray_efficiency_all_busy']:.0%} of the function on all cores"
        ),
        "the function's time": ", ".join(f"{STAGES[s]} {v:.0%}" for s, v in shares.items()),
        "first batch": "; ".join([f"{results['first_batch_s']:.1f} s", *peers]),
        "consumer's wait a batch": (
            f"median {1000 * results['consumer_wait_s']:.0f} ms, 99th percentile "
            f"{1000 * results['consumer_wait_p99_s']:.0f} ms"
        ),
        "bytes": (
            f"{results['source_bytes_per_image']:,.0f} read and {results['bytes_per_image']:,.0f} "
            f"moved an image, {results['bytes_per_s'] / _MIB:,.0f} MiB/s"
        ),
        "peak of the object store": _mib(results["peak_object_store_bytes"]),
        "peak of this process": _mib(results["peak_driver_bytes"]),
        "peak of all data workers": (
            f"{_mib(results['peak_workers_bytes'])}, of which "
            f"{_mib(results['peak_workers_private_bytes'])} not shared"
        ),
        "spilled to disk": "not known" if spilled is None else _mib(spilled),
    }
    for label, text in rows.items():
        table.add_row(label, text)
    return table


def plan_table(plans: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of plans over the number of images."""
    table = Table(
        title="The order of a run of 100 epochs",
        title_justify="left",
        caption="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()),
        caption_justify="left",
    )
    table.add_column("source")
    for column in (
        "images",
        "plan sent",
        "build",
        "first item",
        "an item in order",
        "at random",
        "peak memory",
    ):
        table.add_column(column, justify="right")
    for plan in plans:
        begin = [plan["kind"], f"{plan['num_images']:.0e}".replace("e+0", "e")]
        if plan["problem"] is not None:
            table.add_row(*begin, plan["problem"])
            continue
        table.add_row(
            *begin,
            _bytes(plan["plan_bytes"]),
            f"{plan['build_s']:.3f} s",
            f"{plan['first_item_s']:.3f} s",
            f"{plan['item_in_order_ms']:.3f} ms",
            f"{plan['item_at_random_ms']:.2f} ms",
            _bytes(plan["peak_bytes"]),
        )
    return table


def _mib(number: float) -> str:
    return f"{number / _MIB:,.0f} MiB"


def _bytes(number: float) -> str:
    return f"{number / 1024:,.1f} KiB" if number < _MIB else f"{number / _MIB:,.1f} MiB"

"""`raysl benchmark input`: measure the speed of a run's input, and find its slowest stage."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.table import Table

from raysl.benchmark.arguments import add_benchmark, add_json, add_rounds, add_run, positive, whole
from raysl.benchmark.input import InputBenchmark, measure_round, medians, open_input
from raysl.benchmark.ray_input import cores_of, input_layout, share_source, spilled_bytes
from raysl.benchmark.view_function import AUGMENT, CONSUMER, DECODE, READ, STAGES, cost_of
from raysl.embed.ray_embed import quiet
from raysl.report.terminal import console, say, say_notes
from raysl.run.ray_cluster import Layout, connect, disconnect
from raysl.run.recipe import load_run

_MIB = 1 << 20
_GPU_IMAGES_PER_S = 1000.0  # assumed if it is not given
# Keys of the results, and fields of `Stream` that they are from.
_STREAM_KEYS = {
    "first_batch_s": "first_batch_s",
    "consumer_wait_s": "wait_s",
    "consumer_wait_p99_s": "wait_p99_s",
    "bytes_per_image": "bytes_per_image",
    "peak_object_store_bytes": "peak_object_store_bytes",
    "peak_driver_bytes": "peak_driver_bytes",
    "peak_workers_bytes": "peak_workers_bytes",
    "peak_workers_private_bytes": "peak_workers_private_bytes",
}


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure the making of views: on one core, on all cores, and through Ray Data"
    parser = add_benchmark(kinds, "input", summary)
    add_run(parser)
    add_rounds(parser, seconds=10.0, after=", after its warm-up")
    parser.add_argument("--batch-size", type=whole, help="images per batch of a consumer")
    parser.add_argument(
        "--consumers",
        type=whole,
        help="number of processes that take batches (cluster.num_train_workers)",
    )
    parser.add_argument(
        "--gpu-images-per-s",
        type=positive,
        help="training speed of one GPU (img/s of raysl pretrain), to compute the CPUs it needs",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the input in rounds; print tables and advice.

    Raises:
        ConfigError: If a setting is wrong, or the source is too small for the batch size.
        ClusterError: If the data workers do not fit on the cluster.
    """
    bench = open_input(
        load_run(arguments.config, arguments.overrides),
        batch_size=arguments.batch_size,
        num_consumers=arguments.consumers,
        seconds=arguments.seconds,
    )
    with ExitStack() as stack:
        if connect():
            stack.callback(disconnect)
        quiet()
        layout = input_layout(bench.config)
        _say_start(bench, layout)
        spilled_before = spilled_bytes()
        source = share_source(bench.source)
        rounds = []
        for number in range(arguments.repeats):
            label = f"repeat {number + 1} of {arguments.repeats}"
            rounds.append(measure_round(bench, layout, source, number=number, label=label))
        spilled = spilled_bytes()
    results = _results(bench, layout, rounds, arguments.gpu_images_per_s)
    results["spilled_bytes"] = (
        None if spilled is None or spilled_before is None else spilled - spilled_before
    )
    out = console()
    out.print(_rates_table(results))
    out.print(_stream_table(results))
    out.print(results["binding_sentence"], markup=False)
    out.print(results["sizing"], markup=False)
    return results


def _say_start(bench: InputBenchmark, layout: Layout) -> None:
    data, usual = bench.config.data, bench.run_batch_size
    on_device = ", colour operations on the device" if data.color_on == "device" else ""
    less = "" if bench.batch_size == usual else f" (the run's is {usual})"
    say(
        f"raysl benchmark input: {bench.source.name}, {bench.num_images:,} images, recipe "
        f"{data.views.recipe}{on_device}\n"
        f"  {layout.num_data_workers} data worker(s) on {cores_of(layout)} core(s), "
        f"{layout.num_nodes} node(s), {bench.num_consumers} consumer(s), batches of "
        f"{bench.batch_size} images{less}"
    )
    say_notes(bench.source)


def _results(
    bench: InputBenchmark,
    layout: Layout,
    rounds: Sequence[Mapping[str, float | None]],
    gpu_images_per_s: float | None,
) -> dict[str, Any]:
    """Return the medians over the rounds, under the keys of ``--json``."""
    median: dict[str, Any] = medians(rounds)
    cores, rate = cores_of(layout), median["ray_images_per_s"]
    shares = {s: median[f"function_{s}_share"] for s in (READ, DECODE, AUGMENT)}
    cost = cost_of(
        cores=cores,
        ray_images_per_s=rate,
        busy_images_per_s_per_core=median["busy_images_per_s"],
        shares=shares,
        wait_share=median["ray_wait_share"],
    )
    slow_gpu = gpu_images_per_s is not None and gpu_images_per_s < rate
    results: dict[str, Any] = {
        "source": bench.source.name,
        "num_images": bench.num_images,
        "recipe": bench.config.data.views.recipe,
        "color_on": bench.config.data.color_on,
        "batch_size": bench.batch_size,
        "num_consumers": bench.num_consumers,
        "num_data_workers": layout.num_data_workers,
        "num_nodes": layout.num_nodes,
        "cores": cores,
        "decode_images_per_s_per_core": median["decode_images_per_s"],
        "function_images_per_s_per_core": median["function_images_per_s"],
        "function_images_per_s_per_core_all_busy": median["busy_images_per_s"],
        "function_shares": shares,
        "source_bytes_per_image": median["function_source_bytes_per_image"],
        "ray_images_per_s": rate,
        "ray_efficiency": rate / (cores * median["function_images_per_s"]),
        "ray_efficiency_all_busy": rate / (cores * median["busy_images_per_s"]),
        "bytes_per_s": rate * median["ray_bytes_per_image"],
        **{name: median[f"ray_{key}"] for name, key in _STREAM_KEYS.items()},
        "core_ms_per_image": cost.stages,
        "binding_stage": CONSUMER if slow_gpu else cost.binding,
        "repeats": list(rounds),
    }
    return results | _sentences(results, gpu_images_per_s)


def _sentences(results: Mapping[str, Any], gpu_images_per_s: float | None) -> dict[str, str]:
    """Return two sentences: the slowest stage, and the number of cores that feed a GPU."""
    costs = results["core_ms_per_image"]
    parts = ", ".join(f"{STAGES[stage]} {ms:.2f}" for stage, ms in costs.items())
    stage = STAGES[results["binding_stage"]]
    per_core = results["ray_images_per_s"] / results["cores"]
    gpu = gpu_images_per_s or _GPU_IMAGES_PER_S
    return {
        "binding_sentence": f"Slowest stage: {stage} (core-milliseconds per image: {parts}).",
        "sizing": (
            f"A GPU that trains at {gpu:,.0f} images/s needs about {gpu / per_core:.1f} CPU cores "
            f"of this kind to feed it ({per_core:,.0f} images/s per core through Ray)."
        ),
    }


def _rates_table(results: Mapping[str, Any]) -> Table:
    rounds, cores = results["repeats"], results["cores"]
    count = len(rounds)
    table = Table(
        title=f"Images per second, median of {count} repeat{'s' if count > 1 else ''}",
        title_justify="left",
    )
    for column in ("", "images/s", "images/s/core", "min-max of images/s"):
        table.add_column(column, justify="left" if not column else "right")

    def add_row(label: str, key: str, num_cores: int, scale: int = 1) -> None:
        values = [each[key] for each in rounds if each[key] is not None]
        if not values:
            return
        middle = statistics.median(values)
        low, high = scale * min(values), scale * max(values)
        table.add_row(
            label,
            f"{scale * middle:,.0f}",
            f"{scale * middle / num_cores:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
        )

    add_row("decoding alone, one core", "decode_images_per_s", 1)
    add_row("function of a data worker, one core", "function_images_per_s", 1)
    add_row(
        f"function, {cores} core(s) at once, without Ray Data", "busy_images_per_s", cores, cores
    )
    add_row(f"through Ray Data, {cores} core(s)", "ray_images_per_s", cores)
    return table


def _stream_table(results: Mapping[str, Any]) -> Table:
    table = Table(title="The stream through Ray Data", title_justify="left", show_header=False)
    shares = results["function_shares"]
    spilled = results["spilled_bytes"]
    rows = {
        "efficiency": (
            f"{results['ray_efficiency']:.0%} of the function's speed on one core x cores; "
            f"{results['ray_efficiency_all_busy']:.0%} of its speed on all cores at once"
        ),
        "time of the function": ", ".join(f"{STAGES[s]} {v:.0%}" for s, v in shares.items()),
        "first batch": f"{results['first_batch_s']:.1f} s",
        "wait per batch": (
            f"median {1000 * results['consumer_wait_s']:.0f} ms, 99th percentile "
            f"{1000 * results['consumer_wait_p99_s']:.0f} ms"
        ),
        "bytes": (
            f"{results['source_bytes_per_image']:,.0f} read and {results['bytes_per_image']:,.0f} "
            f"moved per image, {results['bytes_per_s'] / _MIB:,.0f} MiB/s"
        ),
        "peak of the object store": _mib(results["peak_object_store_bytes"]),
        "peak of this process": _mib(results["peak_driver_bytes"]),
        "peak of all data workers": (
            f"{_mib(results['peak_workers_bytes'])}, of which "
            f"{_mib(results['peak_workers_private_bytes'])} not shared"
        ),
        "spilled to disk": "unknown" if spilled is None else _mib(spilled),
    }
    for label, text in rows.items():
        table.add_row(label, text)
    return table


def _mib(number: float) -> str:
    return f"{number / _MIB:,.0f} MiB"

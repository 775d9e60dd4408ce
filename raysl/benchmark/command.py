"""`raysl benchmark`: measure the cost of input, plan and loss, and compare methods."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from raysl.benchmark import embed_command as benchmark_embed
from raysl.benchmark import label_free_command as benchmark_label_free
from raysl.benchmark import loss_command as benchmark_loss
from raysl.benchmark import methods_command as benchmark_methods
from raysl.benchmark.input_peer import PEERS, PeerTask, is_installed, run_peer
from raysl.benchmark.plan import KINDS, measure_in_own_process
from raysl.benchmark.plan_picture import draw_plan_scale
from raysl.benchmark.ray_input import (
    cores_of,
    function_on_all_cores,
    input_layout,
    share_source,
    spilled_bytes,
    steps_needed,
    stream,
    stream_task,
)
from raysl.benchmark.tables import input_tables, plan_table, sizing
from raysl.benchmark.view_function import (
    AUGMENT,
    CONSUMER,
    DECODE,
    READ,
    cost_of,
    default_batch_size,
    summarise,
    time_decode,
    time_function,
)
from raysl.data.fragments import images_per_epoch
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.embed.ray_embed import quiet
from raysl.errors import ConfigError
from raysl.evaluate.training_source import open_training_source
from raysl.report.terminal import console, print_json, say, say_notes
from raysl.run.places import with_absolute_sources
from raysl.run.ray_cluster import Layout, connect, disconnect
from raysl.run.recipe import RunConfig, block_spec, load_run, plan_of
from raysl.sources.source import Source

NONE = "none"
_LONG = 1_000_000  # steps: a plan that no measurement in one process comes to the end of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and the arguments of each."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    text = "making views: one core, all cores, through Ray Data, and a torch DataLoader"
    stream = kinds.add_parser("input", help=text, description=f"raysl benchmark input: {text}")
    stream.add_argument("config", type=Path, help="a YAML file or a name: quickstart")
    stream.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    stream.add_argument("--repeats", type=_whole, default=3, help="number of rounds (3)")
    stream.add_argument(
        "--seconds",
        type=_positive,
        default=10.0,
        help="seconds of each measurement after warm-up (10)",
    )
    stream.add_argument("--batch-size", type=_whole, help="batch size of each consumer")
    stream.add_argument(
        "--consumers",
        type=_whole,
        help="processes that consume batches (cluster.num_train_workers)",
    )
    stream.add_argument(
        "--compare",
        default="torch",
        metavar="PEER[,PEER]",
        help=f"{', '.join(PEERS)} or {NONE} (torch)",
    )
    stream.add_argument(
        "--gpu-images-per-s",
        type=_positive,
        help="training speed of one GPU (the img/s of raysl pretrain), to size the CPUs",
    )
    stream.add_argument("--json", action="store_true", help="end with one JSON object of results")
    text = "memory and start time of the plan (the order of a run) over the number of images"
    plan = kinds.add_parser("plan", help=text, description=f"raysl benchmark plan: {text}")
    plan.add_argument(
        "--images",
        type=_numbers,
        default=[10**6, 10**8, 10**9],
        help="numbers of images (1e6,1e8,1e9)",
    )
    plan.add_argument("--figure", type=Path, help="PNG to draw")
    plan.add_argument("--json", action="store_true", help="end with one JSON object of results")
    benchmark_loss.add_arguments(kinds, whole=_whole)
    benchmark_embed.add_arguments(kinds, whole=_whole, positive=_positive)
    benchmark_methods.add_arguments(kinds)
    benchmark_label_free.add_arguments(kinds, whole=_whole)


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1; got {text}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"a number above 0; got {text}")
    return number


def _numbers(text: str) -> list[int]:
    return [_whole(str(int(float(part)))) for part in text.split(",")]


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for."""
    measure = {
        "input": _input,
        "plan": _plan,
        "embed": benchmark_embed.run,
        "loss": benchmark_loss.run,
        "methods": benchmark_methods.run,
        "label_free": benchmark_label_free.run,
    }
    results = measure[arguments.what](arguments)
    if arguments.json:
        print_json(results)
    return 0


class _Bench(NamedTuple):
    """What the measurements of one benchmark share."""

    config: RunConfig[Any]
    source: Source
    batch_size: int
    num_consumers: int
    seconds: float
    peers: list[str]

    def spec(self) -> BlockSpec:
        """Return how the run makes blocks of views."""
        return block_spec(self.config.data)

    @property
    def num_images(self) -> int:
        """Images of an epoch; mixed sources count by their weights."""
        return images_per_epoch(self.source.group_sizes, self.source.weights)

    def plan(self, *, steps: int, num_consumers: int = 1) -> Plan:
        """Return the run's order with the benchmark's batch."""
        train = {
            "global_batch_size": self.batch_size * num_consumers,
            "steps": steps,
            "epochs": None,
        }
        cluster = {"num_train_workers": num_consumers}
        config = self.config.model_copy(
            update={
                "train": self.config.train.model_copy(update=train),
                "cluster": self.config.cluster.model_copy(update=cluster),
            }
        )
        return plan_of(config, self.source)


def _input(arguments: argparse.Namespace) -> dict[str, Any]:
    peers = _peers(arguments.compare)
    config = with_absolute_sources(load_run(arguments.config, arguments.overrides))
    source = open_training_source(config.data, config.evaluate, config.method)
    num_consumers = arguments.consumers or max(1, config.cluster.num_train_workers)
    bench = _Bench(
        config,
        source,
        _batch_size(arguments.batch_size, config, source, num_consumers),
        num_consumers,
        arguments.seconds,
        peers,
    )
    with ExitStack() as stack:
        if connect():
            stack.callback(disconnect)
        quiet()
        layout = input_layout(config)
        _say_start(bench, layout)
        spilled_before = spilled_bytes()
        reference = share_source(source)
        repeats = []
        for number in range(arguments.repeats):
            label = f"repeat {number + 1} of {arguments.repeats}"
            repeats.append(_measure(bench, layout, reference, label=label, number=number))
        spilled = spilled_bytes()
    results = _results(bench, layout, repeats, arguments.gpu_images_per_s)
    known = spilled is not None and spilled_before is not None
    results["spilled_bytes"] = spilled - spilled_before if known else None  # type: ignore[operator]
    out = console()
    for table in input_tables(results):
        out.print(table)
    out.print(results["binding_sentence"], markup=False)
    out.print(results["sizing"], markup=False)
    return results


def _peers(text: str) -> list[str]:
    peers = [name for name in text.split(",") if name != NONE]
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"--compare {text}: unknown {unknown[0]!r}; use {', '.join(PEERS)}, none")
    return peers


def _batch_size(
    asked: int | None, config: RunConfig[Any], source: Source, num_consumers: int
) -> int:
    num_images = images_per_epoch(source.group_sizes, source.weights)
    if num_images < num_consumers:
        raise ConfigError(
            f"{source.name} has {num_images:,} images for {num_consumers} consumers; lower "
            f"--consumers"
        )
    if asked is not None:
        if asked * num_consumers > num_images:
            raise ConfigError(
                f"--batch-size {asked} for {num_consumers} consumer(s) is more than the "
                f"{num_images:,} images of {source.name}; use at most {num_images // num_consumers}"
            )
        return asked
    wanted = config.train.global_batch_size // max(1, config.cluster.num_train_workers)
    return default_batch_size(wanted, num_images=num_images, num_consumers=num_consumers)


def _say_start(bench: _Bench, layout: Layout) -> None:
    config = bench.config
    wanted = config.train.global_batch_size // max(1, config.cluster.num_train_workers)
    on_device = ", colour left to the device" if config.data.color_on == "device" else ""
    less = "" if bench.batch_size == wanted else f" (the run's is {wanted})"
    say(
        f"raysl benchmark input: {bench.source.name}, {bench.num_images:,} images, recipe "
        f"{config.data.views.recipe}{on_device}\n"
        f"  {layout.num_data_workers} data worker(s) on {cores_of(layout)} core(s), "
        f"{layout.num_nodes} node(s), {bench.num_consumers} consumer(s), batches of "
        f"{bench.batch_size} images{less}"
    )
    say_notes(bench.source)
    for peer in bench.peers:
        if not is_installed(peer):
            say(f"  {peer} is not installed: not measured")


def _measure(
    bench: _Bench, layout: Layout, reference: Any, *, label: str, number: int
) -> dict[str, float | None]:
    """Measure everything once, one after the other, and return the figures."""
    spec, seconds = bench.spec(), bench.seconds
    endless = bench.plan(steps=_LONG)
    start = number * 10_000  # other images each time, where there are as many
    say(f"measuring the function on one core, {label}")
    function = time_function(bench.source, endless, spec, seconds=seconds, start=start)
    say(f"measuring decoding on one core, {label}")
    decode_images_per_s = time_decode(bench.source, seconds=seconds / 2)
    say(f"measuring the function on all cores, {label}")
    busy = function_on_all_cores(
        reference, endless, spec, layout=layout, seconds=seconds, start=start
    )
    say(f"measuring the stream through Ray Data, {label}")
    images = busy * cores_of(layout) * seconds
    dealt = bench.plan(steps=_LONG, num_consumers=bench.num_consumers)
    task = stream_task(
        dealt,
        spec,
        layout=layout,
        num_consumers=bench.num_consumers,
        prefetch=bench.config.cluster.prefetch_batches,
        images=images,
    )
    dealt = bench.plan(steps=steps_needed(task), num_consumers=bench.num_consumers)
    ray = stream(reference, dealt, spec, layout=layout, task=task)
    figures: dict[str, float | None] = {
        **{f"function_{name}": value for name, value in function._asdict().items()},
        "decode_images_per_s": decode_images_per_s,
        "busy_images_per_s": busy,
        **{f"ray_{name}": value for name, value in ray._asdict().items()},
    }
    for peer in bench.peers:
        if is_installed(peer):
            say(f"measuring {PEERS[peer]}, {label}")
            speed = run_peer(
                PeerTask(
                    peer, bench.source, endless, bench.config.data, _local_cores(), bench.seconds
                )
            )
            figures[f"{peer}_images_per_s"] = speed.images_per_s
            figures[f"{peer}_first_batch_s"] = speed.first_batch_s
            if speed.left_out:
                say(f"  without {', '.join(speed.left_out)}: it has no such operation")
    return figures


def _local_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _results(
    bench: _Bench,
    layout: Layout,
    repeats: Sequence[Mapping[str, float | None]],
    gpu_images_per_s: float | None,
) -> dict[str, Any]:
    """Put the medians over the repeats under the names that are documented."""
    middle: dict[str, Any] = summarise(repeats)
    cores, rate = cores_of(layout), middle["ray_images_per_s"]
    shares = {s: middle[f"function_{s}_share"] for s in (READ, DECODE, AUGMENT)}
    cost = cost_of(
        cores=cores,
        ray_images_per_s=rate,
        busy_images_per_s_per_core=middle["busy_images_per_s"],
        shares=shares,
        wait_share=middle["ray_wait_share"],
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
        "decode_images_per_s_per_core": middle["decode_images_per_s"],
        "function_images_per_s_per_core": middle["function_images_per_s"],
        "function_images_per_s_per_core_all_busy": middle["busy_images_per_s"],
        "function_shares": shares,
        "source_bytes_per_image": middle["function_source_bytes_per_image"],
        "ray_images_per_s": rate,
        "ray_efficiency": rate / (cores * middle["function_images_per_s"]),
        "ray_efficiency_all_busy": rate / (cores * middle["busy_images_per_s"]),
        "bytes_per_s": rate * middle["ray_bytes_per_image"],
        **{name: middle[f"ray_{key}"] for name, key in _OF_THE_STREAM.items()},
        **_of_peers(bench.peers, middle),
        "core_ms_per_image": cost.stages,
        "binding_stage": CONSUMER if slow_gpu else cost.binding,
        "repeats": list(repeats),
    }
    return results | sizing(results, gpu_images_per_s)


_OF_THE_STREAM = {
    "first_batch_s": "first_batch_s",
    "consumer_wait_s": "wait_s",
    "consumer_wait_p99_s": "wait_p99_s",
    "bytes_per_image": "bytes_per_image",
    "peak_object_store_bytes": "peak_object_store_bytes",
    "peak_driver_bytes": "peak_driver_bytes",
    "peak_workers_bytes": "peak_workers_bytes",
    "peak_workers_private_bytes": "peak_workers_private_bytes",
}


def _of_peers(peers: Sequence[str], middle: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the figures of all peers, and those of the first under names of their own."""
    of_each = {
        name: {
            "images_per_s": middle.get(f"{name}_images_per_s"),
            "first_batch_s": middle.get(f"{name}_first_batch_s"),
            "is_installed": is_installed(name),
        }
        for name in peers
    }
    first: dict[str, Any] = next((p for p in of_each.values() if p["is_installed"]), {})
    return {
        "peer_cores": _local_cores(),
        "peer_images_per_s": first.get("images_per_s"),
        "peer_first_batch_s": first.get("first_batch_s"),
        "peers": of_each,
    }


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    measured = []
    for kind in KINDS:
        for num_images in arguments.images:
            say(f"measuring the plan of {num_images:,} images in {KINDS[kind]}")
            measured.append(measure_in_own_process(kind, num_images))
    console().print(plan_table(measured))
    if arguments.figure is not None:
        draw_plan_scale(arguments.figure, measured)
        say(f"drawn: {arguments.figure}")
    return {"plans": measured}

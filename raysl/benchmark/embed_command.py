"""`raysl benchmark embed`: measure embedding on Ray, and estimate the cost of a billion images."""

import argparse
import os
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from rich.table import Table

from raysl.benchmark.arguments import add_benchmark, add_json, add_rounds, positive, whole
from raysl.benchmark.embedding import (
    EmbeddingCosts,
    PlanLine,
    decoding_rate,
    embedding_pools,
    measure_on_ray,
    multiplication_rate,
    plan_embedding,
    sample_rows,
)
from raysl.embed.config import EmbedConfig
from raysl.embed.ray_embed import quiet
from raysl.embed.source import embedding_of, encoder_file
from raysl.encoder.file import read_description
from raysl.evaluate.embedding import EmbeddingSpec, images_per_chunk
from raysl.report.terminal import console, mapping_table, say, say_notes
from raysl.run.ray_cluster import connect, disconnect
from raysl.sources.command_line import open_argument
from raysl.sources.source import Source, size_of

_MIB = 1 << 20
_WORKERS = 100
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((31_557_600.0, "years"), (86_400.0, "days"), (3600.0, "h"), (60.0, "min"))


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure embedding on Ray, and estimate the cost of a billion images"
    parser = add_benchmark(kinds, "embed", summary)
    parser.add_argument("source", help="a source, as for raysl embed")
    parser.add_argument("encoder", metavar="run", help="a run folder, or an encoder.safetensors")
    parser.add_argument("overrides", nargs="*", help="settings of raysl embed: key=value")
    add_rounds(parser, seconds=20.0)
    parser.add_argument(
        "--images", type=whole, default=10**9, help="number of images in the estimate (1e9)"
    )
    parser.add_argument(
        "--workers",
        type=whole,
        default=_WORKERS,
        help=f"number of workers in the estimate: GPUs, or CPUs if there are none ({_WORKERS})",
    )
    parser.add_argument(
        "--worker-images-per-s",
        type=positive,
        help="speed of a worker in the estimate (the measured one)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in rounds; print the rates and the estimate.

    Raises:
        ConfigError: If a setting is wrong, or there is no encoder.
        ClusterError: If no CPU of the cluster is free.
    """
    encoder = encoder_file(arguments.encoder)
    config, source = open_argument(arguments, EmbedConfig, where="raysl benchmark embed")
    embedding = embedding_of(encoder, config)
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        if connect():
            stack.callback(disconnect)
        quiet()
        pools = embedding_pools(config.num_workers)
        actors = pools.num_cpu_actors
        say(
            f"raysl benchmark embed: {source.name}, {encoder}, {embedding.size_px} px, "
            f"{actors} actor(s) on CPUs, {pools.num_gpu_actors} on GPUs"
        )
        say_notes(source)
        expected = decoding_rate(source, embedding) * actors
        rounds = []
        for number in range(arguments.repeats):
            say(f"measuring Ray Data, {number + 1} of {arguments.repeats}")
            measured = measure_on_ray(
                source,
                embedding,
                num_workers=config.num_workers,
                images_per_s=expected,
                seconds=arguments.seconds,
            )
            rounds.append(measured)
            expected = measured.images_per_s
    rates = [measured.images_per_s for measured in rounds]
    results: dict[str, Any] = {
        "source": source.name,
        "encoder": str(encoder),
        "size_px": embedding.size_px,
        "chunk_images": images_per_chunk(embedding.size_px),
        "actors": actors,
        "gpus": pools.num_gpu_actors,
        "load_before": load,
        "ray": {
            "images_per_s": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "values": rates,
            "first_batch_s": statistics.median(measured.first_batch_s for measured in rounds),
        },
    }
    _print_rates(results)
    costs = _costs(arguments, config, source, embedding, results)
    lines = plan_embedding(costs)
    _print_plan(costs, lines, gpus=pools.num_gpu_actors)
    plan = {"given": costs._asdict(), "lines": [line._asdict() for line in lines]}
    return results | {"plan": plan}


def _print_rates(results: Mapping[str, Any]) -> None:
    rates = results["ray"]
    low, high = rates["min"], rates["max"]
    rows = {
        "images per second": f"{rates['images_per_s']:,.1f} ({low:,.1f}-{high:,.1f})",
        "first chunk": f"{rates['first_batch_s']:.1f} s",
    }
    console().print(mapping_table(f"Embedding by Ray Data, {results['actors']} actors", rows))


def _costs(
    arguments: argparse.Namespace,
    config: EmbedConfig,
    source: Source,
    embedding: EmbeddingSpec,
    results: Mapping[str, Any],
) -> EmbeddingCosts:
    sizes = [size_of(encoded) for encoded in source.read(sample_rows(source))]
    workers = results["gpus"] or results["actors"]
    return EmbeddingCosts(
        num_images=arguments.images,
        embed_dim=int(read_description(embedding.encoder)["embed_dim"]),
        bytes_per_feature=int(np.dtype(config.store).itemsize),
        image_bytes=float(np.mean(sizes)),
        size_px=embedding.size_px,
        chunk_images=results["chunk_images"],
        images_per_s_per_worker=arguments.worker_images_per_s
        or results["ray"]["images_per_s"] / workers,
        num_workers=arguments.workers,
        decode_images_per_s_per_cpu=decoding_rate(source, embedding),
        multiplications_per_s=multiplication_rate(),
        shard_bytes=int(config.shard_mib * _MIB),
    )


def _print_plan(costs: EmbeddingCosts, lines: list[PlanLine], *, gpus: int) -> None:
    kind = "GPUs" if gpus else "CPUs"
    table = Table(
        title=f"On paper: {costs.num_images:,} images on {costs.num_workers:,} {kind} at "
        f"{costs.images_per_s_per_worker:,.1f} images/s each",
        title_justify="left",
    )
    for column in ("quantity", "formula", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for line in lines:
        table.add_row(line.what, line.formula, value_text(line))
    out = console()
    out.print(table)
    out.print(
        f"M images, G {kind}, r = {costs.images_per_s_per_worker:,.1f} images/s of each (measured "
        f"here unless set), D = {costs.embed_dim} features of b = {costs.bytes_per_feature} "
        f"bytes, c = {costs.chunk_images} images per chunk, S = {costs.size_px} px, "
        f"d = {costs.decode_images_per_s_per_cpu:,.0f} images/s read and decoded by one core, "
        f"f = {costs.multiplications_per_s / 1e9:,.1f}e9 multiplications/s of one worker",
        markup=False,
    )


def value_text(line: PlanLine) -> str:
    """Format a quantity of the estimate: 2.1 TB, 4.9 days, 12 CPUs."""
    if line.unit == "s":
        for seconds, name in _TIMES:
            if line.value >= seconds:
                return f"{line.value / seconds:,.1f} {name}"
        return f"{line.value:,.2g} s"
    if line.unit.startswith("bytes"):
        for size, letter in _UNITS:
            if line.value >= size:
                return f"{line.value / size:,.1f} {letter}B{line.unit.removeprefix('bytes')}"
    return f"{line.value:,.0f} {line.unit}"

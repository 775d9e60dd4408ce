"""`raysl benchmark embed`: compare embedding on Ray with plain torch loops; plan a billion."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from rich.table import Table

from raysl.benchmark.embedding_peer import LOOPS, LoopTask, run_loop
from raysl.benchmark.embedding_plan import EmbeddingCosts, PlanLine, plan_embedding
from raysl.benchmark.ray_embedding import embedding_pools, measure_on_ray
from raysl.embed.config import EmbedConfig
from raysl.embed.ray_embed import quiet
from raysl.embed.source import embedding_of, encoder_file
from raysl.encoder.file import read_description
from raysl.errors import ConfigError
from raysl.evaluate.embedding import Embedding, chunk_images, read_pixels
from raysl.report.terminal import console, say, say_notes
from raysl.run.ray_cluster import connect, disconnect
from raysl.sources.command_line import open_asked
from raysl.sources.source import Source, size_of

RAY = "ray"
_NONE = "none"
_MIB = 1 << 20
_MATRIX = 1024
_DECODED = 256
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((31_557_600.0, "years"), (86_400.0, "days"), (3600.0, "h"), (60.0, "min"))


def add_arguments(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]",
    *,
    whole: Callable[[str], int],
    positive: Callable[[str], float],
) -> None:
    """Declare the arguments.

    Args:
        kinds: What `raysl benchmark` measures.
        whole: Reads a number above 0.
        positive: Likewise, with a fraction.
    """
    text = "compare embedding on Ray with plain torch loops, and plan a billion images"
    embed = kinds.add_parser("embed", help=text, description=f"raysl benchmark embed: {text}")
    embed.add_argument("source", help="a source, as for raysl embed")
    embed.add_argument("encoder", metavar="run", help="a run folder, or an encoder.safetensors")
    embed.add_argument("overrides", nargs="*", help="settings of raysl embed: key=value")
    embed.add_argument("--repeats", type=whole, default=3, help="number of rounds (3)")
    embed.add_argument(
        "--seconds", type=positive, default=20.0, help="seconds of each measurement (20)"
    )
    embed.add_argument(
        "--compare",
        default=",".join(LOOPS),
        metavar="LOOP[,LOOP]",
        help=f"{', '.join(LOOPS)} or {_NONE} (all)",
    )
    embed.add_argument(
        "--images",
        type=lambda given: whole(str(int(float(given)))),
        default=10**9,
        help="images of the plan (1e9)",
    )
    embed.add_argument(
        "--workers", type=whole, help="workers of the plan: GPUs, or CPUs without GPUs (100)"
    )
    embed.add_argument(
        "--worker-images-per-s",
        type=positive,
        help="speed of a worker in the plan (as measured here)",
    )
    embed.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure Ray and the loops, in turns, and print tables."""
    loops = [name for name in arguments.compare.split(",") if name != _NONE]
    unknown = [name for name in loops if name not in LOOPS]
    if unknown:
        raise ConfigError(
            f"--compare {arguments.compare}: unknown {unknown[0]!r}; use {', '.join(LOOPS)}, none"
        )
    encoder = encoder_file(arguments.encoder)
    config, source = open_asked(arguments, EmbedConfig, where="raysl benchmark embed")
    embedding = embedding_of(encoder, config)
    load = os.getloadavg()[0]
    measured: dict[str, list[float]] = {name: [] for name in (RAY, *loops)}
    first: dict[str, list[float]] = {name: [] for name in (RAY, *loops)}
    with ExitStack() as stack:
        if connect():
            stack.callback(disconnect)
        quiet()
        pools = embedding_pools(config.num_workers)
        cores = pools.num_cpu_actors
        say(
            f"raysl benchmark embed: {source.name}, {encoder}, {embedding.size_px} px, "
            f"{cores} actor(s) on CPUs, {pools.num_gpu_actors} on GPUs; loops on {_local_cores()} "
            f"core(s)"
        )
        say_notes(source)
        guess = _one_core(source, embedding) * cores
        for repeat in range(arguments.repeats):
            for name in (*loops, RAY):
                say(f"measuring {LOOPS.get(name, 'Ray Data')}, {repeat + 1} of {arguments.repeats}")
                if name == RAY:
                    seen: Any = measure_on_ray(
                        source,
                        embedding,
                        num_workers=config.num_workers,
                        images_per_s=measured[loops[-1]][-1] if loops else guess,
                        seconds=arguments.seconds,
                    )
                else:
                    task = LoopTask(name, source, embedding, _local_cores(), arguments.seconds)
                    seen = run_loop(task)
                measured[name].append(seen.images_per_s)
                first[name].append(seen.first_batch_s)
        gpus = pools.num_gpu_actors
    results = {
        "source": source.name,
        "encoder": str(encoder),
        "size_px": embedding.size_px,
        "chunk_images": chunk_images(embedding.size_px),
        "cores": _local_cores(),
        "actors": cores,
        "gpus": gpus,
        "load_before": load,
        **{name: _summary(values, first[name]) for name, values in measured.items()},
        "ratio": {name: _ratio(measured[RAY], measured[name]) for name in loops},
    }
    console().print(_table(results, loops))
    given = _given(arguments, config, source, embedding, results)
    results["plan"] = {"given": given._asdict(), "lines": _print_plan(given, gpus=gpus)}
    return results


def _local_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _summary(values: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    return {
        "images_per_s": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
        "first_batch_s": statistics.median(first),
    }


def _ratio(ray: Sequence[float], loop: Sequence[float]) -> dict[str, float]:
    """The ratio within each repeat: what else the machine does then slows both."""
    each = [a / b for a, b in zip(ray, loop, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def _one_core(source: Source, embedding: Embedding) -> float:
    """Images a second that one core reads and decodes."""
    count = min(_DECODED, int(source.group_sizes.sum()))
    rows = np.arange(count, dtype=np.int64)
    read_pixels(source, rows[:1], embedding)
    began = time.perf_counter()
    read_pixels(source, rows, embedding)
    return count / (time.perf_counter() - began)


def _table(results: Mapping[str, Any], loops: Sequence[str]) -> Table:
    table = Table(title="Embedding, images a second after the start", title_justify="left")
    for column in ("how", "median", "min", "max", "first batch, s", "Ray / this"):
        table.add_column(column, justify="left" if column == "how" else "right")
    for name in (RAY, *loops):
        seen = results[name]
        ratio = "" if name == RAY else f"{results['ratio'][name]['median']:.3f}"
        table.add_row(
            LOOPS.get(name, f"Ray Data, {results['actors']} actors"),
            *(f"{seen[key]:,.1f}" for key in ("images_per_s", "min", "max", "first_batch_s")),
            ratio,
            style="bold" if name == RAY else None,
        )
    return table


def _given(
    arguments: argparse.Namespace,
    config: EmbedConfig,
    source: Source,
    embedding: Embedding,
    results: Mapping[str, Any],
) -> EmbeddingCosts:
    rows = np.arange(min(_DECODED, int(source.group_sizes.sum())), dtype=np.int64)
    sizes = [size_of(each) for each in source.read(rows)]
    workers = results["gpus"] or results["actors"]
    return EmbeddingCosts(
        num_images=arguments.images,
        embed_dim=int(read_description(embedding.encoder)["embed_dim"]),
        bytes_per_feature=int(np.dtype(config.store).itemsize),
        image_bytes=float(np.mean(sizes)),
        size_px=embedding.size_px,
        chunk_images=results["chunk_images"],
        images_per_s_per_worker=arguments.worker_images_per_s
        or results[RAY]["images_per_s"] / workers,
        num_workers=arguments.workers or 100,
        decode_images_per_s_per_cpu=_one_core(source, embedding),
        multiplications_per_s=_multiplications_per_s(),
        shard_bytes=int(config.shard_mib * _MIB),
    )


def _multiplications_per_s() -> float:
    """Of a float32 matrix product on a GPU, or on one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.randn(_MATRIX, _MATRIX, device=device)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the GPU
        times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return float(_MATRIX**3 / min(times))


def _print_plan(given: EmbeddingCosts, *, gpus: int) -> list[dict[str, Any]]:
    kind = "GPUs" if gpus else "CPUs"
    lines = plan_embedding(given)
    table = Table(
        title=f"On paper: {given.num_images:,} images on {given.num_workers:,} {kind} at "
        f"{given.images_per_s_per_worker:,.1f} images/s each",
        title_justify="left",
    )
    for column in ("what", "formula", "is"):
        table.add_column(column, justify="right" if column == "is" else "left")
    for line in lines:
        table.add_row(line.what, line.formula, _shown(line))
    out = console()
    out.print(table)
    out.print(
        f"M images, G {kind}, r = {given.images_per_s_per_worker:,.1f} images/s of one (measured "
        f"here unless given), D = {given.embed_dim} features of b = {given.bytes_per_feature} "
        f"bytes, c = {given.chunk_images} images a chunk, S = {given.size_px} px, "
        f"d = {given.decode_images_per_s_per_cpu:,.0f} images/s that one core reads and decodes, "
        f"f = {given.multiplications_per_s / 1e9:,.1f}e9 multiplications/s of one, measured here",
        markup=False,
    )
    return [line._asdict() for line in lines]


def _shown(line: PlanLine) -> str:
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

"""Measure the input of a run: the speed at which its views are made, without training."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raysl.benchmark.ray_input import (
    Stream,
    cores_of,
    function_on_all_cores,
    steps_needed,
    stream,
    stream_task,
)
from raysl.benchmark.view_function import default_batch_size, time_decode, time_function
from raysl.data.fragments import images_per_epoch
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.errors import ConfigError
from raysl.evaluate.training_source import open_training_source
from raysl.report.terminal import say
from raysl.run.places import with_absolute_sources
from raysl.run.ray_cluster import Layout
from raysl.run.recipe import RunConfig, block_spec, plan_of
from raysl.sources.source import Source

_MANY_STEPS = 1_000_000  # more than a measurement in one process takes
_ROUND_ITEMS = 10_000  # distance between the first items of rounds


class InputBenchmark(NamedTuple):
    """The input of a run, and how to measure it."""

    config: RunConfig[Any]
    source: Source
    batch_size: int
    """Images per batch of a consumer."""
    num_consumers: int
    seconds: float
    """Duration of each measurement after its warm-up."""

    @property
    def run_batch_size(self) -> int:
        """Images per batch of a worker in the run itself."""
        return self.config.train.global_batch_size // self.config.worker_counts[-1]

    @property
    def num_images(self) -> int:
        """Images per epoch; mixed sources count by their weights."""
        return images_per_epoch(self.source.group_sizes, self.source.weights)

    def spec(self) -> BlockSpec:
        """Return the description of the run's blocks of views."""
        return block_spec(self.config.data)

    def plan(self, *, steps: int = _MANY_STEPS, num_consumers: int = 1) -> Plan:
        """Return the run's order of images with the benchmark's batch size."""
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


def open_input(
    config: RunConfig[Any],
    *,
    batch_size: int | None = None,
    num_consumers: int | None = None,
    seconds: float,
) -> InputBenchmark:
    """Open the source of a run, and choose batch size and consumers of its benchmark.

    Args:
        config: The run's configuration.
        batch_size: Images per batch of a consumer; None takes the run's, at most 256 and half of
            the source.
        num_consumers: Number of processes that take batches; None takes the number of the run's
            train workers.
        seconds: Duration of each measurement.

    Raises:
        ConfigError: If the source has fewer images than a batch of all consumers.
        DataError: If the source cannot be read.
    """
    config = with_absolute_sources(config)
    source = open_training_source(config.data, config.evaluate, config.method)
    num_consumers = num_consumers or config.worker_counts[-1]
    bench = InputBenchmark(config, source, batch_size or 1, num_consumers, seconds)
    num_images = bench.num_images
    if num_images < num_consumers:
        raise ConfigError(
            f"{source.name} has {num_images:,} images for {num_consumers} consumers; lower "
            f"--consumers"
        )
    if batch_size is None:
        usual = default_batch_size(
            bench.run_batch_size, num_images=num_images, num_consumers=num_consumers
        )
        return bench._replace(batch_size=usual)
    if batch_size * num_consumers > num_images:
        raise ConfigError(
            f"--batch-size {batch_size} for {num_consumers} consumer(s) is more than the "
            f"{num_images:,} images of {source.name}; use at most {num_images // num_consumers}"
        )
    return bench


def measure_round(
    bench: InputBenchmark, layout: Layout, source: Any, *, number: int, label: str
) -> dict[str, float | None]:
    """Measure each part of the input once, one after the other.

    Args:
        bench: The input to measure.
        layout: The data workers on the connected cluster.
        source: Reference to the source in Ray's object store.
        number: Number of the round, from 0.
        label: Name of the round, for messages.

    Returns:
        Measurements by name: ``function_`` of the data workers' function on one core, ``decode_``
        of decoding on one core, ``busy_`` of the function on all cores, ``ray_`` of the stream.
    """
    spec, seconds = bench.spec(), bench.seconds
    plan, start = bench.plan(), number * _ROUND_ITEMS
    say(f"measuring the function on one core, {label}")
    function = time_function(bench.source, plan, spec, seconds=seconds, start=start)
    say(f"measuring decoding on one core, {label}")
    decode_images_per_s = time_decode(bench.source, seconds=seconds / 2)
    say(f"measuring the function on all cores, {label}")
    busy = function_on_all_cores(source, plan, spec, layout=layout, seconds=seconds, start=start)
    say(f"measuring the stream through Ray Data, {label}")
    images = busy * cores_of(layout) * seconds
    streamed = measure_stream(bench, layout, source, images=images)
    return {
        **{f"function_{name}": value for name, value in function._asdict().items()},
        "decode_images_per_s": decode_images_per_s,
        "busy_images_per_s": busy,
        **{f"ray_{name}": value for name, value in streamed._asdict().items()},
    }


def measure_stream(bench: InputBenchmark, layout: Layout, source: Any, *, images: float) -> Stream:
    """Measure the stream of batches through Ray Data.

    Args:
        bench: The input to measure.
        layout: The data workers on the connected cluster.
        source: Reference to the source in Ray's object store.
        images: Approximate number of images to measure, after the warm-up.

    Raises:
        RayslError: The error of a data worker.
        ClusterError: If the CPUs are in use.
    """
    spec = bench.spec()
    task = stream_task(
        bench.plan(num_consumers=bench.num_consumers),
        spec,
        layout=layout,
        num_consumers=bench.num_consumers,
        prefetch=bench.config.cluster.prefetch_batches,
        images=images,
    )
    plan = bench.plan(steps=steps_needed(task), num_consumers=bench.num_consumers)
    return stream(source, plan, spec, layout=layout, task=task)


def medians(rounds: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the median of each measurement over the rounds; None if a round lacks it."""
    result: dict[str, float | None] = {}
    for name in rounds[0]:
        values = [value for each in rounds if (value := each[name]) is not None]
        result[name] = statistics.median(values) if len(values) == len(rounds) else None
    return result

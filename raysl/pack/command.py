"""`raysl pack`: rewrite any source as shuffled Parquet shards that stream fast."""

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from raysl.config.help_text import settings_text
from raysl.data.first_look import first_look
from raysl.pack.config import PackConfig
from raysl.pack.ray_pack import ray_runner
from raysl.pack.run import Calls, Facts, PackResult, Runner, Unit, pack, thread_runner
from raysl.pack.shards import Job, Report
from raysl.report.progress import CountView
from raysl.report.terminal import console, mapping_table, print_json, say, say_notes
from raysl.run.ray_cluster import connect, disconnect
from raysl.run.shell import command
from raysl.sources.command_line import open_argument
from raysl.sources.source import Source

_MIB = 1 << 20

_EPILOG = """\
The settings and their defaults:
{settings}

Images keep their original bytes unless they must be shrunk or are neither JPEG, PNG nor WebP. The
shards have the columns image, label (if there are labels), path (the id of the image in its source,
which data.filter calls row_id), width and height. Bad images are left out and listed in
OUT/bad_images.jsonl.

The same command resumes an interrupted one; the result is the same to the bit for any
interruptions and any number of workers. Two processes must not pack into one folder at once.

  raysl pack photos/ packed/ short_side_px=256
  raysl pack 's3://bucket/shards/*.tar' s3://bucket/packed num_workers=64
  raysl pack cifar10 packed/ num_workers=0         without Ray, in threads of this process
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(settings=settings_text(PackConfig, without=["source"]))
    parser.add_argument(
        "source", help="a folder of images, Parquet, tar, s3://..., digits, cifar10, ..."
    )
    parser.add_argument(
        "output", metavar="out", help="a folder: a local path or a URI such as s3://bucket/name"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Pack a source, or resume an interrupted pack."""
    began = time.monotonic()
    config, source = open_argument(arguments, PackConfig, where="raysl pack")
    count = int(source.group_sizes.sum())
    say(f"packing {count:,} images from {source.name} into {arguments.output}")
    say_notes(source, first_look(source))
    view = CountView()
    with ExitStack() as stack:
        stack.callback(view.close)
        run_units = _runner(config, stack)
        result = pack(source, config, arguments.output, run=run_units, view=view)
    _say_result(result, source_images=count, seconds=time.monotonic() - began)
    if arguments.json:
        print_json(_values(result, seconds=time.monotonic() - began))
    return 0


def _runner(config: PackConfig, stack: ExitStack) -> Runner:
    if config.num_workers == 0:
        return thread_runner(os.cpu_count() or 1)
    run_on_ray = ray_runner(config.num_workers)

    def run(
        function: Unit, source: Source, job: Job, calls: Calls, *, report: Report
    ) -> Iterator[Facts]:
        # Ray is connected at the first unit: a complete or refused folder does not need it.
        if connect():
            stack.callback(disconnect)
        yield from run_on_ray(function, source, job, calls, report=report)

    return run


def _say_result(result: PackResult, *, source_images: int, seconds: float) -> None:
    if result.complete_before:
        say(f"{result.output}: already packed; nothing to do")
    summary = {
        "images": f"{result.images:,} of {source_images:,}",
        "bad images": f"{result.bad_images:,}"
        + (f", listed in {result.output}/bad_images.jsonl" if result.bad_images else ""),
        "bytes": f"{result.bytes_in / _MIB:,.1f} MiB in, {result.bytes_out / _MIB:,.1f} MiB out",
        "shards": f"{result.shards:,}",
        "fingerprint": result.fingerprint,
        "seconds": f"{seconds:,.1f}",
    }
    out = console()
    out.print(mapping_table(f"packed into {result.output}", summary))
    source_setting = shlex.quote(f"data.source={result.output}")
    out.print(f"next      {command('data', result.output)}", markup=False)
    out.print(f"then      raysl pretrain CONFIG {source_setting} name=packed", markup=False)


def _values(result: PackResult, *, seconds: float) -> dict[str, Any]:
    return {**result._asdict(), "seconds": seconds}

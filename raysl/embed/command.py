"""`raysl embed`: write the features of any source to Parquet, using all nodes of a cluster."""

import argparse
import time
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import torch

from raysl.config.help_text import settings_text
from raysl.data.first_look import first_look
from raysl.embed.config import EmbedConfig
from raysl.embed.ray_embed import quiet, stream_on_ray
from raysl.embed.source import (
    EmbedResult,
    MakeChunks,
    embed_source,
    encoder_file,
    other_decoding,
)
from raysl.evaluate.embedding import Chunk, ChunkPlan, EmbeddingSpec, stream_here
from raysl.folder.address import is_address
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

OUT then holds Parquet shards with the columns id, row, label and label_name (if there are labels)
and features; pandas, pyarrow and duckdb open it as one table. The id of a file is its path below
the source, that of a tar member is SHARD/MEMBER, that of a Parquet row FILE:ROW; data.filter calls
it row_id. Bad images are left out and listed in OUT/_bad_images.jsonl.

The same command resumes an interrupted one; the result depends neither on interruptions nor on the
number of workers. Two processes must not embed into one folder at once.

  raysl embed photos/ runs/my_run embeddings/
  raysl embed 's3://bucket/*.parquet' encoder.safetensors s3://bucket/embeddings store=float16
  raysl embed cifar10 runs/my_run embeddings/ split=test num_workers=0     without Ray

then
  raysl search embeddings/ --query cat.jpg --grid neighbours.png
  raysl duplicates embeddings/ --contact-sheet duplicates.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(settings=settings_text(EmbedConfig, without=["source"]))
    parser.add_argument(
        "source", help="a folder of images, Parquet, tar, s3://..., digits, cifar10, ..."
    )
    parser.add_argument("encoder", metavar="run", help="a run folder, or an encoder.safetensors")
    parser.add_argument(
        "output", metavar="out", help="a folder: a local path or a URI such as s3://bucket/name"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Embed a source, or resume an interrupted embedding."""
    began = time.monotonic()
    encoder = encoder_file(arguments.encoder)
    config, source = open_argument(arguments, EmbedConfig, where="raysl embed")
    count = int(source.group_sizes.sum())
    say(f"embedding {count:,} images from {source.name} into {arguments.output}")
    say_notes(source, first_look(source))
    for line in other_decoding(encoder, config):
        say(f"  {line}")
    view = CountView()
    with ExitStack() as stack:
        stack.callback(view.close)
        make_chunks = _chunk_maker(config, stack)
        result = embed_source(
            source,
            encoder,
            config,
            arguments.output,
            make=make_chunks,
            view=view,
            address=arguments.encoder if is_address(arguments.encoder) else None,
        )
    seconds = time.monotonic() - began
    _say_result(result, seconds=seconds)
    if arguments.json:
        rate = result.made / seconds if result.made else None
        print_json({**result._asdict(), "seconds": seconds, "images_per_s": rate})
    return 0


def _chunk_maker(config: EmbedConfig, stack: ExitStack) -> MakeChunks:
    if config.num_workers == 0:
        return lambda source, chunks, embedding: stream_here(
            source, chunks, embedding, num_threads=torch.get_num_threads()
        )

    def make_on_ray(
        source: Source, chunks: ChunkPlan, embedding: EmbeddingSpec
    ) -> Generator[Chunk, None, None]:
        # Ray is connected at the first chunk: a complete or refused folder does not need it.
        if connect():
            stack.callback(disconnect)
        quiet()
        yield from stream_on_ray(source, chunks, embedding, num_workers=config.num_workers)

    return make_on_ray


def _say_result(result: EmbedResult, *, seconds: float) -> None:
    if result.complete_before:
        say(f"{result.output}: already embedded; nothing to do")
    rate = f", {result.made / seconds:,.0f} images/s" if result.made else ""
    summary: dict[str, Any] = {
        "images": f"{result.images:,}",
        "bad images": f"{result.bad_images:,}"
        + (f", listed in {result.output}/_bad_images.jsonl" if result.bad_images else ""),
        "features": f"{result.embed_dim:,} per image",
        "shards": f"{result.shards:,}, {result.bytes / _MIB:,.1f} MiB",
        "seconds": f"{seconds:,.1f}{rate}",
    }
    out = console()
    out.print(mapping_table(f"embedded into {result.output}", summary))
    search = command("search", result.output, "--grid", "neighbours.png")
    duplicates = command("duplicates", result.output, "--contact-sheet", "duplicates.png")
    out.print(f"next      {search}\n          {duplicates}", markup=False)

"""What names an image, wherever its source lies."""

from collections.abc import Callable

from raysl.sources.source import BUILT_IN, Source, SourceConfig
from raysl.sources.storage import resolve


def stable_name(source: Source, config: SourceConfig) -> Callable[[int], str]:
    """Return what names a row: its place below the source, wherever the source lies.

    Files are named by their path below the folder, as ``data.filter`` knows them; rows of shards by
    the shard, and what the source says of the place in it.
    """
    if config.source in BUILT_IN:
        return source.where
    _, root = resolve(config.source)
    above = root.rstrip("/")
    prefixes = (above + "/", above.rpartition("/")[0] + "/")

    def name(row: int) -> str:
        where = source.where(row)
        for prefix in prefixes:
            if len(prefix) > 1 and where.startswith(prefix):
                return where[len(prefix) :]
        return where

    return name

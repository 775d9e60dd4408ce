"""Write and read the Parquet shards of embeddings, and the file that describes them.

Files whose names start with an underscore are not data, so pandas, pyarrow, duckdb and Spark open
the folder as one table.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import DataError
from raysl.pack.folder import Bad, PackFolder

ABOUT, BAD_IMAGES = "_embeddings.json", "_bad_images.jsonl"
ID, ROW, LABEL, LABEL_NAME, FEATURES = "id", "row", "label", "label_name", "features"
_META = b"raysl"
_GROUP_ROWS = 4096


class ShardPlan(NamedTuple):
    """The distribution of a source's rows over shards."""

    num_rows: int
    shard_rows: int
    """Number of rows per shard; the last shard has the remainder."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard, and the one after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.num_rows)

    def name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return f"features-{shard:06}-of-{self.num_shards:06}.parquet"


class ShardRows(NamedTuple):
    """The content of a shard, one entry per row, without bad images."""

    ids: Sequence[str]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    """-1 where unknown; None if the source has no labels."""
    features: npt.NDArray[np.float32]  # (n, D)


def embeddings_folder(uri: str) -> PackFolder:
    """Return the folder of embeddings, which may not exist yet.

    Raises:
        DataError: If the URI's scheme is unknown.
    """
    return PackFolder(uri, verb="embed", claim_name=ABOUT)


def write_shard(
    folder: PackFolder,
    name: str,
    content: ShardRows,
    *,
    class_names: Sequence[str],
    store: str,
    about: Mapping[str, Any],
    bad: list[Bad],
) -> None:
    """Write a shard atomically.

    Args:
        folder: The folder of the shards.
        name: File name of the shard.
        content: The rows of the shard.
        class_names: Class names, by class number.
        store: Type of the stored features: float32 or float16.
        about: Metadata of the features, stored in the schema's metadata with ``bad``.
        bad: The images of the shard that are left out.

    Raises:
        DataError: If it cannot be written, such as on a full disk.
    """
    value_type = pa.from_numpy_dtype(np.dtype(store))
    values = np.ascontiguousarray(content.features, dtype=store)
    dim = values.shape[1]
    columns: dict[str, pa.Array] = {
        ID: pa.array(content.ids, pa.string()),
        ROW: pa.array(content.rows, pa.int64()),
    }
    if content.labels is not None:
        columns[LABEL] = pa.array(content.labels, pa.int64(), mask=content.labels < 0)
        if class_names:
            names = pa.array(list(class_names), pa.string())
            columns[LABEL_NAME] = names.take(columns[LABEL])
    columns[FEATURES] = pa.FixedSizeListArray.from_arrays(
        pa.array(values.ravel(), value_type), list_size=dim
    )
    meta = json.dumps({**about, "bad": bad}).encode()
    table = pa.table(columns).replace_schema_metadata({_META: meta})
    with folder.writing(name) as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=_GROUP_ROWS,
            # Features do not repeat and barely compress.
            use_dictionary=[LABEL_NAME] if LABEL_NAME in columns else False,
            compression={ID: "zstd"},
            write_statistics=[ROW],
        )


def read_bad(folder: PackFolder, name: str) -> list[Bad] | None:
    """Return the bad images that a shard's metadata lists; None if the file cannot be read."""
    try:
        with folder.filesystem.open_input_file(f"{folder.root}/{name}") as file:
            meta = pq.read_metadata(file).metadata or {}
        return [
            Bad(int(row), str(row_id), str(reason))
            for row, row_id, reason in json.loads(meta[_META])["bad"]
        ]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None


def read_about(folder: PackFolder) -> dict[str, Any]:
    """Return the metadata of finished embeddings.

    Raises:
        DataError: If the folder holds no embeddings, or `raysl embed` has not finished there.
    """
    try:
        text = folder.read(ABOUT)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder.uri}: cannot be read: {error}") from None
    if text is None:
        raise DataError(
            f"{folder.uri}: holds no embeddings; `raysl embed SOURCE RUN {folder.uri}` makes them"
        )
    about = folder.claim()
    assert about is not None
    if "images" not in about:
        raise DataError(
            f"{folder.uri}: `raysl embed` has not finished there; the same command resumes it"
        )
    return about


@contextmanager
def result_file(path: str | Path) -> Iterator[pa.NativeFile]:
    """Open a result file for writing; it appears atomically when the block ends.

    Args:
        path: A local path or a URI such as s3://bucket/folder/file.

    Raises:
        DataError: If it cannot be written.
    """
    text = str(path)
    head, _, name = text.rpartition("/")
    folder = PackFolder(head or "/" if "/" in text else ".")
    folder.create()
    with folder.writing(name) as stream:
        yield stream

"""Write and read the Parquet shards of embeddings, and the file that describes them.

Names that begin with an underscore are none of the data: pandas, pyarrow, duckdb and Spark open the
folder as one table.
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
    """How the rows of a source are dealt to the shards."""

    num_rows: int
    shard_rows: int
    """Rows of a shard; of the last one, what is left."""

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-self.num_rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard, and the one after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.num_rows)

    def name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return f"features-{shard:06}-of-{self.num_shards:06}.parquet"


class ShardRows(NamedTuple):
    """What goes into a shard, one entry a row; bad images are not among them."""

    ids: Sequence[str]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    """-1 where unknown; None: the source has no labels."""
    features: npt.NDArray[np.float32]  # (n, D)


def embeddings_folder(uri: str) -> PackFolder:
    """Return the folder that embeddings are written into.

    Raises:
        DataError: If the URI's scheme is not known.
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
    """Write a shard; it appears whole or not at all.

    Args:
        folder: Where.
        name: Of the file.
        content: Its rows.
        class_names: By number.
        store: Type of the features: float32 or float16.
        about: What the features are, kept in the schema's metadata with ``bad``.
        bad: The images of these rows that were left out.

    Raises:
        DataError: If it cannot be written, as on a full disk.
    """
    kind = pa.from_numpy_dtype(np.dtype(store))
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
        pa.array(values.ravel(), kind), list_size=dim
    )
    meta = json.dumps({**about, "bad": bad}).encode()
    table = pa.table(columns).replace_schema_metadata({_META: meta})
    with folder.writing(name) as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=_GROUP_ROWS,
            # Features do not repeat, and hardly shrink.
            use_dictionary=[LABEL_NAME] if LABEL_NAME in columns else False,
            compression={ID: "zstd"},
            write_statistics=[ROW],
        )


def read_bad(folder: PackFolder, name: str) -> list[Bad] | None:
    """Return the bad images of a shard that is there; None if its file is damaged."""
    try:
        with folder.filesystem.open_input_file(f"{folder.root}/{name}") as file:
            meta = pq.read_metadata(file).metadata or {}
        return [
            Bad(int(row), str(row_id), str(why))
            for row, row_id, why in json.loads(meta[_META])["bad"]
        ]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None


def read_about(folder: PackFolder) -> dict[str, Any]:
    """Return what is known of finished embeddings.

    Raises:
        DataError: If there are none, or `raysl embed` has not finished there.
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
            f"{folder.uri}: `raysl embed` has not finished there; the same command goes on where "
            f"it stopped"
        )
    return about


@contextmanager
def result_file(place: str | Path) -> Iterator[pa.NativeFile]:
    """Open a file for a result, local or in an object store; it appears whole or not at all.

    Raises:
        DataError: If it cannot be written.
    """
    text = str(place)
    head, _, name = text.rpartition("/")
    folder = PackFolder(head or "/" if "/" in text else ".")
    folder.create()
    with folder.writing(name) as stream:
        yield stream

#!/usr/bin/env bash
# The current files of a Delta table that has deleted rows by deletion vectors, as Spark and Databricks do by default.
# Expected: file_uris(), the list to hand to another Parquet reader, refuses such a table or says so, as to_pyarrow_table() does.
# Seen: it names the files without a word, and a reader of those files gets the deleted rows back.
# Hit: whoever feeds a table's files to a loader of their own: images whose deletion was asked for are trained on again.
# raysl asks deletion_vectors() first and refuses by name (sources/tables.py).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q --disable-pip-version-check install deltalake==1.6.6 pyarrow==25.0.1
"$dir/venv/bin/python" - "$dir/t" <<'P'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

root = Path(sys.argv[1])
write_deltalake(root, pa.table({"n": [0, 1, 2, 3]}))
entries = [json.loads(line) for line in (root / "_delta_log" / f"{0:020}.json").open()]
add = next({k: v for k, v in e["add"].items() if v is not None} for e in entries if "add" in e)
# The entry that deletes row 1 and leaves the file: base85 of a 64-bit roaring bitmap (Delta protocol, "Deletion Vectors").
features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
vector = {"storageType": "i", "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000005c8Xg0rr91",
          "sizeInBytes": 34, "cardinality": 1}
actions = [
    {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}},
    {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}},
    {"add": {**add, "deletionVector": vector}},
]
(root / "_delta_log" / f"{1:020}.json").write_text("\n".join(map(json.dumps, actions)))

print("deltalake", version("deltalake"), "pyarrow", version("pyarrow"))
table = DeltaTable(root)
print("kept by the log:", pa.table(table.deletion_vectors())["selection_vector"].to_pylist())
rows = [n for file in table.file_uris() for n in pq.read_table(file)["n"].to_pylist()]
print("in the files of file_uris():", rows)
try:
    print("to_pyarrow_table():", table.to_pyarrow_table()["n"].to_pylist())
except Exception as error:
    print("to_pyarrow_table():", error)
sys.exit(0 if rows == [0, 1, 2, 3] else "behaviour has changed")
P

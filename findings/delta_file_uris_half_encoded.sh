#!/usr/bin/env bash
# The files of a Delta table in a folder with a space.
# Expected: DeltaTable.file_uris() gives local files as plain absolute paths, which open.
# Seen: the table's own folder comes percent-encoded ("a%20table"), what lies below it does not. No file of that name is
# there, and decoding the whole name breaks the names of partitions, which hold percent signs on the disk.
# Hit: whoever reads a table's current files by another reader, from a folder with a space or another such sign.
# raysl takes the paths of the log (get_add_actions), decodes those, and puts the folder before them (sources/tables.py).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q --disable-pip-version-check install deltalake==1.6.6 pyarrow==25.0.1
"$dir/venv/bin/python" - "$dir/a table" <<'P'
import os
import sys
from importlib.metadata import version

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

root = sys.argv[1]
rows = pa.table({"n": [1, 2], "kind": ["x y", "z"]})
write_deltalake(root, rows, partition_by=["kind"])
print("deltalake", version("deltalake"), "pyarrow", version("pyarrow"))
files = DeltaTable(root).file_uris()
for file in files:
    print(file[len(os.path.dirname(root)):], "is there:", os.path.exists(file))
changed = any(map(os.path.exists, files)) or not all("/a%20table/kind=" in file for file in files)
sys.exit("behaviour has changed" if changed else 0)
P

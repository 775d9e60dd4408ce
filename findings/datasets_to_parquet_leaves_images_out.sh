#!/usr/bin/env bash
# A data set of image files, written with Hugging Face's Dataset.to_parquet().
# Expected: the Parquet file holds the images, as that of push_to_hub() does.
# Seen: bytes are null, and path is what was given when the set was made: relative to the working directory of that moment.
# The file reads well where it was written, and on another machine holds no image.
# Hit: whoever moves such a file into a bucket or to a cluster: every image is missing there.
# raysl counts such rows at opening and reads the paths, relative to the Parquet file's own folder (sources/linked.py).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q --disable-pip-version-check install datasets==5.2.0 pillow==13.0.0 pyarrow==25.0.1
cd "$dir"
HF_HOME="$dir/home" "$dir/venv/bin/python" - <<'P'
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from PIL import Image as Picture

Path("photos").mkdir()
Path("out").mkdir()
Picture.new("RGB", (8, 8), (200, 0, 0)).save("photos/0.jpg")
Dataset.from_dict({"image": ["photos/0.jpg"]}, features=Features({"image": Image()})).to_parquet("out/0.parquet")
print("datasets", version("datasets"), "pyarrow", version("pyarrow"))
row = pq.read_table("out/0.parquet")["image"].to_pylist()[0]
print("in the file:", row)
sys.exit(0 if row == {"bytes": None, "path": "photos/0.jpg"} else "behaviour has changed")
P

#!/usr/bin/env bash
# Expected: load_dataset(FOLDER) reads every Parquet file, or every image, that lies below the folder.
# What happens (datasets 5.2.0): as soon as one file or folder has the word train, test, val, ... in its
# name, only what has such a word is read, and the rest is left out without a line:
#   a.parquet, b.parquet, test.parquet     -> the split test alone
#   car/1.png, train/2.png (two classes)   -> the split train alone; the class car is gone
#   split=train/, split=test/ (partitions) -> the other way round: not told apart, all are train
# Who is hit: whoever adds a file called test.parquet beside the data, or has a class called train.
# raysl: names are splits only if one is for training and another is beside it (shards: or each file has
# one); what belongs to none is counted and named; partitions are told apart.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install datasets==5.2.0 pillow==13.0.0
HF_HUB_OFFLINE=1 HF_HOME=$work/home "$work/venv/bin/python" - "$work" <<'PY'
import pathlib, sys
import datasets, pyarrow as pa, pyarrow.parquet as pq
from PIL import Image

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
root = pathlib.Path(sys.argv[1])
seen = {}
for case, names in {
    "one file called test": ["a.parquet", "b.parquet", "test.parquet"],
    "a folder beside the splits": ["train/0.parquet", "val/0.parquet", "extra/0.parquet"],
    "partitions": ["split=train/0.parquet", "split=test/0.parquet"],
    "a class called train": ["car/1.png", "train/2.png"],
}.items():
    folder = root / case.replace(" ", "_")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (4, 4)).save(folder / name)
        else:
            pq.write_table(pa.table({"x": [0]}), folder / name)
    kind = "imagefolder" if names[0].endswith(".png") else "parquet"
    given = {"data_dir": str(folder)} if kind == "imagefolder" else {}
    found = datasets.load_dataset(kind if given else str(folder), cache_dir=str(root / "cache"), **given)
    seen[case] = {split: part.num_rows for split, part in found.items()}
    print(f"{case}: {len(names)} files, read: {seen[case]}")
sys.exit(
    seen
    != {
        "one file called test": {"test": 1},
        "a folder beside the splits": {"train": 1, "validation": 1},
        "partitions": {"train": 2},
        "a class called train": {"train": 1},
    }
)
PY

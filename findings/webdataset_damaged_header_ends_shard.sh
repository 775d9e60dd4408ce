#!/usr/bin/env bash
# A tar shard in which one byte of a member's header has changed, or that ends at a member's border.
# Expected: an error, as of a shard that is cut within an image, or a warning: images are missing.
# What happens: WebDataset ends the shard there without a word, whatever follows, also if it is cut
#   within a header. GNU tar sees the changed header (it ends with 2), but neither of the cuts.
# Who is hit: whoever copies shards over a network or from an old disk: a shard of 10,000 images
#   may give 3, each epoch, and only a count tells.
# raysl instead: reads what is whole before the damage, and counts and names such shards at the
#   start of a run and in `raysl data`; shards without closing blocks too.
# Seen with: webdataset 1.0.2 (1 if it behaves differently now).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv v
v/bin/python -m pip -q --disable-pip-version-check install webdataset==1.0.2 numpy==2.4.6
v/bin/python - <<'PY'
import io
import sys
import tarfile
from importlib.metadata import version

import webdataset

file = io.BytesIO()
with tarfile.open(fileobj=file, mode="w") as shard:
    for number in range(9):
        member = tarfile.TarInfo(f"{number}.jpg")
        member.size = 512
        shard.addfile(member, io.BytesIO(bytes([number]) * 512))
whole = file.getvalue()
header = 3 * 1024  # of the fourth image
shards = {
    "whole": whole,
    "header_changed": whole[:header] + b"?" + whole[header + 1 :],
    "cut_at_border": whole[:header],
    "cut_in_header": whole[: header + 100],
    "cut_in_image": whole[: header + 512 + 100],
}


def read(path):
    try:
        return sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False))
    except tarfile.ReadError as error:
        return type(error).__name__


print("webdataset", version("webdataset"))
found = {}
for name, data in shards.items():
    with open(f"{name}.tar", "wb") as out:
        out.write(data)
    found[name] = read(f"{name}.tar")
    print(f"{name}: {found[name]} of 9 images")
sys.exit(
    found
    != {
        "whole": 9,
        "header_changed": 3,
        "cut_at_border": 3,
        "cut_in_header": 3,
        "cut_in_image": "ReadError",
    }
)
PY
for name in header_changed cut_at_border cut_in_header; do
  tar tf $name.tar >/dev/null 2>&1 && echo "GNU tar, $name: 0" || echo "GNU tar, $name: $?"
done
# Output:
# webdataset 1.0.2
# whole: 9 of 9 images
# header_changed: 3 of 9 images
# cut_at_border: 3 of 9 images
# cut_in_header: 3 of 9 images
# cut_in_image: ReadError of 9 images
# GNU tar, header_changed: 2
# GNU tar, cut_at_border: 0
# GNU tar, cut_in_header: 0

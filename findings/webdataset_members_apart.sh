#!/usr/bin/env bash
# A WebDataset shard whose members are not sorted by name: first all images, then all labels.
# Expected: three samples of an image and a label each, or an error, as of two equal neighbours.
# What happens: six samples without a word: three images without a label, then three labels without
#   an image. A member that was appended again (tar r) is a sample more, unless it happens to stand
#   right behind the first one, which is a ValueError.
# Who is hit: whoever packs with plain `tar c`, `find | tar` or a program that writes one kind of
#   file after the other; a step that skips incomplete samples then skips all of them.
# raysl instead: gathers a shard's members by key before it makes samples, takes the last of equal
#   names, and says how many there were.
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


def write(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def read(path):
    try:
        samples = list(webdataset.WebDataset(path, shardshuffle=False))
    except ValueError as error:
        return type(error).__name__
    return [f"{s['__key__']}: {'+'.join(k for k in s if k[0] != '_')}" for s in samples]


print("webdataset", version("webdataset"))
images = [(f"{n}.jpg", b"image") for n in range(3)]
labels = [(f"{n}.cls", b"1") for n in range(3)]
write("together.tar", sorted(images + labels))
write("apart.tar", images + labels)
write("appended.tar", images + images[:1])
write("appended_last.tar", images + images[2:])
found = {name: read(f"{name}.tar") for name in ("together", "apart", "appended", "appended_last")}
for name, samples in found.items():
    print(f"{name}: {samples}")
sys.exit(
    found
    != {
        "together": ["0: cls+jpg", "1: cls+jpg", "2: cls+jpg"],
        "apart": ["0: jpg", "1: jpg", "2: jpg", "0: cls", "1: cls", "2: cls"],
        "appended": ["0: jpg", "1: jpg", "2: jpg", "0: jpg"],
        "appended_last": "ValueError",
    }
)
PY
# Output:
# webdataset 1.0.2
# together: ['0: cls+jpg', '1: cls+jpg', '2: cls+jpg']
# apart: ['0: jpg', '1: jpg', '2: jpg', '0: cls', '1: cls', '2: cls']
# appended: ['0: jpg', '1: jpg', '2: jpg', '0: jpg']
# appended_last: ValueError

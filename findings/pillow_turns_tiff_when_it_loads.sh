#!/usr/bin/env bash
# One expects: Pillow hands out pixels as they are stored and leaves the turn to ImageOps.exif_transpose,
# as it does for JPEG, PNG, WebP and AVIF.
# What happens: of a TIFF with an orientation tag open() gives the turned size, load() turns the pixels
# and takes the tag away.
# Who is hit: whoever reads the orientation or the stored size from the header and turns once more.
# raysl asks Pillow after load() what is left to turn (raysl/data/readers.py).
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" -q --disable-pip-version-check install pillow==13.0.0
"$d/venv/bin/python" - <<'PY'
import io, sys
import PIL
from PIL import Image

print("Pillow", PIL.__version__)
sizes = {}
for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF"):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (64, 32)).save(file, kind, exif=exif)
    picture = Image.open(io.BytesIO(file.getvalue()))
    before = picture.size
    picture.load()
    sizes[kind] = picture.size
    print(kind, "opened", before, "loaded", picture.size, "orientation left", picture.getexif().get(0x0112))
sys.exit(0 if [kind for kind, size in sizes.items() if size == (32, 64)] == ["TIFF"] else 1)
PY
# Seen:
# Pillow 13.0.0
# JPEG opened (64, 32) loaded (64, 32) orientation left 6
# PNG opened (64, 32) loaded (64, 32) orientation left 6
# WEBP opened (64, 32) loaded (64, 32) orientation left 6
# AVIF opened (64, 32) loaded (64, 32) orientation left 6
# TIFF opened (32, 64) loaded (32, 64) orientation left None

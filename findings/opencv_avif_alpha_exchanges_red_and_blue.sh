#!/usr/bin/env bash
# One expects: cv2.imdecode(..., IMREAD_COLOR_RGB) gives red, green, blue of any file.
# What happens: of an AVIF with an alpha channel it gives blue, green, red; of the same picture as AVIF
# without alpha, or as PNG with alpha, red comes first. Nothing is raised.
# Who is hit: whoever trains on cut-outs that web exporters wrote, with OpenCV as the decoder.
# raysl decodes AVIF with Pillow (raysl/data/decode.py).
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" -q --disable-pip-version-check install opencv-python-headless==5.0.0.93 pillow==13.0.0
"$d/venv/bin/python" - <<'PY'
import io, sys
import cv2
import numpy as np
import PIL
from PIL import Image

print("OpenCV", cv2.__version__, "Pillow", PIL.__version__)
found = {}
for kind, mode in (("AVIF", "RGB"), ("AVIF", "RGBA"), ("PNG", "RGBA")):
    file = io.BytesIO()
    Image.new(mode, (32, 32), (200, 60, 20, 128)[: len(mode)]).save(file, kind, quality=95)
    pixels = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR_RGB)
    found[kind, mode] = pixels[16, 16].tolist()
    print(kind, mode, "stored (200, 60, 20), read", found[kind, mode])
red, _, blue = found["AVIF", "RGBA"]
sys.exit(0 if red < 60 < 160 < blue and found["AVIF", "RGB"][0] > 160 else 1)
PY
# Seen:
# OpenCV 5.0.0 Pillow 13.0.0
# AVIF RGB stored (200, 60, 20), read [201, 61, 20]
# AVIF RGBA stored (200, 60, 20), read [20, 61, 201]
# PNG RGBA stored (200, 60, 20), read [200, 60, 20]

#!/usr/bin/env bash
# One expects: a TIFF whose red, green and blue lie in planes (PlanarConfiguration 2) decodes to the same
# pixels as one that interleaves them, or to nothing.
# What happens: of 8 bits OpenCV reads planes right; of 16 and 32 bits and floating point it returns an
# array of the right shape and type with other values in it. Nothing is raised or logged.
# Who is hit: satellite and microscope images, which are often stored so.
# raysl reads such files with tifffile (raysl/data/read_tiff.py).
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" -q --disable-pip-version-check install opencv-python-headless==5.0.0.93 tifffile==2026.3.3
"$d/venv/bin/python" - <<'PY'
import io, sys
import cv2
import numpy as np
import tifffile

print("OpenCV", cv2.__version__, "tifffile", tifffile.__version__)
right = {}
for kind in (np.uint8, np.uint16, np.float32):
    planes = np.stack([np.full((16, 16), value, kind) for value in (200, 60, 20)])
    planes[:, :, 8:] //= 2
    for planar, values in (("separate", planes), ("contig", np.moveaxis(planes, 0, -1))):
        file = io.BytesIO()
        tifffile.imwrite(file, np.ascontiguousarray(values), photometric="rgb", planarconfig=planar)
        assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), values)
        read = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)
        same = np.array_equal(read[..., ::-1], np.moveaxis(planes, 0, -1))
        right[kind.__name__, planar] = same
        print(kind.__name__, planar, read.dtype, read.shape, "first pixel", read[0, 0, ::-1].tolist(), "right" if same else "WRONG")
wrong = [name for name, same in right.items() if not same]
sys.exit(0 if wrong == [("uint16", "separate"), ("float32", "separate")] else 1)
PY
# Seen:
# OpenCV 5.0.0 tifffile 2026.3.3
# uint8 separate uint8 (16, 16, 3) first pixel [200, 60, 20] right
# uint8 contig uint8 (16, 16, 3) first pixel [200, 60, 20] right
# uint16 separate uint16 (16, 16, 3) first pixel [200, 200, 200] WRONG
# uint16 contig uint16 (16, 16, 3) first pixel [200, 60, 20] right
# float32 separate float32 (16, 16, 3) first pixel [200.0, 200.0, 200.0] WRONG
# float32 contig float32 (16, 16, 3) first pixel [200.0, 60.0, 20.0] right

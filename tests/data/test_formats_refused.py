"""Files that are no images, each by the words that say what it is."""

import gzip
import io
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from raysl.data.decode import Flaw, decode_or_flaw
from raysl.sources.pixels import PLAIN

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4)))
    return file.getvalue()


FILES = {
    "DICOM": bytes(128) + b"DICM" + bytes(40),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n%\xe2\xe3",
    "A page saved as .jpg": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "An answer in JSON saved as .jpg": b'{"error": "not found"}',
    "A pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "NumPy, HDF5, NIfTI": _npy(),
    "OpenEXR, Radiance HDR": cv2.imencode(".hdr", np.ones((8, 8, 3), np.float32))[1].tobytes(),
    "Camera raw (CR3, RAF, ORF, RW2)": b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
    "Videos": b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2",
    "Archives": gzip.compress(b"x"),
    "HEIC without pillow-heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50),
    "Nothing": b"",
    "Anything else": np.random.default_rng(0).bytes(3000),
}


@pytest.mark.parametrize("name", FILES)
def test_each_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "without" in name:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    section = DOCS.read_text().split("## Refused by name\n")[1]
    words = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE))
    found = decode_or_flaw(FILES[name], PLAIN)
    assert isinstance(found, Flaw)
    assert words[name] in found.reason


def test_the_docs_have_a_row_for_each_and_no_other() -> None:
    section = DOCS.read_text().split("## Refused by name\n")[1]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    assert [row for row in rows if row != "Kind"] == list(FILES)


def test_reasons_are_distinct_and_fit_into_a_byte() -> None:
    assert len({flaw.reason for flaw in Flaw}) == len(Flaw)
    assert max(Flaw) < 256

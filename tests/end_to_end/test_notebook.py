"""docs/examples/notebook.py, run from top to bottom in an empty folder."""

import runpy
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "examples" / "notebook.py"


@pytest.mark.slow
def test_pretrains_loads_the_encoder_and_finds_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(NOTEBOOK))
    assert left["features"].shape == (600, left["description"]["embed_dim"])
    assert left["top1"] > 0.6
    assert left["results"]["knn_top1"] > 0.7

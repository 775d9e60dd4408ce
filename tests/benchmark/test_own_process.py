"""A measurement in a process of its own answers with its values, or with raysl's own error."""

from pathlib import Path

import pytest

from raysl.benchmark.own_process import ask
from raysl.errors import DataError

MEASURES = """
from typing import NamedTuple

from raysl.errors import ClusterError
from raysl.benchmark.own_process import answer


class Found(NamedTuple):
    seconds: float


def measure(task: float) -> Found:
    if task < 0:
        raise ClusterError(f"got {task}; give more")
    return Found(2 * task)


answer(measure)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "measures.py").write_text(MEASURES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "measures"


def test_values_come_back(module: str) -> None:
    assert ask(module, 1.5, name="a clock") == {"seconds": 3.0}


def test_an_error_of_raysls_comes_back_with_its_text_alone(module: str) -> None:
    with pytest.raises(DataError, match=r"^a clock: got -1; give more$"):
        ask(module, -1, name="a clock")

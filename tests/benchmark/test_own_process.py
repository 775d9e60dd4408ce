"""A measurement in a separate process returns its values, or the reason why there are none."""

from pathlib import Path

import pytest

from raysl.benchmark.own_process import run_in_own_process
from raysl.errors import DataError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that prints its arguments, fails, sleeps or prints no JSON, as it is told."""
    (tmp_path / "measures.py").write_text(
        "import json, sys, time\n"
        "what = sys.argv[1]\n"
        "if what == 'fail': sys.exit('first line\\nno such GPU')\n"
        "if what == 'own': sys.exit('raysl.errors.DataError: no such folder')\n"
        "if what == 'end': sys.exit(3)\n"
        "if what == 'sleep': time.sleep(60)\n"
        "print('progress')\n"
        "print(json.dumps(sys.argv[1:]) if what != 'words' else 'no JSON')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "measures"


def test_the_last_line_is_the_result(module: str) -> None:
    assert run_in_own_process(module, "a b", 1.5, timeout_s=60) == ["a b", "1.5"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fail", "no such GPU"),
        ("own", "no such folder"),
        ("end", "ended with status 3"),
        ("words", "ended with status 0"),
    ],
)
def test_a_process_without_a_result_is_an_error_with_its_reason(
    module: str, what: str, reason: str
) -> None:
    with pytest.raises(DataError, match=f"^{reason}$"):
        run_in_own_process(module, what, timeout_s=60)


def test_a_process_that_takes_too_long_is_killed(module: str) -> None:
    with pytest.raises(DataError, match=r"^took more than 0\.5 s$"):
        run_in_own_process(module, "sleep", timeout_s=0.5)

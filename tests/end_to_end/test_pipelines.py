"""pipelines/VERB.py, which `ray job submit` runs, is the same command as `raysl VERB`."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_pipeline_passes_its_words_to_its_verb(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: raysl {script.stem}")


def test_there_is_one_for_each_verb() -> None:
    from raysl.cli import VERBS

    assert {script.stem for script in SCRIPTS} == set(VERBS)

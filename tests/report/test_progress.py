"""Counting aloud: a line now and then where there is no terminal, never a division by nothing."""

import itertools

import pytest

from raysl.report import progress as counting
from raysl.report.progress import CountView


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that goes on by four seconds whenever it is asked for."""
    times = itertools.count(step=4.0)
    monkeypatch.setattr(counting.time, "monotonic", lambda: next(times))


@pytest.mark.usefixtures("clock")
class TestCountView:
    def test_writes_how_many_how_fast_and_what_is_left(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        view = CountView()
        view.begin("packing", total=1000, done=200)
        for _ in range(10):
            view.advance(50)
        lines = capsys.readouterr().err.splitlines()
        assert 1 < len(lines) < 10
        assert all(line.startswith("packing: ") and "/1,000 images" in line for line in lines)
        assert all("images/s" in line and line.endswith(" s left") for line in lines)

    def test_counts_no_further_than_the_total(self, capsys: pytest.CaptureFixture[str]) -> None:
        view = CountView()
        view.begin("packing", total=100, done=0)
        for _ in range(10):
            view.advance(50)
        assert "100/100 images" in capsys.readouterr().err.splitlines()[-1]

    def test_nothing_done_yet_has_no_end_in_sight(self, capsys: pytest.CaptureFixture[str]) -> None:
        view = CountView()
        view.begin("packing", total=100, done=60)
        for _ in range(5):
            view.advance(0)
        lines = capsys.readouterr().err.splitlines()
        assert lines
        assert all(line == "packing: 60/100 images  0 images/s" for line in lines)

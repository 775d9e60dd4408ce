"""Which steps a resume does again: counted from the step note and the metrics, and kept."""

from pathlib import Path

import pytest

from raysl.run.resume import open_metrics, repeated_steps
from raysl.track.run_folder import MetricsFile, RunFolder, read_metrics
from raysl.track.step_note import StepNote, read_step_note


def crashed(folder: RunFolder, *, logged: int = 0, noted: int = 0) -> None:
    """Leave what a start leaves that was killed after these steps."""
    if logged:
        metrics = MetricsFile(folder.metrics, start_step=logged)
        metrics.log({"train/loss": 1.0}, step=logged)
        metrics.close()
    StepNote(folder.last_step, start_step=noted).close()


def resume(folder: RunFolder, start_step: int) -> list[str]:
    """Start again; return the texts of all events."""
    open_metrics(folder, start_step).close()
    StepNote(folder.last_step, start_step=start_step).close()
    return [str(event["text"]) for event in read_metrics(folder.events)]


@pytest.mark.parametrize(
    ("logged", "noted", "start_step", "text"),
    [
        (40, 47, 40, "resumes after step 40; steps 41 to 47 are done again"),
        (46, 44, 40, "resumes after step 40; steps 41 to 46 are done again"),
        (40, 41, 40, "resumes after step 40; step 41 is done again"),
        (3, 5, 0, "starts over; steps 1 to 5 are done again"),
    ],
)
def test_what_is_done_again_is_told_and_logged(
    tmp_path: Path, logged: int, noted: int, start_step: int, text: str
) -> None:
    folder = RunFolder(tmp_path)
    crashed(folder, logged=logged, noted=noted)
    assert resume(folder, start_step) == [text]
    repeated = max(logged, noted) - start_step
    assert repeated_steps(folder) == repeated
    last = read_metrics(folder.metrics)[-1]
    assert (last["step"], last["train/repeated_steps"]) == (start_step, repeated)


def test_a_start_from_the_last_step_repeats_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert resume(folder, 0) == []
    crashed(folder, logged=40, noted=40)
    assert resume(folder, 40) == []
    assert repeated_steps(folder) == 0
    assert not any("train/repeated_steps" in record for record in read_metrics(folder.metrics))


def test_several_faults_add_up_and_one_that_did_no_step_adds_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    crashed(folder, noted=47)
    resume(folder, 40)
    assert len(resume(folder, 40)) == 1  # it died before its first step
    crashed(folder, noted=43)
    assert len(resume(folder, 40)) == 2
    assert repeated_steps(folder) == 10


class TestStepNote:
    def test_holds_the_last_step_even_if_it_is_shorter(self, tmp_path: Path) -> None:
        StepNote(tmp_path / "last_step", start_step=1000).close()
        StepNote(tmp_path / "last_step", start_step=7).close()
        assert read_step_note(tmp_path / "last_step") == 7

    def test_is_not_written_more_often_than_it_matters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        monkeypatch.setattr("raysl.track.step_note.time.monotonic", lambda: now[0])
        note = StepNote(tmp_path / "last_step", start_step=0)
        seen = []
        for step in range(1, 5):
            now[0] = step * 0.06
            note(step)
            seen.append(read_step_note(tmp_path / "last_step"))
        note.close()
        assert seen == [0, 2, 2, 4]

    def test_of_a_folder_that_is_gone_is_zero(self, tmp_path: Path) -> None:
        note = StepNote(tmp_path / "gone" / "last_step", start_step=3)
        note(4)
        note.close()
        assert read_step_note(tmp_path / "gone" / "last_step") == 0

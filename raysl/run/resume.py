"""Count the steps that a resume does again, and note them in the folder of the run."""

from raysl.track.events import note_event
from raysl.track.run_folder import MetricsFile, RunFolder, read_metrics
from raysl.track.step_note import read_step_note

_REPEATED = "repeated"


def open_metrics(folder: RunFolder, start_step: int) -> MetricsFile:
    """Open the metrics file on rank 0, and note the steps that this start does again, if any."""
    before = repeated_steps(folder)
    _note_resume(folder, start_step)  # before the records of these steps are dropped
    metrics = MetricsFile(folder.metrics, start_step=start_step)
    if (repeated := repeated_steps(folder)) > before:
        metrics.log({"train/repeated_steps": repeated}, step=start_step)
    return metrics


def _note_resume(folder: RunFolder, start_step: int) -> None:
    """Note which steps an earlier start did after its last checkpoint: they are done again."""
    logged = max((int(r["step"]) for r in read_metrics(folder.metrics)), default=0)
    last_step = max(logged, read_step_note(folder.last_step))
    if last_step <= start_step:
        return
    first = start_step + 1
    which = f"step {first} is" if first == last_step else f"steps {first} to {last_step} are"
    begins = f"resumes after step {start_step}" if start_step else "starts over"
    note_event(
        folder.events,
        f"{begins}; {which} done again",
        step=start_step,
        **{_REPEATED: float(last_step - start_step)},
    )


def repeated_steps(folder: RunFolder) -> int:
    """Return how many steps the resumes of a run have done again."""
    return int(sum(event.get(_REPEATED, 0) for event in read_metrics(folder.events)))

"""Show the progress of a count of images: a bar on a terminal, else a line every ten seconds."""

import time

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from raysl.report.terminal import console, say

_LINE_EVERY_S = 10.0


class CountView:
    """Shows a count, its speed and the time left, on standard error."""

    def __init__(self) -> None:
        self._console = console(error=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what, self._total, self._done, self._done_at_start = "", 0, 0, 0
        self._began = self._last_line = time.monotonic()

    def begin(self, what: str, *, total: int, done: int) -> None:
        """Start a new count.

        Args:
            what: Name of the work, such as "packing".
            total: Number of images.
            done: Number of images that are already done, from an earlier start.
        """
        self.close()
        self._what, self._total, self._done, self._done_at_start = what, total, done, done
        self._began = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(what, total=total, completed=done, speed="")
            self._bar.start()

    def advance(self, count: int) -> None:
        """Add to the count of images."""
        self._done = min(self._total, self._done + count)
        speed = f"{self._speed():,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=speed)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            left = ""
            if self._speed() > 0:
                left = f"  {(self._total - self._done) / self._speed():,.0f} s left"
            self._console.print(
                f"{self._what}: {self._done:,}/{self._total:,} images  {speed}{left}", markup=False
            )

    def note(self, text: str) -> None:
        """Print a message that is not progress."""
        say(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self) -> float:
        seconds = time.monotonic() - self._began
        return (self._done - self._done_at_start) / seconds if seconds > 0 else 0.0

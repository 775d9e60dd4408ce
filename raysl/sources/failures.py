"""What could not be read a moment ago."""

import time
from collections.abc import Hashable


class Failures:
    """Remembers failures for a while: rows of one bad place do not each try it again.

    A pickled one is empty.

    Args:
        seconds: After which a place is tried again.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._until: dict[Hashable, tuple[float, str]] = {}

    def __reduce__(self) -> tuple[type["Failures"], tuple[float]]:
        return type(self), (self.seconds,)

    def get(self, place: Hashable) -> str | None:
        """Return why a place could not be read, if that was lately."""
        until, reason = self._until.get(place, (0.0, ""))
        return reason if time.monotonic() < until else None

    def add(self, place: Hashable, reason: str) -> None:
        """Remember a failure."""
        self._until[place] = time.monotonic() + self.seconds, reason

"""Remember for a minute which places could not be read."""

import time
from collections.abc import Hashable


class Failures:
    """Remember recent failures, so that the rows of one bad place do not each retry it.

    Empty after unpickling.

    Args:
        seconds: Time after which a place is retried.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._until: dict[Hashable, tuple[float, str]] = {}

    def __reduce__(self) -> tuple[type["Failures"], tuple[float]]:
        return type(self), (self.seconds,)

    def get(self, place: Hashable) -> str | None:
        """Return why a place could not be read recently, or None."""
        until, reason = self._until.get(place, (0.0, ""))
        return reason if time.monotonic() < until else None

    def add(self, place: Hashable, reason: str) -> None:
        """Record a failure."""
        self._until[place] = time.monotonic() + self.seconds, reason

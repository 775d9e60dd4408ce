"""What a run that waits says, how often, and when it ends."""

import pytest

from raysl.run.waiting import RESIZE, Note, Patience, WaitMessages

PLACE = Note("place", "waits for room")


class Wait:
    """A clock, what the run waits for, and what was said."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.note: Note | None = None
        self.said: list[str] = []
        self.messages = WaitMessages(lambda: self.note, self.said.append, clock=lambda: self.now)

    def for_s(self, seconds: int) -> list[str]:
        """Let seconds pass; return what was said meanwhile."""
        before = len(self.said)
        for _ in range(seconds):
            self.messages.look()
            self.now += 1
        return self.said[before:]


@pytest.fixture
def wait() -> Wait:
    return Wait()


class TestMessages:
    def test_a_wait_is_told_within_30_s_and_then_rarely(self, wait: Wait) -> None:
        wait.note = PLACE
        assert wait.for_s(20) == []
        assert wait.for_s(10) == ["  the run waits for room (for 20 s)"]
        assert wait.for_s(280) == []
        assert wait.for_s(20) == ["  the run waits for room (for 320 s)"]

    def test_a_short_wait_is_not_told(self, wait: Wait) -> None:
        for note in (PLACE, Note("start", "starts 1 train worker"), PLACE, None) * 5:
            wait.note = note
            assert wait.for_s(19) == []

    def test_the_text_of_a_wait_may_change(self, wait: Wait) -> None:
        wait.note = PLACE
        wait.for_s(15)
        wait.note = PLACE._replace(text="waits for 1 of 2")
        assert wait.for_s(15) == ["  the run waits for 1 of 2 (for 20 s)"]

    def test_another_number_of_workers_is_told_at_once_and_once(self, wait: Wait) -> None:
        wait.note = Note(RESIZE, "starts 2 train workers instead of 1")
        assert wait.for_s(60) == ["  the run starts 2 train workers instead of 1"]
        wait.note = None
        assert wait.for_s(60) == []


class TestPatience:
    def test_ends_after_the_longest_wait_with_what_was_waited_for(self) -> None:
        now = [0.0]
        patience = Patience(60.0, clock=lambda: now[0])
        assert patience.too_long(PLACE) is None
        now[0] = 60.0
        assert patience.too_long(PLACE) is None
        now[0] = 61.0
        message = patience.too_long(PLACE)
        assert message is not None
        assert message.startswith("the run waits for room. It waited for 61 s, longer than ")
        assert "cluster.max_wait_s=60" in message

    def test_measures_each_wait_anew(self) -> None:
        now = [0.0]
        patience = Patience(60.0, clock=lambda: now[0])
        for note in (PLACE, None, PLACE, Note("start", "starts"), PLACE):
            assert patience.too_long(note) is None
            now[0] += 50.0
            assert patience.too_long(note) is None

    def test_null_waits_for_ever(self) -> None:
        now = [0.0]
        patience = Patience(None, clock=lambda: now[0])
        assert patience.too_long(PLACE) is None
        now[0] = 1e9
        assert patience.too_long(PLACE) is None

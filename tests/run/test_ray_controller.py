"""Another controller starts if one ends, but never two at once, and not without end."""

from collections.abc import Callable
from typing import Any

import pytest
import ray

from raysl.errors import ClusterError
from raysl.run import ray_controller
from raysl.run.ray_controller import run_controller

DIED = ray.exceptions.RayActorError(error_msg="It died.\nThis is the last line.")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done after each end, instead of asking a cluster."""
    done: list[str] = []
    monkeypatch.setattr(ray_controller, "_wait_for_end", lambda *_: done.append("waited"))
    monkeypatch.setattr(ray_controller, "_free_room", lambda: done.append("freed"))
    return done


def run_of(*outcomes: Any) -> Callable[[], Any]:
    """Return controllers with such results, one after the other; errors are raised."""
    rest = iter(outcomes)

    def run() -> Any:
        outcome = next(rest)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return run


def attempt(run: Callable[[], Any], *, is_over: bool = False) -> tuple[Any, list[str]]:
    told: list[str] = []
    result = run_controller(
        run,
        most_failures=2,
        is_over=lambda: is_over,
        head_answers=lambda: True,
        tell=told.append,
    )
    return result, told


class TestRunController:
    def test_starts_another_one_after_the_room_of_the_last_is_free(self, ended: list[str]) -> None:
        assert attempt(run_of(DIED, ray.exceptions.ActorUnavailableError("lost", None), 7))[0] == 7
        assert ended == ["waited", "freed"] * 2

    def test_says_each_new_start(self, ended: list[str]) -> None:
        _, told = attempt(run_of(DIED, 7))
        assert len(told) == len(ended) / 2 == 1
        assert "from the last checkpoint" in told[0]

    def test_gives_up_after_max_failures(self, ended: list[str]) -> None:
        with pytest.raises(
            ClusterError,
            match=r"ended early 3 times \(cluster.max_failures=2\).*: This is the last",
        ):
            attempt(run_of(DIED, DIED, DIED, 7))
        assert ended == ["waited", "freed"] * 2

    def test_starts_none_once_the_command_ends(self, ended: list[str]) -> None:
        with pytest.raises(ClusterError, match="The same command resumes"):
            attempt(run_of(DIED, 7), is_over=True)
        assert not ended

    def test_other_errors_of_ray_become_one_line(self, ended: list[str]) -> None:
        with pytest.raises(ClusterError, match=r"Ray failed: RaySystemError: .*resumes from"):
            attempt(run_of(ray.exceptions.RaySystemError("the disk"), 7))
        assert not ended


def test_a_control_store_that_is_gone_is_not_asked_about_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> bool:
        raise ClusterError("the head is gone")

    monkeypatch.setattr(ray._private.state, "actors", lambda _: pytest.fail("it was asked"))
    with pytest.raises(ClusterError, match="the head is gone"):
        ray_controller._wait_for_end("id", gone)

"""Checkpoints are written in a thread: what training waits for, and what becomes of errors."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import RunFolderError
from raysl.train.checkpoint_writer import CheckpointWriter

SOON_S = 10.0  # longer than anything here takes


class Disk:
    """Stands for the disk: a write takes until it is let go, and may fail."""

    def __init__(self) -> None:
        self.written: list[tuple[int, float]] = []  # step and value of the state
        self.attempts: list[int] = []
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.error: Exception | None = None
        self.told: list[tuple[int, str]] = []

    def write(self, state: Any, step: int) -> None:
        self.attempts.append(step)
        self.has_begun.set()
        assert self.may_end.wait(SOON_S)
        if self.error is not None:
            raise self.error
        self.written.append((step, float(state["w"][0])))

    def tell(self, step: int, line: str) -> None:
        self.told.append((step, line))

    def writer(self, *, patience_s: float = 0.0, **more: Any) -> CheckpointWriter:
        more.setdefault("first_pause_s", 0.01)
        return CheckpointWriter(self.write, patience_s=patience_s, tell=self.tell, **more)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.may_end.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


FULL = RunFolderError("step-2: the checkpoint cannot be written: No space left on device")


class TestTrainingGoesOn:
    def test_while_the_disk_writes_what_the_state_was(self, disk: Disk) -> None:
        weight = torch.tensor([1.0])
        disk.may_end.clear()
        with disk.writer() as writer:
            writer.save({"w": weight}, step=1)  # returns, though the write does not end
            assert disk.has_begun.wait(SOON_S)
            weight.add_(1)
            assert disk.written == []
            disk.may_end.set()
        assert disk.written == [(1, 1.0)]

    def test_but_a_second_checkpoint_waits_for_the_first(self, disk: Disk) -> None:
        disk.may_end.clear()
        with disk.writer() as writer:
            writer.save({"w": torch.tensor([1.0])}, step=1)
            assert disk.has_begun.wait(SOON_S)
            second = threading.Thread(
                target=lambda: writer.save({"w": torch.tensor([2.0])}, step=2)
            )
            second.start()
            second.join(timeout=0.1)
            assert second.is_alive()
            assert disk.attempts == [1]
            disk.may_end.set()
            second.join(timeout=SOON_S)
        assert disk.written == [(1, 1.0), (2, 2.0)]

    def test_and_who_needs_the_checkpoint_waits_for_it(self, disk: Disk) -> None:
        with disk.writer() as writer:
            writer.wait()  # for nothing
            writer.save({"w": torch.tensor([1.0])}, step=1)
            writer.wait()
            assert disk.written == [(1, 1.0)]


class TestFailure:
    def test_is_tried_again_until_it_succeeds_and_both_are_told(self, disk: Disk) -> None:
        disk.error = FULL
        with disk.writer(patience_s=SOON_S) as writer:
            writer.save({"w": torch.tensor([2.0])}, step=2)
            until(lambda: len(disk.attempts) >= 2)
            assert writer.problem is None
            disk.error = None
            writer.wait()
        assert disk.written == [(2, 2.0)]
        assert [step for step, _ in disk.told] == [2, 2]
        assert disk.told[0][1] == f"{FULL}. Training continues, and it is tried again for 10 s"
        assert disk.told[1][1].startswith("the checkpoint of step 2 is written, after 0 s of")

    def test_that_lasts_is_a_problem_and_nothing_more_is_written(self, disk: Disk) -> None:
        disk.error = FULL
        with disk.writer(patience_s=0.1) as writer:
            writer.save({"w": torch.tensor([2.0])}, step=2)
            writer.wait()
            assert writer.problem == str(FULL)
            tried = len(disk.attempts)
            assert tried > 2
            writer.save({"w": torch.tensor([3.0])}, step=3)
            writer.wait()
        assert len(disk.attempts) == tried

    def test_does_not_hold_up_a_newer_checkpoint_which_takes_its_place(self, disk: Disk) -> None:
        disk.error = FULL
        with disk.writer(patience_s=SOON_S, first_pause_s=SOON_S) as writer:
            writer.save({"w": torch.tensor([1.0])}, step=1)
            until(lambda: bool(disk.told))
            disk.error = None
            began = time.monotonic()
            writer.save({"w": torch.tensor([2.0])}, step=2)
            writer.wait()
            assert time.monotonic() - began < SOON_S / 2
        assert disk.written == [(2, 2.0)]
        assert disk.attempts == [1, 2]

    def test_is_not_tried_again_where_nothing_can_help(self, disk: Disk) -> None:
        gone: list[str] = []
        with disk.writer(patience_s=SOON_S, lost=lambda: gone[0] if gone else None) as writer:
            writer.save({"w": torch.tensor([1.0])}, step=1)
            writer.wait()
            gone.append("the folder was deleted")
            writer.save({"w": torch.tensor([2.0])}, step=2)
            writer.wait()
            assert writer.problem == "the folder was deleted"
        assert disk.attempts == [1]

    def test_of_another_kind_is_a_problem_too(self, disk: Disk) -> None:
        disk.error = KeyError("w")
        with disk.writer(patience_s=SOON_S) as writer:
            writer.save({"w": torch.tensor([1.0])}, step=7)
            writer.wait()
            assert writer.problem == "the checkpoint of step 7: KeyError: 'w'"

    def test_is_given_up_when_the_run_ends_with_another_error(self, disk: Disk) -> None:
        disk.error = FULL
        began = time.monotonic()
        writer = disk.writer(patience_s=SOON_S, first_pause_s=SOON_S)

        def train() -> None:
            with writer:
                writer.save({"w": torch.tensor([1.0])}, step=1)
                until(lambda: bool(disk.told))
                raise ValueError("diverged")

        with pytest.raises(ValueError, match="diverged"):
            train()
        assert time.monotonic() - began < SOON_S / 2
        assert writer.problem == str(FULL)


class TestEnd:
    @pytest.mark.parametrize(
        ("error", "written"), [(ValueError, [(1, 1.0)]), (KeyboardInterrupt, [])]
    )
    def test_waits_for_the_write_unless_the_process_must_end_at_once(
        self, disk: Disk, error: type[BaseException], written: list[tuple[int, float]]
    ) -> None:
        disk.may_end.clear()
        ending = threading.Timer(0.3, disk.may_end.set)

        def train() -> None:
            with disk.writer() as writer:
                writer.save({"w": torch.tensor([1.0])}, step=1)
                assert disk.has_begun.wait(SOON_S)
                ending.start()
                raise error

        with pytest.raises(error):
            train()
        assert disk.written == written

    def test_leaves_no_thread(self, disk: Disk) -> None:
        with disk.writer() as writer:
            writer.save({"w": torch.tensor([1.0])}, step=1)
        until(lambda: "raysl-checkpoints" not in {t.name for t in threading.enumerate()})


class TestCopy:
    def states(self, *given: Any) -> list[Any]:
        """Return what is written of each state."""
        written: list[Any] = []
        with CheckpointWriter(lambda state, _: written.append(state), patience_s=0.0) as writer:
            for step, state in enumerate(given):
                writer.save(state, step=step)
                writer.wait()
        return written

    def test_is_of_numbers_and_lists_too(self) -> None:
        groups = [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}]
        (written,) = self.states({"optimizer": {"state": {0: {}}, "param_groups": groups}})
        groups[0]["lr"] = 0.2
        assert written["optimizer"]["param_groups"] == [
            {"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}
        ]

    def test_keeps_the_order_in_memory_and_what_torch_attaches_to_a_state(self) -> None:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        state = conv.state_dict()
        (written,) = self.states({"method": state})
        assert isinstance(written["method"], OrderedDict)
        assert written["method"]._metadata == state._metadata  # type: ignore[attr-defined]
        assert written["method"]["weight"].stride() == conv.weight.stride()
        assert torch.equal(written["method"]["weight"], conv.weight)

    @pytest.mark.parametrize(
        "value",
        [
            torch.arange(6).reshape(2, 3).t(),  # dense, in another order
            torch.arange(12).reshape(3, 4)[:, ::2],  # with gaps
            torch.arange(12)[3:9],  # a part of a larger one
            torch.tensor([0.1, math.nan]).bfloat16(),
            torch.tensor([True, False]),
            torch.tensor(5),
            torch.ones(1).expand(4),
            torch.empty(0, 3),
        ],
    )
    def test_is_exact_for_every_kind_of_tensor(self, value: Tensor) -> None:
        for written in self.states({"v": value}, {"v": value}):
            assert written["v"].dtype == value.dtype
            assert torch.equal(written["v"].nan_to_num(), value.nan_to_num())

    def test_shares_memory_where_the_state_does(self) -> None:
        """Else tied weights would take their space in the file twice."""
        linear = nn.Linear(3, 3)
        (written,) = self.states({"a": linear.state_dict(), "b": linear.state_dict()})
        assert written["a"]["weight"].data_ptr() == written["b"]["weight"].data_ptr()
        assert written["a"]["bias"].data_ptr() != written["a"]["weight"].data_ptr()

    def test_takes_its_memory_once(self) -> None:
        first, second = self.states({"w": torch.zeros(100)}, {"w": torch.ones(100)})
        assert first["w"].data_ptr() == second["w"].data_ptr()
        grown, other = self.states({"w": torch.zeros(100)}, {"w": torch.ones(101)})
        assert grown["w"].shape == (100,)
        assert torch.equal(other["w"], torch.ones(101))

"""What the controller loads: it must not need torch, and lets the workers find each other."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from raysl.run import ray_group
from raysl.run.ray_group import BatchOptions, ProcessGroup, ProcessGroupConfig

pytestmark = pytest.mark.usefixtures("done_at_once")


class Workers:
    """Stands for Ray Train's worker group: runs each function here, and notes it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return self.size

    def execute_single(self, rank: int, function: Callable[[], Any]) -> Any:
        assert rank == 0
        return "10.0.0.7", 29500

    def execute(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.calls.append((function.__name__, arguments))
        function(*arguments)

    def execute_async(self, function: Callable[..., Any], *arguments: Any) -> list[str]:
        self.calls.append((function.__name__, arguments))
        return ["leaving"] * self.size


@pytest.fixture
def done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(ray_group.ray, "wait", lambda refs, **_: (refs, []))


def test_importing_it_and_what_the_stream_needs_does_not_load_torch() -> None:
    """Four processes of the stream start one after the other; torch costs each seconds."""
    code = (
        "import sys, raysl.run.ray_data; print(*sys.modules)\n"
        "import raysl.run.ray_group, raysl.run.ray_scaling, raysl.run.ray_preflight\n"
        "import raysl.run.ray_streams, raysl.run.ray_controller\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    stream, controller = (
        {name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines()
    )
    assert {"raysl", "ray", "cv2"} <= stream
    assert not stream & {"torch", "torchvision", "sklearn", "scipy", "mlflow", "matplotlib"}
    assert "torch" not in controller


def test_workers_are_told_where_rank_0_is() -> None:
    workers, config = Workers(3), ProcessGroupConfig("gloo")
    assert config.backend_cls is ProcessGroup
    ProcessGroup().on_start(workers, config)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "blocks_per_batch"), [(1, 256, 2), (2, 128, 1), (3, 85, 1)]
)
def test_a_workers_part_of_a_batch_follows_from_the_number_of_workers(
    num_workers: int, batch_size: int, blocks_per_batch: int
) -> None:
    large = BatchOptions(global_batch_size=256, bytes_per_image=300_000, prefetch_batches=2)
    assert large.of_worker(num_workers) == {
        "batch_size": batch_size,
        "prefetch_batches": 2,
        "blocks_per_batch": blocks_per_batch,
    }


@pytest.mark.parametrize(("size", "destroys"), [(1, False), (2, True)])
def test_workers_leave_the_group_if_there_is_one(size: int, destroys: bool) -> None:
    workers = Workers(size)
    ProcessGroup().on_shutdown(workers, ProcessGroupConfig("gloo"))
    assert workers.calls == [("_leave", (destroys,))]


def test_a_worker_that_never_loaded_torch_has_no_group_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setitem(sys.modules, "ray.train.torch.config", None)  # importing it would fail
    ray_group._leave(True)
    assert "torch" not in sys.modules

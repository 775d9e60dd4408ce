"""What rank 0 alone finds out about the disk ends a run on both ranks, at the same step."""

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from two_ranks import Results

from raysl.data.stream import ItemMaker, iterate
from raysl.errors import RunFolderError, StoppedError
from raysl.nn.collectives import broadcast_object, rank_and_size
from raysl.run.measuring import Place
from raysl.run.recipe import RunConfig, block_spec, plan_of, run_from_values
from raysl.run.worker import pretrain
from raysl.sources.open import open_source
from raysl.track.run_folder import RunFolder, list_checkpoints

pytestmark = pytest.mark.distributed

STEPS = 6


def config() -> RunConfig[Any]:
    crop = {"count": 2, "size_px": 16, "crop": {"scale": [0.5, 1.0]}}
    values = {
        "name": "r",
        "data": {"source": "digits", "limit": 64, "views": {"recipe": "custom", "kinds": [crop]}},
        "backbone": {"name": "resnet18", "stem": "small", "width": 0.125},
        "method": {"name": "simclr"},
        "train": {
            **{"steps": STEPS, "global_batch_size": 8, "log_every": 1},
            **{"checkpoint_every": {"steps": 2}, "checkpoint_retry_s": 0.0},
        },
        "evaluate": {
            "every": None,
            "final": ["knn"],
            "max_train_images": 40,
            "max_test_images": 20,
        },
        "cluster": {"num_train_workers": 2, "threads_per_train_worker": 1},
    }
    return run_from_values(values, where="the test")


def ended(before_step: Callable[[RunFolder, int], bool], save: Any = torch.save) -> dict[str, Any]:
    """Run to its end; ``before_step`` is asked on each rank whether to stop, and may do harm."""
    folder = RunFolder(Path(broadcast_object(tempfile.mkdtemp())) / "r")
    folder.path.mkdir(exist_ok=True)
    run, asked = config(), []
    source = open_source(run.data, data=run.data)
    rank, size = rank_and_size()

    def stops() -> bool:
        asked.append(len(asked))
        return before_step(folder, len(asked))

    batches = lambda: iterate(  # noqa: E731
        ItemMaker(source, plan_of(run, source), block_spec(run.data)),
        **{"start_step": 0, "rank": rank, "world_size": size, "num_threads": 1},
        prefetch_steps=1,
    )
    error: RunFolderError | StoppedError | None = None
    with mock.patch.object(torch, "save", save):
        try:
            pretrain(
                run,
                **{"folder": folder, "source": source, "start_step": 0, "stops": stops},  # type: ignore[arg-type]
                place=Place(torch.device("cpu"), 1),
                open_batches=batches,
            )
        except (RunFolderError, StoppedError) as caught:
            error = caught
    found = {
        **{"error": type(error).__name__, "text": str(error), "steps": len(asked)},
        **{"on_every_rank": getattr(error, "on_every_rank", None), "folder": str(folder.path)},
        **{"checkpoints": list_checkpoints(folder.checkpoints), "left": folder.path.exists()},
    }
    broadcast_object(None)  # both have looked
    shutil.rmtree(folder.path.parent, ignore_errors=True)
    return found


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def delete(folder: RunFolder, step: int) -> bool:
    if step == 4 and rank_and_size()[0] == 0:
        shutil.rmtree(folder.path)
    return False


def everything() -> Results:
    return {
        "full": ended(lambda folder, step: False, full),
        "deleted": ended(delete),
        "stopped": ended(lambda folder, step: step == 3),
    }


def test_a_checkpoint_that_rank_0_cannot_write_ends_both_at_one_step(ranks: list[Results]) -> None:
    first, second = (each["full"] for each in ranks)
    assert first == second
    path = f"{first['folder']}/checkpoints/step-000000002"
    assert first["text"] == (
        f"{path}: the checkpoint cannot be written: [Errno 28] No space left on device. Earlier "
        f"checkpoints are untouched; free space or set output_dir to another disk, then run the "
        f"same command"
    )
    assert (first["error"], first["on_every_rank"]) == ("RunFolderError", True)
    assert first["steps"] <= 4  # at the logging step after the failure, or after the second try
    assert first["checkpoints"] == []


def test_a_folder_that_was_deleted_ends_both_and_stays_deleted(ranks: list[Results]) -> None:
    first, second = (each["deleted"] for each in ranks)
    assert first == second
    assert (first["error"], first["on_every_rank"]) == ("RunFolderError", True)
    assert first["text"].startswith(f"{first['folder']}: the run folder was deleted, renamed or")
    assert first["steps"] <= 5
    assert not first["left"]


def test_a_stop_waits_for_its_checkpoint_on_both(ranks: list[Results]) -> None:
    for each in ranks:
        assert (each["stopped"]["error"], each["stopped"]["text"]) == (
            "StoppedError",
            "after step 3 of 6",
        )
        assert each["stopped"]["checkpoints"] == [2, 3]

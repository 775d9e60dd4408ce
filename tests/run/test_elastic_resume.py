"""Nothing is lost and nothing repeated, whatever the number of workers and wherever a run ends.

No model is trained: it is written down which rows each worker saw in which step, with a hash of
their pixels. The data comes through the door that a training uses.
"""

import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import ray
import ray.train
import torch.distributed as dist
from ray.data._internal.cluster_autoscaler import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from raysl.augment.crop import Crop
from raysl.augment.ops import Blur, ColorJitter, Flip
from raysl.augment.pipeline import View
from raysl.data.block import Block
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker, iterate, join_chunks
from raysl.run.ray_cluster import ClusterNeeds
from raysl.run.ray_data import RemainingDataset, iterate_shard
from raysl.run.ray_streams import StreamConfig
from raysl.sources.source import ArraySource
from raysl.track.run_folder import checkpoint_path, latest_step

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "known_to_workers")]

NUM_IMAGES, BATCH, STEPS_PER_EPOCH, EPOCHS = 64, 12, 5, 3  # four images of each epoch are left out
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
CPUS_PER_TRAIN_WORKER = 0.5
VIEWS = (
    View(count=2, size_px=16, crop=Crop(), ops=(Flip(), ColorJitter(), Blur())),
    View(count=1, size_px=8, crop=Crop(scale=(0.1, 0.4))),
)

# How a part of a run ends, and what its trainer then says.
ENDS = {"raise": "interrupted by a test", "kill": "died"}

Seen = dict[int, dict[int, str]]  # step -> row -> hash of the pixels of all its views


class Encoded(ArraySource):
    """Images as PNG and JPEG files; reading the ``slow`` row lasts until ``late`` was read."""

    slow = late = -1
    mark = Path()  # there once the late row was read before the slow one

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        if self.late in indices:
            self.mark.touch()
        deadline = time.monotonic() + 20
        while self.slow in indices and not self.mark.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return [
            cv2.imencode((".png", ".jpg")[index % 2], self.images[index])[1].tobytes()
            for index in indices
        ]


def source() -> Encoded:
    blobs = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 4, 3), dtype=np.uint8)
    images = [cv2.resize(each, (32, 24), interpolation=cv2.INTER_CUBIC) for each in blobs]
    return Encoded("made up", np.stack(images))


def plan(item_size: int) -> Plan:
    return Plan(
        [20, 30, 14],
        seed=5,
        global_batch_size=BATCH,
        item_size=item_size,
        num_steps=NUM_STEPS,
        window_size=50,
    )


def rest(
    folder: Path, images: Encoded, num_workers: int, *, item_size: int, num_data_workers: int
) -> RemainingDataset:
    """Return what opens the rest of the run whose checkpoints lie in a folder."""
    return RemainingDataset(
        ray.put(images),
        plan(item_size),
        BlockSpec(VIEWS),
        newest_step=partial(latest_step, folder / "checkpoints"),
        needs=ClusterNeeds((num_workers,), "cpu", CPUS_PER_TRAIN_WORKER, num_data_workers, 1),
    )


def bare(item_size: int = BATCH) -> Iterator[Block]:
    """Return the batches of a run without Ray."""
    make = ItemMaker(source(), plan(item_size), BlockSpec(VIEWS))
    return iterate(make, start_step=0, rank=0, world_size=1, num_threads=1)


def hashes(batch: Block) -> Seen:
    """Return the rows of a batch of one step with the hash of all their views."""
    (step,) = set(batch["step"].tolist())
    rows = {}
    for place, index in enumerate(batch["index"].tolist()):
        pixels = b"".join(batch[f"views_{kind}"][place].tobytes() for kind in range(len(VIEWS)))
        rows[index] = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    assert len(rows) == len(batch["index"])
    return {step: rows}


def expected() -> Seen:
    seen: Seen = {}
    for batch in bare():
        seen |= hashes(batch)
    return seen


def look_only(settings: dict[str, Any]) -> None:
    """Do a worker's part of a run up to where it is told to end, and how."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    folder = Path(settings["folder"])
    batches = iterate_shard(
        lambda: ray.train.get_dataset_shard("train"),
        batch_size=BATCH // world_size,
        prefetch_batches=2,
    )
    with open(log_of(folder, settings["stop"], rank), "w") as file:
        for batch in batches:
            found = hashes(join_chunks(batch))
            file.write(json.dumps(found) + "\n")
            file.flush()
            # What the gradients do to a training: nobody begins the next step before all are here.
            dist.barrier()
            done = next(iter(found)) + 1
            if done == settings["checkpoint"] and rank == 0:
                checkpoint_path(folder / "checkpoints", done).mkdir(parents=True)
            if done == settings["stop"]:
                if settings["how"] == "raise":
                    raise RuntimeError(ENDS["raise"])
                if rank == world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # like a rank that waits for the one that is gone


def fit(
    folder: Path, num_workers: int, *, item_size: int, checkpoint: int, stop: int, how: str
) -> Seen:
    """Train until a run ends as it is told to; return what its workers saw together."""
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    trainer = TorchTrainer(
        look_only,
        train_loop_config={
            "folder": str(folder),
            "checkpoint": checkpoint,
            "stop": stop,
            "how": how,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers, resources_per_worker={"CPU": CPUS_PER_TRAIN_WORKER}
        ),
        datasets={
            "train": rest(folder, source(), num_workers, item_size=item_size, num_data_workers=1)
        },
        dataset_config=StreamConfig(str(folder)),
        run_config=RunConfig(name=f"until-{stop}", storage_path=str(folder)),
    )
    with pytest.raises(TrainingFailedError, match=ENDS[how]):
        trainer.fit()
    return together(
        [
            [
                {int(step): {int(row): pixels for row, pixels in rows.items()}}
                for line in log_of(folder, stop, rank).read_text().splitlines()
                for step, rows in json.loads(line).items()
            ]
            for rank in range(num_workers)
        ]
    )


def log_of(folder: Path, stop: int, rank: int) -> Path:
    return folder / f"seen-until-{stop}-by-rank-{rank}.jsonl"


def read_here(opened: RemainingDataset, num_steps: int) -> list[list[Block]]:
    """Return the batches of each rank as threads of this process read them."""
    num_workers = opened.num_workers
    # What Ray Train does with its datasets once it knows its workers.
    shards = StreamConfig("test").configure(
        {"train": opened()}, num_workers, worker_handles=None, worker_node_ids=None
    )

    def read(rank: int) -> list[Block]:
        batches = iterate_shard(
            lambda: shards[rank]["train"], batch_size=BATCH // num_workers, prefetch_batches=2
        )
        return [join_chunks(batch) for batch in batches][
            :num_steps
        ]  # all are read, so that Ray's execution ends

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(read, range(num_workers)))


@contextmanager
def no_whole_cpu_for_each() -> Iterator[None]:
    """Let a request leave one of four CPUs to several executions, who share it in whole numbers."""
    coordinator = get_or_create_autoscaling_coordinator()
    highest = ResourceRequestPriority.HIGH
    ray.get(coordinator.request_resources.remote("test", [{"CPU": 3.0}], 600.0, priority=highest))
    yield
    ray.get(coordinator.cancel_request.remote("test"))


def together(ranks: Sequence[Sequence[Seen]]) -> Seen:
    """Join what all ranks saw to global batches; each must have had its share of each batch."""
    seen: Seen = {}
    for batches in ranks:
        for step, rows in (item for batch in batches for item in batch.items()):
            assert len(rows) == BATCH // len(ranks)
            assert rows.keys().isdisjoint(seen.get(step, {}))
            seen.setdefault(step, {}).update(rows)
        assert list(seen) == sorted(seen)
    return seen


class TestTheRunWithoutRay:
    def test_sees_each_image_of_an_epoch_at_most_once_in_full_batches(self) -> None:
        seen = expected()
        assert list(seen) == list(range(NUM_STEPS))
        assert all(len(rows) == BATCH for rows in seen.values())
        left_out = []
        for epoch in range(EPOCHS):
            first = epoch * STEPS_PER_EPOCH
            rows = [row for step in range(first, first + STEPS_PER_EPOCH) for row in seen[step]]
            assert len(rows) == len(set(rows)) == BATCH * STEPS_PER_EPOCH
            left_out.append(frozenset(range(NUM_IMAGES)) - set(rows))
        assert len(set(left_out)) == EPOCHS  # another rest each epoch
        pixels = [pixels for rows in seen.values() for pixels in rows.values()]
        assert len(pixels) == len(set(pixels))  # and no views twice


class TestAnUninterruptedRun:
    @pytest.mark.parametrize(
        ("num_workers", "num_data_workers", "item_size", "overtaken", "most_ranks"),
        [
            (1, 4, 4, True, 4),  # three blocks make a step
            (2, 2, 2, False, 1),  # two executions
            (3, 4, 4, True, 2),  # two, and a block holds six steps of a worker
        ],
    )
    def test_is_the_same_on_any_number_of_workers_in_whatever_order_items_get_ready(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        num_workers: int,
        num_data_workers: int,
        item_size: int,
        overtaken: bool,
        most_ranks: int,
    ) -> None:
        monkeypatch.setattr("raysl.run.ray_data._BLOCK_IMAGES", 24)
        monkeypatch.setattr("raysl.run.ray_data._FEWEST_BLOCKS", 1)
        images = source()
        if overtaken:  # the very first batch is ready after one that is steps away
            rows = dict.fromkeys(row for batch in expected().values() for row in batch)
            images.slow, *_, images.late = rows
            images.mark = tmp_path / "overtaken"
        opened = rest(
            tmp_path, images, num_workers, item_size=item_size, num_data_workers=num_data_workers
        )
        opened.most_ranks = most_ranks
        with no_whole_cpu_for_each() if most_ranks == 1 else nullcontext():
            ranks = read_here(opened, NUM_STEPS)
        assert together([list(map(hashes, batches)) for batches in ranks]) == expected()
        assert not overtaken or images.mark.exists()
        if num_workers == 1:
            for found, wanted in zip(ranks[0], bare(item_size), strict=True):
                for name in wanted:
                    np.testing.assert_array_equal(found[name], wanted[name])


class TestAnInterruptedRun:
    @pytest.mark.slow
    def test_goes_on_with_other_numbers_of_workers_as_if_nothing_had_happened(
        self, tmp_path: Path
    ) -> None:
        # One worker up to after an epoch's first step, two until one raises after a checkpoint
        # within that epoch, three until one is killed after a checkpoint at its end, then one.
        whole = expected()
        first = rest(tmp_path, source(), 1, item_size=12, num_data_workers=1)
        seen = together([list(map(hashes, read_here(first, 6)[0]))])
        assert seen == {step: whole[step] for step in range(6)}
        checkpoint_path(tmp_path / "checkpoints", 6).mkdir(parents=True)
        # Also what was seen after the last checkpoint, and will be seen again.
        seen = fit(tmp_path, 2, item_size=2, checkpoint=8, stop=9, how="raise")
        assert seen == {step: whole[step] for step in range(6, 9)}
        seen = fit(tmp_path, 3, item_size=4, checkpoint=10, stop=12, how="kill")
        assert seen == {step: whole[step] for step in range(8, 12)}
        last = rest(tmp_path, source(), 1, item_size=6, num_data_workers=1)
        seen = together([list(map(hashes, read_here(last, NUM_STEPS - 10)[0]))])
        assert seen == {step: whole[step] for step in range(10, NUM_STEPS)}

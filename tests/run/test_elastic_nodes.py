"""A node that comes while a run trains gives it another train worker, and changes nothing else."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

from raysl.cli import main
from raysl.data.block import Block
from raysl.data.stream import ItemMaker, iterate, join_chunks
from raysl.run import ray_group
from raysl.run.recipe import block_spec, load_run, plan_of
from raysl.sources.open import open_source
from raysl.track.run_folder import RunFolder, latest_step, read_metrics

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("no_ray_cluster", "known_to_workers", "undrawn"),
]

# Steps so small that rounding stays rounding, as in test_ray_train.py.
CALM = ["method.temperature=1.0", "optim.base_lr=1e-4", "optim.warmup={steps: 0}"]
CALM += ["backbone={name: resnet18, width: 0.125, batch_norm: sync}", "evaluate.every=null"]
CALM += ["train.steps=16", "train.checkpoint_every={steps: 4}"]
ELASTIC = ["cluster.num_train_workers={min: 1, max: 3}", "cluster.resize_every_s=0"]
ELASTIC += ["cluster.num_data_workers=1", "cluster.cpus_per_train_worker=1"]

ADD_AT, HOLD_AT = 5, 9  # a worker alone waits at these steps: for the node, and for its end
PATIENCE_S = 120.0

Seen = dict[int, dict[int, str]]  # step -> row -> hash of the pixels of all its views


def hashes(batch: Block) -> Seen:
    batch = join_chunks(batch)
    (step,) = set(batch["step"].tolist())
    rows = {
        index: hashlib.blake2b(batch["views_0"][place].tobytes(), digest_size=8).hexdigest()
        for place, index in enumerate(batch["index"].tolist())
    }
    return {step: rows}


def watched_train_worker(settings: dict[str, Any]) -> Any:
    """Train as a run's workers do, and write down what they are given."""
    open_shard, folder = ray_group.iterate_shard, Path(settings["notes"])

    def watched(*arguments: Any, **named: Any) -> Iterator[Block]:
        context = ray.train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
        for batch in open_shard(*arguments, **named):
            found = hashes(batch)
            step = next(iter(found))
            with open(folder / f"seen-by-{rank}-of-{size}.jsonl", "a") as file:
                file.write(json.dumps(found) + "\n")
            deadline = time.monotonic() + PATIENCE_S
            while size == 1 and step == ADD_AT and not (folder / "added").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            if size == 1 and step == ADD_AT:
                time.sleep(3)  # the controller looks at the nodes several times
            if size == 1 and step == HOLD_AT:
                time.sleep(PATIENCE_S)
            yield batch

    ray_group.iterate_shard = watched  # type: ignore[assignment] # in this worker's process only
    try:
        return ray_group.train_worker(settings)
    finally:
        ray_group.iterate_shard = open_shard


def seen_by(folder: Path, size: int) -> Seen:
    seen: Seen = {}
    for rank in range(size):
        for line in (folder / f"seen-by-{rank}-of-{size}.jsonl").read_text().splitlines():
            for step, rows in json.loads(line).items():
                seen.setdefault(int(step), {}).update({int(row): h for row, h in rows.items()})
    return seen


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of one node with two CPUs: one trains and one makes views."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    node = {"num_cpus": 2, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_comes_gives_the_run_another_worker_after_its_next_checkpoint(
    one_node: Cluster,
    run_yaml: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrain", str(run_yaml("fixed")), *CALM]) == 0
    monkeypatch.setattr("raysl.run.ray_train.train_worker", watched_train_worker)
    config, folder = run_yaml("elastic"), RunFolder(Path("runs/elastic"))
    statuses: list[int] = []
    training = threading.Thread(
        target=lambda: statuses.append(main(["pretrain", str(config), *CALM, *ELASTIC]))
    )
    training.start()
    while training.is_alive() and not latest_step(folder.checkpoints):
        time.sleep(0.1)
    one_node.add_node(num_cpus=2, object_store_memory=200 << 20)  # only in the main thread
    (folder.path / "added").touch()
    training.join()
    assert statuses == [0]

    run = load_run(config, [*CALM, *ELASTIC])
    images = open_source(run.data, data=run.data)
    make = ItemMaker(images, plan_of(run, images), block_spec(run.data))
    expected: Seen = {}
    for batch in iterate(make, start_step=0, rank=0, world_size=1, num_threads=1):
        expected |= hashes(batch)
    alone, both = seen_by(folder.path, 1), seen_by(folder.path, 2)
    assert alone == {step: expected[step] for step in alone}
    assert both == {step: expected[step] for step in both}
    assert min(alone) == 0
    assert max(both) == 15
    # The second start resumes from the checkpoint, after which few steps were made twice.
    assert min(both) == 8
    assert max(alone) <= HOLD_AT

    records = {name: read_metrics(RunFolder(Path("runs") / name).metrics) for name in RUNS}
    losses = {
        name: {r["step"]: r["train/loss"] for r in found if "train/loss" in r}
        for name, found in records.items()
    }
    assert losses["elastic"] == pytest.approx(losses["fixed"], abs=1e-3)
    assert len(losses["elastic"]) == 16
    workers = {
        r["step"]: r["cluster/train_workers"] for r in records["elastic"] if "train/loss" in r
    }
    assert [workers[step] for step in (1, 8, 9, 16)] == [1.0, 1.0, 2.0, 2.0]
    printed = capsys.readouterr().err
    assert "1 (of 1 or 2) train worker(s)" in printed
    assert "the run starts 2 train workers instead of 1" in printed


RUNS = ("fixed", "elastic")

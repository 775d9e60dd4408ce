"""Packing on Ray gives what packing in this process gives."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.errors import ClusterError, DataError
from raysl.pack.config import PackConfig
from raysl.pack.ray_pack import ray_runner
from raysl.pack.run import Runner, pack, thread_runner
from raysl.pack.shards import BucketFacts, Job
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source

pytestmark = pytest.mark.ray


class Counting:
    def __init__(self) -> None:
        self.counts: list[int] = []

    def begin(self, what: str, *, total: int, done: int) -> None:
        self.counts.append(0)

    def advance(self, count: int) -> None:
        self.counts[-1] += count

    def note(self, text: str) -> None:
        pass


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Forty PNGs as a folder and as a Parquet file of many row groups."""
    rng = np.random.default_rng(0)
    images = [
        cv2.imencode(".png", rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))[1].tobytes()
        for _ in range(40)
    ]
    for number, image in enumerate(images):
        path = tmp_path / "folder" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    table = pa.table({"image": images, "label": [f"class{n % 2}" for n in range(40)]})
    pq.write_table(table, tmp_path / "file.parquet", row_group_size=3)
    return {"folder": tmp_path / "folder", "parquet": tmp_path / "file.parquet"}


def pack_it(out: Path, run: Runner, *, source: Path, **settings: Any) -> Counting:
    values = {"shard_mib": 0.003, "row_group_mib": 0.001, **settings}
    config = PackConfig(source=str(source), **values)
    opened = open_source(config, data=DataConfig(source=config.source, shuffle_window_mib=1))
    view = Counting()
    pack(opened, config, str(out), run=run, view=view)
    return view


def files_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}


@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    @pytest.mark.parametrize(("kind", "num_workers"), [("folder", None), ("parquet", 1)])
    def test_gives_the_same_shards_to_the_bit(
        self, kind: str, num_workers: int | None, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        view = pack_it(tmp_path / "ray", ray_runner(num_workers), source=sources[kind])
        pack_it(tmp_path / "here", thread_runner(2), source=sources[kind])
        assert files_of(tmp_path / "ray") == files_of(tmp_path / "here")
        assert len(list((tmp_path / "ray").glob("part-*.parquet"))) > 2
        assert all(0 < count <= 40 for count in view.counts)

    def test_a_task_that_is_killed_is_done_again(
        self, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        def fragile(source: Source, job: Job, unit: int, **_: Any) -> BucketFacts:
            marker = Path(job.output) / f"tried-{unit}"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return BucketFacts([(str(unit), name) for name in ("ray",) if name in sys.modules])

        config = PackConfig(source=str(sources["folder"]))
        source = open_source(config, data=DataConfig(source=config.source))
        (tmp_path / "pack.json").write_text("{}")
        job = Job(config, str(tmp_path), 40, 1, True)
        made = ray_runner(None)(fragile, source, job, [(0,), (1,)], report=lambda _: None)
        assert sorted(facts.bad for facts in made) == [[("0", "ray")], [("1", "ray")]]

    def test_tasks_do_not_import_torch(self) -> None:
        code = "import sys, raysl.pack.ray_pack; print('torch' in sys.modules)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.strip() == "False"

    def test_raises_what_a_task_raised(self, sources: dict[str, Path], tmp_path: Path) -> None:
        for path in list(sources["folder"].rglob("*.png"))[:20]:
            path.write_bytes(b"")
        with pytest.raises(DataError, match="images are bad so far"):
            pack_it(tmp_path / "out", ray_runner(None), source=sources["folder"])

    def test_a_node_that_does_not_see_the_folder_is_named(
        self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The claim is what tells a node that it sees the folder.
        monkeypatch.setattr("raysl.pack.run.PackFolder.write_claim", lambda *_: None)
        with pytest.raises(ClusterError, match=r"node .* does not see .*/out: on several nodes"):
            pack_it(tmp_path / "out", ray_runner(None), source=sources["folder"])

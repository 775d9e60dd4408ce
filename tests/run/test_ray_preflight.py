"""A node that cannot take part in a run is told before the first worker starts."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import ray

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.errors import ClusterError
from raysl.run import ray_preflight
from raysl.run.ray_cluster import Layout, all_nodes
from raysl.run.ray_preflight import (
    Answers,
    NodeFacts,
    ask_nodes,
    bytes_in_flight,
    check_cluster,
    check_store,
    facts_here,
    notes_on,
    raise_problems,
)
from raysl.run.recipe import load_run
from raysl.sources.source import ArraySource, Encoded, Unreadable

MIB = 1 << 20
VERSIONS = {"Python": "3.11", "raysl": "1.0", "ray": "2.60.0", "torch": "2.15.0"}
HERE = NodeFacts(VERSIONS, 64 * MIB, None)
LAYOUT = Layout(2, 1.0, 3, 1.0, False, 1, 1)


class Images(ArraySource):
    """Images that are read as a test wishes."""

    answer: Callable[[], Encoded] | None = None

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        return super().read(indices) if self.answer is None else [self.answer()]


def images(answer: Callable[[], Encoded] | None = None) -> Images:
    made = Images("made up", np.zeros((160, 8, 8, 3), dtype=np.uint8))
    made.answer = answer
    return made


class TestTheObjectStore:
    def test_holds_what_data_workers_make_and_train_workers_prefetch(self) -> None:
        spec = BlockSpec((View(count=2, size_px=224, crop=Crop()),))
        plan = Plan([10_000], seed=0, global_batch_size=256, item_size=1, num_steps=100)
        need = bytes_in_flight(plan, spec, LAYOUT, prefetch_batches=2)
        item = 128 * 2 * 3 * 224 * 224  # a worker's whole batch
        assert need == {"data": 3 * item, "train": 2 * 3 * item}
        check_store(need, sum(need.values()), LAYOUT)
        with pytest.raises(ClusterError) as caught:
            check_store(need, 200 * MIB, LAYOUT)
        assert str(caught.value).startswith(
            "views in flight need 331 MiB of object store, and the cluster has 200 MiB: 3 data "
            "workers make 110 MiB, 2 train workers prefetch 220 MiB. Lower cluster.prefetch_batches"
        )


class TestTheFactsOfANode:
    def test_name_versions_without_build_and_read_an_image(self) -> None:
        facts = facts_here(images())
        assert set(facts.versions) == set(VERSIONS)
        assert facts.versions["ray"] == ray.__version__
        assert "+" not in facts.versions["torch"]
        assert facts.versions["Python"].count(".") == 1
        assert facts.shm_bytes is None or facts.shm_bytes > 0
        assert facts.problem is None

    def test_say_why_images_cannot_be_read(self) -> None:
        def fail() -> Encoded:
            raise FileNotFoundError("/data/a.jpg")

        assert facts_here(images(fail)).problem == "FileNotFoundError: /data/a.jpg"
        assert facts_here(images(lambda: Unreadable("is gone"))).problem == "is gone"
        assert facts_here(None).problem is None


class TestProblems:
    def test_of_several_nodes_are_told_together(self) -> None:
        old = VERSIONS | {"torch": "2.14.0", "raysl": "0.9"}
        answers: Answers = [
            ("10.0.0.1", HERE),
            ("10.0.0.2", HERE._replace(versions=old)),
            ("10.0.0.3", HERE._replace(problem="No such file: /data/a.jpg")),
            ("10.0.0.4", "No module named 'raysl'"),
            ("10.0.0.5", None),
        ]
        with pytest.raises(ClusterError) as caught:
            raise_problems(HERE, answers)
        assert str(caught.value).splitlines() == [
            "3 nodes of the cluster cannot take part in this run:",
            "  10.0.0.2: raysl 0.9 instead of 1.0, torch 2.14.0 instead of 2.15.0",
            "  10.0.0.3: cannot read the images: No such file: /data/a.jpg",
            "  10.0.0.4: cannot run raysl: No module named 'raysl'",
            "Give all nodes the same versions and access to data.source, or stop these nodes",
        ]

    def test_of_many_nodes_are_cut(self) -> None:
        with pytest.raises(ClusterError) as caught:
            raise_problems(HERE, [(f"10.0.0.{n}", "is broken") for n in range(100)])
        lines = str(caught.value).splitlines()
        assert len(lines) == 8
        assert lines[-2] == "  and 95 more"

    def test_are_none_if_all_nodes_are_like_this_one(self) -> None:
        raise_problems(HERE, [("10.0.0.1", HERE)] * 3)

    def test_that_only_slow_a_run_are_notes(self) -> None:
        answers: Answers = [("a", HERE), ("b", None), ("c", HERE), ("d", HERE)]
        notes = notes_on(answers, {"a": 64 * MIB, "b": 1.0, "c": 65 * MIB})
        assert notes[0] == "node b did not answer within 60 s"
        assert notes[1].startswith(
            "node c: /dev/shm has 64 MiB, less than its object store of 65 MiB, so Ray keeps views "
            "on disk"
        )
        assert len(notes) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "known_to_workers")
class TestAskingNodes:
    def test_brings_their_facts_or_why_there_are_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nodes = all_nodes()
        ((_, facts),) = ask_nodes(nodes, ray.put(images()))
        assert facts == facts_here(images())
        ((_, facts),) = ask_nodes(nodes, ray.put(images(lambda: Unreadable("is gone"))))
        assert isinstance(facts, NodeFacts)
        assert facts.problem == "is gone"
        gone = [nodes[0]._replace(node_id="a" * 56)]
        ((_, why),) = ask_nodes(gone, ray.put(None))
        assert isinstance(why, str)

        def late() -> Encoded:
            time.sleep(10)
            raise AssertionError

        monkeypatch.setattr(ray_preflight, "_ANSWER_S", 0.5)
        began = time.monotonic()
        assert [why for _, why in ask_nodes(nodes, ray.put(images(late)))] == [None]
        assert time.monotonic() - began < 10

    def test_is_left_out_if_there_is_one(
        self, run_yaml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(ray_preflight, "ask_nodes", lambda *each: asked.append(each))
        config = load_run(run_yaml("one"), ["cluster.num_train_workers=1"])
        notes = check_cluster(config, images(), LAYOUT._replace(num_train_workers=1))
        assert not asked
        assert all("/dev/shm" in note for note in notes)

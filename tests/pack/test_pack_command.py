"""`raysl pack` as a command: its report, its JSON object, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raysl.pack.config import PackConfig
from raysl.pack.run import thread_runner
from raysl.pack.shards import Job


def last_json(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


class TestPack:
    def test_says_what_it_did_and_what_comes_next(
        self, broken_photos: Path, tmp_path: Path, call: Callable[..., Any]
    ) -> None:
        out = tmp_path / "out"
        words = ["num_workers=0", "short_side_px=60", "max_bad_share=0.1", "--json"]
        status, printed, said = call("pack", broken_photos, out, *words)
        assert status == 0
        results = last_json(printed)
        assert results["images"] == 28
        assert results["bad_images"] == 2
        assert results["shards"] == 1
        assert results["output"] == str(out)
        assert results["bytes_in"] == sum(p.stat().st_size for p in broken_photos.rglob("*.jpg"))
        assert results["bytes_out"] == (out / "part-00000.parquet").stat().st_size
        assert f"packing 30 images from {broken_photos} into {out}" in said
        assert "28 of 30" in printed
        assert f"next      raysl data {out}\n" in printed
        assert f"then      raysl pretrain CONFIG data.source={out} name=packed\n" in printed
        table = pq.read_table(out / "part-00000.parquet")
        assert set(table.column("height").to_pylist()) == {60}
        assert json.loads((out / "manifest.json").read_text())["class_names"] == ["cat", "dog"]

    def test_the_same_command_again_has_nothing_to_do_and_starts_no_ray(
        self, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = call("pack", "digits", tmp_path, "limit=50", "num_workers=0", "--json")
        monkeypatch.setattr("raysl.pack.command.connect", lambda: pytest.fail("Ray was started"))
        again = call("pack", "digits", tmp_path, "limit=50", "--json")
        assert "already packed; nothing to do" in again.err
        results = [last_json(called.out) for called in (first, again)]
        assert [values.pop("complete_before") for values in results] == [False, True]
        for values in results:
            del values["seconds"]
        assert results[0] == results[1]

    def test_runs_on_ray_with_the_given_number_of_workers_unless_it_is_zero(
        self, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[Any] = []

        def ray_runner(num_workers: int | None) -> Any:
            events.append(num_workers)

            def run(function: Any, source: Any, job: Job, calls: Any, *, report: Any) -> Any:
                assert isinstance(job.config, PackConfig)
                events.append("run")
                yield from thread_runner(1)(function, source, job, calls, report=report)

            return run

        monkeypatch.setattr("raysl.pack.command.ray_runner", ray_runner)
        monkeypatch.setattr("raysl.pack.command.connect", lambda: events.append("on") or True)
        monkeypatch.setattr("raysl.pack.command.disconnect", lambda: events.append("off"))
        assert call("pack", "digits", tmp_path / "a", "limit=9", "num_workers=3").status == 0
        assert events == [3, "on", "run", "off"]
        assert call("pack", "digits", tmp_path / "b", "limit=9", "num_workers=0").status == 0
        assert len(events) == 4

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["max_bad_share=0.01"], "2 of 30 images are bad so far"),
            (["quality=101"], "quality: Input should be less than or equal to 100, got 101"),
            (["short_side=256"], "unknown key 'short_side'; did you mean 'short_side_px'?"),
            (["source=other"], "give the source once"),
        ],
    )
    def test_a_mistake_is_one_message_and_status_one(
        self,
        words: list[str],
        text: str,
        broken_photos: Path,
        tmp_path: Path,
        call: Callable[..., Any],
    ) -> None:
        status, _, said = call("pack", broken_photos, tmp_path / "out", "num_workers=0", *words)
        assert status == 1
        assert text in said
        assert "Traceback" not in said

    def test_what_is_packed_is_a_source_of_a_run(
        self, run_yaml: Callable[[str], Path], call: Callable[..., Any]
    ) -> None:
        config = run_yaml("packed")
        assert call("pack", "digits", "out", "num_workers=0", "shard_mib=0.1").status == 0
        words = ["data.source=out", "data.limit=null", "--json"]
        status, printed, _ = call("config", config, *words)
        assert status == 0
        assert last_json(printed)["derived"]["num_images"] == 1347

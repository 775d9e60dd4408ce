"""Packing: what is kept, what is made anew, the shuffle, going on after a stop, bad images."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.pack import run as pack_module
from raysl.pack import shards as pack_shards
from raysl.pack.config import PackConfig
from raysl.pack.run import Facts, PackResult, pack, thread_runner
from raysl.pack.shards import Job
from raysl.sources.manifest import read_manifest
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source
from raysl.sources.storage import resolve


class Silent:
    def begin(self, what: str, *, total: int, done: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def open_it(config: PackConfig) -> Source:
    return open_source(config, data=DataConfig(source=config.source, shuffle_window_mib=1))


def pack_it(out: Path, *, threads: int = 2, run: Any = None, **settings: Any) -> PackResult:
    config = PackConfig(num_workers=0, **settings)
    runner = run or thread_runner(threads)
    return pack(open_it(config), config, str(out), run=runner, view=Silent())


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def shards_of(out: Path) -> dict[str, bytes]:
    """Everything a pack leaves but the lock: the claim names the source as it was typed."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}


def jpeg(number: int, *, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty JPEGs in three class folders."""
    root = tmp_path / "images"
    for number in range(60):
        path = root / f"class{number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """The same number of images in a Parquet file of nine row groups."""
    path = tmp_path / "images.parquet"
    images = [jpeg(number) for number in range(60)]
    table = pa.table({"image": images, "label": [number % 4 for number in range(60)]})
    pq.write_table(table, path, row_group_size=7)
    return path


SMALL = {"shard_mib": 0.008, "row_group_mib": 0.002}


class TestShards:
    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_hold_every_image_once_with_its_label_path_and_size(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        given = request.getfixturevalue(kind)
        result = pack_it(tmp_path / "out", source=str(given), **SMALL)
        rows = rows_of(tmp_path / "out")
        assert sorted(row["image"] for row in rows) == sorted(jpeg(n) for n in range(60))
        assert result.images == len(rows) == 60
        assert result.bytes_in == sum(len(jpeg(n)) for n in range(60))
        assert {(row["width"], row["height"]) for row in rows} == {(16, 12)}
        number_of = {jpeg(n): n for n in range(60)}
        source = open_it(PackConfig(source=str(given)))
        for row in rows:
            number = number_of[row["image"]]
            if kind == "folder":
                assert row["path"] == f"class{number % 3}/{number:03d}.jpg"
                assert row["label"] == number % 3
            else:
                assert row["path"] == source.row_id(number)
                assert row["label"] == number % 4

    def test_are_about_as_large_as_asked_and_made_of_small_row_groups(
        self, folder: Path, tmp_path: Path
    ) -> None:
        result = pack_it(tmp_path / "out", source=str(folder), **SMALL)
        total = sum(len(row["image"]) for row in rows_of(tmp_path / "out"))
        assert result.shards == -(-total // int(0.008 * 2**20))
        most = 0
        for file in (tmp_path / "out").glob("*.parquet"):
            groups = pq.ParquetFile(file)
            assert abs(groups.metadata.num_rows - 60 / result.shards) < 1
            for number in range(groups.num_row_groups):
                column = groups.read_row_group(number, ["image"]).column(0)
                most = max(most, sum(len(image.as_py()) for image in column))
        assert 0.002 * 2**20 <= most < 0.002 * 2**20 + max(len(jpeg(n)) for n in range(60))

    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_are_shuffled_across_the_whole_source(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        pack_it(tmp_path / "out", source=str(request.getfixturevalue(kind)), **SMALL)
        number_of = {jpeg(n): n for n in range(60)}
        order = [number_of[row["image"]] for row in rows_of(tmp_path / "out")]
        assert order != sorted(order)
        for part in (order[:20], order[20:40], order[40:]):
            assert min(part) < 20
            assert max(part) >= 40

    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_are_the_same_to_the_bit_whoever_works_and_in_whatever_order(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        def backwards(
            function: Any, source: Source, job: Job, calls: Any, *, report: Any
        ) -> Iterator[Facts]:
            for call in reversed(calls):
                yield function(source, job, *call, num_threads=1, report=report)

        given = str(request.getfixturevalue(kind))
        one = pack_it(tmp_path / "one", threads=1, source=given, **SMALL)
        many = pack_it(tmp_path / "many", threads=4, source=given, **SMALL)
        pack_it(tmp_path / "back", run=backwards, source=given, **SMALL)
        assert shards_of(tmp_path / "one") == shards_of(tmp_path / "many")
        assert shards_of(tmp_path / "one") == shards_of(tmp_path / "back")
        assert one.fingerprint == many.fingerprint

    def test_another_seed_gives_another_order_and_another_fingerprint(
        self, folder: Path, tmp_path: Path
    ) -> None:
        results = [pack_it(tmp_path / f"{s}", source=str(folder), seed=s) for s in (0, 1)]
        images = [[row["image"] for row in rows_of(tmp_path / f"{s}")] for s in (0, 1)]
        assert images[0] != images[1]
        assert sorted(images[0]) == sorted(images[1])
        assert results[0].fingerprint != results[1].fingerprint

    def test_reads_each_row_group_of_a_grouped_source_once(
        self, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = PackConfig(source=str(parquet), num_workers=0, **SMALL)
        source = open_it(config)
        (tmp_path / "out").mkdir()
        pack_module._estimate(source, config)
        asked: list[int] = []
        read = source.read
        monkeypatch.setattr(source, "read", lambda rows: asked.extend(rows) or read(rows))
        monkeypatch.setattr(
            pack_module, "_estimate", lambda *_: {"shards": 3, "estimated_bytes": 30_000}
        )
        pack(source, config, str(tmp_path / "out"), run=thread_runner(1), view=Silent())
        assert asked == list(range(60))

    def test_open_as_a_source_that_the_manifest_describes(
        self, folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        result = pack_it(out, source=str(folder), **SMALL)
        manifest = read_manifest(*resolve(str(out)))
        assert manifest is not None
        assert manifest.class_names == ("class0", "class1", "class2")
        assert manifest.bytes == sum(len(row["image"]) for row in rows_of(out))
        for file in manifest.files:
            found = pq.ParquetFile(out / file.path)
            assert file.size_bytes == (out / file.path).stat().st_size
            groups = range(found.num_row_groups)
            assert list(file.rows) == [found.metadata.row_group(g).num_rows for g in groups]
        packed = open_it(PackConfig(source=str(out)))
        assert int(packed.group_sizes.sum()) == result.images
        assert packed.read([3])[0] == rows_of(out)[3]["image"]


class TestGoingOn:
    def stopping_after(self, count: int) -> Any:
        def run(
            function: Any, source: Source, job: Job, calls: Any, *, report: Any
        ) -> Iterator[Facts]:
            for number, call in enumerate(calls):
                if number == count:
                    raise KeyboardInterrupt
                yield function(source, job, *call, num_threads=1, report=report)

        return run

    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_gives_what_an_undisturbed_pack_gives(
        self, kind: str, count: int, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        given = str(request.getfixturevalue(kind))
        pack_it(tmp_path / "whole", source=given, **SMALL)
        with pytest.raises(KeyboardInterrupt):
            pack_it(tmp_path / "out", run=self.stopping_after(count), source=given, **SMALL)
        assert not (tmp_path / "out" / "manifest.json").exists()
        pack_it(tmp_path / "out", source=given, **SMALL)
        assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")

    def test_makes_only_what_is_missing_or_damaged(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        pack_it(out, source=str(folder), **SMALL)
        whole = shards_of(out)
        (out / "manifest.json").unlink()
        (out / "part-00000.parquet").write_bytes(b"")
        (out / "part-00001.parquet").unlink()
        kept = (out / "part-00002.parquet").stat().st_mtime_ns
        pack_it(out, source=str(folder), **SMALL)
        assert shards_of(out) == whole
        assert (out / "part-00002.parquet").stat().st_mtime_ns == kept

    def test_a_complete_folder_is_left_as_it_is(self, folder: Path, tmp_path: Path) -> None:
        first = pack_it(tmp_path / "out", source=str(folder), **SMALL)
        again = pack_it(tmp_path / "out", source=str(folder), **SMALL)
        assert again.complete_before
        assert again._replace(complete_before=False) == first

    def test_other_settings_or_another_source_are_refused_with_the_differences(
        self, folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        pack_it(out, source=str(folder), seed=1)
        with pytest.raises(DataError, match=r"(?s)other settings:\n  seed: 1 there, 2 here\nGive"):
            pack_it(out, source=str(folder), seed=2)
        (folder / "class0" / "more.jpg").write_bytes(jpeg(100))
        with pytest.raises(DataError, match="the source's fingerprint: '"):
            pack_it(out, source=str(folder), seed=1)

    def test_a_folder_with_other_files_is_refused(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        with pytest.raises(DataError, match=r"did not write, such as thesis\.tex"):
            pack_it(tmp_path / "out", source=str(folder))

    def test_a_folder_inside_the_source_is_refused(self, folder: Path) -> None:
        with pytest.raises(DataError, match="lies in the source"):
            pack_it(folder / "packed", source=str(folder))
        assert not (folder / "packed").exists()

    @pytest.mark.parametrize(
        ("kind", "sign"), [("folder", "part-*.parquet"), ("parquet", "_buckets/*.arrow")]
    )
    def test_a_killed_process_leaves_nothing_that_counts_as_done(
        self, kind: str, sign: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        given, out = str(request.getfixturevalue(kind)), tmp_path / "out"
        code = (
            "import time; from pathlib import Path; from unittest.mock import Mock\n"
            "from raysl.pack import shards as s; from raysl.sources.open import open_source\n"
            "from raysl.pack.run import PackConfig, thread_runner, pack\n"
            "from raysl.sources.source import DataConfig\n"
            "kept = s.pack_image\n"
            "s.pack_image = lambda *a: (time.sleep(0.02), kept(*a))[1]\n"
            f"config = PackConfig(source={given!r}, num_workers=0, **{SMALL})\n"
            f"source = open_source(config, data=DataConfig(source={given!r}))\n"
            f"pack(source, config, {str(out)!r}, run=thread_runner(1), view=Mock())\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        ended = time.monotonic() + 60
        while not list(out.glob(sign)) and time.monotonic() < ended:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert list(out.glob(sign))
        assert not (out / "manifest.json").exists()
        pack_it(out, source=given, **SMALL)
        pack_it(tmp_path / "whole", source=given, **SMALL)
        assert shards_of(out) == shards_of(tmp_path / "whole")


class TestRoom:
    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_a_full_disk_is_one_error_and_the_same_command_goes_on(
        self,
        kind: str,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        given, out = str(request.getfixturevalue(kind)), tmp_path / "out"
        writer = pack_shards._ShardWriter
        flush, written = writer._flush, iter([False] * 6)

        def full(self: Any) -> None:
            if next(written, True):
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(self)

        with monkeypatch.context() as patch:
            patch.setattr(writer, "_flush", full)
            with pytest.raises(DataError, match=r"the disk is full.*the same command resumes"):
                pack_it(out, source=given, **SMALL)
        assert [p for p in out.iterdir() if p.name.startswith(".part")] == []
        assert not (out / "manifest.json").exists()
        pack_it(out, source=given, **SMALL)
        pack_it(tmp_path / "whole", source=given, **SMALL)
        assert shards_of(out) == shards_of(tmp_path / "whole")

    def test_what_cannot_fit_is_refused_beforehand(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10_000))
        with pytest.raises(DataError, match="are needed, 0 MiB are free; free some space"):
            pack_it(tmp_path / "out", source=str(folder))


class TestBadImages:
    def test_are_left_out_listed_and_counted(self, folder: Path, tmp_path: Path) -> None:
        (folder / "class0" / "000.jpg").write_bytes(b"")
        (folder / "class1" / "001.jpg").write_bytes(b"<html>not found</html>")
        (folder / "class2" / "002.jpg").write_bytes(jpeg(2)[:-200])
        out = tmp_path / "out"
        result = pack_it(out, source=str(folder), max_bad_share=0.1, **SMALL)
        assert (result.images, result.bad_images) == (57, 3)
        assert len(rows_of(out)) == 57
        listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
        ids = ["class0/000.jpg", "class1/001.jpg", "class2/002.jpg"]
        assert [entry["id"] for entry in listed] == ids
        assert [entry["name"] for entry in listed] == [str(folder / each) for each in ids]
        source = open_it(PackConfig(source=str(folder)))
        assert [source.row_id(entry["row"]) for entry in listed] == ids
        assert [entry["reason"].split()[0] for entry in listed] == ["no", "a", "damaged:"]

    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_too_many_end_it_and_a_higher_share_goes_on(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        given, out = request.getfixturevalue(kind), tmp_path / "out"
        settings = {"source": str(given), "max_megapixels": 1e-4, **SMALL}
        with pytest.raises(DataError, match=r"more than max_bad_share=0\.01; such as"):
            pack_it(out, **settings)
        assert (out / "bad_images.jsonl").read_text().count("max_megapixels") > 0
        result = pack_it(out, max_bad_share=1.0, **settings)
        assert (result.images, result.bad_images) == (0, 60)

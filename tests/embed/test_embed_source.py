"""A folder of embeddings: what is in it, going on after a stop, what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.embed import source as module
from raysl.embed.config import EmbedConfig
from raysl.embed.embeddings import Embeddings
from raysl.embed.source import EmbedResult, embed_source, encoder_file
from raysl.errors import ConfigError, DataError
from raysl.evaluate import embedding as embedding_module
from raysl.evaluate.embedding import Chunk, ChunkPlan, EmbeddingSpec, features_here, stream_here
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source


class Counting:
    def __init__(self) -> None:
        self.total = self.before = self.done = 0

    def begin(self, what: str, *, total: int, done: int) -> None:
        self.total, self.before = total, done

    def advance(self, count: int) -> None:
        self.done += count


def open_it(config: EmbedConfig) -> Source:
    data = DataConfig(source=config.source)
    return open_source(config, split=config.split, data=data)


def make_here(source: Source, chunks: ChunkPlan, embedding: EmbeddingSpec) -> Iterator[Chunk]:
    return stream_here(source, chunks, embedding, num_threads=1)


def embed_it(
    photos: Path | str, encoder: Path, out: Path | str, *, make: Any = make_here, **settings: Any
) -> EmbedResult:
    values = {"source": str(photos), "max_bad_share": 0.05, "shard_mib": 0.004, **settings}
    config = EmbedConfig.model_validate(values)
    return embed_source(open_it(config), encoder, config, str(out), make=make, view=Counting())


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_module, "_MOST_IMAGES", 8)


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


class TestFolder:
    def test_opens_as_one_table_with_each_good_row_once(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path, out = tiny_encoder(), tmp_path / "out"
        result = embed_it(photos, path, out)
        assert (result.images, result.bad_images, result.made) == (100, 1, 101)
        assert result.shards == len(shards_of(out)) > 5
        frame = pd.read_parquet(out).sort_values("row")
        source = open_it(EmbedConfig(source=str(photos)))
        broken = next(row for row in range(101) if source.where(row).endswith("broken.png"))
        assert frame["row"].tolist() == [row for row in range(101) if row != broken]
        assert frame["id"].iloc[0] == "class0/000.png"
        assert frame["label_name"].iloc[-1] == "class1"
        assert frame["label"].iloc[-1] == 1
        wanted, _ = features_here(
            source, frame["row"].to_numpy(), EmbeddingSpec(str(path), 16), num_threads=1
        )
        assert np.abs(np.stack(frame["features"]) - wanted).max() < 1e-5
        bad = [json.loads(line) for line in (out / "_bad_images.jsonl").read_text().splitlines()]
        assert bad == [
            {
                "row": broken,
                "id": "class0/broken.png",
                "name": str(photos / "class0" / "broken.png"),
                "reason": "not an image of a known format",
            }
        ]

    def test_says_in_each_shard_what_the_features_are(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        embed_it(photos, tiny_encoder("my_run"), tmp_path / "out")
        schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
        meta = json.loads(schema.metadata[b"raysl"])
        assert (meta["run"], meta["method"], meta["embed_dim"]) == ("my_run", "simclr", 64)
        assert meta["mean"] == [0.5, 0.4, 0.3]
        assert meta["size_px"] == 16
        assert schema.field("features").type.list_size == 64

    def test_float16_and_unit_length(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = tiny_encoder()
        embed_it(photos, path, tmp_path / "a")
        embed_it(photos, path, tmp_path / "b", store="float16", normalize=True)
        plain = np.stack(pd.read_parquet(tmp_path / "a").sort_values("row")["features"])
        half = np.stack(pd.read_parquet(tmp_path / "b").sort_values("row")["features"])
        assert half.dtype == np.float16
        unit = plain / np.linalg.norm(plain, axis=1, keepdims=True)
        assert np.abs(half - unit).max() < 1e-3

    def test_a_source_without_labels_has_no_label_column(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        embed_it(photos / "class1", tiny_encoder(), tmp_path / "out")
        assert list(pd.read_parquet(tmp_path / "out").columns) == ["id", "row", "features"]

    def test_the_test_split_of_a_built_in_set(
        self, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        result = embed_it("digits", tiny_encoder(), tmp_path / "out", split="test", shard_mib=1.0)
        assert result.images == 450


class TestGoingOn:
    def test_the_same_again_does_nothing(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path, out = tiny_encoder(), tmp_path / "out"
        embed_it(photos, path, out)
        before = shards_of(out)

        def never(*_: Any) -> Iterator[Chunk]:
            raise AssertionError

        again = embed_it(photos, path, out, make=never)
        assert again.complete_before
        assert again.made == 0
        assert again.images == 100
        assert shards_of(out) == before

    def test_only_missing_and_damaged_shards_are_made(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path, out = tiny_encoder(), tmp_path / "out"
        embed_it(photos, path, out)
        before = shards_of(out)
        names = sorted(before)
        (out / names[1]).unlink()
        (out / names[3]).write_bytes(before[names[3]][:100])
        made = embed_it(photos, path, out)
        assert 0 < made.made < 60
        assert not made.complete_before
        assert shards_of(out) == before

    def test_after_a_kill_no_shard_is_lost_or_doubled(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path, out = tiny_encoder(), tmp_path / "out"
        code = (
            "import time; from pathlib import Path\n"
            "from raysl.evaluate import embedding as e\n"
            "e._MOST_IMAGES = 8\n"
            "from raysl.embed.source import embed_source\n"
            "from raysl.embed.config import EmbedConfig\n"
            "from raysl.sources.open import open_source\n"
            "from raysl.sources.source import DataConfig\n"
            "from unittest.mock import Mock\n"
            "def make(*given):\n"
            "    for chunk in e.stream_here(*given, num_threads=1):\n"
            "        time.sleep(0.2)\n"
            "        yield chunk\n"
            f"c = EmbedConfig(source={str(photos)!r}, max_bad_share=0.05, shard_mib=0.004)\n"
            "s = open_source(c, data=DataConfig(source=c.source))\n"
            f"embed_source(s, Path({str(path)!r}), c, {str(out)!r}, make=make, view=Mock())\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        ended = time.monotonic() + 60
        while len(list(out.glob("features-*"))) < 2 and time.monotonic() < ended:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(shards_of(out)) >= 2
        with pytest.raises(DataError, match="has not finished there; the same command resumes"):
            Embeddings(str(out))
        (out / ".features-000009-of-000013.parquet.0123").write_bytes(b"half")
        made = embed_it(photos, path, out)
        assert 0 < made.made < 101
        embed_it(photos, path, tmp_path / "whole")
        assert shards_of(out) == shards_of(tmp_path / "whole")
        assert not list(out.glob(".features*"))

    def test_a_full_disk_is_one_error_and_the_same_command_goes_on(
        self,
        photos: Path,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path, out = tiny_encoder(), tmp_path / "out"
        write, written = module.write_shard, []

        def full(*given: Any, **more: Any) -> None:
            written.append(1)
            if len(written) > 3:
                folder, name = given[0], given[1]
                with folder.writing(name):
                    raise OSError(errno.ENOSPC, "No space left on device")
            write(*given, **more)

        monkeypatch.setattr(module, "write_shard", full)
        with pytest.raises(DataError, match=r"the disk is full\. Complete files are kept"):
            embed_it(photos, path, out)
        monkeypatch.undo()
        monkeypatch.setattr(embedding_module, "_MOST_IMAGES", 8)
        assert len(shards_of(out)) == 3
        assert embed_it(photos, path, out).images == 100


class TestRefusals:
    def test_another_encoder_or_setting_is_named(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        embed_it(photos, tiny_encoder(), out)
        before = shards_of(out)
        other = tiny_encoder("other", seed=1)
        with pytest.raises(DataError, match=r"the encoder \(digest of its weights\): '\w+' there"):
            embed_it(photos, other, out)
        with pytest.raises(DataError, match="store: 'float32' there, 'float16' here"):
            embed_it(photos, tiny_encoder(), out, store="float16")
        (photos / "class0" / "000.png").unlink()
        with pytest.raises(DataError, match="the source's fingerprint"):
            embed_it(photos, tiny_encoder(), out)
        assert shards_of(out) == before

    def test_a_folder_of_other_things_and_one_inside_the_source(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        with pytest.raises(DataError, match=r"raysl embed did not write, such as thesis\.tex"):
            embed_it(photos, tiny_encoder(), tmp_path / "out")
        with pytest.raises(DataError, match="lies in the source"):
            embed_it(photos, tiny_encoder(), photos / "out")

    def test_too_many_bad_images_are_listed(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match=r"1 of 101 images are bad so far[\s\S]*broken\.png"):
            embed_it(photos, tiny_encoder(), tmp_path / "out", max_bad_share=0.0)
        assert "broken" in (tmp_path / "out" / "_bad_images.jsonl").read_text()
        assert embed_it(photos, tiny_encoder(), tmp_path / "out", max_bad_share=0.1).images == 100

    def test_no_encoder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no encoder there; give an encoder file"):
            encoder_file(str(tmp_path))

    def test_two_processes_in_one_folder(
        self, photos: Path, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        def inside(*given: Any) -> Iterator[Chunk]:
            with pytest.raises(DataError, match=r"process \d+ writes into this folder"):
                embed_it(photos, tiny_encoder(), tmp_path / "out")
            yield from make_here(*given)

        assert embed_it(photos, tiny_encoder(), tmp_path / "out", make=inside).images == 100


def test_an_object_store_holds_the_same(
    photos: Path,
    tiny_encoder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moto_server = pytest.importorskip("moto.server", reason="no moto; `uv sync --all-groups`")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = pafs.S3FileSystem(
            endpoint_override=f"http://{host}:{port}",
            allow_bucket_creation=True,
            region="us-east-1",
        )
        store.create_dir("vectors")
        path = tiny_encoder()
        embed_it(photos, path, tmp_path / "local", shard_mib=0.012)
        embed_it(photos, path, "s3://vectors/out", shard_mib=0.012)
        there, here = Embeddings("s3://vectors/out"), Embeddings(str(tmp_path / "local"))
        assert there.rows.tolist() == here.rows.tolist()
        places = np.arange(len(here))
        assert bool((there.directions(places) == here.directions(places)).all())
        names = [info.base_name for info in store.get_file_info(pafs.FileSelector("vectors/out"))]
        name = sorted(n for n in names if n.startswith("features-"))[0]
        store.delete_file(f"vectors/out/{name}")
        again = embed_it(photos, path, "s3://vectors/out", shard_mib=0.012)
        assert 0 < again.made < 101
        assert again.images == 100
    finally:
        server.stop()

"""`raysl benchmark embed`: its arguments, its figures, and the estimate that follows from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.benchmark.embed_command import value_text
from raysl.benchmark.embedding import (
    EmbeddingCosts,
    PlanLine,
    endless_rows,
    plan_embedding,
    sample_rows,
)
from raysl.benchmark.throughput import Throughput
from raysl.cli import main
from raysl.embed.ray_embed import Pools
from raysl.sources.source import ArraySource

COSTS = EmbeddingCosts(
    num_images=10**9,
    embed_dim=512,
    bytes_per_feature=4,
    image_bytes=100_000.0,
    size_px=224,
    chunk_images=64,
    images_per_s_per_worker=25.0,
    num_workers=100,
    decode_images_per_s_per_cpu=500.0,
    multiplications_per_s=1e11,
    shard_bytes=32 << 20,
)


def test_the_estimate_follows_its_formulas() -> None:
    values = {line.what: line.value for line in plan_embedding(COSTS)}
    assert values["features"] == 10**9 * (512 * 4 + 40)
    assert values["time"] == 10**9 / (100 * 25)
    assert values["worker days"] == pytest.approx(10**9 / 25 / 86_400)
    assert values["read from the source"] == 100 * 25 * 100_000
    assert values["CPUs that decode"] == 100 * 25 / 500
    assert values["object store of all nodes"] == 2 * 100 * 64 * (3 * 224**2 + 4 * 512)
    assert values["one query, exact"] == 10**9 * 512 / (100 * 1e11)
    assert values["all against all, exact"] == 10**18 * 512 / (100 * 1e11)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.1e12, "bytes", "2.1 TB"),
        (5e8, "bytes/s", "500.0 MB/s"),
        (12.0, "bytes", "12 bytes"),
        (423_360.0, "s", "4.9 days"),
        (0.056, "s", "0.056 s"),
        (12_345.0, "CPUs", "12,345 CPUs"),
    ],
)
def test_a_value_is_printed_in_units_that_a_person_reads(
    value: float, unit: str, text: str
) -> None:
    assert value_text(PlanLine("x", "", value, unit)) == text


def test_rows_begin_again_where_the_source_ends() -> None:
    source = ArraySource("five", np.zeros((5, 2, 2), dtype=np.uint8))
    assert endless_rows(source, count=12).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert sample_rows(source).tolist() == [0, 1, 2, 3, 4]


class TestCommand:
    @pytest.fixture
    def given_rates(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Let rounds reach 100, 300 and 200 images/s on two actors; return what was expected."""
        expected: list[float] = []
        rates = iter([100.0, 300.0, 200.0])

        def measure(*_: Any, images_per_s: float, **__: Any) -> Throughput:
            expected.append(images_per_s)
            return Throughput(next(rates), 1.5, [], 1.0, 0.0)

        module = "raysl.benchmark.embed_command"
        monkeypatch.setattr(f"{module}.connect", lambda: False)
        monkeypatch.setattr(f"{module}.measure_on_ray", measure)
        monkeypatch.setattr(f"{module}.embedding_pools", lambda _: Pools(2, 1.0, 0, 0.0))
        return expected

    def test_reports_the_median_and_plans_with_the_rate_of_one_worker(
        self,
        given_rates: list[float],
        tiny_encoder: Callable[..., Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = ["digits", str(tiny_encoder().parent), "--images", "1e6", "--workers", "10"]
        assert main(["benchmark", "embed", *words, "--json"]) == 0
        out, err = capsys.readouterr()
        results = json.loads(out.splitlines()[-1])
        ray = results["ray"]
        assert (ray["images_per_s"], ray["min"], ray["max"]) == (200.0, 100.0, 300.0)
        assert ray["values"] == [100.0, 300.0, 200.0]
        assert given_rates[1:] == [100.0, 300.0]  # a round is as long as the last one was quick
        lines = {line["what"]: line["value"] for line in results["plan"]["lines"]}
        assert lines["time"] == pytest.approx(1e6 / (10 * 200 / 2))
        assert "2 actor(s) on CPUs, 0 on GPUs" in err
        assert "On paper: 1,000,000 images on 10 CPUs at 100.0 images/s each" in out

    @pytest.mark.usefixtures("given_rates")
    def test_a_given_speed_replaces_the_measured_one(
        self, tiny_encoder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["digits", str(tiny_encoder()), "--worker-images-per-s", "5", "--repeats", "1"]
        assert main(["benchmark", "embed", *words, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
        assert plan["given"]["images_per_s_per_worker"] == 5
        assert plan["given"]["num_images"] == 10**9
        assert plan["given"]["num_workers"] == 100

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["digits", "nowhere"], "nowhere: no encoder there"),
            (["digits", "ENCODER", "size=3"], "unknown key 'size'"),
        ],
    )
    def test_a_mistake_is_one_message_before_ray_starts(
        self,
        words: list[str],
        text: str,
        tiny_encoder: Callable[..., Path],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        connect = "raysl.benchmark.embed_command.connect"
        monkeypatch.setattr(connect, lambda: pytest.fail("Ray was started"))
        encoder = str(tiny_encoder())
        command = [encoder if word == "ENCODER" else word for word in words]
        assert main(["benchmark", "embed", *command]) == 1
        assert text in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_embedding_is_measured_on_ray(
    tiny_encoder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["digits", str(tiny_encoder()), "num_workers=2", "--seconds", "0.2", "--repeats", "1"]
    assert main(["benchmark", "embed", *words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["actors"] == 2
    assert results["ray"]["images_per_s"] > 0
    assert results["ray"]["first_batch_s"] > 0

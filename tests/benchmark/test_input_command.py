"""`raysl benchmark input`: its arguments, its JSON object and its refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.benchmark.input import medians
from raysl.cli import main

DOCUMENTED = """\
cores function_images_per_s_per_core decode_images_per_s_per_core ray_images_per_s ray_efficiency
first_batch_s consumer_wait_s peak_object_store_bytes peak_driver_bytes bytes_per_image
binding_stage repeats spilled_bytes"""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ends_with_one_object_of_all_documented_figures_also_on_a_tiny_source(
    run_yaml: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spilled = iter([5, 7])  # before and after; each asks Ray's command line
    monkeypatch.setattr("raysl.benchmark.input_command.spilled_bytes", lambda: next(spilled))
    command = ["benchmark", "input", str(run_yaml("x")), "data.limit=5", "--json"]
    short = ["--seconds", "0.1", "--repeats", "1"]
    assert main([*command, *short, "--gpu-images-per-s", "0.1"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert set(DOCUMENTED.split()) <= set(results)
    assert results["num_images"] == 5
    assert results["batch_size"] == 2
    assert "batches of 2 images (the run's is 32)" in err
    assert results["cores"] == 1
    assert results["bytes_per_image"] >= 2 * 32 * 32 * 3
    assert results["spilled_bytes"] == 2
    assert results["function_images_per_s_per_core_all_busy"] > 0
    assert results["first_batch_s"] > 0
    assert 0 < results["consumer_wait_s"] <= results["consumer_wait_p99_s"]
    assert results["peak_driver_bytes"] > 0
    assert results["peak_object_store_bytes"] > 5 * 8 * 8  # the images alone
    assert results["peak_workers_bytes"] >= results["peak_workers_private_bytes"] > 0
    assert results["binding_stage"] == "consumer"  # a GPU of one image in ten seconds
    assert results["decode_images_per_s_per_core"] is None  # digits are pixels
    rates = [figures["ray_images_per_s"] for figures in results["repeats"]]
    assert results["ray_images_per_s"] == pytest.approx(rates[0])
    efficiency = results["ray_images_per_s"] / results["function_images_per_s_per_core"]
    assert results["ray_efficiency"] == pytest.approx(efficiency)
    assert "repeat 1 of 1" in err
    assert "through Ray Data, 1 core(s)" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--batch-size", "161"],
            "is more than the 160 images of digits/train; use at most 160",
        ),
        (["--consumers", "200"], "160 images for 200 consumers; lower --consumers"),
        (["data.limits=5"], "unknown key 'limits'; did you mean 'limit'?"),
    ],
)
def test_a_wrong_setting_is_refused_before_ray_starts(
    run_yaml: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    monkeypatch.setattr("raysl.benchmark.input_command.connect", lambda: pytest.fail("started"))
    assert main(["benchmark", "input", str(run_yaml("x")), *words]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    ["--seconds=0", "--seconds=-1", "--seconds=nan", "--seconds=x", "--repeats=0", "--repeats=1.5"],
)
def test_a_number_out_of_range_is_a_usage_error(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "input", "x.yaml", word])
    assert word.partition("=")[0] in capsys.readouterr().err


def test_a_figure_is_the_median_over_the_rounds_and_missing_if_a_round_lacks_it() -> None:
    rounds = [{"a": 1.0, "b": None}, {"a": 9.0, "b": 2.0}, {"a": 2.0, "b": None}]
    assert medians(rounds) == {"a": 2.0, "b": None}

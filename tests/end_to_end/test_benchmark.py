"""`raysl benchmark` as a person uses it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.cli import main

PROMISED = """\
cores function_images_per_s_per_core decode_images_per_s_per_core ray_images_per_s ray_efficiency
first_batch_s consumer_wait_s peak_object_store_bytes peak_driver_bytes bytes_per_image
peer_images_per_s binding_stage repeats"""


class TestInput:
    @pytest.mark.ray
    @pytest.mark.usefixtures("ray_cluster")
    def test_ends_with_one_object_of_all_that_is_promised_also_on_a_tiny_source(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["benchmark", "input", str(run_yaml("x")), "data.limit=5", "--json"]
        short = ["--seconds", "0.1", "--repeats", "1", "--compare", "none"]
        assert main([*command, *short, "--gpu-images-per-s", "0.1"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out.splitlines()[-1])
        assert set(PROMISED.split()) <= set(found)
        assert found["num_images"] == 5
        assert found["batch_size"] == 2
        assert "batches of 2 images (the run's is 32)" in err
        assert found["cores"] == 1
        assert found["bytes_per_image"] >= 2 * 32 * 32 * 3
        assert found["binding_stage"] == "consumer"  # a GPU of one image in ten seconds
        assert found["peer_images_per_s"] is None
        assert found["decode_images_per_s_per_core"] is None  # digits are pixels
        rates = [repeat["ray_images_per_s"] for repeat in found["repeats"]]
        assert found["ray_images_per_s"] == pytest.approx(rates[0])
        efficiency = found["ray_images_per_s"] / found["function_images_per_s_per_core"]
        assert found["ray_efficiency"] == pytest.approx(efficiency)
        assert "repeat 1 of 1" in err
        assert "through Ray Data, 1 core(s)" in out

    @pytest.mark.parametrize(
        ("extra", "says"),
        [
            (["--compare", "dali"], "unknown 'dali'; use torch, torch-uint8, lightly, none"),
            (
                ["--batch-size", "161"],
                "is more than the 160 images of digits/train; use at most 160",
            ),
            (["--consumers", "200"], "160 images for 200 consumers; lower --consumers"),
        ],
    )
    def test_what_cannot_be_is_told_before_anything_starts(
        self,
        run_yaml: Callable[[str], Path],
        capsys: pytest.CaptureFixture[str],
        extra: list[str],
        says: str,
    ) -> None:
        assert main(["benchmark", "input", str(run_yaml("x")), *extra]) == 1
        assert says in capsys.readouterr().err

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "x"])
    def test_a_length_that_is_no_number_above_zero_is_refused(
        self, run_yaml: Callable[[str], Path], value: str
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["benchmark", "input", str(run_yaml("x")), f"--seconds={value}"])


class TestPlan:
    def test_gives_a_figure_and_a_row_for_each_size_and_kind(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture = tmp_path / "plan.png"
        command = ["benchmark", "plan", "--images", "1e3,2e4", "--figure", str(picture), "--json"]
        assert main(command) == 0
        plans = json.loads(capsys.readouterr().out.splitlines()[-1])["plans"]
        assert [(p["kind"], p["num_images"]) for p in plans] == [
            ("shards", 1000),
            ("shards", 20000),
            ("folder", 1000),
            ("folder", 20000),
        ]
        assert all(p["peak_bytes"] > 0 and p["first_item_s"] > 0 for p in plans)
        assert picture.exists()


class TestMethods:
    def test_trains_compares_and_writes_a_section_with_pictures(
        self,
        run_yaml: Callable[[str], Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        page = tmp_path / "docs" / "results.md"
        page.parent.mkdir()
        page.write_text("# Results\n")
        words = [str(run_yaml("one")), "cluster.num_train_workers=0", "train.log_every=1"]
        words += ["evaluate.final=[knn,linear_lbfgs]"]
        assert main(["benchmark", "methods", "--into", str(page), "--json", *words]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out.splitlines()[-1])
        assert found["failed"] == {}
        (run,) = found["runs"]
        assert run["name"] == "one"
        assert len(run["losses"]) == len(run["steps"]) > 1
        assert 0 < run["knn_top1"] <= 1
        assert "one: one starts: simclr" in err
        text = page.read_text()
        assert text.startswith("# Results\n\n<!-- methods: begin -->\n| configuration | method |")
        assert "| one | simclr | resnet18 |" in text
        assert {path.name for path in page.parent.glob("*.png")} == {
            "methods_losses.png",
            "methods_gains.png",
        }

    def test_a_wrong_setting_is_told_before_anything_is_trained(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = str(run_yaml("one"))
        assert main(["benchmark", "methods", path, "method.warmth=1"]) == 1
        assert "method.warmth" in capsys.readouterr().err
        assert main(["benchmark", "methods", path, path]) == 1
        assert "several configurations have the run name one" in capsys.readouterr().err

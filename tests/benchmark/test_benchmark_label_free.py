import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from raysl.benchmark.label_free import (
    UNTRAINED,
    EncoderScores,
    Study,
    StudyConfig,
    correlations,
    find_subjects,
    groups_of,
    markdown_table,
    open_subject,
    pearson,
    promise,
    ranks,
    untrained_like,
)
from raysl.cli import main
from raysl.encoder.file import save_encoder
from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import BackboneConfig, build_backbone

TINY = BackboneConfig(name="resnet18", stem="small", width=0.125)


def encoder(folder: Path, *, seed: int, **description: Any) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    known = {
        "backbone": TINY.model_dump(mode="json"),
        "image_size_px": 16,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "method": f"method{seed}",
    }
    path = folder / "encoder.safetensors"
    save_encoder(path, build_backbone(TINY, image_size_px=16), description=known | description)
    return path


def row(number: int, linear: float, *, method: str = "a", **measures: float) -> EncoderScores:
    return EncoderScores(f"run{number}", method, "shape", measures, linear, 1.0)


class TestFindSubjects:
    def test_names_runs_by_their_folder_and_longer_where_two_are_alike(
        self, tmp_path: Path
    ) -> None:
        paths = [encoder(tmp_path / name, seed=0).parent for name in ("x/a", "y/a", "y/b")]
        names = [name for name, _ in find_subjects(paths, checkpoints=False)]
        assert names == ["x/a", "y/a", "b"]

    def test_takes_the_checkpoints_that_a_run_kept(self, tmp_path: Path) -> None:
        run = encoder(tmp_path / "a", seed=0).parent
        for step in (3, 20):
            (run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
        found = find_subjects([run], checkpoints=True)
        assert [name for name, _ in found] == ["a@3", "a@20"]
        given = find_subjects([found[1][1], run], checkpoints=False)
        assert [name for name, _ in given] == ["a@20", "a"]

    def test_refuses_what_holds_no_encoder_and_what_is_given_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="neither a run folder"):
            find_subjects([tmp_path], checkpoints=False)
        run = encoder(tmp_path / "a", seed=0).parent
        with pytest.raises(ConfigError, match="twice"):
            find_subjects([run, run], checkpoints=False)


class TestSubjects:
    def test_an_untrained_one_has_the_same_shape_and_other_weights(self, tmp_path: Path) -> None:
        trained = open_subject("a", encoder(tmp_path / "a", seed=3))
        fresh = [untrained_like(trained, seed=seed) for seed in (0, 0, 1)]
        first = [next(iter(each.encoder.parameters())) for each in [trained, *fresh]]
        assert torch.equal(first[1], first[2])
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[2], first[3])
        assert fresh[0].method == UNTRAINED
        assert fresh[0].backbone == trained.backbone

    def test_needs_to_know_how_the_input_is_normalised(self, tmp_path: Path) -> None:
        path = encoder(tmp_path / "a", seed=0, mean=[0.5] * 3)
        assert open_subject("a", path).mean == (0.5, 0.5, 0.5)
        with pytest.raises(DataError, match="no such file or folder"):
            open_subject("a", tmp_path / "missing.safetensors")


class TestCorrelations:
    def test_ranks_and_correlation_are_scipys(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.integers(0, 6, 30).astype(float)
        y = x + rng.normal(size=30)
        np.testing.assert_array_equal(ranks(x), stats.rankdata(x) - 1)
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert pearson(ranks(x), ranks(y)) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert np.isnan(pearson(np.ones(4), y[:4]))

    def test_are_one_where_a_measure_keeps_its_promise(self) -> None:
        rows = [
            row(n, n / 10, rankme=n**2, alpha_req=3 - n / 5, alignment=-n, uniformity=1 / (1 + n))
            for n in range(8)
        ]
        found = {each.measure: each for each in correlations(rows)}
        assert set(found) == {"rankme", "alpha_req", "alignment", "uniformity"}
        for each in found.values():
            assert each.spearman == pytest.approx(1.0)
            assert each.spearman_interval == pytest.approx((1.0, 1.0))
            assert each.pearson_interval[0] <= each.pearson <= each.pearson_interval[1]

    def test_an_exponent_is_good_near_one_from_both_sides(self) -> None:
        assert promise("alpha_req", 1.5) == promise("alpha_req", 0.5) < promise("alpha_req", 1.1)

    def test_do_not_count_encoders_without_a_measure(self) -> None:
        rows = [row(n, n / 10, rankme=float(n)) for n in range(6)]
        rows += [row(9, 0.1, alignment=0.2)]
        (found,) = correlations(rows)
        assert (found.measure, found.num_encoders) == ("rankme", 6)

    def test_groups_are_those_of_five_or_more(self) -> None:
        rows = [row(n, 0.1 * n, method="ab"[n > 4], rankme=float(n)) for n in range(9)]
        rows += [row(9, 0.3, method=UNTRAINED, rankme=1.0)]
        groups = groups_of(rows)
        assert {name: len(some) for name, some in groups.items()} == {
            "all": 10,
            "trained, one backbone": 9,
            "a": 5,
        }
        table = markdown_table({name: correlations(some) for name, some in groups.items()})
        assert "| measure | promise | all (10) | trained, one backbone (9) | a (5) |" in table
        assert "| rankme | higher is better | +0." in table


class TestStudy:
    def test_wants_labels(self, tmp_path: Path) -> None:
        values = {"data": {"source": "digits"}, "evaluate": {"max_train_images": 100}}
        study = Study(StudyConfig.model_validate_json(json.dumps(values)), num_threads=1)
        assert len(study.sets(16).train) == 100
        assert study.sets(16) is study.sets(16)

    def test_measures_from_the_command_to_the_figure(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = [str(encoder(tmp_path / f"r{seed}", seed=seed).parent) for seed in range(4)]
        figure, page = tmp_path / "a.png", tmp_path / "results.md"
        command = ["benchmark", "label_free", *runs, "data.source=digits", "--json"]
        command += ["evaluate.max_train_images=100", "evaluate.max_test_images=50"]
        assert main([*command, "--figure", str(figure), "--into", str(page)]) == 0
        results = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert results["failed"] == {}
        assert [each["method"] for each in results["encoders"]] == [
            *(f"method{seed}" for seed in range(4)),
            UNTRAINED,
        ]
        assert all(0 < each["linear_top1"] <= 1 for each in results["encoders"])
        assert set(results["encoders"][0]["measures"]) > {"rankme", "alignment", "knn_top1"}
        assert figure.stat().st_size > 1000
        assert "<!-- label_free: begin -->" in page.read_text()

    def test_too_few_encoders_are_told_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = str(encoder(tmp_path / "a", seed=0).parent)
        command = ["benchmark", "label_free", run]
        assert main(command) != 0
        assert "data.source" in capsys.readouterr().err
        few = ["data.source=digits", "evaluate.max_train_images=100", "--no-untrained"]
        assert main([*command, *few]) != 0
        assert "needs five" in capsys.readouterr().err

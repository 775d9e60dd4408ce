"""What an evaluation takes from a run, and on which images it measures."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from raysl.config.yaml_text import to_yaml
from raysl.downstream.evaluation_config import (
    EvaluationConfig,
    EvaluationData,
    EvaluationTestConfig,
    data_config,
    labels_note,
    load_evaluation,
)
from raysl.downstream.evaluation_sets import (
    EvaluationSets,
    check_labels,
    evaluate_config,
    open_sets,
    too_few_for_few_shot,
)
from raysl.encoder.file import save_encoder
from raysl.errors import DataError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.sources.pixels import Bits


def write_folder(root: Path, classes: dict[str, int]) -> str:
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            cv2.imwrite(str(root / name / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    return str(root)


def opened(**data: Any) -> EvaluationSets:
    images = EvaluationData.model_validate(data)
    return open_sets(images, size_px=8, crop_fraction=1.0, num_threads=1)


def asked(**data: Any) -> EvaluationConfig:
    return EvaluationConfig(data=EvaluationData.model_validate(data))


class TestFromARun:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        folder = tmp_path / "runs" / "a"
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        config = BackboneConfig(name="resnet18", width=0.125)
        encoder = build_backbone(config, image_size_px=16)
        save_encoder(folder / "encoder.safetensors", encoder, description={"image_size_px": 16})
        return folder

    def loaded(self, run: Path, data: dict[str, Any], *overrides: str, **evaluate: Any) -> Any:
        values = {"data": {"source": "photos", **data}, "evaluate": evaluate}
        (run / "config.yaml").write_text(to_yaml(values))
        return load_evaluation(str(run), overrides, home=run)

    def test_the_settings_of_pixels_and_the_split_go_along(self, run: Path) -> None:
        told = {"split": "val", "intensity": {"bits": 12}, "color_profile": "ignore"}
        config, _ = self.loaded(run, {**told, "pages": "first"}, source="others")
        data = data_config(config.data)
        assert (data.split, data.decoding()) == ("val", (Bits(bits=12), "ignore", "first"))
        test = evaluate_config(config.data).test_images(data)
        assert (Path(str(test.source)).name, test.split) == ("others", None)
        assert test.decoding() == data.decoding()

    def test_what_is_told_of_the_test_images_goes_along(self, run: Path) -> None:
        told = {"label_column": "fine", "filter": [["a", ">", 1]], "limit": 9, "split": "test"}
        more = {"image_column": "jpg", "intensity": [0, 4095], "pages": "channels"}
        config, _ = self.loaded(run, {"label_column": "coarse"}, source="others", **told, **more)
        data = data_config(config.data)
        test = evaluate_config(config.data).test_images(data)
        assert data.label_column == "coarse"
        assert (test.label_column, test.image_column) == ("fine", "jpg")
        assert (test.limit, test.split) == (9, "test")
        assert [tuple(each) for each in test.filter] == [("a", ">", 1)]
        assert test.decoding() == ((0, 4095), data.color_profile, "channels")

    def test_other_images_take_nothing_of_it(self, run: Path) -> None:
        config, _ = self.loaded(run, {"intensity": {"bits": 12}}, "data.source=x", source="others")
        assert (config.data.intensity, config.data.test_source) == (None, None)

    def test_other_test_images_take_nothing_of_the_runs_own(self, run: Path) -> None:
        told = {"label_column": "fine", "filter": [["a", ">", 1]], "limit": 9}
        config, _ = self.loaded(run, {"limit": 50}, "data.test_source=new", source="others", **told)
        assert Path(str(config.data.test_source)).name == "new"
        assert config.data.test == EvaluationTestConfig()
        assert config.data.limit == 50

    def test_mixed_in_images_are_the_runs_too_and_leave_with_the_source(self, run: Path) -> None:
        mix = {"mix": [{"source": "more", "weight": 2.0}], "limit": 50, "filter": [["a", ">", 1]]}
        config, _ = self.loaded(run, mix)
        data = data_config(config.data)
        assert [Path(part.source).name for part in data.mix] == ["more"]
        assert (data.limit, len(data.filter)) == (50, 1)
        config, _ = self.loaded(run, mix, "data.source=new")
        data = data_config(config.data)
        assert (data.mix, data.limit, data.filter) == ((), None, ())
        photos = run.parent.parent / "photos"
        photos.mkdir()
        config, _ = self.loaded(run, mix, f"data.source={photos}", "data.limit=7")
        assert (len(data_config(config.data).mix), config.data.limit) == (1, 7)

    def test_what_was_trained_without_labels_may_be_measured_with_them(self, run: Path) -> None:
        config, origin = self.loaded(run, {"labels": "none"})
        assert data_config(config.data).labels is None
        assert "/photos is measured with its labels" in labels_note(config, origin)
        config, origin = self.loaded(run, {"labels": "none"}, "data.labels=none")
        assert data_config(config.data).labels == "none"
        assert labels_note(config, origin) == ""
        assert labels_note(*self.loaded(run, {"labels": "none"}, "data.source=x")) == ""
        assert labels_note(*self.loaded(run, {"labels": {"fraction": 0.5}})) == ""


class TestSets:
    def test_without_labels_there_is_a_line_of_how_to_get_them(self, tmp_path: Path) -> None:
        sets = opened(source=write_folder(tmp_path, {".": 10}))
        assert not sets.labelled
        assert (len(sets.train), len(sets.test)) == (8, 2)
        assert sets.notes[0].endswith("is measured; put the images into folders, one per class")
        with pytest.raises(DataError, match=r"one per class\. knn needs labels of two classes"):
            check_labels(asked(source="x"), sets, ["knn"])

    def test_left_out_labels_are_none(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"a": 10, "b": 10})
        assert opened(source=folder).labelled
        assert not opened(source=folder, labels="none").labelled

    def test_unlabelled_images_are_measured_within_labelled_ones(self, tmp_path: Path) -> None:
        flat = write_folder(tmp_path / "flat", {".": 10})
        folder = write_folder(tmp_path / "test", {"a": 10, "b": 10})
        sets = opened(source=flat, test_source=folder)
        assert sets.within
        assert (len(sets.train), len(sets.test)) == (16, 4)
        assert f"trained within data.test_source={folder}" in sets.notes[0]
        check_labels(asked(source="x"), sets, ["knn", "linear"])
        with pytest.raises(DataError, match=r"^semi_1: trains on labels, and those of data\.sou"):
            check_labels(asked(source="x"), sets, ["semi_1"])

    def test_errors_name_the_keys_of_an_evaluation(self, tmp_path: Path) -> None:
        train = write_folder(tmp_path / "train", {"a": 5, "b": 5})
        other = write_folder(tmp_path / "other", {"a": 5, "c": 5})
        flat = write_folder(tmp_path / "flat", {".": 5})
        with pytest.raises(
            DataError, match=r"^data\.test_source=.*'c' not.*data\.test\.filter"
        ) as e:
            opened(source=train, test_source=other)
        assert "evaluate." not in str(e.value)
        assert "labels=none" not in str(e.value)
        with pytest.raises(DataError, match=r"^data\.test_source=.*no labels; put the images"):
            opened(source=train, test_source=flat)
        with pytest.raises(DataError, match=r"^data\.test_source=.*/none: no such file"):
            opened(source=train, test_source=f"{tmp_path}/none")

    def test_too_few_labels_for_few_shot_are_refused_if_it_is_asked_for(
        self, tmp_path: Path
    ) -> None:
        sets = opened(source=write_folder(tmp_path, {"a": 20, "b": 3}))
        config = asked(source="x")
        assert "class 'b' has" in too_few_for_few_shot(config, sets, ["knn", "few_shot"])
        assert too_few_for_few_shot(config, sets, ["knn"]) == ""
        check_labels(config, sets, ["knn", "linear"])
        with pytest.raises(DataError, match=r"class 'b' has .*labels_per_class=5; lower it"):
            check_labels(config, sets, ["few_shot"])

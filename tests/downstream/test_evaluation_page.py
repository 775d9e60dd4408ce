import html
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from raysl.downstream.evaluation_files import read_evaluation
from raysl.downstream.evaluation_page import draw_evaluation
from raysl.encoder.file import save_encoder
from raysl.errors import DataError
from raysl.evaluate.features import EvalImages
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.sources.source import ArraySource

CLASSES = ["cat", "<dog>", "$x_"]
PROTOCOLS: dict[str, Any] = {
    "knn": {"version": 1, "mean": 0.75, "deviation": 0.0, "settings": {"k": 3}, "seconds": 0.5},
    "linear": {
        "version": 2,
        "mean": 0.812,
        "deviation": 0.004,
        "values": [0.808, 0.816],
        "seeds": [0, 1],
        "seconds": 700.0,
        "images_per_s": 1234.0,
        "settings": {"inverse_penalty": 1.0},
    },
    "few_shot": {"version": 1, "mean": 0.5, "deviation": 0.03, "settings": {"labels_per_class": 1}},
}


class Made(NamedTuple):
    folder: Path
    encoder: Path
    train: EvalImages
    test: EvalImages

    def draw(self) -> list[tuple[str, str]]:
        return draw_evaluation(self.folder, encoder=self.encoder, train=self.train, test=self.test)

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text()

    @property
    def drawn(self) -> set[str]:
        return {path.stem for path in (self.folder / "pictures").glob("*.png")}

    def change(self, **arrays: Any) -> None:
        with np.load(self.folder / "evaluation.npz") as kept:
            merged = {name: kept[name] for name in kept.files} | arrays
        np.savez(
            self.folder / "evaluation.npz", **{k: v for k, v in merged.items() if v is not None}
        )

    def record(self, **values: Any) -> None:
        path = self.folder / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def images(count: int, seed: int) -> EvalImages:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count + 5, 16, 16, 3), dtype=np.uint8)
    rows = np.arange(5, count + 5)
    source = ArraySource("made up", pixels, np.arange(count + 5) % 3, CLASSES)
    return EvalImages(source, rows, rows % 3, size_px=16, crop_fraction=1.0, num_threads=1)


def make(tmp_path: Path, backbone: BackboneConfig) -> Made:
    folder = tmp_path / "run" / "evaluations" / "main"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    encoder = tmp_path / "run" / "encoder.safetensors"
    description = {
        "backbone": backbone.model_dump(mode="json"),
        "image_size_px": 16,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    save_encoder(encoder, build_backbone(backbone, image_size_px=16), description=description)
    train, test = images(60, 0), images(30, 1)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, part in (("train", train), ("test", test)):
        centers = 3 * np.eye(3, 12)[part.labels]
        features = centers + rng.normal(size=(len(part), 12))
        arrays[f"{name}_features"] = features.astype(np.float32)
        arrays[f"{name}_labels"], arrays[f"{name}_rows"] = part.labels, part.rows
    arrays["predictions_linear"] = np.where(np.arange(30) < 6, (test.labels + 1) % 3, test.labels)
    np.savez(folder / "evaluation.npz", **arrays)
    record = {
        "encoder": str(encoder),
        "source": "train.parquet",
        "test_source": "a/b/test.parquet",
        "protocols": PROTOCOLS,
        "label_free": {"rankme": 7.25, "alignment": 0.125},
        "features": {"seconds": 2.0, "images_per_s": 45.0},
        "classes": CLASSES,
        "bad_images": 0,
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    return Made(folder, encoder, train, test)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path, BackboneConfig(name="resnet18", stem="small", width=0.25))


PICTURES = {
    "label_fraction", "map", "neighbours", "mistakes", "confusion", "spectrum",
    "method_reconstruction",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One with every picture, drawn once."""
    backbone = BackboneConfig(name="resnet18", stem="small", width=0.25)
    made = make(tmp_path_factory.mktemp("whole"), backbone)
    # The neighbours of three blobs so far apart make no mistake unless labels are wrong.
    labels = made.test.labels.copy()
    labels[:4] = (labels[:4] + 1) % 3
    made.change(test_labels=labels)
    made.record(source="<script>y")
    grid = np.zeros((2, 3, 8, 8, 3), dtype=np.uint8)
    left: dict[str, Any] = {
        "reconstruction": grid,
        "reconstruction.columns": np.array(["image", "masked", "made"]),
        "reconstruction.caption": np.array("Patches & pixels."),
    }
    np.savez(made.encoder.parent / "method_pictures.npz", **left)
    assert made.draw() == []
    return made


class TestDrawEvaluation:
    def test_draws_every_picture_and_puts_it_into_the_page(self, whole: Made) -> None:
        assert whole.drawn == PICTURES
        assert whole.page.count("data:image/png;base64,") == len(PICTURES)
        assert "http" not in whole.page.replace("http-equiv", "")

    def test_tells_every_protocol_with_its_deviation_time_and_speed(self, whole: Made) -> None:
        rows = re.findall(r"<tr><th scope=row>(.*?)(?=\n)", whole.page)
        assert "Linear<td>81.2 &plusmn; 0.4<td>12 min<td>1,234" in rows
        assert "Nearest neighbours<td>75.0<td>0.5 s<td>&ndash;" in rows
        assert "linear 81.2 &plusmn; 0.4 %" in whole.page
        assert "Linear, version 2" in whole.page
        assert "test images of test.parquet" in whole.page
        assert "<th scope=row>RankMe<td>7.25" in whole.page

    def test_escapes_what_came_from_outside(self, whole: Made) -> None:
        assert "<script>" not in whole.page
        assert html.escape("<script>y") in whole.page

    def test_shows_what_pretraining_left(self, whole: Made) -> None:
        assert "From pretraining: reconstruction" in whole.page
        assert "Patches &amp; pixels." in whole.page

    def test_draws_a_transformers_attention(self, tmp_path: Path) -> None:
        vit = BackboneConfig(name="vit_tiny", depth=1, patch_size_px=8)
        made = make(tmp_path, vit)
        assert [name for name, _ in made.draw()] in ([], ["mistakes"])
        assert "attention" in made.drawn
        assert "<h2>Attention</h2>" in made.page

    def test_without_labels_shows_clusters_and_no_mistakes(self, made: Made) -> None:
        made.change(
            test_labels=np.full(30, -1), train_labels=np.full(60, -1), predictions_linear=None
        )
        made.record(protocols={}, classes=[])
        assert made.draw() == []
        assert made.drawn == {"map", "neighbours", "spectrum"}
        assert "without labels" in made.page

    def test_an_old_picture_does_not_stay(self, made: Made) -> None:
        made.draw()
        (made.folder / "pictures" / "attention.png").write_bytes(b"of another encoder")
        made.change(test_features=np.zeros((30, 12), dtype=np.float32))
        failures = dict(made.draw())
        assert "no spectrum" in failures["spectrum"]
        assert "attention" not in made.drawn
        assert "spectrum" not in made.drawn
        assert "not drawn (pictures/spectrum.png)" in made.page

    def test_tells_what_is_missing_or_damaged(self, made: Made) -> None:
        (made.folder / "evaluation.npz").write_bytes(b"no zip")
        ((name, problem),) = made.draw()
        assert name == "report"
        assert "evaluation.npz: damaged" in problem
        (made.folder / "evaluation.json").unlink()
        assert "evaluation.json: missing" in made.draw()[0][1]

    def test_a_damaged_encoder_costs_its_picture_alone(self, made: Made) -> None:
        made.encoder.write_bytes(b"nothing")
        assert "attention" in dict(made.draw())
        assert {"map", "confusion"} <= made.drawn


class TestReadEvaluation:
    def test_images_are_those_of_the_rows(self, made: Made) -> None:
        made.change(test_rows=np.roll(made.test.rows, 3))
        found = read_evaluation(made.folder, train=made.train, test=made.test)
        expected = made.test.source.read([int(made.test.rows[0])])[0]
        np.testing.assert_array_equal(found.test.thumbnails(np.array([3]), most_px=64)[0], expected)
        assert found.test.thumbnails(np.array([3, 1]), most_px=4).shape == (2, 4, 4, 3)

    def test_leaves_out_features_that_are_not_finite(self, made: Made) -> None:
        features = np.ones((30, 12), dtype=np.float32)
        features[4] = np.nan
        made.change(test_features=features)
        found = read_evaluation(made.folder, train=made.train, test=made.test)
        places = found.test.subset(100)
        assert sorted(places.tolist()) == [place for place in range(30) if place != 4]
        assert len(found.test.subset(5)) == 5

    @pytest.mark.parametrize(
        "wrong",
        [
            {"test_labels": np.zeros(3, dtype=np.int64)},
            {"predictions_linear": np.zeros(3, dtype=np.int64)},
            {"train_rows": None},
        ],
    )
    def test_refuses_what_does_not_fit(self, made: Made, wrong: dict[str, Any]) -> None:
        made.change(**wrong)
        with pytest.raises(DataError, match=r"evaluation\.npz"):
            read_evaluation(made.folder, train=made.train, test=made.test)

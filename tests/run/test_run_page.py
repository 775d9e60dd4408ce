import base64
import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.data.decode import decode
from raysl.folder.whole import write_json
from raysl.run.page import draw_all, write_report
from raysl.run.recipe import Derived, RunConfig, derive, run_from_values
from raysl.sources.source import ArraySource
from raysl.track.run_folder import RunFolder

RESULTS = {
    "knn_top1": 0.9123,
    "linear_lbfgs_top1": 0.9456,
    "few_shot_top1": 0.7,
    "few_shot_top1_std": 0.0321,
    "untrained_knn_top1": 0.8111,
    "untrained_linear_lbfgs_top1": 0.8222,
    "untrained_few_shot_top1": 0.5333,
    "untrained_few_shot_top1_std": 0.04,
    "pixels_knn_top1": 0.7444,
    "pixels_linear_lbfgs_top1": 0.7555,
    "pixels_few_shot_top1": 0.4666,
    "pixels_few_shot_top1_std": 0.05,
    "num_train_labels": 1347,
    "num_test_labels": 450,
    "num_classes": 10,
    "knn_k": 17,
    "knn_temperature": 0.09,
    "few_shot_labels": 3,
    "few_shot_draws": 6,
}
VOID = {"meta", "img"}
LEFT_OPEN = {"th", "td", "tr"}  # HTML lets these end by themselves


class Page(HTMLParser):
    """Reads a page as a browser would: its text, tags and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | LEFT_OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix)) for source in sources]


def make_config(**sections: Any) -> RunConfig[Any]:
    values = {
        "name": "a-run",
        "data": {"source": "digits", "views": {"recipe": "simclr", "size_px": 8}},
        "backbone": {"name": "resnet18", "stem": "cifar"},
        "method": {"name": "simclr"},
        "train": {"epochs": 4, "global_batch_size": 4},
    }
    return run_from_values(values | sections, where="test")


def make_derived(config: RunConfig[Any]) -> Derived:
    return derive(config, num_images=1347)


def make_source() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    return ArraySource("s", pixels)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The folder of a finished run with labels, not drawn yet."""
    folder = RunFolder(tmp_path / "a-run")
    folder.path.mkdir()
    write_json(folder.results, RESULTS)
    lines = [{"step": step, "train/loss": 1 / step, "train/lr": 0.1} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez(
        folder.features,
        features=np.random.default_rng(0).normal(size=(12, 4)),
        labels=np.arange(12) % 3,
        thumbnails=np.zeros((12, 8, 8, 3), dtype=np.uint8),
        class_names=np.array(["<script>alert(2)</script>", "$b", "c"]),
    )
    return folder


def draw(folder: RunFolder, config: RunConfig[Any] | None = None) -> list[tuple[str, str]]:
    config = config or make_config()
    source = make_source()
    return draw_all(folder, source=source, config=config, derived=make_derived(config))


class TestDrawAll:
    def test_draws_every_picture_and_puts_it_into_the_page(self, folder: RunFolder) -> None:
        assert draw(folder) == []
        names = ["accuracy", "curves", "views", "map"]
        files = [(folder.pictures / f"{name}.png").read_bytes() for name in names]
        assert Page(folder.report.read_text()).pictures == files
        assert {p.stem for p in folder.pictures.iterdir()} == set(names)
        for file in files:
            image = decode(file, where="a picture")
            assert min(image.shape[:2]) >= 200
            assert image.std() > 5

    def test_one_failure_does_not_lose_the_others(self, folder: RunFolder) -> None:
        folder.features.write_bytes(b"not a zip file")
        failures = draw(folder)
        assert [name for name, _ in failures] == ["map"]
        assert failures[0][1]
        page = Page(folder.report.read_text())
        assert len(page.pictures) == 3
        assert "not drawn (pictures/map.png)" in page.text

    def test_an_old_picture_does_not_stand_for_one_that_failed(self, folder: RunFolder) -> None:
        draw(folder)
        folder.metrics.unlink()
        assert [name for name, _ in draw(folder)] == ["curves"]
        assert not (folder.pictures / "curves.png").exists()

    def test_a_run_without_labels_has_no_accuracy_and_no_failure(self, folder: RunFolder) -> None:
        write_json(folder.results, {"steps": 3})
        assert draw(folder) == []
        page = Page(folder.report.read_text())
        assert "there are no labels" in page.text
        assert "nan" not in page.text.lower()
        assert len(page.pictures) == 3

    def test_too_few_labels_for_a_probe_leave_it_out(self, folder: RunFolder) -> None:
        known = {name: value for name, value in RESULTS.items() if "few_shot" not in name}
        write_json(folder.results, known)
        assert draw(folder) == []
        page = Page(folder.report.read_text())
        assert "Nearest neighbours" in page.text
        assert "per class" not in page.text.partition("Settings")[0]

    def test_reports_a_page_that_cannot_be_written(self, folder: RunFolder) -> None:
        folder.report.mkdir()
        assert [name for name, _ in draw(folder)] == ["report"]
        assert len(list(folder.pictures.iterdir())) == 4

    def test_works_in_a_thread_of_its_own(self, folder: RunFolder) -> None:
        failures: list[object] = ["not run"]
        thread = threading.Thread(target=lambda: failures.__setitem__(0, draw(folder)))
        thread.start()
        thread.join()
        assert failures == [[]]


class TestWriteReport:
    def write(self, folder: RunFolder, config: RunConfig[Any] | None = None) -> str:
        config = config or make_config()
        path = write_report(folder, config=config, derived=make_derived(config))
        assert path == folder.report
        return path.read_text(encoding="utf-8")

    def test_holds_every_accuracy_with_its_deviation(self, folder: RunFolder) -> None:
        text = Page(self.write(folder)).text
        rows = [
            "Pretrained91.294.670.0 \u00b1 3.2",
            "Before training81.182.253.3 \u00b1 4.0",
            "Bare pixels74.475.546.7 \u00b1 5.0",
        ]
        assert all(row in text for row in rows)

    def test_says_how_accuracies_were_measured(self, folder: RunFolder) -> None:
        text = Page(self.write(folder)).text
        for part in ("1,347 labelled", "450 others of 10", "C 1", "3 labels per class, 6 draws"):
            assert part in text
        assert "knn@1 (k 17, temperature 0.09" in text  # as the run kept, not as set now
        assert (
            "With 450 test images, the standard error of 94.6 % is 1.1 percentage points" in text
        )  # sqrt(0.9456 * 0.0544 / 450)

    def test_says_what_fine_tuning_gave_where_it_was_asked_for(self, folder: RunFolder) -> None:
        assert "Fine-tuned" not in Page(self.write(folder)).text
        write_json(folder.results, RESULTS | {"finetune_top1": 0.876, "finetune_labels": 1234})
        config = make_config(evaluate={"final": ["finetune"], "finetune": {"head_layers": 2}})
        text = Page(self.write(folder, config)).text
        assert "Fine-tuned on 1,234 of the labels, from layer 2 of the projection head" in text
        assert "it reaches 87.6 % top-1 accuracy" in text

    def test_a_run_without_counts_names_none(self, folder: RunFolder) -> None:
        write_json(folder.results, {"knn_top1": 0.9, "protocols": {"knn": "knn@1 (k 20)"}})
        quick = Page(self.write(folder)).text.partition("Configuration")[0]
        assert "the nearest neighbours of its features reach 90.0 % top-1 accuracy." in quick
        assert "labelled images train" not in quick
        assert "Pretrained90.0" in quick
        for missing in ("Bare pixels", "Before training"):  # neither was measured
            assert missing not in quick
        write_json(folder.results, {"top1": 0.901})
        views = {"recipe": "finetune", "size_px": 8}
        config = make_config(
            data={"source": "digits", "views": views}, method={"name": "supervised"}
        )
        text = Page(self.write(folder, config)).text
        assert "it reaches 90.1 % top-1 accuracy on the test images." in text

    def test_says_which_weights_the_network_had_before_training(self, folder: RunFolder) -> None:
        backbone = {"name": "resnet18", "stem": "cifar"}
        given = make_config(backbone=backbone | {"weights": "<b>.pth"})
        for config, weights in ((make_config(), "random weights"), (given, "the weights of <b>")):
            text = Page(self.write(folder, config)).text
            assert f"Before training, the same network has {weights}" in text
            assert "untrained" not in text.partition("Configuration")[0].lower()

    def test_opens_with_what_was_done_in_a_sentence(self, folder: RunFolder) -> None:
        text = Page(self.write(folder)).text
        assert "simclr pretrained a resnet18 for 4 epochs on 1,347 images of digits" in text
        assert "reaches 94.6 % top-1 accuracy, against 82.2 % before training" in text

    def test_asks_the_network_for_nothing(self, folder: RunFolder) -> None:
        draw(folder)
        page = self.write(folder)
        assert not re.search(r"""(src|href|url|action)\s*[=(]\s*['"]?\s*(https?:)?//""", page)
        assert {tag for tag, _ in Page(page).tags}.isdisjoint(
            {"script", "link", "iframe", "object"}
        )
        assert "default-src 'none'" in page

    def test_is_made_for_a_phone_and_for_the_night(self, folder: RunFolder) -> None:
        page = self.write(folder)
        assert "width=device-width" in page
        assert "prefers-color-scheme: dark" in page
        assert "max-width: 100%" in page

    def test_closes_what_it_opens(self, folder: RunFolder) -> None:
        draw(folder)
        assert Page(folder.report.read_text()).open == []

    def test_escapes_names_that_are_code(self, folder: RunFolder) -> None:
        evil = "<script>alert(1)</script>\"'&"
        config = make_config()
        data = config.data.model_copy(update={"source": evil})
        config = config.model_copy(update={"name": evil, "data": data})
        write_json(folder.results, RESULTS | {"knn_k": evil, "num_classes": evil})
        page = self.write(folder, config)
        assert "<script" not in page
        assert Page(page).text.count(evil) >= 4  # title, heading, sentence, configuration

    def test_a_class_name_that_is_code_does_not_reach_the_page(self, folder: RunFolder) -> None:
        assert draw(folder) == []
        assert "<script" not in folder.report.read_text()

    def test_holds_the_configuration_and_what_follows_from_it(self, folder: RunFolder) -> None:
        page = Page(self.write(folder))
        assert [tag for tag, _ in page.tags].count("details") == 2
        assert "global_batch_size: 4" in page.text
        assert "total_steps1,344" in page.text

    @pytest.mark.parametrize(
        "chosen",
        [
            {"name": "resnet18", "stem": "cifar"},
            {"name": "resnet18"},
            {"name": "resnet18", "stem": "small", "norm": "group"},
            {"name": "resnet18", "width": 0.5},
            {"name": "convnext_tiny"},
            {"name": "vit_tiny", "patch_size_px": 4, "depth": 2, "pool": "mean"},
        ],
    )
    def test_its_lines_of_code_load_the_encoder(
        self, folder: RunFolder, chosen: dict[str, Any]
    ) -> None:
        from raysl.encoder.file import save_encoder
        from raysl.nn.backbones import build_backbone

        if chosen["name"].startswith("vit"):
            pytest.importorskip("timm")
        views = {"recipe": "simclr", "size_px": 32}
        config = make_config(backbone=chosen, data={"source": "digits", "views": views})
        backbone = build_backbone(config.backbone, image_size_px=config.image_size_px)
        section = config.backbone.model_dump(mode="json")
        description = {"backbone": section, "image_size_px": config.image_size_px}
        save_encoder(folder.encoder, backbone, description=description)
        code = Page(self.write(folder, config)).text
        code = code[code.index("Use the encoder") + len("Use the encoder") :]
        code = code[: code.index("Its input is RGB")]
        scope: dict[str, Any] = {}
        exec(code.replace('"encoder.safetensors"', repr(str(folder.encoder))), scope)
        model = scope["model"]
        loaded = getattr(model, "net", model).state_dict()
        saved = backbone.net.state_dict()
        assert loaded.keys() == saved.keys()
        assert all((loaded[key] == saved[key]).all() for key in saved)

    def test_lists_the_files_that_are_there(self, folder: RunFolder) -> None:
        text = Page(self.write(folder)).text
        assert "metrics.jsonl" in text
        assert "mlflow.json" not in text
        assert str(folder.path) in text

    def test_works_for_a_run_that_has_nothing_yet(self, tmp_path: Path) -> None:
        page = Page(self.write(RunFolder(tmp_path / "empty")))
        assert "the run has no results yet" in page.text
        assert page.pictures == []

    def test_a_damaged_picture_is_left_out(self, folder: RunFolder) -> None:
        folder.pictures.mkdir()
        (folder.pictures / "curves.png").write_bytes(b"half")
        assert "not drawn (pictures/curves.png)" in Page(self.write(folder)).text

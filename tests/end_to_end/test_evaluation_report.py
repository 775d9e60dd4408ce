"""The page of an evaluation in a real browser, on a desk and on a phone."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.downstream.evaluation_page import draw_evaluation
from raysl.encoder.file import save_encoder
from raysl.evaluate.features import EvalImages
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.sources.builtin import open_digits
from raysl.sources.source import ArraySource

pytestmark = pytest.mark.slow

NAMES = [f"the long name of class {number}" for number in range(10)]


def images(source: ArraySource, count: int) -> EvalImages:
    labels = source.labels()
    assert labels is not None
    rows = np.arange(count)
    return EvalImages(source, rows, labels[:count], size_px=32, crop_fraction=1.0, num_threads=1)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of made-up features of the digits, with every picture and long words."""
    run = tmp_path_factory.mktemp("browser") / ("a_run_of_a_name_without_spaces_" * 3)
    folder = run / "evaluations" / "main"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    vit = BackboneConfig(name="vit_tiny", depth=1, patch_size_px=8)
    header = {"backbone": vit.model_dump(mode="json"), "image_size_px": 32}
    header |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    encoder = run / "encoder.safetensors"
    save_encoder(encoder, build_backbone(vit, image_size_px=32), description=header)
    train, test = images(open_digits("train"), 120), images(open_digits("test"), 60)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"predictions_linear": rng.integers(0, 10, 60)}
    for name, part in (("train", train), ("test", test)):
        features = 2 * np.eye(10, 24)[part.labels] + rng.normal(size=(len(part), 24))
        arrays[f"{name}_features"] = features.astype(np.float32)
        arrays[f"{name}_labels"], arrays[f"{name}_rows"] = part.labels, part.rows
    np.savez(folder / "evaluation.npz", **arrays)
    one = {"version": 1, "mean": 0.8, "deviation": 0.0123, "seconds": 1234.5, "images_per_s": 54321}
    names = ("knn", "linear", "few_shot", "semi_1", "semi_10", "finetune", "transfer")
    record = {
        "encoder": str(encoder),
        "source": "s3://bucket/" + "deep/" * 20 + "train.parquet",
        "test_source": "s3://bucket/test-" + "0123456789" * 8 + ".parquet",
        "protocols": {
            name: one | {"settings": {"labels_per_class": 5, "rates": [0.1] * 20}} for name in names
        },
        "label_free": {"rankme": 7.0, "alpha_req": 1.2, "alignment": 0.1, "uniformity": -2.0},
        "features": {"seconds": 1.0, "images_per_s": 180.0},
        "classes": NAMES,
        "bad_images": 3,
    }
    record["protocols"]["linear"] = one | {"settings": {}}  # type: ignore[index]
    (folder / "evaluation.json").write_text(json.dumps(record))
    problems = draw_evaluation(folder, encoder=encoder, train=train, test=test)
    assert [name for name, _ in problems] == []
    return folder / "report.html"


@pytest.fixture(params=[1280, 390])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Chromium as wide as a desk's window and as a phone."""
    pytest.importorskip("selenium")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver")
    webdriver = importlib.import_module("selenium.webdriver")
    service = importlib.import_module("selenium.webdriver.chrome.service").Service(driver)
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if request.param < 500:
        metrics = {"width": request.param, "height": 844, "pixelRatio": 2.0}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    else:
        options.add_argument(f"--window-size={request.param},1000")
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


def test_fits_the_window_shows_every_picture_and_asks_the_network_for_nothing(
    page: Path, browser: Any
) -> None:
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, window = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert wide <= window
    loaded = browser.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0,"
        " i.getBoundingClientRect().right <= window.innerWidth])"
    )
    assert len(loaded) == 7
    assert all(shown and inside for shown, inside in loaded)
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(n => !n.startsWith('data:'))"
    )
    assert asked == []

"""Four hundred images of which twenty are damaged in ten ways: training goes on and says which."""

import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pytest
from PIL import Image as PILImage

from raysl.cli import main
from raysl.data.decode import Flaw
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")

NUM_IMAGES, NUM_BAD = 400, 20


def _encode(picture: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(picture).save(file, kind)
    return file.getvalue()


def _bomb() -> bytes:
    """A small PNG that says it has 3.6 thousand million pixels."""
    data = bytearray(_encode(np.zeros((4, 4, 3), dtype=np.uint8), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _damaged(way: int, picture: np.ndarray) -> tuple[bytes, Flaw]:
    jpeg, png = _encode(picture, "JPEG"), _encode(picture, "PNG")
    middle = len(jpeg) // 2
    return [
        (b"", Flaw.EMPTY),
        (jpeg[:middle], Flaw.DAMAGED),
        (jpeg[:-2], Flaw.DAMAGED),
        (jpeg[:-40] + b"\xff\xd9" * 20, Flaw.DAMAGED),
        (jpeg[:200], Flaw.DAMAGED),
        (png[: len(png) // 2], Flaw.DAMAGED),
        (_encode(picture, "WEBP")[:40], Flaw.DAMAGED),
        (b"<html>404 not found</html>", Flaw.WEB_PAGE),
        (np.random.default_rng(way).bytes(3000), Flaw.NOT_AN_IMAGE),
        (_bomb(), Flaw.TOO_LARGE),
    ][way]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Flaw]]:
    """A folder of JPEG files, and what is wrong with which."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    bad = rng.permutation(NUM_IMAGES)[:NUM_BAD].tolist()
    flaws = {}
    for number in range(NUM_IMAGES):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = cv2.resize(small, (40, 30), interpolation=cv2.INTER_CUBIC)
        path = folder / f"{number:04}.jpg"
        if number in bad:
            data, flaws[str(path)] = _damaged(bad.index(number) % 10, picture)
        else:
            data = _encode(picture, "JPEG")
        path.write_bytes(data)
    return folder, flaws


def _settings(folder: Path) -> list[str]:
    return [
        f"data.source={folder}",
        "data.limit=null",
        "train.steps=10",
        f"train.global_batch_size={NUM_IMAGES // 10}",
        "train.checkpoint_every={steps: 5}",
        "evaluate.every=null",
        "data.bad_images={max_share: 0.06}",
    ]


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.usefixtures("ray_cluster", "empty_store_here")
def test_one_epoch_finds_them_all_and_ends_well(
    run_yaml: Callable[[str], Path],
    photos: tuple[Path, dict[str, Flaw]],
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    folder, flaws = photos
    more = [f"cluster.num_train_workers={num_workers}", "track.mlflow=true"]
    more += ["track.log_model=false", "--json"]
    assert main(["pretrain", str(run_yaml("bad")), *_settings(folder), *more]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    lines = Path("runs/bad/bad_images.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert result["num_bad_images"] == NUM_BAD
    assert f"{NUM_BAD} bad images, listed in " in output.err
    assert {entry["name"]: entry["reason"] for entry in listed} == {
        name: flaw.reason for name, flaw in flaws.items()
    }
    assert len(listed) == NUM_BAD
    assert len(Counter(flaws.values())) == 5
    records = read_metrics(RunFolder(Path("runs/bad")).metrics)
    assert [r["train/loss"] for r in records if "train/loss" in r][-1] > 0
    assert max(r.get("data/bad_images", 0) for r in records) == NUM_BAD
    client = mlflow.MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    run = client.get_run(result["mlflow_run_id"])
    assert run.data.metrics["data/bad_images"] == NUM_BAD
    assert "bad_images.jsonl" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_too_many_end_the_run_with_an_example_and_the_list(
    run_yaml: Callable[[str], Path],
    photos: tuple[Path, dict[str, Flaw]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, flaws = photos
    command = ["pretrain", str(run_yaml("strict")), *_settings(folder)]
    command[-1] = "data.bad_images={max_share: 0.02}"
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"of {NUM_IMAGES} images are bad, such as " in error
    assert any(name in error for name in flaws)
    assert "data.bad_images.max_share=0.02" in error
    assert len(Path("runs/strict/bad_images.jsonl").read_text().splitlines()) > 0.02 * NUM_IMAGES

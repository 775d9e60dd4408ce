from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.augment.pipeline import make_views as views_of
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.run.method_pictures import write_method_pictures
from raysl.run.pictures import draw_grid, read_method_pictures
from raysl.sources.source import ArraySource
from raysl.train.batches import batch_converter, view_converter

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIEWS = (View(count=2, size_px=8, crop=Crop(scale=(0.5, 1.0))),)
PROGRESS = Progress(step=10, total_steps=10, steps_per_epoch=5, seed=3)


class ShowsConfig(MethodConfig):
    name: Literal["shows"] = "shows"


class Shows(Method):
    """Shows its views as they are, and a picture in colours of its own."""

    Config = ShowsConfig
    draws = True

    def __init__(self, config: ShowsConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.backbone = backbone
        self.modes: list[bool] = []

    @property
    def encoder(self) -> Backbone:
        return self.backbone

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        raise AssertionError

    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        self.modes.append(self.training)
        if not self.draws:
            return {}
        views: Tensor = torch.stack(list(batch.views), dim=1)
        grey = torch.full((1, 3, 3, 4, 4), 0.5)
        return {
            "views": ImageGrid(views, ("first", "second"), "Both views."),
            "grey": ImageGrid(grey, (), "A grey picture.", normalised=False),
        }


def write(path: Path, method: Method, source: ArraySource) -> None:
    device = torch.device("cpu")
    to_views = view_converter(device=device, mean=MEAN, std=STD, channels_last=True)
    write_method_pictures(
        path,
        method,
        source=source,
        views=VIEWS,
        to_batch=batch_converter(to_views, device=device),
        progress=PROGRESS,
        mean=MEAN,
        std=STD,
    )


def shows() -> Shows:
    data = TrainingSet(num_images=12, global_batch_size=4, view_sizes_px=(8, 8))
    return Shows(ShowsConfig(), Backbone(nn.Linear(1, 1), embed_dim=1), data)


def images() -> ArraySource:
    return ArraySource(
        "s", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    )


def test_normalised_pictures_come_back_as_the_pixels_of_the_views(tmp_path: Path) -> None:
    source = images()
    path = tmp_path / "pictures.npz"
    write(path, shows(), source)
    found = read_method_pictures(path)
    assert list(found) == ["views", "grey"]
    rows = np.unique(np.linspace(0, 11, 8).astype(np.int64))
    for shown, row in zip(found["views"].pixels, rows.tolist(), strict=True):
        pixels = source.read(np.array([row]))[0]
        assert isinstance(pixels, np.ndarray)
        (expected,) = views_of(pixels, VIEWS, seed=3, epoch=0, index=row)
        np.testing.assert_array_equal(shown, np.stack(expected))
    assert found["views"].columns == ["first", "second"]
    assert found["views"].caption == "Both views."
    assert set(found["grey"].pixels.ravel().tolist()) == {128}
    for name, grid in found.items():
        draw_grid(tmp_path / f"{name}.png", grid)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_the_method_is_in_evaluation_mode_and_nothing_of_it_changes(tmp_path: Path) -> None:
    method = shows()
    before = torch.get_rng_state()
    write(tmp_path / "pictures.npz", method, images())
    assert method.modes == [False]
    assert method.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_that_shows_nothing_leaves_no_file(tmp_path: Path) -> None:
    method = shows()
    method.draws = False
    write(tmp_path / "pictures.npz", method, images())
    assert list(tmp_path.iterdir()) == []
    assert read_method_pictures(tmp_path / "pictures.npz") == {}

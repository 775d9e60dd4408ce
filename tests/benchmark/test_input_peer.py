"""The peer makes the same recipe of the same bytes, and says what it lacks."""

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms

from raysl.augment.crop import Image
from raysl.augment.pipeline import View
from raysl.benchmark.input_peer import (
    PeerImages,
    PeerTask,
    is_installed,
    run_peer,
    torchvision_ops,
    transform_of,
)
from raysl.config.load import validate
from raysl.data.plan import Plan
from raysl.errors import DataError
from raysl.sources.source import ArraySource, DataConfig


def data(views: dict[str, Any]) -> DataConfig:
    return validate(DataConfig, {"source": "x", "views": views}, where="test")


def images() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    return ArraySource("made up", pixels)


def view(*ops: dict[str, Any]) -> View:
    return validate(View, {"size_px": 32, "ops": list(ops)}, where="test")


class TestOps:
    def test_of_simclr_have_the_recipes_parameters(self) -> None:
        (kind,) = data({"recipe": "simclr", "size_px": 224, "color_strength": 0.5}).views.views()
        (flip, jitter, grey, blur), missing = torchvision_ops(kind)
        assert missing == []
        assert isinstance(flip, transforms.RandomHorizontalFlip)
        assert jitter.p == 0.8
        assert jitter.transforms[0].brightness == (0.6, 1.4)
        assert jitter.transforms[0].hue == (-0.1, 0.1)
        assert grey.p == 0.2
        assert blur.transforms[0].kernel_size == (23, 23)
        assert blur.transforms[0].sigma == (0.1, 2.0)

    def test_that_torchvision_lacks_on_pil_images_are_named(self) -> None:
        ops, missing = torchvision_ops(view({"op": "sobel"}, {"op": "flip"}, {"op": "noise"}))
        assert len(ops) == 1
        assert missing == ["sobel", "noise"]

    @pytest.mark.parametrize(
        "op", ["flip", "rotate", "quarter_turn", "color_jitter", "grey", "blur", "solarise"]
    )
    def test_of_raysl_run_on_pil_images(self, op: str) -> None:
        ops, missing = torchvision_ops(view({"op": op, "prob": 1.0}))
        assert missing == []
        image = PIL.Image.fromarray(images().images[0])
        assert ops[0](image).size == image.size


class TestTransform:
    def test_makes_every_view_of_every_kind(self) -> None:
        config = data({"recipe": "dino", "size_px": 32, "local_count": 3, "local_size_px": 16})
        transform, left_out = transform_of("torch-uint8", config)
        made = transform(PIL.Image.fromarray(images().images[0]))
        assert [tuple(v.shape) for v in made] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
        assert {v.dtype for v in made} == {torch.uint8}
        assert left_out == []

    def test_of_most_users_gives_normalised_floats(self) -> None:
        config = data({"recipe": "mae", "size_px": 8})
        transform, _ = transform_of("torch", config)
        grey = PIL.Image.new("RGB", (8, 8), (124, 116, 104))  # the mean of ImageNet
        (made,) = transform(grey)
        assert made.dtype == torch.float32
        assert made.abs().max() < 0.02


class TestImages:
    def test_are_decoded_by_pillow_and_a_bad_one_ends_nothing(self) -> None:
        encoded = io.BytesIO()
        PIL.Image.new("L", (30, 20), 7).save(encoded, "PNG")

        class Files(ArraySource):
            def read(self, indices: Any) -> list[bytes | Image]:
                return [encoded.getvalue() if index == 0 else b"broken" for index in indices]

        found = PeerImages(Files("files", images().images), lambda image: (image.mode, image.size))
        assert found[0] == ("RGB", (30, 20))
        assert found[1][0] == "RGB"


class TestRunPeer:
    def task(self, peer: str = "torch") -> PeerTask:
        plan = Plan([12], seed=0, global_batch_size=4, item_size=2, num_steps=1)
        config = data({"recipe": "simclr", "size_px": 16})
        return PeerTask(peer, images(), plan, config, num_workers=1, seconds=0.2)

    @pytest.mark.distributed
    def test_answers_from_a_process_of_its_own(self) -> None:
        speed = run_peer(self.task())
        assert speed.images_per_s > 0
        assert speed.first_batch_s > 0
        assert speed.num_workers == 1
        assert speed.left_out == []

    def test_a_process_that_ends_without_an_answer_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.executable", "false")
        with pytest.raises(DataError, match="torchvision on PIL, float, normalised: failed: exit"):
            run_peer(self.task())

    def test_lightly_is_no_dependency(self) -> None:
        assert is_installed("torch")
        assert is_installed("lightly") in (True, False)

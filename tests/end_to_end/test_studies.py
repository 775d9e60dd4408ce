"""The scripts of docs/studies: peers do the same with the same images, and say what they lack."""

import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms

from raysl.augment.crop import Image
from raysl.augment.pipeline import View
from raysl.config.load import validate
from raysl.data.plan import Plan
from raysl.embed.config import EmbedConfig
from raysl.embed.ray_embed import Pools
from raysl.embed.source import embedding_of
from raysl.evaluate.embedding import features_here
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig

SPEED = SimpleNamespace(images_per_s=10.0, first_batch_s=1.0, left_out=("noise",))

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script as another script beside it would."""
    monkeypatch.syspath_prepend(str(STUDIES))
    for name in ("input_against_torch", "embedding_against_torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def data(views: dict[str, Any]) -> DataConfig:
    return validate(DataConfig, {"source": "x", "views": views}, where="test")


def images() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    return ArraySource("made up", pixels)


def view(*ops: dict[str, Any]) -> View:
    return validate(View, {"size_px": 32, "ops": list(ops)}, where="test")


class TestInputPeers:
    def test_simclr_has_the_recipes_parameters(self, study: Callable[[str], Any]) -> None:
        (kind,) = data({"recipe": "simclr", "size_px": 224, "color_strength": 0.5}).views.views()
        (flip, jitter, grey, blur), missing = study("input_against_torch").torchvision_ops(kind)
        assert missing == []
        assert isinstance(flip, transforms.RandomHorizontalFlip)
        assert jitter.p == 0.8
        assert jitter.transforms[0].brightness == (0.6, 1.4)
        assert jitter.transforms[0].hue == (-0.1, 0.1)
        assert grey.p == 0.2
        assert blur.transforms[0].kernel_size == (23, 23)
        assert blur.transforms[0].sigma == (0.1, 2.0)

    def test_operations_that_torchvision_lacks_are_named(self, study: Callable[[str], Any]) -> None:
        given = view({"op": "sobel"}, {"op": "flip"}, {"op": "noise"})
        ops, missing = study("input_against_torch").torchvision_ops(given)
        assert len(ops) == 1
        assert missing == ["sobel", "noise"]

    @pytest.mark.parametrize(
        "op", ["flip", "rotate", "quarter_turn", "color_jitter", "grey", "blur", "solarise"]
    )
    def test_all_others_run_on_pil_images(self, op: str, study: Callable[[str], Any]) -> None:
        ops, missing = study("input_against_torch").torchvision_ops(view({"op": op, "prob": 1.0}))
        assert missing == []
        image = PIL.Image.fromarray(images().images[0])
        assert ops[0](image).size == image.size

    def test_every_view_of_every_kind_is_made(self, study: Callable[[str], Any]) -> None:
        config = data({"recipe": "dino", "size_px": 32, "local_count": 3, "local_size_px": 16})
        transform, left_out = study("input_against_torch").transform_of("torch-uint8", config)
        made = transform(PIL.Image.fromarray(images().images[0]))
        assert [tuple(v.shape) for v in made] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
        assert {v.dtype for v in made} == {torch.uint8}
        assert left_out == []

    def test_most_users_loader_gives_normalised_floats(self, study: Callable[[str], Any]) -> None:
        config = data({"recipe": "mae", "size_px": 8})
        transform, _ = study("input_against_torch").transform_of("torch", config)
        grey = PIL.Image.new("RGB", (8, 8), (124, 116, 104))  # the mean of ImageNet
        (made,) = transform(grey)
        assert made.dtype == torch.float32
        assert made.abs().max() < 0.02

    def test_images_are_decoded_by_pillow_and_a_bad_one_ends_nothing(
        self, study: Callable[[str], Any]
    ) -> None:
        encoded = io.BytesIO()
        PIL.Image.new("L", (30, 20), 7).save(encoded, "PNG")

        class Files(ArraySource):
            def read(self, indices: Any) -> list[bytes | Image]:
                return [encoded.getvalue() if index == 0 else b"broken" for index in indices]

        files = Files("files", images().images)
        loaded = study("input_against_torch").PeerImages(files, lambda i: (i.mode, i.size))
        assert loaded[0] == ("RGB", (30, 20))
        assert loaded[1][0] == "RGB"

    def test_batches_have_the_plans_rows_in_its_order(self, study: Callable[[str], Any]) -> None:
        plan = Plan([12], seed=0, global_batch_size=4, item_size=2, num_steps=9)
        batches = iter(study("input_against_torch").Batches(plan))
        rows = [row for _ in range(3) for row in next(batches)]
        expected = np.concatenate([plan.item(position).indices for position in range(6)])
        assert rows == expected.tolist()

    @pytest.mark.distributed
    def test_a_peer_is_measured_in_a_process_of_its_own(self, study: Callable[[str], Any]) -> None:
        module = study("input_against_torch")
        plan = Plan([12], seed=0, global_batch_size=4, item_size=2, num_steps=1)
        config = data({"recipe": "simclr", "size_px": 16})
        task = module.PeerTask("torch", images(), plan, config, num_workers=1, seconds=0.05)
        speed = module.in_own_process(module.measure_peer, task)
        assert speed.images_per_s > 0
        assert speed.first_batch_s > 0
        assert speed.left_out == ()


class TestEmbeddingLoops:
    @pytest.mark.parametrize("loop", ["own-decode", "here"])
    def test_give_the_features_of_raysl(
        self,
        loop: str,
        study: Callable[[str], Any],
        tiny_encoder: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        module = study("embedding_against_torch")
        monkeypatch.setattr(module, "_ROWS", 8)
        config = EmbedConfig(source="digits", limit=8)
        source = open_source(config, data=DataConfig(source="digits"))
        embedding = embedding_of(tiny_encoder(), config)
        expected, _ = features_here(source, np.arange(8), embedding, num_threads=1)
        task = module.LoopTask(loop, source, embedding, 0, 0.1)
        if loop == "here":
            (features,) = module.features_here(task._replace(cores=1))
        else:
            (features,) = module.features_of_loader(task)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)

    def test_torchvisions_loop_gives_features_of_every_image(
        self, study: Callable[[str], Any], photos: Path, tiny_encoder: Callable[..., Path]
    ) -> None:
        module = study("embedding_against_torch")
        config = EmbedConfig(source=str(photos), limit=8)
        source = open_source(config, data=DataConfig(source=str(photos)))
        task = module.LoopTask("torch", source, embedding_of(tiny_encoder(), config), 0, 0.1)
        features = next(module.features_of_loader(task))
        assert features.shape == (256, 64)
        assert np.isfinite(features).all()
        np.testing.assert_allclose(features[:8], features[8:16], rtol=1e-4, atol=1e-5)


class TestSideBySide:
    """What is measured of raysl stands in; it runs on Ray in the tests of `raysl benchmark`."""

    @pytest.fixture
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mock]:
        """Replace a function of raysl by one that takes the same arguments and measures 20.0."""

        def replace(module: Any, name: str) -> Mock:
            monkeypatch.setattr(module, "connect", lambda: False)
            monkeypatch.setattr(module, "in_own_process", lambda *_: SPEED)
            measured = create_autospec(getattr(module, name))
            measured.return_value = SimpleNamespace(images_per_s=20.0, first_batch_s=0.5)
            monkeypatch.setattr(module, name, measured)
            return measured

        return replace

    def test_input(
        self,
        study: Callable[[str], Any],
        stand_in: Callable[..., Mock],
        run_yaml: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        module = study("input_against_torch")
        measured = stand_in(module, "measure_stream")
        monkeypatch.setattr(module, "input_layout", lambda _: "a layout")
        monkeypatch.setattr(module, "cores_of", lambda _: 2)
        monkeypatch.setattr(module, "share_source", lambda source: source)
        words = [str(run_yaml("x")), "data.limit=16", "--peers=torch,torch-uint8"]
        speeds = module.main([*words, "--rounds=2", "--seconds=0.1"])
        assert {name: len(rows) for name, rows in speeds.items()} == {
            "raysl": 2,
            "torch": 2,
            "torch-uint8": 2,
        }
        assert measured.call_count == 2
        out = capsys.readouterr().out
        assert "raysl through Ray Data" in out
        assert "torchvision on PIL, uint8, without noise" in out
        assert f"{20.0 / SPEED.images_per_s:.2f}" in out

    def test_embedding(
        self,
        study: Callable[[str], Any],
        stand_in: Callable[..., Mock],
        tiny_encoder: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        module = study("embedding_against_torch")
        measured = stand_in(module, "measure_on_ray")
        monkeypatch.setattr(module, "embedding_pools", lambda _: Pools(3, 1.0, 0, 0.0))
        words = ["digits", str(tiny_encoder()), "num_workers=1", "--loops=own-decode"]
        speeds = module.main([*words, "--rounds=1", "--seconds=0.1"])
        assert list(speeds) == ["raysl", "own-decode"]
        assert [row.images_per_s for row in speeds["raysl"]] == [20.0]
        assert measured.call_args.kwargs["images_per_s"] == SPEED.images_per_s
        assert "raysl on Ray, 3 actors" in capsys.readouterr().out

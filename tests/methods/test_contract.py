"""What every method promises to the loop; a new file in raysl/methods is found by itself."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raysl.errors import ConfigError
from raysl.methods import load_method, method_names
from raysl.methods.base import Method, Progress
from raysl.nn.backbones import Backbone

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

pytestmark = pytest.mark.filterwarnings("error")
every_method = pytest.mark.parametrize("name", method_names())


def build(name: str, backbone: Backbone, *, seed: int = 0) -> Method:
    kind = load_method(name)
    torch.manual_seed(seed)
    return kind(kind.Config(), backbone)


@every_method
class TestMethod:
    def test_is_named_like_its_file(self, name: str) -> None:
        kind = load_method(name)
        assert issubclass(kind, Method)
        assert kind.Config().name == name

    def test_loss_is_a_finite_float32_scalar_also_under_autocast(
        self, name: str, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(name, tiny_backbone())
        views = make_views(num_views=method.Config().num_views)
        losses = [method(views, progress).loss]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(method(views, progress).loss)
        for loss in losses:
            assert loss.shape == ()
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)

    def test_every_trainable_parameter_gets_a_gradient_and_no_other(
        self, name: str, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(name, tiny_backbone())
        method(make_views(num_views=method.Config().num_views), progress).loss.backward()
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key
                assert parameter.grad.abs().sum() > 0, key
            else:
                assert parameter.grad is None, key
        assert all(parameter.requires_grad for parameter in method.encoder.parameters())

    def test_metrics_are_detached_scalars_named_section_slash_name(
        self, name: str, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(name, tiny_backbone())
        metrics = method(make_views(num_views=method.Config().num_views), progress).metrics
        assert metrics
        for key, value in metrics.items():
            assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", key)
            assert value.shape == ()
            assert not value.requires_grad
            assert torch.isfinite(value)

    def test_features_are_those_of_one_view_and_detached(
        self, name: str, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(name, tiny_backbone())
        features = method(make_views(num_views=method.Config().num_views), progress).features
        assert features.shape == (8, method.encoder.embed_dim)
        assert not features.requires_grad

    def test_state_dict_round_trip_gives_the_same_loss(
        self, name: str, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(name, tiny_backbone())
        views = make_views(num_views=method.Config().num_views)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        for seed in range(2):  # so that queues and averages have moved
            other = make_views(num_views=method.Config().num_views, seed=seed + 1)
            method(other, progress).loss.backward()
            optimizer.step()
            method.after_optimizer_step(progress)

        copy = build(name, tiny_backbone(seed=1), seed=1)
        with torch.no_grad():
            assert copy(views, progress).loss != method(views, progress).loss
        copy.load_state_dict(method.state_dict(), strict=True)
        torch.manual_seed(3)
        expected = method(views, progress).loss
        torch.manual_seed(3)
        assert torch.equal(copy(views, progress).loss, expected)

    def test_encoder_is_a_backbone_within_the_method(
        self, name: str, tiny_backbone: Backbones
    ) -> None:
        method = build(name, tiny_backbone())
        assert isinstance(method.encoder, Backbone)
        assert any(module is method.encoder for module in method.modules())


def test_progress_gives_every_rank_the_same_numbers_and_every_step_others() -> None:
    def numbers(step: int, seed: int) -> list[int]:
        progress = Progress(step=step, total_steps=9, steps_per_epoch=3, seed=seed)
        return torch.randperm(50, generator=progress.shared_generator()).tolist()

    assert numbers(1, 0) == numbers(1, 0)
    drawn = [tuple(numbers(step, seed)) for step in range(4) for seed in (0, 1, 2**63 - 1)]
    assert len(set(drawn)) == 12


class TestLoadMethod:
    def test_names_are_those_of_the_files(self) -> None:
        assert {"simclr", "moco"} <= set(method_names())
        assert "base" not in method_names()

    @pytest.mark.parametrize("name", ["simclrr", "base", "", "SimCLR"])
    def test_an_unknown_name_lists_the_known_ones(self, name: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_method(name)
        message = str(caught.value)
        assert f"method.name: got {name!r}, allowed: {', '.join(method_names())}" in message
        assert "dotted name" in message

    def test_a_dotted_name_loads_a_module_from_outside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "someone_elses"
        package.mkdir()
        (package / "mine.py").write_text("from raysl.methods.simclr import SimCLR as METHOD\n")
        (package / "empty.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert load_method("someone_elses.mine") is load_method("simclr")
        with pytest.raises(ConfigError, match=r"method.name=someone_elses.empty: .*'METHOD'"):
            load_method("someone_elses.empty")

    def test_a_module_that_is_not_there_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigError, match=r"method.name=not_there.at_all: No module named"):
            load_method("not_there.at_all")


def test_training_and_evaluating_load_neither_ray_nor_mlflow() -> None:
    program = """
import sys
from raysl.methods import load_method, method_names
for name in method_names():
    load_method(name)
import raysl.optim.build, raysl.train.checkpoint, raysl.train.loop
import raysl.evaluate.protocol, raysl.encoder
print(sorted({"ray", "mlflow"} & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"

"""What every method promises to the loop; a new file in raysl/methods is found by itself."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raysl.config.help_text import docstring_of
from raysl.errors import ConfigError
from raysl.methods import load_method, method_names
from raysl.methods.base import Batch, LossOutput, Method, MethodConfig, Progress, TrainingSet
from raysl.nn.backbones import Backbone
from raysl.nn.heads import count_layers
from raysl.train.gradient import backward, can_split

pytestmark = pytest.mark.filterwarnings("error")
every_method = pytest.mark.parametrize("name", method_names())

DATA = TrainingSet(
    num_images=64, global_batch_size=8, view_sizes_px=(32, 32), class_counts=(22, 21, 21)
)
SMALL = 16


def small(name: str, teacher: Path) -> MethodConfig:
    """The defaults of a method, but no wide heads; where it needs a teacher, this one."""
    kind = load_method(name).Config
    wide = {
        field: SMALL
        for field, info in kind.model_fields.items()
        if field.endswith(("_dim", "_prototypes")) and (info.default or SMALL + 1) > SMALL
    }
    given: dict[str, Any] = {"teacher": str(teacher)} if "teacher" in kind.files else {}
    return kind(**wide, **given)


class Subject:
    """A method under test and what it is fed."""

    def __init__(
        self, name: str, backbones: dict[bool, Callable[..., Backbone]], teacher: Path
    ) -> None:
        self.kind = load_method(name)
        self.config = small(name, teacher)
        self._backbone = backbones[self.config.needs_vit]

    def method(self, *, seed: int = 0) -> Method:
        backbone = self._backbone(seed=seed)
        torch.manual_seed(seed)
        return self.kind(self.config, backbone, DATA)

    def batch(self, *, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.linspace(0.5, 2.0, 8).view(8, 1, 1, 1)
        views = [
            torch.randn(8, 3, 32, 32, generator=generator) * spread + spread
            for _ in range(self.config.num_views)
        ]
        return Batch(views, torch.arange(8) + 8 * seed, torch.arange(8) % 3)


class Operations(TorchDispatchMode):
    """Counts the operations that torch does within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def subject(
    name: str,
    tiny_backbone: Callable[..., Backbone],
    tiny_vit: Callable[..., Backbone],
    teacher: Path,
) -> Subject:
    return Subject(name, {False: tiny_backbone, True: tiny_vit}, teacher)


def total(output: LossOutput) -> Tensor:
    return output.loss + (0.0 if output.adversary_loss is None else output.adversary_loss)


@every_method
class TestMethod:
    def test_is_named_like_its_file(self, name: str) -> None:
        kind = load_method(name)
        assert issubclass(kind, Method)
        assert kind.Config().name == name

    def test_says_of_every_setting_what_it_means(self, name: str) -> None:
        config = load_method(name).Config
        settings = [setting for setting in config.model_fields if setting != "name"]
        assert [setting for setting in settings if not docstring_of(config, setting)] == []

    def test_loss_is_a_finite_float32_scalar_also_under_autocast(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method()
        outputs = [method(subject.batch(), progress)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(method(subject.batch(), progress))
        for output in outputs:
            assert output.loss.shape == ()
            assert output.loss.dtype == torch.float32
            assert torch.isfinite(total(output))

    def test_every_trainable_parameter_gets_a_gradient_and_no_other(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method()
        total(method(subject.batch(), progress)).backward()
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key
                assert parameter.grad.abs().sum() > 0, key
            else:
                assert parameter.grad is None, key

    def test_an_adversary_and_the_rest_learn_from_their_own_loss_only(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method()
        output = method(subject.batch(), progress)
        theirs = set() if method.adversary is None else set(method.adversary.parameters())
        assert (output.adversary_loss is None) == (method.adversary is None)
        output.loss.backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in theirs)
        if output.adversary_loss is not None:
            method.zero_grad()
            output.adversary_loss.backward()
            assert all(p.grad is None for p in method.parameters() if p not in theirs)

    def test_metrics_are_detached_scalars_named_section_slash_name(
        self, subject: Subject, progress: Progress
    ) -> None:
        metrics = subject.method()(subject.batch(), progress).metrics
        assert metrics
        for key, value in metrics.items():
            assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", key)
            assert value.shape == ()
            assert not value.requires_grad
            assert torch.isfinite(value), key

    def test_a_step_that_is_not_logged_has_the_same_loss_no_metrics_and_less_to_do(
        self, subject: Subject, progress: Progress
    ) -> None:
        outputs, counts = [], []
        for is_logged in (True, False):
            method = subject.method()
            torch.manual_seed(5)
            with Operations() as done:
                outputs.append(method(subject.batch(), progress._replace(is_logged=is_logged)))
            counts.append(done.count)
        assert outputs[1].metrics == {}
        assert torch.equal(outputs[0].loss, outputs[1].loss)
        assert torch.equal(outputs[0].features, outputs[1].features)
        assert counts[1] < counts[0]

    def test_features_are_those_of_one_view_and_detached(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method()
        features = method(subject.batch(), progress).features
        assert features.shape == (8, method.encoder.embed_dim)
        assert not features.requires_grad

    def test_state_dict_round_trip_gives_the_same_loss(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method()
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
        for seed in range(2):  # so that queues and averages have moved
            total(method(subject.batch(seed=seed + 1), progress)).backward()
            method.before_optimizer_step(progress)
            optimizer.step()
            method.after_optimizer_step(progress)

        copy = subject.method(seed=1)
        with torch.no_grad():
            parameters = zip(copy.parameters(), method.parameters(), strict=True)
            assert any(not torch.equal(a, b) for a, b in parameters)
        copy.load_state_dict(method.state_dict(), strict=True)
        torch.manual_seed(3)
        expected = method(subject.batch(), progress).loss
        torch.manual_seed(3)
        assert torch.equal(copy(subject.batch(), progress).loss, expected)

    def test_encoder_is_a_backbone_within_the_method(self, subject: Subject) -> None:
        method = subject.method()
        assert isinstance(method.encoder, Backbone)
        assert any(module is method.encoder for module in method.modules())

    def test_its_head_takes_the_features_and_has_as_many_layers_as_its_settings_say(
        self, subject: Subject
    ) -> None:
        method = subject.method()
        num_layers = subject.config.projection_head_layers(is_vit=subject.config.needs_vit)
        head = method.projection_head
        assert (head is None) == (num_layers == 0)
        if head is not None:
            assert count_layers(head) == num_layers
            assert head[0].in_features == method.encoder.embed_dim
            assert any(module is head for module in method.modules())

    def test_a_batch_in_parts_has_the_gradient_of_the_whole(
        self, subject: Subject, progress: Progress
    ) -> None:
        """In evaluation mode, where batch norm takes nothing from the batch."""
        if not can_split(subject.kind):
            pytest.skip("its loss can neither be cached nor accumulated")
        found: list[tuple[Tensor, list[Tensor]]] = []
        for size in (None, 8):  # of one part, so that what is random is the same
            method = subject.method().eval()
            torch.manual_seed(5)
            output = backward(
                method,
                subject.batch(),
                progress,
                model=method,
                autocast=nullcontext,
                micro_batch_size=size,
            )
            gradients = [p.grad for p in method.parameters() if p.grad is not None]
            found.append((output.loss, gradients))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
        for part, whole in zip(found[1][1], found[0][1], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)

    def test_pictures_are_finite_and_have_a_title_a_column(
        self, subject: Subject, progress: Progress
    ) -> None:
        method = subject.method().eval()
        for picture in method.pictures(subject.batch(), progress).values():
            rows, columns, channels, height, width = picture.images.shape
            assert channels == 3
            assert height == width
            assert picture.columns == () or len(picture.columns) == columns
            assert rows > 0
            assert picture.caption
            assert not picture.images.requires_grad
            assert picture.images.isfinite().all()


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
import raysl.evaluate.protocol, raysl.encoder.file
print(sorted({"ray", "mlflow"} & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"

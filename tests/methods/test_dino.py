import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysl.config.base import Duration
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.dino import DINO, DINOConfig, dino_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.vit import DropPath, VisionTransformer

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


def dino_by_hand(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, cold: float, warm: float
) -> Tensor:
    """Eqs. (1) to (3) with a loop over pairs, images and prototypes, in float64."""
    terms = []
    for t, g_t in enumerate(teacher):
        for s, g_s in enumerate(student):
            if s == t:
                continue
            for row_t, row_s in zip(g_t.detach().double(), g_s.double(), strict=True):
                up_t = torch.exp((row_t - center.double()) / cold)
                up_s = torch.exp(row_s / warm)
                p_t, p_s = up_t / up_t.sum(), up_s / up_s.sum()
                terms.append(
                    -torch.stack([p * torch.log(q) for p, q in zip(p_t, p_s, strict=True)]).sum()
                )
    return torch.stack(terms).mean()


def outputs(views: int = 4, n: int = 3, k: int = 5) -> tuple[list[Tensor], list[Tensor], Tensor]:
    torch.manual_seed(0)
    student = [torch.randn(n, k).requires_grad_() for _ in range(views)]
    return student, [torch.randn(n, k) for _ in range(2)], 0.5 * torch.randn(k)


def loss_of(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    return dino_loss(student, teacher, center, student_temperature=0.3, teacher_temperature=0.2)


class TestDinoLoss:
    @pytest.mark.parametrize("views", [2, 3, 6])
    @pytest.mark.parametrize(("cold", "warm"), [(0.04, 0.1), (0.5, 1.0)])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, views: int, cold: float, warm: float
    ) -> None:
        student, teacher, center = outputs(views)
        loss = dino_loss(
            student, teacher, center, student_temperature=warm, teacher_temperature=cold
        )
        expected = dino_by_hand(student, teacher, center, cold, warm)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for gradient, exact in zip(
            torch.autograd.grad(loss, student),
            torch.autograd.grad(expected, student),
            strict=True,
        ):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("k", [2, 65])
    def test_uniform_outputs_give_the_logarithm_of_the_number_of_prototypes(self, k: int) -> None:
        flat = [torch.ones(3, k)] * 4
        assert loss_of(flat, flat[:2], torch.zeros(k)).item() == pytest.approx(math.log(k))

    def test_equal_one_hot_views_have_a_closed_form(self) -> None:
        views = [torch.eye(4)] * 3
        loss = dino_loss(
            views, views[:2], torch.zeros(4), student_temperature=0.5, teacher_temperature=1e-3
        )
        assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / 0.5)))

    def test_a_view_is_never_compared_with_itself(self) -> None:
        student, teacher, center = outputs(views=2)
        (to_view_0,) = torch.autograd.grad(loss_of(student, teacher, center), student[:1])
        other = [torch.randn_like(teacher[0]), teacher[1]]
        (again,) = torch.autograd.grad(loss_of(student, other, center), student[:1])
        assert torch.equal(to_view_0, again)

    def test_does_not_depend_on_the_order_of_images_prototypes_or_small_views(self) -> None:
        student, teacher, center = outputs()
        loss = loss_of(student, teacher, center).item()
        for order, dim in ((torch.tensor([2, 0, 1]), 0), (torch.tensor([3, 0, 4, 1, 2]), 1)):
            moved = [[x.index_select(dim, order) for x in views] for views in (student, teacher)]
            c = center[order] if dim == 1 else center
            assert loss_of(moved[0], moved[1], c).item() == pytest.approx(loss)
        small_swapped = [student[0], student[1], student[3], student[2]]
        assert loss_of(small_swapped, teacher, center).item() == pytest.approx(loss)
        large_swapped = [student[1], student[0], *student[2:]]
        assert loss_of(large_swapped, teacher[::-1], center).item() == pytest.approx(loss)

    def test_takes_no_gradient_to_the_teacher(self) -> None:
        student, teacher, center = outputs()
        loss_of(student, [t.requires_grad_() for t in teacher], center).backward()
        assert all(t.grad is None for t in teacher)

    def test_gradient_is_right(self) -> None:
        student, teacher, center = outputs(views=3)

        def loss(*views: Tensor) -> Tensor:
            return loss_of(list(views), [t.double() for t in teacher], center.double())

        assert torch.autograd.gradcheck(
            loss, tuple(s.detach().double().requires_grad_() for s in student)
        )

    def test_is_exact_under_autocast_and_for_half_precision_values(self) -> None:
        student, teacher, center = outputs()
        loss = loss_of(student, teacher, center)
        assert loss.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss_of(student, teacher, center), loss)
        halves = [[x.detach().bfloat16() for x in views] for views in (student, teacher)]
        floats = [[x.float() for x in views] for views in halves]
        found = loss_of(halves[0], halves[1], center)
        assert torch.equal(found, loss_of(floats[0], floats[1], center))

    def test_center_may_be_a_row_as_in_the_authors_code(self) -> None:
        student, teacher, center = outputs()
        assert torch.equal(
            loss_of(student, teacher, center[None]), loss_of(student, teacher, center)
        )

    def test_says_which_shapes_it_got(self) -> None:
        x, c = torch.zeros(3, 5), torch.zeros(5)
        with pytest.raises(ShapeError, match=r"same for every view; got \[\(3, 5\), \(3, 4\), "):
            loss_of([x, torch.zeros(3, 4)], [x, x], c)
        with pytest.raises(ShapeError, match=r"must be \(N, K\).*got \[\(5,\)"):
            loss_of([c, c], [c, c], c)
        with pytest.raises(ShapeError, match=r"center must be \(5,\) .*; got \(4,\)"):
            loss_of([x, x], [x, x], torch.zeros(4))
        with pytest.raises(ShapeError, match="got 1 of the student, 1 of the teacher"):
            loss_of([x], [x], c)


SMALL: dict[str, Any] = {
    "hidden_dim": 8, "bottleneck_dim": 5, "num_prototypes": 7, "teacher_temperature": 0.06,
    "ema_momentum": 0.5,
}  # fmt: skip


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


def step(method: DINO, batch: Batch, progress: Progress, *, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)
    method(batch, progress).loss.backward()
    method.before_optimizer_step(progress)
    optimizer.step()
    method.after_optimizer_step(progress)


@pytest.fixture
def batch(make_views: Views) -> Batch:
    return batch_of(make_views(size=16) + make_views(num_views=3, seed=1, size=8))


@pytest.fixture
def method(tiny_backbone: Backbones, training_set: TrainingSet) -> DINO:
    return DINO(DINOConfig(**SMALL), tiny_backbone(), training_set)


class TestDINO:
    def test_loss_is_that_of_all_views_with_the_teachers_large_ones(
        self, tiny_backbone: Backbones, training_set: TrainingSet, batch: Batch, progress: Progress
    ) -> None:
        method = DINO(DINOConfig(**SMALL), tiny_backbone(batch_norm=False), training_set)
        method.center.normal_(std=0.1)
        step(method, batch, progress)  # student and teacher differ from here on
        student = [method.student.head(method.student.backbone(v)) for v in batch.views]
        teacher = [method.teacher.head(method.teacher.backbone(v)) for v in batch.views[:2]]
        # The warm-up is a tenth of 20 steps: over at step 3.
        expected = dino_by_hand(student, teacher, method.center, 0.06, 0.1)
        assert method(batch, progress).loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_views_of_one_size_go_through_the_backbone_together(
        self, method: DINO, batch: Batch, progress: Progress
    ) -> None:
        seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
        for name, network in (("student", method.student), ("teacher", method.teacher)):
            network.backbone.register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append(tuple(args[0].shape))
            )
        method(batch, progress)
        assert seen == {"student": [(16, 3, 16, 16), (24, 3, 8, 8)], "teacher": [(16, 3, 16, 16)]}

    def test_features_are_the_students_of_view_0(
        self, tiny_backbone: Backbones, training_set: TrainingSet, batch: Batch, progress: Progress
    ) -> None:
        method = DINO(DINOConfig(**SMALL), tiny_backbone(batch_norm=False), training_set)
        expected = method.student.backbone(batch.views[0]).detach()
        torch.testing.assert_close(method(batch, progress).features, expected)

    def test_teacher_starts_as_the_student_and_follows_it_without_a_gradient(
        self, method: DINO, batch: Batch, progress: Progress
    ) -> None:
        before = [p.clone() for p in method.teacher.parameters()]
        assert all(map(torch.equal, before, method.student.parameters()))
        step(method, batch, progress)
        momentum = 1 - (1 - 0.5) * (1 + math.cos(math.pi * 3 / 20)) / 2
        assert method.momentum_at(progress) == pytest.approx(momentum)
        for old, student, teacher in zip(
            before, method.student.parameters(), method.teacher.parameters(), strict=True
        ):
            torch.testing.assert_close(teacher, momentum * old + (1 - momentum) * student)
            assert teacher.grad is None

    def test_center_follows_the_teachers_outputs_also_of_a_batch_in_parts(
        self, method: DINO, batch: Batch, progress: Progress
    ) -> None:
        method.eval()  # batch norm takes nothing from a part
        with torch.no_grad():
            output = method.teacher(batch.views[:2])[1]
            method(batch, progress)  # no training, so it leaves no trace
        method.train()
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for rows in (slice(0, 5), slice(5, 8)):
            method(batch_of([view[rows] for view in batch.views]), progress)
        method.after_optimizer_step(progress)
        torch.testing.assert_close(method.center, 0.1 * output.mean(dim=0))
        method.after_optimizer_step(progress)  # nothing new: it stays
        torch.testing.assert_close(method.center, 0.1 * output.mean(dim=0))

    @pytest.mark.parametrize("norm_last_layer", [True, False])
    def test_prototypes_stay_for_the_first_epoch(
        self,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        batch: Batch,
        norm_last_layer: bool,
    ) -> None:
        config = DINOConfig(**SMALL, norm_last_layer=norm_last_layer)
        method = DINO(config, tiny_backbone(), training_set)
        last = method.student.head.last_layer
        assert len(list(last.parameters())) == (1 if norm_last_layer else 2)
        start = [p.clone() for p in last.parameters()]
        step(method, batch, Progress(4, 20, 5, seed=7))
        assert all(map(torch.equal, last.parameters(), start))
        method.zero_grad()
        step(method, batch, Progress(5, 20, 5, seed=7))
        assert not any(map(torch.equal, last.parameters(), start))

    def test_momentum_goes_to_its_final_value_along_half_a_cosine(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        def found(**settings: Any) -> list[float]:
            config = DINOConfig(num_prototypes=7, ema_momentum=0.9, **settings)
            method = DINO(config, tiny_backbone(), training_set)
            return [method.momentum_at(Progress(s, 20, 5, seed=0)) for s in (0, 10, 20)]

        assert found() == pytest.approx([0.9, 0.95, 1.0])
        assert found(final_ema_momentum=0.9) == pytest.approx([0.9, 0.9, 0.9])

    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_head_has_the_layers_that_the_configuration_says(
        self, tiny_backbone: Backbones, training_set: TrainingSet, layers: int
    ) -> None:
        config = DINOConfig(**SMALL, head_layers=layers, head_batch_norm=True)
        head = DINO(config, tiny_backbone(), training_set).student.head
        widths = [m.out_features for m in head.mlp if isinstance(m, nn.Linear)]
        assert widths == [8] * (layers - 1) + [5]
        assert sum(isinstance(m, nn.BatchNorm1d) for m in head.mlp) == layers - 1

    def test_teacher_temperature_rises_linearly_over_its_warm_up(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = DINOConfig(
            teacher_temperature=0.08, teacher_temperature_warmup=Duration(epochs=2.0)
        )
        method = DINO(config, tiny_backbone(), training_set)
        found = [method.temperature_at(Progress(s, 99, 10, seed=0)) for s in (0, 5, 10, 20, 98)]
        assert found == pytest.approx([0.04, 0.05, 0.06, 0.08, 0.08])

    def test_metrics_tell_both_collapses(
        self, method: DINO, batch: Batch, progress: Progress
    ) -> None:
        output = method(batch, progress)
        metrics = {name: value.item() for name, value in output.metrics.items()}
        entropy = metrics["dino/teacher_entropy"]
        assert 0 < entropy < math.log(7)
        assert metrics["dino/student_teacher_kl"] == pytest.approx(output.loss.item() - entropy)
        assert 1 <= metrics["dino/prototypes_used"] <= 7
        assert metrics["dino/teacher_temperature"] == pytest.approx(0.06)

        nn.init.zeros_(
            method.teacher.head.get_parameter("mlp.4.weight")
        )  # every image has the same outputs
        flat = method(batch, progress).metrics
        assert flat["dino/teacher_entropy"].item() == pytest.approx(math.log(7))
        method.center[3] = -9.0
        single = method(batch, progress).metrics
        assert single["dino/teacher_entropy"].item() == pytest.approx(0, abs=1e-5)
        assert single["dino/prototypes_used"].item() == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize("network", ["teacher", "student"])
    def test_encoder_is_the_one_that_the_configuration_says(
        self, tiny_backbone: Backbones, training_set: TrainingSet, network: Any
    ) -> None:
        backbone = tiny_backbone()
        method = DINO(DINOConfig(**SMALL, evaluate_network=network), backbone, training_set)
        assert method.encoder is getattr(method, network).backbone
        assert (method.encoder is backbone) == (network == "student")

    def test_teacher_drops_no_branches(self, training_set: TrainingSet) -> None:
        net = VisionTransformer(
            image_size_px=16, patch_size_px=8, embed_dim=8, depth=2, num_heads=2, drop_path=0.3
        )
        method = DINO(DINOConfig(**SMALL), Backbone(net, embed_dim=8), training_set)

        def most(module: nn.Module) -> float:
            return max(m.prob for m in module.modules() if isinstance(m, DropPath))

        assert (most(method.student), most(method.teacher)) == (0.3, 0.0)


class TestSizes:
    @pytest.mark.parametrize(
        ("images", "prototypes", "temperature", "momentum"),
        [
            (64, 256, 0.04, 0.99),
            (10_000, 512, 0.04, 0.99),
            (50_000, 2048, 0.04, 0.99),  # lightly's CIFAR-10 benchmark
            (253_000, 16_384, 0.055, 0.993),  # half of the way, in logarithms
            (1_281_167, 65_536, 0.07, 0.996),  # the paper
            (10**8, 65_536, 0.07, 0.996),
        ],
    )
    def test_defaults_follow_from_the_number_of_images(
        self, images: int, prototypes: int, temperature: float, momentum: float
    ) -> None:
        found = DINOConfig().size_defaults(TrainingSet(images, 8, (32, 32)))
        assert found["num_prototypes"].value == prototypes
        assert found["teacher_temperature"].value == pytest.approx(temperature, abs=1e-4)
        assert found["ema_momentum"].value == pytest.approx(momentum, abs=1e-4)
        assert all(f"{images:,}" in default.formula for default in found.values())

    def test_what_is_given_has_no_default(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = DINOConfig(num_prototypes=9, ema_momentum=0.0)
        assert list(config.size_defaults(training_set)) == ["teacher_temperature"]
        method = DINO(config, tiny_backbone(), training_set)
        assert method.center.shape == (9,)
        assert (method.ema_momentum, method.teacher_temperature) == (0.0, 0.04)

    def test_large_views_come_first(self) -> None:
        def check(*sizes: int) -> None:
            DINOConfig().check_shape(RunShape(8, 1, sizes, BackboneConfig()))

        check(32, 32)
        check(32, 32, 16, 16)
        with pytest.raises(ConfigError, match=r"large ones; data.views makes sizes \[32, 16, 32\]"):
            check(32, 16, 32)
        with pytest.raises(ConfigError, match="dino takes 2 or more views"):
            check(32)


class TestPictures:
    def test_are_attention_maps_of_each_head_and_their_mean_over_the_images_values(
        self,
        tiny_vit: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
    ) -> None:
        method = DINO(DINOConfig(**SMALL), tiny_vit(), training_set).eval()
        views = make_views(3, size=32)
        grid = method.pictures(batch_of(views), progress)["attention"]
        assert grid.columns == ("image", "head 1", "head 2", "mean")
        assert grid.images.shape == (3, 4, 3, 32, 32)
        assert torch.equal(grid.images[:, 0], views[0])
        net = method.encoder.net
        assert isinstance(net, VisionTransformer)
        heads = net.last_attention(views[0]).detach().unflatten(2, (4, 4))
        low, high = views[0].amin(dim=(1, 2, 3)), views[0].amax(dim=(1, 2, 3))
        for column, maps in ((1, heads[:, 0]), (2, heads[:, 1]), (3, heads.mean(dim=1))):
            cells = grid.images[:, column, :, ::8, ::8]  # one pixel a patch
            for image in range(3):
                share = (maps[image] - maps[image].min()) / (maps[image].max() - maps[image].min())
                expected = low[image] + share * (high - low)[image]
                torch.testing.assert_close(cells[image], expected.expand(3, -1, -1))

    def test_there_are_none_of_a_convolutional_network(
        self, method: DINO, batch: Batch, progress: Progress
    ) -> None:
        assert method.pictures(batch, progress) == {}

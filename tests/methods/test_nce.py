import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.nce import (
    ISOTROPIC_SHARE,
    NCE,
    NCEConfig,
    _first_of_each,
    nce_loss,
)
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.geometry import log_mean_exp_on_sphere

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]
Build = Callable[..., NCE]

NUM_IMAGES = 20
LABELS = [0] * 12 + [1] * 6 + [2] * 2


def nce_by_hand(
    data_logits: Tensor,
    noise_logits: Tensor,
    data_log_noise: Tensor,
    noise_log_noise: Tensor,
    *,
    num_noise: int,
) -> Tensor:
    """Eqs. (6) and (7) of Wu et al. in probabilities, one datum and one sample after another."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data_logits)):
        model, noise = data_logits[i].double().exp(), data_log_noise[i].double().exp()
        total = total - torch.log(model / (model + num_noise * noise))
        for k in range(noise_logits.shape[1]):
            model, noise = noise_logits[i, k].double().exp(), noise_log_noise[i, k].double().exp()
            total = total - torch.log(1 - model / (model + num_noise * noise))
    return total / len(data_logits)


def numbers(n: int = 4, k: int = 6, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n,), (n, k), (n,), (n, k))
    return [torch.randn(shape, generator=generator, dtype=dtype) * 2 - 1 for shape in shapes]


def loss_of(values: list[Tensor], num_noise: int) -> Tensor:
    data, noise, data_log_noise, noise_log_noise = values
    return nce_loss(
        data,
        noise,
        data_log_noise=data_log_noise,
        noise_log_noise=noise_log_noise,
        num_noise=num_noise,
    )


class TestNceLoss:
    @pytest.mark.parametrize("num_noise", [1, 6, 4096])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, num_noise: int
    ) -> None:
        values = [x.requires_grad_() for x in numbers()]
        loss, expected = loss_of(values, num_noise), nce_by_hand(*values, num_noise=num_noise)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, values)
        for gradient, exact in zip(gradients, torch.autograd.grad(expected, values), strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6, check_dtype=False)

    @pytest.mark.parametrize(("num_noise", "expected"), [(1, 2 * math.log(2)), (3, None)])
    def test_a_model_equal_to_the_noise_has_a_closed_form(
        self, num_noise: int, expected: float | None
    ) -> None:
        _, _, data_log_noise, noise_log_noise = numbers(4, num_noise)
        values = [data_log_noise, noise_log_noise, data_log_noise, noise_log_noise]
        m = num_noise
        closed_form = expected or math.log(1 + m) + m * math.log(1 + 1 / m)
        assert loss_of(values, m).item() == pytest.approx(closed_form, rel=1e-5)

    def test_depends_on_the_ratio_of_densities_alone(self) -> None:
        values = numbers()
        loss = loss_of(values, 6).item()
        shifts = (1.5, 2.5, 1.5, 2.5)  # another measure at the data and at the noise
        moved = [x + shift for x, shift in zip(values, shifts, strict=True)]
        assert loss_of(moved, 6).item() == pytest.approx(loss, rel=1e-5)

    def test_does_not_depend_on_the_order_of_images_or_samples(self) -> None:
        values = numbers()
        loss = loss_of(values, 6).item()
        rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
        turned = [x[rows] if x.ndim == 1 else x[rows][:, columns] for x in values]
        assert loss_of(turned, 6).item() == pytest.approx(loss, rel=1e-6)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        values = [x.requires_grad_() for x in numbers(dtype=torch.float64)]
        torch.autograd.gradcheck(lambda *x: loss_of(list(x), 6), values)

    def test_is_finite_where_probabilities_are_not(self) -> None:
        values = [x * 1e4 for x in numbers()]
        assert loss_of(values, 6).isfinite()

    def test_is_exact_under_autocast(self) -> None:
        values = numbers()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss_of(values, 6), loss_of(values, 6))
            assert loss_of([x.bfloat16() for x in values], 6).dtype == torch.float32

    def test_says_which_shapes_it_got(self) -> None:
        data, noise, data_log_noise, noise_log_noise = numbers()
        with pytest.raises(ShapeError, match=r"got \(4,\), \(4,\), \(4, 6\), \(4, 5\)"):
            loss_of([data, noise, data_log_noise, noise_log_noise[:, :5]], 6)
        with pytest.raises(ShapeError, match=r"\(N,\), noise_logits"):
            loss_of([data[:3], noise, data_log_noise, noise_log_noise], 6)

    def test_recovers_mean_precision_and_normaliser_of_a_gaussian(self) -> None:
        """Consistency: only an exact normaliser is rewarded, none is given to the model."""
        generator = torch.Generator().manual_seed(0)
        data = 1.0 + 0.7 * torch.randn(6_000, generator=generator, dtype=torch.float64)
        noise = 2.0 * torch.randn(6_000, 3, generator=generator, dtype=torch.float64)
        known = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(2.0)).log_prob
        mean, precision, log_c = (
            torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.0, 1.0, 0.0)
        )

        def model(x: Tensor) -> Tensor:
            return -precision * (x - mean) ** 2 / 2 + log_c

        optimizer = torch.optim.LBFGS([mean, precision, log_c], max_iter=50)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of([model(data), model(noise), known(data), known(noise)], 3)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        assert mean.item() == pytest.approx(1.0, abs=0.04)
        assert precision.item() == pytest.approx(1 / 0.7**2, rel=0.06)
        expected = -math.log(0.7 * math.sqrt(2 * math.pi))
        assert log_c.item() == pytest.approx(expected, abs=0.04)


@pytest.fixture
def build(tiny_backbone: Backbones) -> Build:
    def build(*, seed: int = 0, batch_norm: bool = False, **settings: object) -> NCE:
        backbone = tiny_backbone(batch_norm=batch_norm)
        torch.manual_seed(seed)
        config = NCEConfig.model_validate(
            {"projection_dim": 4, "num_noise": 5, "temperature": 0.5} | settings
        )
        return NCE(config, backbone, TrainingSet(NUM_IMAGES, 8, (8,), class_counts=(12, 6, 2)))

    return build


def as_batch(views: list[Tensor], index: list[int] | None = None) -> Batch:
    rows = torch.arange(len(views[0])) if index is None else torch.tensor(index)
    return Batch(views, rows, torch.tensor(LABELS)[rows])


def embedded(method: NCE, view: Tensor) -> Tensor:
    return F.normalize(method.projector(method.backbone(view)).detach(), dim=1)


def visit(method: NCE, make_views: Views, progress: Progress, index: list[int]) -> Tensor:
    """Take a step without an optimizer; return what was embedded."""
    view = make_views(len(index), num_views=1, seed=len(index))[0]
    method(as_batch([view], index), progress)
    method.after_optimizer_step(progress)
    return embedded(method, view)


class TestNCE:
    def expected(self, method: NCE, batch: Batch, log_noise: Tensor, rows: Tensor) -> Tensor:
        """The loss from the method's own rows, with log Z as it stands after the batch."""
        v = embedded(method, batch.views[0])
        logits = v @ method.bank.T / method.config.temperature - method.log_normalizer
        own = logits.gather(1, batch.index[:, None])[:, 0]
        return nce_by_hand(
            own,
            logits.gather(1, rows),
            log_noise[batch.index],
            log_noise[rows],
            num_noise=method.num_noise,
        )

    def test_loss_with_uniform_noise_is_the_paper_s(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build()
        batch = as_batch(make_views(num_views=1), [7, 3, 19, 0, 1, 2, 4, 5])
        torch.manual_seed(5)
        output = method(batch, progress)
        torch.manual_seed(5)
        rows = torch.randint(NUM_IMAGES, (8, 5))
        uniform = torch.full((NUM_IMAGES,), -math.log(NUM_IMAGES))
        expected = self.expected(method, batch, uniform, rows)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_first_batch_sets_the_normaliser_for_good(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build()
        view = make_views(num_views=1)[0]
        torch.manual_seed(5)
        method(as_batch([view]), progress)
        torch.manual_seed(5)
        rows = torch.randint(NUM_IMAGES, (8, 5))
        logits = (embedded(method, view) @ method.bank.T / 0.5).gather(1, rows)
        expected = math.log(NUM_IMAGES * logits.exp().mean().item())  # Eq. (8)
        assert method.log_normalizer.item() == pytest.approx(expected, rel=1e-5)
        method(as_batch([view]), progress)
        assert method.log_normalizer.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("noise", ["uniform", "labels"])
    def test_many_samples_give_the_exact_normaliser(
        self, build: Build, make_views: Views, progress: Progress, noise: str
    ) -> None:
        """Importance sampling is right whatever the noise is."""
        estimated = build(noise=noise, num_noise=4000)
        exact = build(noise=noise, num_noise=4000, normalizer="exact")
        for method in (estimated, exact):
            if noise == "labels":
                method.bank_label.copy_(torch.tensor(LABELS))
        batch = as_batch(make_views(num_views=1))
        estimated(batch, progress)
        of_each = (embedded(exact, batch.views[0]) @ exact.bank.T / 0.5).logsumexp(dim=1)
        metric = exact(batch, progress).metrics["nce/log_normalizer"].item()
        assert metric == pytest.approx(of_each.mean().item(), rel=1e-5)
        assert estimated.log_normalizer.item() == pytest.approx(
            of_each.exp().mean().log().item(), abs=0.02
        )

    def test_with_gaussian_noise_many_samples_give_the_closed_form(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        """So the samples have the density that they are said to have."""
        method = build(noise="gaussian", num_noise=60_000)
        spread = torch.diag(torch.tensor([0.55, 0.25, 0.15, 0.05]))
        turn, _ = torch.linalg.qr(torch.randn(4, 4))
        method.second_moment.copy_(turn @ spread @ turn.T)
        method(as_batch(make_views(num_views=1)), progress)
        expected = log_mean_exp_on_sphere(4, 1 / 0.5)
        assert method.log_normalizer.item() == pytest.approx(expected, abs=0.02)
        constant = build(noise="gaussian", normalizer="exact")
        assert constant.log_normalizer.item() == pytest.approx(expected)

    def test_gaussian_density_is_that_of_the_angular_gaussian(self, build: Build) -> None:
        method = build(noise="gaussian")
        moment = torch.diag(torch.tensor([0.7, 0.1, 0.1, 0.1]))
        method.second_moment.copy_(moment)
        scatter = (1 - ISOTROPIC_SHARE) * moment + ISOTROPIC_SHARE * torch.eye(4) / 4
        points = F.normalize(torch.randn(8, 4), dim=1)
        noise = method._gaussian(points, points)
        quadratic = (points @ scatter.inverse() * points).sum(dim=1)
        expected = -scatter.logdet() / 2 - 2 * quadratic.log()
        torch.testing.assert_close(noise.data_log_noise, expected, rtol=1e-4, atol=1e-5)
        assert noise.log_noise.shape == noise.logits.shape == (8, 5)

    def test_second_moments_follow_the_embeddings(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build(noise="gaussian")
        v = visit(method, make_views, progress, [0, 1, 2, 3])
        expected = 0.99 * torch.eye(4) / 4 + 0.01 * v.T @ v / 4
        torch.testing.assert_close(method.second_moment, expected)

    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    def test_noise_from_labels_has_its_classes_by_their_counts_to_a_power(
        self, build: Build, make_views: Views, progress: Progress, power: float
    ) -> None:
        method = build(noise="labels", class_power=power, num_noise=4000)
        method.bank_label.copy_(torch.tensor(LABELS))
        counts = torch.tensor([12.0, 6.0, 2.0])
        of_class = counts**power / (counts**power).sum()
        of_row = (of_class / counts)[LABELS]
        batch = as_batch(make_views(num_views=1))
        v = embedded(method, batch.views[0])
        torch.manual_seed(1)
        noise = method._rows(v, batch)
        torch.testing.assert_close(noise.data_log_noise, of_row[:8].log())
        rows = (noise.logits[0, :, None] * 0.5 - v[0] @ method.bank.T).abs().argmin(dim=1)
        torch.testing.assert_close(noise.log_noise[0], of_row[rows].log())
        drawn = torch.bincount(rows, minlength=NUM_IMAGES) / 4000
        torch.testing.assert_close(drawn, of_row, atol=0.02, rtol=0)

    def test_rows_of_unknown_class_have_the_mean_weight_until_they_are_seen(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build(noise="labels")
        weight = method._row_weight()
        assert weight is not None
        assert weight.unique().numel() == 1
        visit(method, make_views, progress, [0, 13, 19])
        assert method.bank_label.tolist() == [
            LABELS[i] if i in (0, 13, 19) else -1 for i in range(NUM_IMAGES)
        ]
        method.bank_label.copy_(torch.tensor(LABELS))
        known = method._row_weight()
        assert known is not None
        assert known.mean().item() == pytest.approx(weight[0].item())

    def test_the_whole_product_and_the_sampled_rows_give_the_same_logits(
        self,
        build: Build,
        make_views: Views,
        progress: Progress,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        batch = as_batch(make_views(num_views=1))
        found = []
        for limit in (16, 0):
            monkeypatch.setattr("raysl.methods.nce.FULL_PRODUCT", limit)
            method = build()
            torch.manual_seed(2)
            loss = method(batch, progress).loss
            gradient = torch.autograd.grad(loss, [*method.projector.parameters()])
            found.append([loss, *gradient])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("noise", ["uniform", "gaussian"])
    def test_a_learnt_normaliser_starts_at_that_of_random_rows_and_has_a_gradient(
        self, build: Build, make_views: Views, progress: Progress, noise: str
    ) -> None:
        method = build(noise=noise, normalizer="learned")
        rows = math.log(NUM_IMAGES) if noise == "uniform" else 0.0
        expected = rows + log_mean_exp_on_sphere(4, 2.0)
        assert method.log_normalizer.item() == pytest.approx(expected)
        method(as_batch(make_views(num_views=1)), progress).loss.backward()
        assert isinstance(method.log_normalizer, nn.Parameter)
        assert method.log_normalizer.grad is not None
        assert method.log_normalizer.grad.abs() > 0

    def test_proximal_term_holds_embeddings_to_rows_that_were_seen(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        losses = {}
        for weight in (0.0, 10.0):
            for seen in (False, True):
                method = build(proximal_weight=weight)
                if seen:
                    method.bank_step[2:5] = 0
                batch = as_batch(make_views(num_views=1))
                torch.manual_seed(3)
                losses[weight, seen] = method(batch, progress).loss.item()
        assert losses[10.0, False] == losses[0.0, False]
        drift = (embedded(method, batch.views[0]) - method.bank[:8]).square().sum(dim=1)
        expected = losses[0.0, True] + 10 * drift[2:5].sum().item() / 8
        assert losses[10.0, True] == pytest.approx(expected, rel=1e-5)

    def test_head_follows_the_configuration(self, build: Build) -> None:
        def layers(**settings: object) -> list[str]:
            return [type(layer).__name__ for layer in build(**settings).projector]

        assert layers() == ["Linear"]
        assert layers(head="mlp") == ["Linear", "ReLU", "Linear"]
        assert layers(head_batch_norm=True) == ["Linear", "BatchNorm1d"]

    def test_features_are_those_of_the_view_before_the_head(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method, views = build(), make_views(num_views=1)
        features = method(as_batch(views), progress).features
        torch.testing.assert_close(features, method.encoder(views[0]).detach())

    def test_metrics_tell_right_decisions_alignment_and_age(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build()
        method.bank_step[:4] = torch.tensor([0, 1, 2, 2])
        batch = as_batch(make_views(num_views=1))
        torch.manual_seed(5)
        metrics = method(batch, progress).metrics
        torch.manual_seed(5)
        rows = torch.randint(NUM_IMAGES, (8, 5))
        cosine = embedded(method, batch.views[0]) @ method.bank.T
        ratio = (cosine / 0.5 - method.log_normalizer).exp() * NUM_IMAGES / 5
        own = torch.arange(8)
        expected = {
            "nce/data_right": (ratio[own, own] > 1).float().mean(),
            "nce/noise_right": (ratio.gather(1, rows) < 1).float().mean(),
            "nce/log_normalizer": method.log_normalizer,
            "nce/own_row_cosine": cosine[own, own].mean(),
            "nce/bank_age_epochs": torch.tensor((3 + 2 + 1 + 1) / 4 / 5),
        }
        assert metrics.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-5)


class TestBank:
    def test_rows_are_unit_vectors_and_move_half_of_the_way(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build()
        method.bank_step.fill_(0)
        before = method.bank.clone()
        index = [4, 17, 2]
        v = visit(method, make_views, progress, index)
        expected = before.clone()
        for row, new in zip(index, v, strict=True):
            mixed = 0.5 * before[row] + 0.5 * new
            expected[row] = mixed / mixed.norm()
        torch.testing.assert_close(method.bank, expected)
        torch.testing.assert_close(method.bank.norm(dim=1), torch.ones(NUM_IMAGES))
        assert method.bank_step.tolist() == [3 if i in index else 0 for i in range(NUM_IMAGES)]

    def test_random_rows_are_replaced_when_their_image_is_first_seen(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build(bank_momentum=0.9)
        v = visit(method, make_views, progress, [4, 17])
        torch.testing.assert_close(method.bank[[4, 17]], v)

    def test_an_image_twice_in_a_batch_is_written_once(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build(bank_momentum=0.0)
        v = visit(method, make_views, progress, [4, 9, 4, 4])
        torch.testing.assert_close(method.bank[[4, 9]], v[:2])

    def test_first_of_each(self) -> None:
        index = torch.tensor([5, 2, 5, 7, 2, 5])
        assert _first_of_each(index).tolist() == [0, 1, 0, 3, 1, 0]
        assert _first_of_each(index[:1]).tolist() == [0]

    def test_learns_to_tell_images_apart(
        self, build: Build, make_views: Views, progress: Progress
    ) -> None:
        method = build(temperature=0.1, num_noise=20, normalizer="exact", batch_norm=True)
        batch = as_batch(make_views(num_views=1))
        optimizer = torch.optim.Adam(method.parameters(), lr=0.02)

        def own_rows_found() -> int:
            cosine = embedded(method, batch.views[0]) @ method.bank[:8].T
            return int((cosine.argmax(dim=1) == torch.arange(8)).sum())

        assert own_rows_found() < 4
        for _ in range(60):
            output = method(batch, progress)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            method.after_optimizer_step(progress)
        assert own_rows_found() == 8
        assert output.metrics["nce/own_row_cosine"] > 0.95


class TestConfig:
    def test_takes_one_view(self) -> None:
        shape = RunShape(8, 1, (32, 32), BackboneConfig())
        with pytest.raises(ConfigError, match=r"takes 1 views of an image; data.views makes 2"):
            NCEConfig().check_shape(shape)
        NCEConfig().check_shape(shape._replace(view_sizes_px=(32,)))

    def test_a_sphere_of_two_points_is_refused(self) -> None:
        shape = RunShape(8, 1, (32,), BackboneConfig())
        with pytest.raises(ConfigError, match=r"method.projection_dim=1"):
            NCEConfig(projection_dim=1).check_shape(shape)

    def test_noise_is_at_most_as_many_as_images(self, training_set: TrainingSet) -> None:
        default = NCEConfig().size_defaults(training_set)["num_noise"]
        assert default == (64, "min(4,096, 64 images) = 64")
        assert NCEConfig(num_noise=7).size_defaults(training_set) == {}
        large = training_set._replace(num_images=1_281_167)
        assert NCEConfig().size_defaults(large)["num_noise"].value == 4096

    def test_noise_from_labels_needs_labels(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        with pytest.raises(ConfigError, match=r"method.noise=labels: data.source has no labels"):
            NCE(NCEConfig(noise="labels"), tiny_backbone(), training_set)

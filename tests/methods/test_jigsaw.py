import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.jigsaw import (
    Jigsaw,
    JigsawConfig,
    cut_tiles,
    distant_permutations,
    jigsaw_loss,
    mosaic,
    normalise_tiles,
    tile_size_px,
)
from raysl.nn.backbones import Backbone, BackboneConfig

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


def batch_of(image: Tensor) -> Batch:
    return Batch([image], torch.arange(len(image)))


def pair_distances(permutations: np.ndarray) -> np.ndarray:
    places: np.ndarray = (permutations[:, None] != permutations[None]).sum(axis=2)
    distances: np.ndarray = places[np.triu_indices(len(permutations), 1)]
    return distances


def first(count: int) -> np.ndarray:
    """Each permutation depends on those before it alone, so that fewer are the first of more."""
    return distant_permutations(9, 1000)[:count]


class TestDistantPermutations:
    @pytest.mark.parametrize("count", [9, 100, 1000])
    def test_are_different_permutations_and_always_the_same(self, count: int) -> None:
        chosen = first(count)
        assert chosen.shape == (count, 9)
        assert (np.sort(chosen, axis=1) == np.arange(9)).all()
        assert len({tuple(row) for row in chosen.tolist()}) == count
        assert (distant_permutations.__wrapped__(9, 9) == first(9)).all()

    def test_the_first_nine_differ_in_every_place(self) -> None:
        assert (pair_distances(first(9)) == 9).all()

    def test_every_nine_have_each_tile_once_in_each_place(self) -> None:
        squares = first(450).reshape(50, 9, 9)
        assert (np.sort(squares, axis=1) == np.arange(9)[:, None]).all()

    @pytest.mark.parametrize("count", [9, 99, 999])
    def test_mean_distance_is_the_largest_possible(self, count: int) -> None:
        # With every tile equally often in every place, each permutation agrees in a place with
        # count / 9 - 1 of the others.
        possible = 9 - 9 * (count / 9 - 1) / (count - 1)
        distances = pair_distances(first(count))
        assert distances.mean() == pytest.approx(possible, rel=1e-12)

    @pytest.mark.parametrize(("count", "least"), [(6, 9), (10, 7), (35, 6), (100, 2), (1000, 2)])
    def test_least_distance_is_no_smaller_than_the_paper_reports(
        self, count: int, least: int
    ) -> None:
        assert pair_distances(first(count)).min() >= least

    def test_four_tiles_have_24_orders_all_of_them(self) -> None:
        chosen = {tuple(row) for row in distant_permutations(4, 24).tolist()}
        assert chosen == set(itertools.permutations(range(4)))

    def test_each_is_the_farthest_from_those_before_it(self) -> None:
        chosen = distant_permutations(4, 24)
        for i in range(1, 24):
            before, after = chosen[:i], chosen[i:]
            total = (after[:, None] != before[None]).sum(axis=(1, 2))
            assert total[0] == total.max()


class TestCutTiles:
    def test_each_tile_lies_in_its_cell_where_its_offset_says(self) -> None:
        images = torch.arange(2 * 3 * 21 * 21).view(2, 3, 21, 21)
        cells = torch.stack([torch.randperm(9) for _ in range(2)])
        offsets = torch.rand(2, 9, 2)
        tiles = cut_tiles(images, cells, offsets, grid=3)
        size = tile_size_px(21, 3)
        assert size == 5
        assert tiles.shape == (2, 9, 3, 5, 5)
        for n, i in itertools.product(range(2), range(9)):
            row, column = divmod(int(cells[n, i]), 3)
            top = 7 * row + int(offsets[n, i, 0] * 3)
            left = 7 * column + int(offsets[n, i, 1] * 3)
            expected = images[n, :, top : top + size, left : left + size]
            assert torch.equal(tiles[n, i], expected)

    def test_the_ends_of_the_offsets_are_the_ends_of_the_cell(self) -> None:
        images = torch.arange(100).view(1, 1, 10, 10)
        cells = torch.arange(4)[None]
        first = cut_tiles(images, cells, torch.zeros(1, 4, 2), grid=2)
        last = cut_tiles(images, cells, torch.ones(1, 4, 2), grid=2)
        assert first[0, :, 0, 0, 0].tolist() == [0, 5, 50, 55]
        assert last[0, :, 0, -1, -1].tolist() == [44, 49, 94, 99]

    @pytest.mark.parametrize(("view", "grid", "tile"), [(255, 3, 64), (32, 2, 12), (2, 2, 1)])
    def test_a_tile_is_64_of_85_pixels_of_its_cell(self, view: int, grid: int, tile: int) -> None:
        assert tile_size_px(view, grid) == tile

    @pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 3, 2, 2), (3, 8, 8)])
    def test_says_what_it_cannot_cut(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"with S >= 3 to be cut; got \("):
            cut_tiles(torch.zeros(shape), torch.zeros(2, 9).long(), torch.zeros(2, 9, 2), grid=3)


class TestNormaliseTiles:
    def test_each_channel_of_each_tile_has_mean_0_and_deviation_1(self) -> None:
        tiles = torch.randn(2, 4, 3, 6, 6) * 5 + 3
        normal = normalise_tiles(tiles)
        torch.testing.assert_close(normal.mean(dim=(3, 4)), torch.zeros(2, 4, 3), atol=1e-6, rtol=0)
        torch.testing.assert_close(normal.std(dim=(3, 4), unbiased=False), torch.ones(2, 4, 3))

    def test_brightness_and_contrast_do_not_matter(self) -> None:
        tiles = torch.randn(1, 4, 3, 6, 6)
        torch.testing.assert_close(normalise_tiles(tiles * 0.3 - 2), normalise_tiles(tiles))

    def test_a_tile_of_one_colour_becomes_0(self) -> None:
        assert normalise_tiles(torch.full((1, 1, 3, 6, 6), 0.7)).abs().max() < 1e-3


class TestMosaic:
    @pytest.mark.parametrize("grid", [2, 3])
    def test_lays_each_tile_in_its_place_row_by_row(self, grid: int) -> None:
        tiles = torch.arange(2 * grid**2 * 3 * 5 * 5).view(2, grid**2, 3, 5, 5)
        whole = mosaic(tiles)
        assert whole.shape == (2, 3, grid * 5, grid * 5)
        for i in range(grid**2):
            top, left = 5 * (i // grid), 5 * (i % grid)
            assert torch.equal(whole[:, :, top : top + 5, left : left + 5], tiles[:, i])


class TestJigsawLoss:
    def test_equals_the_equation_written_as_loops(self) -> None:
        logits = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
        answer = torch.tensor([0, 23, 5, 5, 11])
        by_hand = [
            torch.log(torch.stack([torch.exp(v) for v in row]).sum()) - row[a]
            for row, a in zip(logits, answer.tolist(), strict=True)
        ]
        torch.testing.assert_close(jigsaw_loss(logits, answer), torch.stack(by_hand).mean())
        assert torch.autograd.gradcheck(lambda x: jigsaw_loss(x, answer), logits)

    @pytest.mark.parametrize("classes", [24, 1000])
    def test_knowing_nothing_costs_log_p(self, classes: int) -> None:
        loss = jigsaw_loss(torch.zeros(3, classes), torch.tensor([0, 1, classes - 1]))
        assert loss.item() == pytest.approx(math.log(classes))

    def test_says_which_shapes_it_got(self) -> None:
        with pytest.raises(ShapeError, match=r"got \(5, 3\), \(4,\)"):
            jigsaw_loss(torch.zeros(5, 3), torch.zeros(4, dtype=torch.long))


class TestJigsaw:
    @pytest.fixture
    def method(self, tiny_backbone: Backbones, training_set: TrainingSet) -> Jigsaw:
        config = JigsawConfig(grid=2, tile_dim=5)
        return Jigsaw(config, tiny_backbone(batch_norm=False), training_set)

    def test_loss_is_that_of_shuffled_normalised_tiles(
        self, method: Jigsaw, make_views: Views, progress: Progress
    ) -> None:
        image = make_views(num_views=1, size=32)[0]
        torch.manual_seed(5)
        output = method(batch_of(image), progress)
        torch.manual_seed(5)
        answer, offsets = torch.randint(24, (8,)), torch.rand(8, 4, 2)
        orders = method.permutations[answer]
        in_place = cut_tiles(
            image,
            torch.arange(4).expand(8, 4),
            # Slot i holds cell p[i], with the offset of slot i.
            torch.stack([o[p.argsort()] for o, p in zip(offsets, orders, strict=True)]),
            grid=2,
        )
        shuffled = torch.stack(
            [t[p] for t, p in zip(in_place, method.permutations[answer], strict=True)]
        )
        features = method.backbone(normalise_tiles(shuffled).flatten(0, 1))
        logits = method.classifier(method.tile_head(features).view(8, -1))
        torch.testing.assert_close(output.loss, jigsaw_loss(logits, answer))
        torch.testing.assert_close(output.features, features.view(8, 4, -1).mean(1).detach())

    def test_of_a_mosaic_the_features_are_classified_as_they_are(
        self,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
    ) -> None:
        config = JigsawConfig(grid=2, arrangement="mosaic", normalise_tiles=False)
        method = Jigsaw(config, tiny_backbone(batch_norm=False), training_set)
        image = make_views(num_views=1, size=32)[0]
        torch.manual_seed(5)
        output = method(batch_of(image), progress)
        torch.manual_seed(5)
        answer, offsets = torch.randint(24, (8,)), torch.rand(8, 4, 2)
        whole = torch.empty(8, 3, 24, 24)
        for n, i in itertools.product(range(8), range(4)):
            row, column = divmod(int(method.permutations[answer[n], i]), 2)
            top, left = (int(x * 5) for x in offsets[n, i])  # tiles of 12 px in cells of 16
            cell = image[n, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            down, right = 12 * (i // 2), 12 * (i % 2)
            whole[n, :, down : down + 12, right : right + 12] = cell[
                :, top : top + 12, left : left + 12
            ]
        features = method.backbone(whole)
        torch.testing.assert_close(
            output.loss, jigsaw_loss(method.classifier(features), answer), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(output.features, features.detach())

    @pytest.mark.parametrize("arrangement", ["apart", "mosaic"])
    def test_every_parameter_gets_a_gradient(
        self,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
        arrangement: str,
    ) -> None:
        config = JigsawConfig(grid=2, tile_dim=5, arrangement=arrangement)
        method = Jigsaw(config, tiny_backbone(), training_set)
        method(batch_of(make_views(num_views=1, size=32)[0]), progress).loss.backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_metrics_count_right_answers_and_tiles_in_place(
        self, method: Jigsaw, make_views: Views, progress: Progress
    ) -> None:
        torch.nn.init.zeros_(method.classifier.weight)
        torch.nn.init.zeros_(method.classifier.bias)
        method.classifier.bias.data[7] = 50.0  # always says permutation 7
        image = make_views(64, num_views=1, size=16)[0]
        torch.manual_seed(5)
        metrics = method(batch_of(image), progress).metrics
        torch.manual_seed(5)
        answer = torch.randint(24, (64,))
        placed = (method.permutations[answer] == method.permutations[7]).float().mean()
        share = (answer == 7).float().mean().item()
        assert metrics["jigsaw/accuracy"].item() == pytest.approx(share)
        assert metrics["jigsaw/tiles_in_place"].item() == pytest.approx(placed.item())
        assert metrics["jigsaw/entropy"].item() == pytest.approx(0.0, abs=1e-6)

    def test_permutations_are_kept_with_the_weights(self, method: Jigsaw) -> None:
        assert torch.equal(
            method.state_dict()["permutations"], torch.tensor(distant_permutations(4, 24))
        )

    def test_pictures_lay_a_solved_puzzle_out_as_the_view(
        self, tiny_backbone: Backbones, training_set: TrainingSet, make_views: Views
    ) -> None:
        config = JigsawConfig(grid=2, tile_dim=5, normalise_tiles=False)
        method = Jigsaw(config, tiny_backbone(), training_set).eval()
        image = make_views(3, num_views=1, size=33)[0]
        progress = Progress(step=1, total_steps=1, steps_per_epoch=1, seed=0)
        grid = method.pictures(batch_of(image), progress)["jigsaw"]
        assert grid.images.shape == (3, 3, 3, 33, 33)
        assert grid.columns == ("view", "puzzle", "solution")
        answer = torch.arange(3) * 7 % 24
        tiles = method._cut(image, answer, torch.full((3, 4, 2), 0.5))
        solved = method._lay_out(tiles, method.permutations[answer], 33)
        shown = solved != 0
        assert shown.any(dim=1).float().mean() == pytest.approx((2 * 12 / 33) ** 2)
        assert torch.equal(solved[shown], image[shown])


class TestCheck:
    def shape(self, view_px: int) -> RunShape:
        return RunShape(8, 1, (view_px,), BackboneConfig())

    @pytest.mark.parametrize(("grid", "view"), [(3, 30), (3, 255), (2, 20)])
    def test_views_that_are_large_enough_pass(self, grid: int, view: int) -> None:
        JigsawConfig(grid=grid).check_shape(self.shape(view))

    def test_refuses_tiles_of_a_few_pixels_and_names_a_view_that_is_enough(self) -> None:
        with pytest.raises(ConfigError, match=r"tiles of 7 px; they need 8\. Use views of 30 px"):
            JigsawConfig(grid=3).check_shape(self.shape(28))

    def test_refuses_more_permutations_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match="num_permutations=25: 4 tiles have 24 orders"):
            JigsawConfig(grid=2, num_permutations=25).check_shape(self.shape(32))

    def test_two_views_are_one_too_many(self) -> None:
        with pytest.raises(ConfigError, match="takes 1 views"):
            JigsawConfig().check_shape(RunShape(8, 1, (64, 64), BackboneConfig()))

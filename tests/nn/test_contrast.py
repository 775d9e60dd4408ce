import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ConfigError, ShapeError
from raysl.nn.contrast import (
    KeyQueue,
    check_queue_length,
    contrast,
    pairwise_sigmoid,
    unit_rows,
)

TILES = [1, 2, 3, 5, 100]  # of 5 rows and 7 keys: many, with a rest, one
EXCLUDED = torch.tensor([[0, 4], [1, 6], [2, 2], [3, 0], [6, 5]])


def unit(n: int, d: int = 4, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(z, dim=1).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows, positives, keys and memory."""
    rows, keys, memory = (unit(n, seed=n, dtype=dtype) for n in (5, 7, 3))
    positives = F.normalize(rows + 0.5 * unit(5, seed=9, dtype=dtype), dim=1)
    return [z.requires_grad_() for z in (rows, positives, keys, memory)]


def by_hand(rows: Tensor, positives: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, float]:
    """The cross entropy as loops, and how often the positive ranks first."""
    total, first = rows.new_zeros(()), 0
    for i, row in enumerate(rows):
        positive = torch.dot(row, positives[i]) / 0.2
        others = [torch.dot(row, k) / 0.2 for j, k in enumerate(keys) if j not in EXCLUDED[i]]
        others += [torch.dot(row, k) / 0.2 for k in memory]
        total = total - torch.log(positive.exp() / (positive.exp() + sum(s.exp() for s in others)))
        first += bool(positive > max(others))
    return total / len(rows), first / len(rows)


def sigmoid_by_hand(
    rows: Tensor, positives: Tensor, keys: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, float]:
    total, first = rows.new_zeros(()), 0
    for i, row in enumerate(rows):
        positive = scale * torch.dot(row, positives[i]) + bias
        others = [scale * torch.dot(row, k) + bias for j, k in enumerate(keys) if j != i]
        total = total + torch.log1p((-positive).exp()) + sum(s.exp().log1p() for s in others)
        first += bool(positive > max(others))
    return total / len(rows), first / len(rows)


class TestContrast:
    @pytest.mark.parametrize("tile", TILES)
    def test_equals_the_equation_written_as_loops_in_value_and_every_gradient(
        self, tile: int
    ) -> None:
        given = inputs()
        rows, positives, keys, memory = given
        found = contrast(
            rows, positives, keys, temperature=0.2, excluded=EXCLUDED, memory=memory, tile=tile
        )
        loss, first = by_hand(*given)
        torch.testing.assert_close(found.loss, loss)
        assert found.partner_top1.item() == pytest.approx(first)
        assert 0 < first < 1
        expected = torch.autograd.grad(loss, given)
        for gradient, exact in zip(torch.autograd.grad(found.loss, given), expected, strict=True):
            torch.testing.assert_close(gradient, exact)

    @pytest.mark.parametrize("tile", [2, 100])
    def test_gradient_is_that_of_the_loss_by_finite_differences(self, tile: int) -> None:
        def loss(rows: Tensor, positives: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
            return contrast(
                rows, positives, keys, temperature=0.5, excluded=EXCLUDED, memory=memory, tile=tile
            ).loss

        assert torch.autograd.gradcheck(loss, inputs())

    @pytest.mark.parametrize("tile", [2, 100])
    def test_rows_may_be_the_keys_themselves(self, tile: int) -> None:
        z = unit(6, seed=0).requires_grad_()
        own = torch.arange(6)
        excluded = torch.stack([own, own.roll(3)], dim=1)
        found = contrast(z, z.roll(3, 0), z, temperature=0.3, excluded=excluded, tile=tile).loss
        logits = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
        expected = F.cross_entropy(logits, own.roll(3))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, z)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("tile", [1, 100])
    def test_a_row_without_negatives_has_no_loss_and_no_gradient(self, tile: int) -> None:
        z = unit(2, seed=0).requires_grad_()
        excluded = torch.tensor([[0, 1], [1, 0]])
        found = contrast(z, z.roll(1, 0), z, temperature=0.1, excluded=excluded, tile=tile)
        found.loss.backward()
        assert found.loss.item() == 0.0
        assert z.grad is not None
        assert torch.equal(z.grad, torch.zeros_like(z))

    def test_a_loss_near_zero_keeps_its_digits_in_float32(self) -> None:
        """Row and positive are equal, the negative is opposite: log(1 + exp(-2 / T))."""
        row = torch.tensor([[1.0, 0.0]])
        loss = contrast(row, row, -row, temperature=0.1).loss
        assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)

    def test_uniform_keys_give_log_of_their_number(self) -> None:
        z = unit_rows(torch.ones(4, 3))
        found = contrast(z, z, z, temperature=0.1, excluded=torch.arange(4)[:, None])
        assert found.loss.item() == pytest.approx(math.log(4))

    def test_keeps_no_matrix_of_all_pairs(self) -> None:
        """What autograd holds on to is a few times the rows and keys."""
        z = unit(64, seed=0).requires_grad_()
        kept: list[int] = []

        def pack(saved: Tensor) -> Tensor:
            kept.append(saved.numel())
            return saved

        own = torch.arange(64)[:, None]
        for tile, most in ((8, 64 * 4), (64, 64 * 64)):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                contrast(z, z, z, temperature=0.1, excluded=own, tile=tile)
            assert max(kept) == most

    @pytest.mark.parametrize("tile", [2, 100])
    def test_is_exact_under_autocast_forward_and_backward(self, tile: int) -> None:
        def gradients(*, autocast: bool) -> tuple[Tensor, ...]:
            given = inputs(torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = contrast(*given[:3], temperature=0.1, excluded=EXCLUDED, tile=tile).loss
                loss.backward()
            return loss.detach(), *(z.grad for z in given[:3] if z.grad is not None)

        for under, plain in zip(gradients(autocast=True), gradients(autocast=False), strict=True):
            assert torch.equal(under, plain)

    def test_says_which_shapes_it_got(self) -> None:
        with pytest.raises(ShapeError, match=r"got \(5, 4\), \(4, 4\), \(7, 4\)"):
            contrast(torch.zeros(5, 4), torch.zeros(4, 4), torch.zeros(7, 4), temperature=1.0)
        zeros = [torch.zeros(n, 4) for n in (5, 5, 7)]
        with pytest.raises(ShapeError, match=r"got \(5, 4\), \(5, 4\), \(7, 4\), \(2, 3\)"):
            contrast(*zeros, temperature=1.0, memory=torch.zeros(2, 3))


class TestPairwiseSigmoid:
    def given(self) -> list[Tensor]:
        rows, positives, keys, _ = inputs()
        scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -2))
        return [rows, positives, keys, scale, bias]

    def loss(self, *given: Tensor, tile: int) -> Any:
        rows, positives, keys, scale, bias = given
        own = torch.arange(5)[:, None]
        return pairwise_sigmoid(
            rows, positives, keys, scale=scale, bias=bias, excluded=own, tile=tile
        )

    @pytest.mark.parametrize("tile", TILES)
    def test_equals_the_equation_written_as_loops_in_value_and_every_gradient(
        self, tile: int
    ) -> None:
        given = self.given()
        found = self.loss(*given, tile=tile)
        loss, first = sigmoid_by_hand(*given)
        torch.testing.assert_close(found.loss, loss)
        assert found.partner_top1.item() == pytest.approx(first)
        expected = torch.autograd.grad(loss, given)
        for gradient, exact in zip(torch.autograd.grad(found.loss, given), expected, strict=True):
            torch.testing.assert_close(gradient, exact)

    @pytest.mark.parametrize("tile", [2, 100])
    def test_gradient_is_that_of_the_loss_by_finite_differences(self, tile: int) -> None:
        assert torch.autograd.gradcheck(lambda *z: self.loss(*z, tile=tile).loss, self.given())


class TestKeyQueue:
    def test_replaces_the_oldest_and_tells_how_old_the_oldest_is(self) -> None:
        queue = KeyQueue(5, 2)
        assert queue.age_steps(0).item() == 0.0  # nothing is in it
        for step in range(2):
            queue.put(torch.full((3, 2), float(step)), step=step)
        assert queue.keys[:, 0].tolist() == [1, 0, 0, 1, 1]
        assert queue.put_at_step.tolist() == [1, 0, 0, 1, 1]
        assert int(queue.place) == 1
        assert queue.age_steps(2).item() == 2.0
        queue.put(torch.full((3, 2), 2.0), step=2)
        assert queue.age_steps(3).item() == 2.0

    def test_starts_with_random_directions(self) -> None:
        torch.testing.assert_close(KeyQueue(7, 3).keys.norm(dim=1), torch.ones(7))

    def test_all_of_it_is_saved(self) -> None:
        assert set(KeyQueue(7, 3).state_dict()) == {"keys", "place", "put_at_step"}


class TestQueueLength:
    def test_from_one_steps_keys_to_the_data_set_is_fine(self) -> None:
        for length in (8, 20):
            check_queue_length("method.x", length, keys_per_step=8, num_images=20)
        check_queue_length("method.x", 99, keys_per_step=8)

    def test_beyond_is_refused(self) -> None:
        with pytest.raises(ConfigError) as caught:
            check_queue_length("method.x", 21, keys_per_step=8, num_images=20)
        assert str(caught.value) == (
            "method.x=21 is more than the 20 training images: old keys of an image would be "
            "negatives of that image; use at most 20, or null"
        )
        with pytest.raises(ConfigError, match=r"method.x=7 is shorter than the 8 keys of one step"):
            check_queue_length("method.x", 7, keys_per_step=8, num_images=20)

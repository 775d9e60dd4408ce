"""The loss of raysl/methods/moco.py; test_moco.py has the method around it."""

import math

import pytest
import torch
from torch import Tensor

from raysl.errors import ShapeError
from raysl.methods.moco import info_nce_loss


def info_nce_by_hand(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Eq. (1) as loops over queries and keys, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    negatives = [row / row.norm() for row in queue.double()]
    for q_row, k_row in zip(query.double(), key.double(), strict=True):
        q, k = q_row / q_row.norm(), k_row / k_row.norm()
        positive = torch.exp(torch.dot(q, k) / temperature)
        denominator = positive + sum(torch.exp(torch.dot(q, n) / temperature) for n in negatives)
        total = total - torch.log(positive / denominator)
    return total / len(query)


def embeddings(n: int = 4, k: int = 6, d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, queue = torch.randn(n, d), torch.randn(k, d) * 3
    key = query * 0.5 + 0.3 * torch.randn(n, d)
    return query.requires_grad_(), key.requires_grad_(), queue.requires_grad_()


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equals_the_equation_written_as_loops_in_value_and_gradient(temperature: float) -> None:
    inputs = embeddings()
    loss = info_nce_loss(*inputs, temperature=temperature)
    expected = info_nce_by_hand(*inputs, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    gradients = torch.autograd.grad(loss, inputs)
    by_hand = torch.autograd.grad(expected, inputs)
    for gradient, exact in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6 / temperature)


@pytest.mark.parametrize("length", [1, 6, 100])
def test_uniform_embeddings_give_log_of_the_number_of_keys(length: int) -> None:
    loss = info_nce_loss(torch.ones(4, 3), torch.ones(4, 3), torch.ones(length, 3), temperature=0.2)
    assert loss.item() == pytest.approx(math.log(length + 1))


def test_orthogonal_negatives_have_a_closed_form() -> None:
    query = torch.eye(8)[:3]
    loss = info_nce_loss(query, query, torch.eye(8)[3:], temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + 5 * math.exp(-2)))


def test_does_not_depend_on_the_order_of_images_or_of_the_queue() -> None:
    query, key, queue = embeddings()
    loss = info_nce_loss(query, key, queue, temperature=0.2).item()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = info_nce_loss(query[order], key[order], queue.flip(0), temperature=0.2).item()
    assert shuffled == pytest.approx(loss)


def test_other_images_of_the_batch_are_not_negatives() -> None:
    query, key, queue = embeddings()
    rows = [info_nce_loss(q[None], k[None], queue, temperature=0.2).item()
            for q, k in zip(query, key, strict=True)]  # fmt: skip
    whole = info_nce_loss(query, key, queue, temperature=0.2).item()
    assert whole == pytest.approx(sum(rows) / len(rows))


def test_does_not_depend_on_the_length_of_an_embedding() -> None:
    query, key, queue = embeddings()
    lengths = torch.tensor([0.1, 1.0, 3.0, 20.0])[:, None]
    scaled = info_nce_loss(query * lengths, key * 7, queue * 0.2, temperature=0.2).item()
    assert scaled == pytest.approx(
        info_nce_loss(query, key, queue, temperature=0.2).item(), rel=1e-5
    )


def test_is_exact_under_autocast() -> None:
    inputs = embeddings()
    loss = info_nce_loss(*inputs, temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce_loss(*inputs, temperature=0.07), loss)
    half = [x.detach().bfloat16() for x in inputs]
    widened = [x.float() for x in half]
    loss = info_nce_loss(*half, temperature=0.2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, info_nce_loss(*widened, temperature=0.2))


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5), (3, 5), (6, 5)),
        ((4, 5), (4, 6), (6, 5)),
        ((4, 5), (4, 5), (6, 4)),
        ((4, 5), (4, 5), (5,)),
        ((5,), (5,), (6, 5)),
    ],
)
def test_says_which_shapes_it_got(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        info_nce_loss(*(torch.zeros(shape) for shape in shapes), temperature=0.2)
    assert str(caught.value) == (
        "query and key must be (N, D) and queue (K, D); got " + ", ".join(map(str, shapes))
    )

import math
from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch

from raysl.optim.lars import LARS

WEIGHTS = [[0.5, -1.0], [2.0, 0.25], [0.1, 0.0]]
GRADIENTS = [
    [[0.1, 0.3], [-0.2, 0.05], [0.0, 1.0]],
    [[-0.4, 0.1], [0.3, 0.2], [0.6, -0.1]],
    [[0.2, -0.2], [0.1, -0.5], [0.3, 0.4]],
]
RATES = [0.5, 2.0, 0.1]


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def lars_by_hand(
    *, momentum: float, decay: float, trust: float, adapt: bool, weights: list[float]
) -> list[float]:
    """Algorithm 1 in plain floats, with the norm of the gradient after the decay."""
    w, v = list(weights), [0.0] * len(weights)
    for lr, rows in zip(RATES, GRADIENTS, strict=True):
        g = [gradient + decay * weight for gradient, weight in zip(flat(rows), w, strict=True)]
        w_norm, g_norm = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
        ratio = trust * w_norm / g_norm if adapt and w_norm > 0 and g_norm > 0 else 1.0
        v = [momentum * old + lr * ratio * x for old, x in zip(v, g, strict=True)]
        w = [weight - step for weight, step in zip(w, v, strict=True)]
    return w


def lars(weights: Sequence[Sequence[float]], **settings: float) -> list[float]:
    parameter = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    adapt = settings.pop("adapt", True)
    optimizer = LARS([{"params": [parameter], "adapt": adapt}], lr=9.9, **settings)
    for lr, gradient in zip(RATES, GRADIENTS, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.detach().flatten().tolist()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("adapt", [True, False])
def test_three_steps_of_changing_rate_equal_the_algorithm(
    momentum: float, decay: float, adapt: bool
) -> None:
    found = lars(
        WEIGHTS, momentum=momentum, weight_decay=decay, trust_coefficient=0.02, adapt=adapt
    )
    expected = lars_by_hand(
        momentum=momentum, decay=decay, trust=0.02, adapt=adapt, weights=flat(WEIGHTS)
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_group_without_adapt_is_sgd_whose_rate_is_inside_the_momentum() -> None:
    """With one constant rate that is torch's SGD, step for step."""
    ours, theirs = (torch.nn.Parameter(torch.tensor(WEIGHTS)) for _ in range(2))
    optimizers = [
        LARS([{"params": [ours], "adapt": False}], lr=0.3, momentum=0.9),
        torch.optim.SGD([theirs], lr=0.3, momentum=0.9),
    ]
    for gradient in GRADIENTS:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_size_of_a_first_step_is_the_rate_times_trust_times_the_size_of_the_weight() -> None:
    for scale in (1e-3, 1.0, 1e3):  # whatever the size of the gradient
        weight = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
        before = weight.detach().clone()
        weight.grad = torch.tensor(GRADIENTS[0], dtype=torch.float64) * scale
        LARS([weight], lr=0.5, trust_coefficient=0.01).step()
        moved = (weight.detach() - before).norm()
        assert moved.item() == pytest.approx(0.5 * 0.01 * before.norm().item())


def test_a_zero_weight_takes_the_plain_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.tensor(GRADIENTS[0])
    LARS([weight], lr=0.5, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), -0.5 * torch.tensor(GRADIENTS[0]))


def test_a_zero_gradient_moves_nothing_and_makes_no_nan() -> None:
    weight = torch.nn.Parameter(torch.tensor(WEIGHTS))
    weight.grad = torch.zeros(3, 2)
    LARS([weight], lr=0.5).step()
    assert torch.equal(weight.detach(), torch.tensor(WEIGHTS))


def test_each_layer_has_a_ratio_of_its_own() -> None:
    small, large = (torch.nn.Parameter(torch.tensor(WEIGHTS) * s) for s in (1.0, 100.0))
    for weight in (small, large):
        weight.grad = torch.tensor(GRADIENTS[0])
    moves = [weight.detach().clone() for weight in (small, large)]
    LARS([small, large], lr=1.0).step()
    moves = [before - now.detach() for before, now in zip(moves, (small, large), strict=True)]
    torch.testing.assert_close(moves[1], moves[0] * 100, rtol=1e-3, atol=1e-4)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.tensor(WEIGHTS))
    LARS([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.tensor(WEIGHTS))


def test_state_dict_round_trip_goes_on_as_if_nothing_had_happened() -> None:
    def optimizer_of(weight: torch.nn.Parameter) -> LARS:
        return LARS([weight], lr=0.5, momentum=0.9)

    weight = torch.nn.Parameter(torch.tensor(WEIGHTS))
    first = optimizer_of(weight)
    weight.grad = torch.tensor(GRADIENTS[0])
    first.step()
    copy = torch.nn.Parameter(weight.detach().clone())
    second = optimizer_of(copy)
    second.load_state_dict(deepcopy(first.state_dict()))
    for parameter, optimizer in ((weight, first), (copy, second)):
        parameter.grad = torch.tensor(GRADIENTS[1])
        optimizer.step()
    assert torch.equal(weight, copy)


def test_returns_the_loss_of_a_closure_that_may_take_gradients() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0]]))

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.1).step(closure).item() == 9.0
    assert weight.item() < 3.0


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -0.1},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1e-4},
        {"trust_coefficient": 0.0},
    ],
)
def test_refuses_values_out_of_range(bad: dict[str, float]) -> None:
    settings = {"lr": 0.1, "momentum": 0.9} | bad
    with pytest.raises(ValueError, match=rf"got .*{next(iter(bad.values()))}"):
        LARS([torch.nn.Parameter(torch.zeros(1))], **settings)

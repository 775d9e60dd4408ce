"""The hash of a tensor's bits; tests/distributed/test_two_ranks_check.py compares ranks."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from raysl.nn.batchnorm import names_of_own_statistics, set_batch_norm_scope
from raysl.train.rank_check import _who, hash_bits

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(count) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 1003])
def test_every_element_counts(dtype: torch.dtype, count: int) -> None:
    tensor = numbers(count, dtype)
    expected = hash_bits(tensor)
    assert expected.dtype == torch.int64
    assert expected.shape == ()
    for place in {0, count // 2, count - 1}:
        changed = tensor.clone()
        changed[place] = ~changed[place] if dtype == torch.bool else changed[place] + 1
        assert hash_bits(changed) != expected
    assert hash_bits(tensor.clone()) == expected


def test_the_last_bit_counts_in_every_place_and_in_every_part() -> None:
    tensor = torch.linspace(0, 1, 300_000)  # more than two parts
    expected = hash_bits(tensor)
    for place in (0, 1, 131_071, 131_072, 299_999):
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(2.0))
        assert hash_bits(changed) != expected


def test_places_count() -> None:
    hashes = {int(hash_bits(torch.tensor(order))) for order in itertools.permutations(range(4))}
    assert len(hashes) == 24
    big = torch.arange(200_000)
    turned = big.clone()
    turned[[0, 70_000]] = turned[[70_000, 0]]
    assert hash_bits(big) != hash_bits(turned)


def test_zero_and_minus_zero_differ_and_nan_equals_itself() -> None:
    assert hash_bits(torch.tensor([0.0])) != hash_bits(torch.tensor([-0.0]))
    assert hash_bits(torch.tensor([torch.nan])) == hash_bits(torch.tensor([torch.nan]))


def test_memory_layout_does_not_count() -> None:
    tensor = torch.randn(4, 3, 5, 5)
    expected = hash_bits(tensor)
    assert hash_bits(tensor.to(memory_format=torch.channels_last)) == expected
    whole = torch.cat([torch.zeros(1), tensor.reshape(-1)])
    assert hash_bits(whole[1:]) == expected  # begins in the middle of a word


def test_of_nothing_is_zero() -> None:
    assert hash_bits(torch.empty(0)) == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((5, 5, 7, 5), "rank 2 unlike 3 others"),
        ((5, 6, 7, 5, 5), "ranks 1, 2 unlike 3 others"),
        ((5, 6), "each rank has another value"),
        ((1,) * 10 + tuple(range(2, 9)), "ranks 10, 11, 12, 13, 14, ... unlike 10 others"),
    ],
)
def test_ranks_that_differ_from_most_are_named(values: tuple[int, ...], text: str) -> None:
    assert _who(values) == text


def test_own_statistics_are_those_of_a_batch_norm_that_is_not_synchronised() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert names_of_own_statistics(net) == {"1.running_mean", "1.running_var"}
    assert names_of_own_statistics(net[1]) == {"running_mean", "running_var"}
    assert names_of_own_statistics(set_batch_norm_scope(net, "sync")) == set()
    assert len(names_of_own_statistics(set_batch_norm_scope(net, "split", num_splits=2))) == 2

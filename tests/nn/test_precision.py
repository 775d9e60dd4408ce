import pytest
import torch

from raysl.nn.precision import at_least_float32, bf16_slowdown_on_cpu


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_float32_and_float64_stays(
    given: torch.dtype, expected: torch.dtype
) -> None:
    x = torch.tensor([1.5, -2.0], dtype=given)
    assert at_least_float32(x).dtype == expected
    assert at_least_float32(x).tolist() == [1.5, -2.0]


def test_the_cost_of_bfloat16_is_measured_on_one_thread_and_leaves_the_others() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 < bf16_slowdown_on_cpu() < 1e5
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

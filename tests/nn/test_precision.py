import pytest
import torch

from raysl.nn.precision import at_least_float32


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

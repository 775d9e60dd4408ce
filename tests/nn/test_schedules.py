import math
from itertools import pairwise

import pytest

from raysl.nn.schedules import cosine, warmup_cosine


def lr(step: int, *, warmup: int = 10, total: int = 110, final: float = 0.2) -> float:
    return warmup_cosine(step, peak=2.0, final=final, warmup_steps=warmup, total_steps=total)


class TestCosine:
    def test_goes_from_start_to_end_along_half_a_cosine(self) -> None:
        for step in range(0, 41):
            expected = 1.0 + (0.99 - 1.0) * (1 + math.cos(math.pi * step / 40)) / 2
            assert cosine(step, 40, start=0.99, end=1.0) == pytest.approx(expected, rel=1e-12)

    def test_is_halfway_at_half_time(self) -> None:
        assert cosine(20, 40, start=3.0, end=1.0) == pytest.approx(2.0)

    @pytest.mark.parametrize(("step", "value"), [(-3, 3.0), (0, 3.0), (40, 1.0), (1000, 1.0)])
    def test_stays_at_its_ends_outside_of_the_run(self, step: int, value: float) -> None:
        assert cosine(step, 40, start=3.0, end=1.0) == value

    def test_of_no_steps_at_all_is_its_start_and_then_its_end(self) -> None:
        assert cosine(0, 0, start=3.0, end=1.0) == 3.0
        assert cosine(1, 0, start=3.0, end=1.0) == 1.0


class TestWarmupCosine:
    def test_first_step_is_already_taken_with_a_share_of_the_peak(self) -> None:
        assert lr(0) == pytest.approx(2.0 / 10)

    def test_rises_by_the_same_amount_each_step(self) -> None:
        assert [lr(step) for step in range(10)] == pytest.approx([0.2 * n for n in range(1, 11)])

    def test_reaches_the_peak_with_the_last_step_of_the_warm_up_and_starts_falling_there(
        self,
    ) -> None:
        assert lr(9) == pytest.approx(2.0)
        assert lr(10) == pytest.approx(2.0)
        assert lr(11) < 2.0

    def test_is_halfway_between_peak_and_final_in_the_middle_of_the_fall(self) -> None:
        assert lr(60) == pytest.approx((2.0 + 0.2) / 2)

    def test_ends_at_the_final_value(self) -> None:
        assert lr(110) == pytest.approx(0.2)
        assert 0.2 < lr(109) < 0.2 + 2.0 * 1e-3

    def test_never_rises_after_the_warm_up(self) -> None:
        values = [lr(step) for step in range(10, 111)]
        assert all(late < early for early, late in pairwise(values))

    def test_without_warm_up_begins_at_the_peak(self) -> None:
        assert lr(0, warmup=0) == 2.0

    def test_with_final_equal_to_the_peak_is_constant_after_the_warm_up(self) -> None:
        assert {lr(step, final=2.0) for step in range(10, 110)} == {2.0}

    def test_a_warm_up_longer_than_the_run_only_rises(self) -> None:
        values = [lr(step, warmup=40, total=20) for step in range(20)]
        assert values == pytest.approx([2.0 * (step + 1) / 40 for step in range(20)])

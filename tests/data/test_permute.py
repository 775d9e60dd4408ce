import numpy as np
import pytest

from raysl.data import permute
from raysl.data.permute import Permutation


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute permutations of every length."""
    monkeypatch.setattr(permute, "COMPUTED_FROM", 0)


@pytest.mark.usefixtures("computed")
class TestComputed:
    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33, 1000, 4096, 65_537])
    def test_holds_every_place_once(self, length: int) -> None:
        assert sorted(Permutation(_rng(), length)[0:length].tolist()) == list(range(length))

    def test_a_slice_is_that_part_of_the_whole(self) -> None:
        permutation = Permutation(_rng(), 5000)
        whole = permutation[0:5000]
        np.testing.assert_array_equal(permutation[123:4321], whole[123:4321])
        assert permutation[7:7].tolist() == []

    def test_another_stream_gives_another_order_and_the_same_one_the_same(self) -> None:
        one, two, again = (Permutation(_rng(seed), 4000)[0:4000] for seed in (0, 1, 0))
        np.testing.assert_array_equal(one, again)
        assert np.mean(one == two) < 0.01

    def test_looks_random(self) -> None:
        """Places, neighbours and halves are as unrelated as in a drawn permutation."""
        length = 100_000
        order = Permutation(_rng(), length)[0:length].astype(float)
        limit = 4 / np.sqrt(length)
        assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < limit
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        counts = np.bincount((order[: length // 2] // (length / 20)).astype(int), minlength=20)
        expected = length / 40
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 45  # 19 degrees of freedom, half of them in each half: p < 0.001

    def test_fixed_points_are_as_few_as_chance_has_them(self) -> None:
        fixed = [
            int((Permutation(_rng(seed), 500)[0:500] == np.arange(500)).sum()) for seed in range(60)
        ]
        assert 0.5 < np.mean(fixed) < 1.6  # Poisson of mean 1


def test_a_short_one_is_drawn_as_numpy_draws_it() -> None:
    np.testing.assert_array_equal(Permutation(_rng(), 100)[10:20], _rng().permutation(100)[10:20])


def test_a_billion_places_take_no_memory() -> None:
    permutation = Permutation(_rng(), 1_000_000_000)
    some = permutation[999_999_000:1_000_000_000]
    assert len(np.unique(some)) == 1000
    assert some.min() >= 0
    assert some.max() < 1_000_000_000

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raysl.augment.random import MAX_VIEWS, borrow_view_stream, uniform

KEY = {"seed": 3, "epoch": 5, "index": 7, "view": 1}


def fresh(*, seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Create the generator that a thread would otherwise reuse."""
    philox = np.random.Philox(key=[seed, 256 * epoch + view], counter=[0, 0, 0, index])
    return np.random.Generator(philox)


def _words(seed: int, epoch: int, index: int, view: int, count: int = 64) -> list[int]:
    rng = borrow_view_stream(seed=seed, epoch=epoch, index=index, view=view)
    return [int(word) for word in rng.bit_generator.random_raw(count)]


class TestViewStream:
    def test_the_same_key_gives_the_same_numbers(self) -> None:
        assert _words(**KEY) == _words(**KEY)

    def test_is_known_once_and_for_all(self) -> None:
        # Other numbers here would change, on a resume, the views of every stored run.
        assert _words(**KEY, count=3) == [
            7274137319038931249,
            7536654465411675181,
            6129056085977233954,
        ]

    @pytest.mark.parametrize("part", ["seed", "epoch", "index", "view"])
    def test_depends_on_each_part_of_the_key(self, part: str) -> None:
        assert _words(**KEY) != _words(**{**KEY, part: KEY[part] + 1})

    def test_does_not_depend_on_what_was_drawn_before(self) -> None:
        expected = borrow_view_stream(**KEY).random(4).tolist()
        borrow_view_stream(**{**KEY, "index": 8}).random(1000)
        assert borrow_view_stream(**KEY).random(4).tolist() == expected

    def test_no_two_keys_share_a_number(self) -> None:
        # 64-bit words: 3**4 * 256 of them hold a chance pair with probability 1e-11.
        words = [
            word
            for seed in (0, 1, 2)
            for epoch in (0, 1, 2)
            for index in (0, 1, 2)
            for view in (0, 1, 255)
            for word in _words(seed, epoch, index, view, count=256)
        ]
        assert len(set(words)) == len(words) == 3**4 * 256

    def test_the_last_view_of_an_epoch_is_not_the_first_of_the_next(self) -> None:
        assert _words(0, 0, 0, MAX_VIEWS - 1) != _words(0, 1, 0, 0)

    def test_takes_keys_of_the_full_range(self) -> None:
        largest = _words(2**64 - 1, 2**50, 2**63 - 1, MAX_VIEWS - 1)
        assert largest != _words(0, 2**50, 2**63 - 1, MAX_VIEWS - 1)

    def test_numbers_are_uniform_over_images(self) -> None:
        first = [borrow_view_stream(seed=0, epoch=0, index=i, view=0).random() for i in range(2000)]
        # Mean 1/2 and variance 1/12; four standard errors.
        assert np.mean(first) == pytest.approx(0.5, abs=4 * (1 / 12 / 2000) ** 0.5)
        neighbours = np.corrcoef(first[:-1], first[1:])[0, 1]
        assert abs(neighbours) < 4 / 2000**0.5

    @pytest.mark.parametrize("view", [-1, MAX_VIEWS])
    def test_a_view_that_would_run_into_the_next_epoch_is_an_error(self, view: int) -> None:
        with pytest.raises(ValueError, match=rf"view must be in \[0, 256\); got {view}"):
            borrow_view_stream(seed=0, epoch=0, index=0, view=view)


class TestBorrowed:
    def test_is_the_same_stream_whatever_was_drawn_from_the_one_before(self) -> None:
        for index in range(50):
            key = {"seed": 7, "epoch": index % 3, "index": index, "view": index % 5}
            borrowed, own = borrow_view_stream(**key), fresh(**key)
            for _ in range(index % 4):  # leaves half a word of the generator unused, or not
                assert borrowed.integers(1000) == own.integers(1000)
                assert borrowed.random() == own.random()
            assert borrowed.permutation(4).tolist() == own.permutation(4).tolist()

    def test_threads_have_their_own(self) -> None:
        def draw(index: int) -> list[float]:
            rng = borrow_view_stream(seed=1, epoch=0, index=index, view=0)
            return [rng.random() for _ in range(200)]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(draw, range(64)))
        for index, values in enumerate(found):
            own = fresh(seed=1, epoch=0, index=index, view=0)
            assert values == [own.random() for _ in range(200)]


def test_uniform_is_that_of_numpy_to_the_bit() -> None:
    mine, numpys = (np.random.default_rng(0) for _ in range(2))
    for low, high in [(0.08, 1.0), (-0.2, 0.2), (0.2, 1.8), (3.0, 3.0)] * 50:
        assert uniform(mine, low, high) == numpys.uniform(low, high)

"""Permute a range: stored if it is short, computed index by index if it is long.

At a given index, a permutation holds one number of the range; see the terms in ``plan.py``.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# From this length on nothing is stored: a stored permutation of a billion rows takes 8 GB.
COMPUTED_FROM = 1 << 21
_ROUNDS = 4
# Odd constants of the SplitMix64 finaliser: Steele, Lea and Flood 2014, figure 17.
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A permutation of [0, length).

    Args:
        rng: Where the permutation, or the keys of its cipher, is drawn from.
        length: Size of the range, > 0.
    """

    def __init__(self, rng: np.random.Generator, length: int) -> None:
        self.length = length
        self._drawn: Indices | None = None
        if length < COMPUTED_FROM:
            self._drawn = rng.permutation(length)
        else:
            self._keys = rng.integers(0, 1 << 63, size=_ROUNDS, dtype=np.int64).astype(np.uint64)
            bits = (length - 1).bit_length()
            self._half = np.uint64((bits + 1) // 2)
            self._mask = np.uint64((1 << int(self._half)) - 1)

    def __getitem__(self, window: slice) -> Indices:
        """Return the permuted numbers at a slice of indices."""
        if self._drawn is not None:
            return self._drawn[window]
        values = np.arange(*window.indices(self.length), dtype=np.uint64)
        values = self._encrypt(values)
        # The cipher permutes a power of four that is at most four times the length. A value outside
        # of the range is encrypted again until it lies inside (cycle walking).
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Run a balanced Feistel network, a permutation for any round function.

        Source: Luby and Rackoff 1988; Black and Rogaway 2002 (cycle walking).
        """
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            mixed = right ^ key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._half) | right

"""Permute a range: a short permutation is stored, a long one is computed index by index.

At a given index, a permutation holds one number of the range; see the terms in ``plan.py``.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# From this length on, permutations are computed: storing one of a billion rows would take 8 GB.
COMPUTED_FROM = 1 << 21
_ROUNDS = 4
# Odd constants of the SplitMix64 finaliser: Steele, Lea and Flood 2014, figure 17.
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A permutation of [0, length).

    Args:
        rng: Random generator for the permutation, or for the keys of the cipher that computes it.
        length: Size of the range, > 0.
    """

    def __init__(self, rng: np.random.Generator, length: int) -> None:
        self.length = length
        self._stored: Indices | None = None
        if length < COMPUTED_FROM:
            self._stored = rng.permutation(length)
        else:
            self._keys = rng.integers(0, 1 << 63, size=_ROUNDS, dtype=np.int64).astype(np.uint64)
            bits = (length - 1).bit_length()
            self._half = np.uint64((bits + 1) // 2)
            self._mask = np.uint64((1 << int(self._half)) - 1)

    def __getitem__(self, window: slice) -> Indices:
        """Return the numbers of the range at a slice of indices."""
        if self._stored is not None:
            return self._stored[window]
        values = np.arange(*window.indices(self.length), dtype=np.uint64)
        values = self._encrypt(values)
        # The cipher permutes a power of four, at most four times the length. A value outside of
        # [0, length) is encrypted again until it is inside (cycle walking).
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Run a balanced Feistel network, which permutes whatever its round function is.

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

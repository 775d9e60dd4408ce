"""Random streams of views: functions of (seed, epoch, image, view) and nothing else."""

import threading

import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]

MAX_VIEWS = 256
_MASK_64 = (1 << 64) - 1
_borrowed = threading.local()
_REPLACEMENTS = 1 << 63  # not used as second word by any view's key


def view_stream(*, seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Return the random stream of one view of one image.

    Philox is counter-based: key and counter identify the stream, so that any machine can recreate
    it in any order, without saved state.

    Args:
        seed: The run's seed, 0 <= seed < 2**64.
        epoch: Number of the epoch, >= 0.
        index: Row of the image in its source, >= 0.
        view: Number of the view, 0 <= view < 256.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    key, counter = _view_words(seed, epoch, index, view)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def borrow_view_stream(*, seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """Return the same stream in a generator that this thread reuses in its next call.

    Eight times as fast: creating a generator takes 16 microseconds, as long as drawing a view.
    """
    if not hasattr(_borrowed, "philox"):
        _borrowed.philox = np.random.Philox(key=0)
        _borrowed.generator = np.random.Generator(_borrowed.philox)
        _borrowed.state = _borrowed.philox.state
    key, counter = _view_words(seed, epoch, index, view)
    _borrowed.state["state"] = {"key": key, "counter": counter}
    _borrowed.philox.state = _borrowed.state
    return _borrowed.generator  # type: ignore[no-any-return]


def _view_words(seed: int, epoch: int, index: int, view: int) -> tuple[_Words, _Words]:
    """Return the key and the counter of a view's stream."""
    if not 0 <= view < MAX_VIEWS:
        raise ValueError(f"view must be in [0, {MAX_VIEWS}); got {view}")
    key = np.array([seed & _MASK_64, (epoch * MAX_VIEWS + view) & _MASK_64], dtype=np.uint64)
    # The lowest word counts the numbers drawn, the highest is the image: streams never overlap.
    return key, np.array([0, 0, 0, index], dtype=np.uint64)


def replacement_stream(*, seed: int, epoch: int, key: int) -> np.random.Generator:
    """Return the random stream that draws the replacement of a bad image.

    Args:
        seed: The run's seed, 0 <= seed < 2**64.
        epoch: Number of the epoch, >= 0.
        key: The key that the bad image's views would have been drawn by, >= 0.
    """
    words = np.array([seed & _MASK_64, _REPLACEMENTS + epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, key], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Return the same number as ``rng.uniform(low, high)``, to the bit, three times as fast."""
    return low + (high - low) * float(rng.random())

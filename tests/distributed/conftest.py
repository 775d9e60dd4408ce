"""A test file defines ``everything()``; these are its results on two ranks and in one process.

One start of two processes serves all files, as start-up is most of the time.
"""

from collections.abc import Iterator

import pytest
import torch
from two_ranks import Ranks, Results


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, two_ranks: Ranks) -> list[Results]:
    """What each of two ranks computed; the file's numbers are cut in two by ``mine``."""
    return two_ranks(request.module.everything)


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest) -> Results:
    """What this process computes on its own, on one thread as each rank does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results: Results = request.module.everything()
    finally:
        torch.set_num_threads(threads)
    return results

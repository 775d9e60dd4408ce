"""A test file defines ``everything()``; these are its results on two ranks and in one process.

One start of two processes runs every check of a file, as start-up is most of the time.
"""

import pytest
import torch
from two_ranks import Results, on_two_ranks


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Results]:
    """What each of two ranks computed; the file's numbers are cut in two by ``mine``."""
    return on_two_ranks(request.module.everything, tmp_path_factory.mktemp("ranks"))


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

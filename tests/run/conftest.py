"""What several tests of runs on Ray need."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def known_to_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send what a test file defines to Ray's workers as it is: they cannot import a test."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(request.module)

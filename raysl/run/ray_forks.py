"""Let the worker processes of a Ray that this process starts come from a fork server."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray._private import parameter
from ray._private.ray_constants import SETUP_WORKER_FILENAME

from raysl.run import fork_client
from raysl.run.forks import serve_workers, workers_folder


@contextmanager
def forked_workers(modules: Sequence[str] = ()) -> Iterator[None]:
    """Give the Ray that is started meanwhile a fork server, where this is possible.

    The server ends with this process, or with :func:`raysl.run.forks.end_server`.

    Args:
        modules: Modules that a new server imports in addition to those of every run.
    """
    path = serve_workers(modules)
    if path is None:
        yield
        return
    names = {
        fork_client.SERVER: path,
        fork_client.OTHERWISE: str(workers_folder() / SETUP_WORKER_FILENAME),
    }
    module: Any = parameter
    real = module.RayParams
    module.RayParams = partial(real, setup_worker_path=fork_client.__file__)
    os.environ.update(names)
    try:
        yield
    finally:
        module.RayParams = real
        for name in names:
            os.environ.pop(name, None)

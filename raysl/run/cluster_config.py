"""The section ``cluster``: the part of a Ray cluster that a run uses."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.run.nodes import Roles, check_labels

_NUMBER, _RANGE = "number", "range"
_MOST_WORKERS = 4096


class WorkerRange(Config):
    """The fewest and the most train workers of a run whose nodes come and go."""

    min: Annotated[int, Field(gt=0, le=_MOST_WORKERS)]
    """Fewest train workers: with room for fewer, the run waits."""
    max: Annotated[int, Field(gt=0, le=_MOST_WORKERS)]
    """Most train workers."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min is at most max; got {{min: {self.min}, max: {self.max}}}")
        return self

    def __str__(self) -> str:
        return f"{{min: {self.min}, max: {self.max}}}"


def _checked(labels: dict[str, str]) -> dict[str, str]:
    check_labels(labels)
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_checked)]
"""Labels of nodes, in Ray's syntax."""


def _kind(value: Any) -> str:
    return _RANGE if isinstance(value, dict | WorkerRange) else _NUMBER


class ClusterConfig(Config):
    """The part of the Ray cluster that a run uses."""

    num_train_workers: Annotated[
        Annotated[int, Field(ge=0), Tag(_NUMBER)] | Annotated[WorkerRange, Tag(_RANGE)],
        Discriminator(_kind),
    ] = 1
    """Number of processes that train; 0 trains in this process, without Ray. {min: 1, max: 4} has
    as many as the nodes that are there have room for, of the numbers that divide the batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses one GPU per train worker if the cluster has enough, else CPUs."""
    cpus_per_train_worker: PositiveFloat | None = None
    """CPUs that Ray reserves for a train worker; the others make views. null reserves 1, or less
    if that would take all CPUs."""
    threads_per_train_worker: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Threads of torch in a train worker on CPU; null divides the node's cores evenly."""
    num_data_workers: PositiveInt | None = None
    """Number of processes that read, decode and augment; null uses all CPUs that are left."""
    train_on: NodeLabels | None = None
    """Labels of the nodes that train, such as {role: train}; a value may be a, !a, in(a, b) or
    !in(a, b). null trains on GPUs wherever they are, and without GPUs on any node."""
    data_on: NodeLabels | None = None
    """Labels of the nodes that make views; null makes them on every CPU that is left."""
    prefetch_batches: Annotated[int, Field(gt=0, le=1000)] = 2
    """Number of batches that a train worker prefetches."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Number of failures of workers or nodes after which a run stops; after each of them it resumes
    from its last checkpoint. With a range of train workers, failures with a new checkpoint between
    them do not add up."""
    max_wait_s: PositiveFloat | None = 1800.0
    """Seconds that a run waits for room for its workers, or for its first batch, before it ends
    with an error; null waits for ever."""
    resize_every_s: Annotated[float, Field(ge=0.0)] = 300.0
    """Shortest time in seconds between two increases of the number of train workers. Each restarts
    the workers after a checkpoint. A fixed number never changes."""

    @property
    def roles(self) -> Roles:
        """Which nodes train and which make views."""
        return Roles(self.train_on, self.data_on)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of train workers follows the nodes."""
        return isinstance(self.num_train_workers, WorkerRange)

    @property
    def uses_ray(self) -> bool:
        """Whether train workers run on Ray, instead of in this process."""
        return self.num_train_workers != 0

    @property
    def counts(self) -> range:
        """All numbers of train workers that the setting allows; this process counts as one."""
        given = self.num_train_workers
        if isinstance(given, WorkerRange):
            return range(given.min, given.max + 1)
        return range(max(1, given), max(1, given) + 1)

    @property
    def batch_multiple(self) -> int:
        """A multiple of the fewest and of the most train workers, for choosing a batch size."""
        return math.lcm(self.counts[0], self.counts[-1])

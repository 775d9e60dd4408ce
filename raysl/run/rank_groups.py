"""Divide the train workers of a run into groups, each of which Ray Data feeds separately. No Ray.

Ray Data spends 8 to 19 ms of one core on each block in the coordinator of an execution, which is
one thread (docs/scale.md). One execution therefore carries about 50 blocks of 32 MiB a second, and
larger runs have several.
"""

from typing import NamedTuple

# Half a node of eight GPUs. At 50 blocks of 128 images of two 224 px views a second, an execution
# brings 1,600 images a second to each of four train workers, which is about what a GPU takes.
MOST_RANKS = 4


class RankGroup(NamedTuple):
    """Train workers that share one execution of Ray Data, and the data workers of the execution."""

    ranks: range
    num_data_workers: int


def rank_groups(
    num_train_workers: int, num_data_workers: int, *, most_ranks: int = MOST_RANKS
) -> list[RankGroup]:
    """Divide train workers and data workers into groups.

    Groups hold consecutive ranks, which Ray Train places on the same node, and their sizes differ
    by one at most. There are no more groups than data workers. Each data worker joins the group
    that has the fewest for its ranks, because all ranks wait for the slowest.

    Args:
        num_train_workers: Number of train workers, > 0.
        num_data_workers: Number of data workers, > 0.
        most_ranks: Largest number of train workers in a group, unless data workers are fewer.

    Returns:
        At least one group, in the order of the ranks.
    """
    num_groups = min(-(-num_train_workers // most_ranks), num_data_workers)
    bounds = [number * num_train_workers // num_groups for number in range(num_groups + 1)]
    ranks = [range(*bounds[number : number + 2]) for number in range(num_groups)]
    shares = [1] * num_groups
    for _ in range(num_data_workers - num_groups):
        poorest = min(range(num_groups), key=lambda number: shares[number] / len(ranks[number]))
        shares[poorest] += 1
    return [RankGroup(*each) for each in zip(ranks, shares, strict=True)]

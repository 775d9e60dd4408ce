"""Groups of near-duplicates, against a search of all pairs; what is kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.embed import duplicates as module
from raysl.embed.duplicates import Forest, choose, find_duplicates
from raysl.embed.embeddings import Embeddings

CPU = torch.device("cpu")


def groups_by_loops(directions: np.ndarray, threshold: float) -> list[list[int]]:
    """Grow each group from its first member until nothing is near any of them."""
    left, groups = set(range(len(directions))), []
    while left:
        group: set[int] = set()
        new = {min(left)}
        while new:
            group |= new
            left -= new
            new = {
                other
                for other in left
                for member in new
                if float(directions[other] @ directions[member]) >= threshold
            }
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


@pytest.mark.parametrize("block", [1, 8, 4096])
@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.999])
def test_groups_are_those_of_loops_whatever_the_blocks(
    block: int,
    threshold: float,
    tmp_path: Path,
    write_embeddings: Callable[..., Embeddings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", block)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    features[40:] = features[rng.integers(0, 40, 20)] + rng.normal(size=(20, 4), scale=0.05)
    embeddings = write_embeddings(tmp_path / "out", features)
    directions = embeddings.directions(np.arange(60)).numpy()
    found = find_duplicates(embeddings, threshold=threshold, device=CPU)
    assert [group.tolist() for group in found.groups] == groups_by_loops(directions, threshold)
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -1)
    assert np.abs(found.nearest - similarity.max(axis=1)).max() < 1e-5
    assert found.num_pairs == int((np.triu(similarity, 1) >= threshold).sum())


def test_one_image_has_no_duplicates(
    tmp_path: Path, write_embeddings: Callable[..., Embeddings]
) -> None:
    found = find_duplicates(
        write_embeddings(tmp_path / "out", np.ones((1, 3), dtype=np.float32)),
        threshold=0.5,
        device=CPU,
    )
    assert found.groups == []
    assert found.nearest.tolist() == [-1]


class TestForest:
    def test_many_pairs_at_a_time_join_like_one_by_one(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            left, right = rng.integers(0, 50, (2, 25))
            forest, slow = Forest(50), list(range(50))
            forest.join(left[:10], right[:10])
            forest.join(left[10:], right[10:])
            for a, b in zip(left.tolist(), right.tolist(), strict=True):
                low, high = sorted((slow[a], slow[b]))
                slow = [low if each == high else each for each in slow]
            wanted = [np.flatnonzero(np.array(slow) == root).tolist() for root in sorted(set(slow))]
            groups = [group.tolist() for group in forest.groups()]
            assert groups == [group for group in wanted if len(group) > 1]

    def test_a_chain_is_one_group(self) -> None:
        forest = Forest(1000)
        forest.join(np.arange(999), np.arange(1, 1000))
        (group,) = forest.groups()
        assert group.tolist() == list(range(1000))


class TestChoose:
    def test_the_ends_of_a_chain_are_both_kept(self) -> None:
        angles = torch.tensor([0.0, 0.1, 0.2, 0.3])
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        choice = choose(directions, threshold=float(torch.tensor(0.1).cos()) - 1e-5)
        assert choice.kept.tolist() == [True, False, True, False]
        assert choice.by.tolist()[1] in (0, 2)
        assert choice.by.tolist()[3] == 2

    def test_each_dropped_one_is_near_a_kept_one_and_no_two_kept_ones_are_near(self) -> None:
        directions = torch.nn.functional.normalize(
            torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
        )
        choice = choose(directions, threshold=0.8)
        similarity = (directions @ directions.T).numpy()
        for place in np.flatnonzero(~choice.kept):
            assert choice.kept[choice.by[place]]
            assert similarity[place, choice.by[place]] >= 0.8 - 1e-6
            assert choice.similarity[place] == pytest.approx(
                similarity[place, choice.by[place]], abs=1e-6
            )
        kept = np.flatnonzero(choice.kept)
        among = similarity[np.ix_(kept, kept)] - 2 * np.eye(len(kept))
        assert among.max() < 0.8

"""Write notes about tar shards: content that is skipped or used in an unexpected way."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from raysl.errors import counted
from raysl.sources.formats import missing_package
from raysl.sources.tar_index import OTHERS, Tally, keep_commonest
from raysl.sources.tar_members import Flaw

_SHOWN = 3


class IndexedShard(NamedTuple):
    """Facts about an indexed shard."""

    shard: str
    """Path of the shard below the source's folder."""
    num_images: int
    """Number of images before any filter."""
    tally: Tally
    flaw: Flaw | None


def tar_notes(indexed: Sequence[IndexedShard], *, key: str) -> tuple[str, ...]:
    """Return a line for each kind of problem with shards, and for each kind of skipped member.

    Args:
        indexed: Facts about the shards.
        key: The setting that selects one of several images of a sample.
    """
    return (*_of_shards(indexed), *_of_samples([s.tally for s in indexed], indexed, key=key))


def _of_shards(indexed: Sequence[IndexedShard]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for each in indexed:
        if each.flaw is not None:
            kinds.setdefault(each.flaw.kind, []).append(each.shard)
        elif each.num_images == 0:
            kinds.setdefault("without an image", []).append(each.shard)
    return [
        f"{len(names):,} of {counted(len(indexed), 'tar shard')} {kind}: {_listed(names)}"
        for kind, names in kinds.items()
    ]


def _of_samples(
    tallies: Sequence[Tally], indexed: Sequence[IndexedShard], *, key: str
) -> list[str]:
    lines = []
    if repeated := sum(tally.repeated for tally in tallies):
        shards = [each.shard for each in indexed if each.tally.repeated]
        verb = "occurs" if repeated == 1 else "occur"
        lines.append(
            f"{counted(repeated, 'member')} {verb} twice in {_listed(shards)}; the last of each is "
            f"used"
        )
    left_out, one_by_one = (
        _sum([tally.left_out for tally in tallies]),
        _sum([tally.one_by_one for tally in tallies]),
    )
    if left_out:
        lines.append(
            f"{counted(left_out.total(), 'image')} left out beside another of the same sample: "
            f"{_ends(left_out)}; {key}={_commonest(left_out)} uses those instead"
        )
    if one_by_one:
        lines.append(_separate_images(one_by_one, key=key))
    if without := sum(tally.without for tally in tallies):
        ends = _sum([tally.without_ends for tally in tallies])
        verb = "has" if without == 1 else "have"
        lines.append(
            f"{counted(without, 'sample')} {verb} no image: members end in {_ends(ends)}"
            + _installing(ends)
        )
    if hidden := sum(tally.hidden for tally in tallies):
        lines.append(f"{counted(hidden, 'image')} left out: names that begin with a dot")
    if links := sum(tally.links for tally in tallies):
        lines.append(
            f"{counted(links, 'image')} left out: links; tar writes files instead with "
            f"--dereference --hard-dereference"
        )
    if bad_json := sum(tally.bad_json for tally in tallies):
        lines.append(f"{counted(bad_json, '.json member')} without a label: not JSON")
    return lines


def _separate_images(ends: Counter[str], *, key: str) -> str:
    line = (
        f"{counted(ends.total(), 'image')} share their names up to the first dot with others but "
        f"are used as separate images: {_ends(ends)}"
    )
    commonest = _commonest(ends)
    # In cat.0.jpg, cat.1.jpg the dots are part of the names; they are not columns of a sample.
    if ends[commonest] == 1 or commonest.partition(".")[0].isdigit():
        return line
    return f"{line}; {key}={commonest} uses one per sample"


def _installing(ends: Counter[str]) -> str:
    if not any(missing_package(f".{end}") for end in ends):
        return ""
    return "; pip install 'raysl[formats]' installs libraries for some of them"


def _sum(counters: Sequence[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return keep_commonest(total)


def _commonest(ends: Counter[str]) -> str:
    return max((end for end in ends if end != OTHERS), key=lambda end: ends[end])


def _ends(ends: Counter[str]) -> str:
    named = sorted((end for end in ends if end != OTHERS), key=lambda end: (-ends[end], end))
    parts = [f"{end} ({ends[end]:,})" for end in named[:_SHOWN]]
    if rest := ends.total() - sum(ends[end] for end in named[:_SHOWN]):
        parts.append(f"others ({rest:,})")
    return ", ".join(parts)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

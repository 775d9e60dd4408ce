"""Format metrics, parameters and times: titles with units, short numbers."""

from collections.abc import Iterable
from typing import NamedTuple

_PERCENT_SUFFIXES = ("_top1", "_share")  # of metrics that are fractions


class Measure(NamedTuple):
    """The format of a metric."""

    words: str
    """Name of the metric."""
    unit: str = ""
    """Empty if it has none."""
    scale: float = 1.0
    """Factor from the metric's value to the unit."""

    @property
    def title(self) -> str:
        """Return the name with the unit."""
        return f"{self.words}, {self.unit}" if self.unit else self.words

    def text(self, value: float) -> str:
        """Format a value in the unit, without naming the unit."""
        return f"{self.scale * value:.1f}" if self.scale == 100 else number_text(value)


def _percent(words: str) -> Measure:
    return Measure(words, "%", 100)


_KNOWN = {
    "train/loss": Measure("Loss"),
    "eval/knn_top1": _percent("Nearest-neighbour accuracy"),
    "eval/top1": _percent("Accuracy"),
    "final/knn_top1": _percent("Nearest-neighbour accuracy at the end"),
    "final/linear_top1": _percent("Accuracy of a linear probe, by SGD"),
    "final/linear_lbfgs_top1": _percent("Accuracy of a linear probe"),
    "final/few_shot_top1": _percent("Accuracy with few labels"),
    "final/finetune_top1": _percent("Accuracy after fine-tuning"),
    "final/top1": _percent("Accuracy at the end"),
    "eval/rankme": Measure("RankMe when evaluated", "dimensions"),
    "eval/alpha_req": Measure("Decay of the spectrum (alpha-ReQ)"),
    "eval/alignment": Measure("Alignment when evaluated (0: equal)"),
    "eval/uniformity": Measure("Uniformity when evaluated"),
    "train/feature_std": Measure("Spread of features (0: collapsed, 1: even)"),
    "train/effective_rank": Measure("Effective rank of features", "dimensions"),
    "train/lr": Measure("Learning rate"),
    "train/grad_norm": Measure("Gradient norm"),
    "train/images_per_s": Measure("Throughput", "images/s"),
    "data/wait_share": _percent("Time spent waiting for data"),
}


def measure(key: str) -> Measure:
    """Return the format of any metric, also of a method's own metrics."""
    if key in _KNOWN:
        return _KNOWN[key]
    section, _, name = key.partition("/")
    words = f"{section}: {name.removesuffix('_top1').replace('_', ' ') or key}"
    if name == "partner_top1":
        words = f"Partner view ranked first ({section})"
    return _percent(words) if name.endswith(_PERCENT_SUFFIXES) else Measure(words)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return a short name for each dotted key: its last part, or more parts if keys share it.

    Keys such as ``backbone.name`` are named by their section.
    """
    parts_of = {key: key.removesuffix(".name").split(".") for key in keys}
    names = {}
    for key, parts in parts_of.items():
        tails = (parts[-length:] for length in range(1, len(parts) + 1))
        unique = (t for t in tails if sum(p[-len(t) :] == t for p in parts_of.values()) == 1)
        names[key] = " ".join(next(unique, parts)).replace("_", " ")
    return names


def value_text(value: object) -> str:
    """Format a parameter's value; None becomes ``none``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number_text(value)
    return "none" if value is None else str(value)


def number_text(value: float) -> str:
    """Format a number: as an integer from 1,000 to 10 million, else with 4 significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def duration_text(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"

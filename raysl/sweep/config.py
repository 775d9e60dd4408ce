"""The configuration of a sweep: base runs, a space over their settings, a metric and a budget."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raysl.config.base import Config, PositiveFloat, PositiveInt, Probability
from raysl.evaluate.protocol import known_protocols
from raysl.track.config import OutputDir, TrackConfig, check_run_name

Scalar = str | int | float | bool | None
Kind = Literal["grid", "choice", "uniform", "log_uniform", "int", "log_int"]

CONFIG = "config"
"""The parameter that distinguishes the runs of several base files."""
SEED = "seed"
"""The parameter that distinguishes repeats of one candidate."""
IF_CHANGED = "data.if_changed"
"""The setting of runs that may change between starts of a sweep."""

_KINDS: tuple[Kind, ...] = get_args(Kind)


def _check_values(given: Any) -> Any:
    """Reject anything but a list of distinct scalars or a section of labels."""
    if isinstance(given, dict) and given:
        return given
    if not isinstance(given, list | tuple):
        raise ValueError(f"takes a list of values, or a section of label: value; got {given!r}")
    problems = [] if given else ["no values; give at least one"]
    for index, value in enumerate(given):
        if isinstance(value, list | dict):
            problems.append(f"the value {value} needs a name; give a section of label: value")
        elif value in given[:index]:
            problems.append(f"the value {value} is listed twice")
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(given)


def _check_range(given: Any, *, whole: bool, log: bool) -> Any:
    """Reject anything but [low, high] with low < high, positive for a logarithm."""
    kind = "whole numbers" if whole else "numbers"
    allowed = (int,) if whole else (int, float)
    is_pair = isinstance(given, list | tuple) and len(given) == 2
    if not is_pair or not all(type(bound) in allowed for bound in given):
        raise ValueError(f"takes [low, high], two {kind}; got {given!r}")
    low, high = given
    if low >= high:
        raise ValueError(f"takes [low, high] with low < high; got [{low}, {high}]")
    if log and low <= 0:
        raise ValueError(f"a logarithm takes [low, high] with low > 0; got [{low}, {high}]")
    return tuple(given)


def _range_check(*, whole: bool = False, log: bool = False) -> BeforeValidator:
    return BeforeValidator(partial(_check_range, whole=whole, log=log))


_Values = Annotated[tuple[Any, ...] | dict[str, Any], BeforeValidator(_check_values)]
_Uniform = Annotated[tuple[float, float], _range_check()]
_LogUniform = Annotated[tuple[float, float], _range_check(log=True)]
# An alias: inside of a class with a field `int`, `int` means the field.
_Int = Annotated[tuple[int, int], _range_check(whole=True)]
_LogInt = Annotated[tuple[int, int], _range_check(whole=True, log=True)]


class Dimension(Config):
    """One setting that a sweep varies: exactly one kind, and optionally a condition."""

    grid: _Values | None = None
    """Values, or a value for each label. A random search covers the combinations of all grids
    evenly."""
    choice: _Values | None = None
    """Values, or a value for each label. A random search draws one."""
    uniform: _Uniform | None = None
    """[low, high] of a real number."""
    log_uniform: _LogUniform | None = None
    """[low, high] of a positive real number, log-uniform."""
    int: _Int | None = None
    """[low, high] of a whole number, both ends included."""
    log_int: _LogInt | None = None
    """[low, high] of a positive whole number, both ends included, log-uniform."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Other settings with the value, or list of values, for which this dimension exists. For
    another dimension, use its value or its label; for anything else, the value that the run would
    have."""

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> "Dimension":
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; got {kinds or 'none'}")
        return self

    @property
    def kind(self) -> Kind:
        """The name of the one kind that is set."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def is_listed(self) -> bool:
        """Whether it is a list of values, not a range."""
        return self.kind in ("grid", "choice")

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return self.kind in ("int", "log_int")

    @property
    def is_log(self) -> bool:
        """Whether it is a log-uniform range."""
        return self.kind in ("log_uniform", "log_int")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of a range."""
        low, high = getattr(self, self.kind)
        return low, high

    def labels(self) -> list[Scalar]:
        """Return the displayed values of a listed dimension."""
        return list(self._listed())

    def values(self) -> list[Any]:
        """Return the values of a listed dimension, in the order of their labels."""
        listed = self._listed()
        return list(listed.values()) if isinstance(listed, dict) else list(listed)

    def value_of(self, label: Scalar) -> Any:
        """Return the value of a label; numbers of a range are returned unchanged."""
        return self.values()[self.labels().index(label)] if self.is_listed else label

    def _listed(self) -> tuple[Any, ...] | dict[str, Any]:
        values: tuple[Any, ...] | dict[str, Any] = getattr(self, self.kind)
        return values


class MetricConfig(Config):
    """The metric by which trials are compared."""

    name: str = "eval/knn_top1"
    """Key of ``metrics.jsonl``."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller value of the metric is better."""
    also: tuple[str, ...] = ()
    """Further keys to report."""


class BudgetConfig(Config):
    """Limits of a sweep."""

    trials: PositiveInt | None = None
    """Number of points of the space to try, each ``repeats`` times; null: all points of a grid."""
    hours: PositiveFloat | None = None
    """Wall time, in hours, after which all trials end."""
    epochs: PositiveFloat | None = None
    """Epochs of a trial, instead of the base's train.epochs and train.steps."""
    steps: PositiveInt | None = None
    """Optimizer steps of a trial, instead of the base's train.epochs and train.steps."""


class NoScheduler(Config):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class AshaScheduler(Config):
    """Successive halving: at each rung only the best trials so far continue.

    Source: Li et al. 2018, arXiv:1810.05934v5.
    """

    name: Literal["asha"] = "asha"
    grace_epochs: PositiveFloat = 1.0
    """Epoch of the first rung; each later rung is reduction_factor times the one before."""
    reduction_factor: Annotated[float, Field(ge=1.1)] = 3.0
    """One of this many trials continues at each rung."""


class HyperBandScheduler(Config):
    """Successive halving with several first rungs at once.

    Source: Li et al. 2016, arXiv:1603.06560v4.
    """

    name: Literal["hyperband"] = "hyperband"
    max_evaluations: Annotated[int, Field(gt=1)] = 9
    """R: number of evaluations of a trial that is never stopped, evenly spaced over its length."""
    reduction_factor: Annotated[float, Field(ge=1.1)] = 3.0
    """One of this many trials continues at each rung."""


class PbtScheduler(Config):
    """Population based training: the worst trials copy the best, with perturbed settings.

    Source: Jaderberg et al. 2017, arXiv:1711.09846v2.
    """

    name: Literal["pbt"] = "pbt"
    perturb_every_epochs: PositiveFloat = 1.0
    """Epochs between two exchanges."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """Share of the trials that count as worst, and as best."""
    resample_prob: Probability = 0.25
    """Probability that a setting is redrawn instead of perturbed."""


SchedulerConfig = Annotated[
    NoScheduler | AshaScheduler | HyperBandScheduler | PbtScheduler, Field(discriminator="name")
]


class RandomSearch(Config):
    """All candidates are drawn in advance, from the sweep's seed."""

    name: Literal["random"] = "random"


class GridSearch(Config):
    """Every combination of the space's values."""

    name: Literal["grid"] = "grid"


class OptunaSearch(Config):
    """Optuna's tree-structured Parzen estimator suggests one candidate after another."""

    name: Literal["optuna"] = "optuna"
    startup_trials: PositiveInt = 10
    """Number of random candidates before the first suggestion."""


SearchConfig = Annotated[RandomSearch | GridSearch | OptunaSearch, Field(discriminator="name")]


class ResourcesConfig(Config):
    """Resources of the trials."""

    trials_at_a_time: PositiveInt | None = None
    """Number of concurrent trials; null: as many as fit."""
    cpus_per_trial: PositiveFloat | None = None
    """CPUs of a trial with one train worker; null derives it from the cluster."""
    gpus_per_trial: PositiveFloat | None = None
    """GPUs of a trial with one train worker; 0.25 lets four share a GPU."""


def _as_tuple(given: Any) -> Any:
    """Convert a list, or a single string, to a tuple for strict validation."""
    return (
        tuple(given) if isinstance(given, list) else (given,) if isinstance(given, str) else given
    )


class SweepConfig(Config):
    """The settings of one sweep."""

    name: str
    """The sweep's folder is output_dir/name; starting the same name again resumes the sweep."""
    output_dir: OutputDir = "runs"
    """Parent of the sweep's folder, which is called ``name``: a path or an address of a store."""
    base: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1),
    ]
    """Run configurations, relative to the sweep's file; ``*`` matches any name. Several of them
    form a first dimension ``config`` of file stems, each tried with every combination."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings and their values, for all trials."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """Dotted settings and their dimensions."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations to exclude: those in which each named setting has its value, or one of its list.
    Settings are named as in a dimension's ``when``."""
    metric: MetricConfig = MetricConfig()
    budget: BudgetConfig = BudgetConfig()
    scheduler: SchedulerConfig = NoScheduler()
    """Which trials stop early, or copy from others."""
    search: SearchConfig = RandomSearch()
    """How candidates are drawn from the space."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the draws; the runs use the seed of their base."""
    repeats: PositiveInt = 1
    """Number of seeds for each candidate: the base's seed and the ones after it."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Retries of a trial whose process or node died. Errors of raysl itself are not retried."""
    resources: ResourcesConfig = ResourcesConfig()
    track: TrackConfig = TrackConfig()
    final: tuple[str, ...] | Literal["knn", "full"] = "knn"
    """Protocols to measure at the end of a trial, as ``evaluate.final`` of a run. knn: nearest
    neighbours alone; full: the default protocols of a run. Both words also fine-tune if
    ``evaluate.finetune`` is given."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)

    @field_validator("final")
    @classmethod
    def _are_protocols(cls, final: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return final if isinstance(final, str) else known_protocols(final)

    @property
    def bases(self) -> Mapping[str, Path]:
        """The base files by stem."""
        return {Path(path).stem: Path(path) for path in self.base}

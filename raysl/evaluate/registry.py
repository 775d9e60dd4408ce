"""The evaluation protocols by name, each with a version and settings fixed within it.

Numbers are only comparable if they were measured the same way, so each is printed with its
protocol, the version and the settings that matter: ``knn@1 (k 20, temperature 0.07)``.
"""

import difflib
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from raysl.config.base import Config
from raysl.config.load import parse_override, validate
from raysl.errors import ConfigError
from raysl.evaluate.probes import (
    FewShotConfig,
    KnnConfig,
    LbfgsConfig,
    LinearConfig,
    ProbeResult,
    ProbeSets,
    measure_few_shot,
    measure_knn,
    measure_lbfgs,
    measure_linear,
)
from raysl.evaluate.training_protocols import FinetuneProtocol, SemiHundredth, SemiTenth
from raysl.sources.source import digest


class Protocol(NamedTuple):
    """A way to measure an encoder."""

    name: str
    version: int
    """Increased when the defaults or the computation change."""
    settings: type[Config]
    title: str
    """Name of the protocol in tables."""
    summary: Callable[[Any], str]
    """Maps the settings to the text that identifies a result."""
    seeds: Callable[[Any, Sequence[int]], tuple[int, ...]]
    """Maps the settings and the requested seeds to the seeds to run; empty if nothing is random."""
    measure: Callable[..., ProbeResult] | None
    """Takes settings, features, seed and device; None for protocols that train the network."""

    def text(self, settings: Config) -> str:
        """Return the name, the version, the main settings and all changed ones."""
        defaults = json.loads(self.settings().model_dump_json())
        values = json.loads(settings.model_dump_json())
        changed = [
            f"{name}={json.dumps(values[name])}"
            for name, default in defaults.items()
            if values[name] != default
        ]
        also = f"; changed: {', '.join(changed)}" if changed else ""
        return f"{self.name}@{self.version} ({self.summary(settings)}{also})"


def _all_seeds(settings: Any, requested: Sequence[int]) -> tuple[int, ...]:
    return tuple(requested)


def _knn_text(settings: KnnConfig) -> str:
    return f"k {settings.k}, temperature {settings.temperature:g}"


def _linear_text(settings: LinearConfig) -> str:
    num_rates = len(settings.base_lrs)
    return (
        f"SGD, {settings.epochs} epochs of {settings.batch_size}, best of {num_rates} rates on "
        f"{settings.held_out_share:.0%} held out"
        if num_rates > 1
        else f"SGD, {settings.epochs} epochs of {settings.batch_size}"
    )


def _lbfgs_text(settings: LbfgsConfig) -> str:
    penalties = settings.inverse_penalties
    if len(penalties) == 1:
        return f"L-BFGS, C {penalties[0]:g}"
    return f"L-BFGS, best of {len(penalties)} C on {settings.held_out_share:.0%} held out"


def _few_shot_text(settings: FewShotConfig) -> str:
    return (
        f"{settings.labels_per_class} labels per class, {settings.draws} draws, "
        f"C {settings.inverse_penalty:g}"
    )


def _training_text(settings: FinetuneProtocol) -> str:
    return settings.text()


PROTOCOLS: Mapping[str, Protocol] = {
    each.name: each
    for each in (
        Protocol(
            "knn",
            1,
            KnnConfig,
            "nearest neighbours",
            _knn_text,
            lambda settings, requested: (),
            measure_knn,
        ),
        Protocol("linear", 1, LinearConfig, "linear", _linear_text, _all_seeds, measure_linear),
        Protocol(
            "linear_lbfgs",
            2,  # 1 chose the best of five C on held-out images
            LbfgsConfig,
            "logistic regression",
            _lbfgs_text,
            lambda settings, requested: (
                tuple(requested) if len(settings.inverse_penalties) > 1 else ()
            ),
            measure_lbfgs,
        ),
        Protocol(
            "few_shot",
            1,
            FewShotConfig,
            "few labels",
            _few_shot_text,
            lambda settings, requested: tuple(range(settings.draws)),
            measure_few_shot,
        ),
        Protocol("finetune", 1, FinetuneProtocol, "fine-tuned", _training_text, _all_seeds, None),
        Protocol("semi_10", 1, SemiTenth, "10 % of the labels", _training_text, _all_seeds, None),
        Protocol("semi_1", 1, SemiHundredth, "1 % of the labels", _training_text, _all_seeds, None),
    )
}
"""The protocols by name."""

TRANSFER = "transfer"
"""Name for the protocols in :data:`TRANSFERRED` on another labelled source."""
TRANSFERRED = ("knn", "linear")
DEFAULT = ("knn", "linear", "few_shot")
"""The protocols that ``raysl evaluate`` measures by default."""
FINAL = ("knn", "linear_lbfgs", "few_shot")
"""The default protocols at the end of a run; given the features, each takes under a second."""


class ProtocolSettings(Config):
    """The settings of every protocol, with the same keys in ``raysl evaluate`` and in a run."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of everything random in a protocol: held-out images, order, first weights, labels."""
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    linear_lbfgs: LbfgsConfig = LbfgsConfig()
    few_shot: FewShotConfig = FewShotConfig()
    finetune: FinetuneProtocol = FinetuneProtocol()
    semi_1: SemiHundredth = SemiHundredth()
    semi_10: SemiTenth = SemiTenth()


class ProtocolRun(NamedTuple):
    """A unit of an evaluation: one seed of a protocol, which is measured and stored by itself."""

    protocol: str
    settings: dict[str, Any]
    seed: int | None
    """None if nothing in the protocol is random."""


def units_of(config: ProtocolSettings, name: str) -> list[ProtocolRun]:
    """Return the units of a protocol: one per seed, or one without seed if nothing is random."""
    settings = getattr(config, name)
    values = settings.model_dump(mode="json")
    seeds = PROTOCOLS[name].seeds(settings, config.seeds)
    return [ProtocolRun(name, values, seed) for seed in seeds or (None,)]


def settings_of(unit: ProtocolRun) -> Any:
    """Return the validated settings of a unit."""
    return validate(PROTOCOLS[unit.protocol].settings, unit.settings, where=unit.protocol)


def key_of(unit: ProtocolRun) -> str:
    """Return the stem of a unit's file names; it changes with version, settings and seed."""
    version = PROTOCOLS[unit.protocol].version
    seed = "" if unit.seed is None else f"-seed{unit.seed}"
    return f"{unit.protocol}@{version}-{settings_digest(settings_of(unit))}{seed}"


def measure_unit(unit: ProtocolRun, sets: ProbeSets, *, device: str) -> tuple[ProbeResult, float]:
    """Measure a unit on features; return its result and its wall time in seconds."""
    measure = PROTOCOLS[unit.protocol].measure
    assert measure is not None
    began = time.monotonic()
    with warnings.catch_warnings():
        # torch warns that features in the object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        measured = measure(settings_of(unit), sets, seed=unit.seed or 0, device=device)
    return measured, time.monotonic() - began


def check_protocols(
    names: Iterable[str],
    *,
    where: str = "--protocols",
    known: Sequence[str] = (*PROTOCOLS, TRANSFER),
) -> tuple[str, ...]:
    """Return the names without duplicates.

    Args:
        names: Names of protocols.
        where: Option or setting that contains the names, for error messages.
        known: The allowed names.

    Raises:
        ConfigError: If one is unknown, with the most similar known name, or if there is none.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: {name!r} is not known; allowed: {', '.join(known)}{hint}")
    if not names:
        raise ConfigError(f"{where}: give at least one of {', '.join(known)}")
    return names


def settings_digest(settings: Config) -> str:
    """Return 16 hex digits that change with any setting."""
    return digest(json.dumps(json.loads(settings.model_dump_json()), sort_keys=True))


def refuse_unmeasured(overrides: Sequence[str], names: Collection[str]) -> None:
    """Reject settings of protocols that are not measured.

    Args:
        overrides: Settings ``section.key=value``.
        names: The protocols to be measured.

    Raises:
        ConfigError: Names the setting, and the option that would measure it.
    """
    measured = {*names, *(TRANSFERRED if TRANSFER in names else ())}
    for override in overrides:
        section = parse_override(override)[0].partition(".")[0]
        if section in {*PROTOCOLS, TRANSFER} - measured:
            together = ",".join([*names, section])
            raise ConfigError(
                f"{override}: has no effect, because {section} is not measured; drop it, or "
                f"measure it: --protocols {together}"
            )

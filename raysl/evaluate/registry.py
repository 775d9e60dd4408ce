"""The evaluation protocols by name, each with a version and settings fixed within it.

Numbers are only comparable if they were measured the same way, so each is printed with its
protocol, the version and the settings that matter: ``knn@1 (k 20, temperature 0.07)``.
"""

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from raysl.config.base import Config
from raysl.config.load import parse_override
from raysl.errors import ConfigError
from raysl.evaluate.probes import (
    FewShotConfig,
    KnnConfig,
    LbfgsConfig,
    LinearConfig,
    ProbeResult,
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
    """Its name in tables."""
    summary: Callable[[Any], str]
    """Maps its settings to the text that identifies a number."""
    seeds: Callable[[Any, Sequence[int]], tuple[int, ...]]
    """Maps its settings and the requested seeds to those to run; empty if nothing is random."""
    measure: Callable[..., ProbeResult] | None
    """Takes settings, features, seed and device; None for protocols that train the network."""

    def text(self, settings: Config) -> str:
        """Return the name, the version, and the settings that identify it or were changed."""
        own = json.loads(self.settings().model_dump_json())
        given = json.loads(settings.model_dump_json())
        changed = [f"{name}={json.dumps(given[name])}" for name in own if own[name] != given[name]]
        also = f"; changed: {', '.join(changed)}" if changed else ""
        return f"{self.name}@{self.version} ({self.summary(settings)}{also})"


def _as_asked(settings: Any, asked: Sequence[int]) -> tuple[int, ...]:
    return tuple(asked)


def _knn_text(settings: KnnConfig) -> str:
    return f"k {settings.k}, temperature {settings.temperature:g}"


def _linear_text(settings: LinearConfig) -> str:
    many = len(settings.base_lrs)
    return (
        f"SGD, {settings.epochs} epochs of {settings.batch_size}, best of {many} rates on "
        f"{settings.held_out_share:.0%} held out"
        if many > 1
        else f"SGD, {settings.epochs} epochs of {settings.batch_size}"
    )


def _lbfgs_text(settings: LbfgsConfig) -> str:
    many = settings.inverse_penalties
    if len(many) == 1:
        return f"L-BFGS, C {many[0]:g}"
    return f"L-BFGS, best of {len(many)} C on {settings.held_out_share:.0%} held out"


def _few_shot_text(settings: FewShotConfig) -> str:
    return (
        f"{settings.labels_per_class} labels a class, {settings.draws} draws, "
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
            lambda settings, asked: (),
            measure_knn,
        ),
        Protocol("linear", 1, LinearConfig, "linear", _linear_text, _as_asked, measure_linear),
        Protocol(
            "linear_lbfgs",
            1,
            LbfgsConfig,
            "logistic regression",
            _lbfgs_text,
            lambda settings, asked: tuple(asked) if len(settings.inverse_penalties) > 1 else (),
            measure_lbfgs,
        ),
        Protocol(
            "few_shot",
            1,
            FewShotConfig,
            "few labels",
            _few_shot_text,
            lambda settings, asked: tuple(range(settings.draws)),
            measure_few_shot,
        ),
        Protocol("finetune", 1, FinetuneProtocol, "fine-tuned", _training_text, _as_asked, None),
        Protocol("semi_10", 1, SemiTenth, "10 % of the labels", _training_text, _as_asked, None),
        Protocol("semi_1", 1, SemiHundredth, "1 % of the labels", _training_text, _as_asked, None),
    )
}
"""The protocols by name."""

TRANSFER = "transfer"
"""Stands for the protocols in :data:`TRANSFERRED`, on another labelled source."""
TRANSFERRED = ("knn", "linear")
DEFAULT = ("knn", "linear", "few_shot")


def check_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names without duplicates.

    Raises:
        ConfigError: If one is unknown, with the most similar known name, or if there is none.
    """
    known = [*PROTOCOLS, TRANSFER]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--protocols: {name!r} is not known; allowed: {', '.join(known)}{hint}"
            )
    if not names:
        raise ConfigError(f"--protocols: give at least one of {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def settings_digest(settings: Config) -> str:
    """Return 16 hex digits that change with any setting."""
    return digest(json.dumps(json.loads(settings.model_dump_json()), sort_keys=True))


def refuse_unmeasured(overrides: Sequence[str], names: Collection[str]) -> None:
    """Reject settings of protocols that are not measured.

    Args:
        overrides: ``section.key=value``.
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
                f"{override}: does nothing, as protocol {section} is not measured; drop it, or "
                f"measure it: --protocols {together}"
            )

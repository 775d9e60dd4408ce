"""Get candidates one by one from Optuna's tree-structured Parzen estimator.

Akiba et al. 2019, Optuna, arXiv:1907.10902v1. The study is a journal in the sweep's folder, so that
an interrupted sweep continues with the results so far.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raysl.sweep.config import Dimension, OptunaSearch, SweepConfig
from raysl.sweep.space import Candidate, candidate_of

_STUDY = "raysl"


class ParzenSearch:
    """Get candidates from Optuna, and report their results to it.

    Args:
        sweep: The sweep.
        journal: The file that stores Optuna's study.
    """

    def __init__(self, sweep: SweepConfig, journal: Path) -> None:
        assert isinstance(sweep.search, OptunaSearch)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("optuna").setLevel(logging.ERROR)
        self._sweep = sweep
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=_STUDY,
            load_if_exists=True,
            direction="maximize" if sweep.metric.mode == "max" else "minimize",
        )
        # A sampler with the same seed would repeat the first draws.
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=sweep.search.startup_trials, seed=(sweep.seed + self.num_asked) % 2**32
        )

    @property
    def num_asked(self) -> int:
        """Number of candidates asked for so far, including those of earlier starts."""
        return len(self._study.get_trials(deepcopy=False))

    def ask(self) -> Candidate:
        """Return the next candidate, with the number of Optuna's trial."""
        trial = self._study.ask()

        def pick(key: str, dimension: Dimension) -> Any:
            low, high = (0.0, 0.0) if dimension.is_listed else dimension.bounds
            if dimension.is_listed:
                return trial.suggest_categorical(key, dimension.labels())
            if dimension.kind in ("int", "log_int"):
                return trial.suggest_int(key, int(low), int(high), log=dimension.kind == "log_int")
            return trial.suggest_float(key, low, high, log=dimension.kind == "log_uniform")

        return candidate_of(self._sweep, trial.number, pick)

    def tell(self, number: int, curve: tuple[tuple[float, float], ...], *, status: str) -> None:
        """Report the results of a candidate; idempotent.

        Args:
            number: The candidate's number.
            curve: Its evaluations, (epoch, metric).
            status: ``finished``, ``stopped`` or ``failed``.
        """
        states: Mapping[str, TrialState] = {
            "finished": TrialState.COMPLETE,
            "stopped": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }
        state = states[status] if curve else TrialState.FAIL
        record = self._study.get_trials(deepcopy=False)[number]
        if record.state.is_finished():
            return
        trial = optuna.Trial(self._study, record._trial_id)
        for step, (_, value) in enumerate(curve):
            trial.report(value, step)
        values = curve[-1][1] if state == TrialState.COMPLETE else None
        self._study.tell(number, values, state=state)

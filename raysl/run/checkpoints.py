"""Save and restore the state of a run: rank 0 writes in a thread, errors reach every rank."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raysl.encoder.file import write_encoder
from raysl.errors import RunFolderError, StoppedError
from raysl.methods.base import Method
from raysl.nn.batchnorm import average_statistics
from raysl.nn.collectives import broadcast_object, rank_and_size
from raysl.optim.build import ScheduledOptimizer
from raysl.run.build import describe
from raysl.run.recipe import Derived, RunConfig
from raysl.track.events import note_event
from raysl.track.run_folder import MetricsFile, RunFolder, list_waiting, read_metrics
from raysl.train.checkpoint import load_checkpoint, load_state, save_checkpoint
from raysl.train.checkpoint_writer import CheckpointWriter
from raysl.train.keep import KeepRule

_ENCODER = "encoder"  # key of a state, whose value goes to a file of its own
_REMEDY = (
    "Earlier checkpoints are untouched; free space or set output_dir to another disk, then run the "
    "same command"
)


class Checkpoints:
    """The checkpoints of a run, as one rank sees them.

    Training does not wait for the disk. What goes wrong there is known on rank 0 alone; the loop
    asks :meth:`troubled` at its logging steps, where the ranks exchange metrics anyway.

    Args:
        config: The run's configuration.
        folder: The run folder.
        method: The method that is trained.
        optimizers: Its optimizers.
        derived: The derived values of the configuration.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        folder: RunFolder,
        method: Method,
        optimizers: Sequence[ScheduledOptimizer],
        derived: Derived,
    ) -> None:
        self._config = config
        self._folder = folder
        self._method = method
        self._optimizers = optimizers
        train = config.train
        sizes = {
            "steps_per_epoch": derived.steps_per_epoch,
            "total_steps": derived.total_steps,
        }
        self._rule = KeepRule(
            newest=train.keep_checkpoints,
            best=train.keep_best,
            every=None if train.keep_every is None else max(1, train.keep_every.in_steps(**sizes)),
            saved_every=derived.checkpoint_every_steps,
        )
        self._metrics: MetricsFile | None = None
        self._writer = CheckpointWriter(
            self._write,
            patience_s=config.train.checkpoint_retry_s,
            lost=self._lost,
            tell=lambda step, line: note_event(folder.events, line, step=step),
        )

    @contextmanager
    def written(self, metrics: MetricsFile | None) -> Iterator[None]:
        """Write checkpoints within the block, which trains, and wait for the last one. Collective.

        After an error, only the write in progress is waited for; after an exception such as
        KeyboardInterrupt, none.

        Args:
            metrics: The metrics file on rank 0, which shows whether the folder is still there; None
                on the others.

        Raises:
            RunFolderError: On every rank, if the last checkpoint cannot be written.
        """
        self._metrics = metrics
        with self._writer:
            try:
                yield
            except StoppedError:
                self.wait()
                raise
            self.wait()

    def restore(self, step: int, *, device: torch.device) -> None:
        """Load the checkpoint of a step.

        Raises:
            RunFolderError: If it is damaged, or does not fit.
        """
        state = load_checkpoint(self._folder.checkpoints, step=step, device=device)
        load_state(self._method, state["method"], owner=f"method {self._config.method.name}")
        for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.optimizer.load_state_dict(optimizer_state)

    def save(self, step: int) -> None:
        """Begin the checkpoint of a step. Collective; it waits only for an earlier one."""
        average_statistics(self._method)
        if rank_and_size()[0] == 0:
            state: dict[str, Any] = {
                "method": self._method.state_dict(),
                "optimizers": [each.optimizer.state_dict() for each in self._optimizers],
                "step": step,
            }
            if self._rule.best is not None or self._rule.every is not None:
                state[_ENCODER] = self._method.encoder.net.state_dict()
            self._writer.save(state, step=step)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Collective.

        Raises:
            RunFolderError: On every rank, if it cannot be written.
        """
        self._writer.wait()
        self.raise_trouble()

    def troubled(self) -> bool:
        """Return whether this rank knows why the run must end."""
        return self._problem() is not None

    def raise_trouble(self) -> None:
        """Raise what rank 0 knows. Collective.

        Raises:
            RunFolderError: On every rank, if a checkpoint cannot be written or the folder is gone.
        """
        problem = broadcast_object(self._problem())
        if problem is not None:
            error = RunFolderError(problem)
            error.on_every_rank = True
            raise error

    def _problem(self) -> str | None:
        if (lost := self._lost()) is not None:
            return lost
        if self._writer.problem is None:
            return None
        patience_s = self._config.train.checkpoint_retry_s
        tried = f"It was tried for {patience_s:g} s (train.checkpoint_retry_s). " * (patience_s > 0)
        remedy = _REMEDY if self._folder.stored is None else ""  # a store's errors name their own
        return f"{self._writer.problem}. {tried}{remedy}".rstrip()

    def _lost(self) -> str | None:
        if self._metrics is None or self._metrics.is_in_place():
            return None
        return (
            f"{self._folder.path}: the run folder was deleted, renamed or replaced while the run "
            f"trained, so its metrics and checkpoints are no longer there. Put the folder back, "
            f"then run the same command to resume; without the folder it starts anew"
        )

    def _write(self, state: Any, step: int) -> None:
        rest = dict(state)
        encoder = rest.pop(_ENCODER, None)

        def also(path: Path) -> None:
            if encoder is not None:
                write_encoder(
                    path / self._folder.encoder.name,
                    encoder,
                    self._method.encoder.embed_dim,
                    description=describe(self._config),
                )

        save_checkpoint(self._folder.checkpoints, rest, step=step, keep=self._kept_steps, also=also)
        self._folder.publish(waits=True)  # what a store does not hold is not written

    def _kept_steps(self, steps: Sequence[int]) -> Collection[int]:
        best, values = self._rule.best, {}
        if best is not None:  # only then is it worth reading the whole file
            records = read_metrics(self._folder.metrics)
            values = {int(r["step"]): float(r[best.metric]) for r in records if best.metric in r}
        return self._rule.kept(steps, values=values, pending=list_waiting(self._folder.to_evaluate))

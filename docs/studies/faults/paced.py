"""SimCLR whose steps take at least some time, and that hangs once if it is told to.

    method: {name: faults.paced, pace_s: 0.2}

The time is spent asleep, so that a run of hours takes little of a machine, and a fault hits the
step that it was meant for. A sleep changes no number.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raysl.methods.base import Batch, LossOutput, Progress, TrainingSet
from raysl.methods.simclr import SimCLR, SimCLRConfig
from raysl.nn.backbones import Backbone

HANG = "FAULTS_HANG"  # an environment variable that names a file
_FOR_EVER_S = 1e6


class PacedConfig(SimCLRConfig):
    """The settings of SimCLR, and the pace."""

    name: Literal["faults.paced"] = "faults.paced"  # type: ignore[assignment]
    pace_s: Annotated[float, Field(ge=0)] = 0.2
    """Seconds that a step takes at least."""


class Paced(SimCLR):
    """SimCLR that sleeps until its step is due."""

    Config = PacedConfig

    def __init__(self, config: PacedConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self._pace_s, self._due = config.pace_s, 0.0

    def loss_of(self, embeddings: tuple, batch: Batch, progress: Progress) -> LossOutput:
        """Return SimCLR's loss, once the step is due."""
        hang = os.environ.get(HANG)
        if hang and Path(hang).exists():
            Path(hang).unlink()
            time.sleep(_FOR_EVER_S)
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + self._pace_s
        return super().loss_of(embeddings, batch, progress)


METHOD = Paced

"""Measure a classifier's accuracy during training and at its end."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.errors import DataError
from raysl.evaluate.features import embed
from raysl.evaluate.protocol import LabelledSets
from raysl.nn.batchnorm import average_statistics
from raysl.nn.classifier import Classifier
from raysl.sources.source import Source
from raysl.sources.subset import SubsetSource
from raysl.track.results import Results


class ClassifierEvaluation:
    """Evaluates a classifier on all test images, in evaluation mode.

    Args:
        model: The classifier that is trained.
        sets: The labelled images of the run; only test images and class names are used.
        to_input: Converts ``(B, S, S, 3)`` uint8 to the network's input on its device.

    Raises:
        DataError: If the test images have other classes than the classifier.
    """

    def __init__(
        self,
        model: Classifier,
        sets: LabelledSets,
        *,
        to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
    ) -> None:
        if sets.class_names != model.class_names:
            raise DataError(
                f"the classes of the images ({_name_some(sets.class_names)}) are not those of the "
                f"classifier ({_name_some(model.class_names)}); the teacher must know the same "
                f"classes, in the same order"
            )
        self._model = model
        self._sets = sets
        self._to_input = to_input
        self._last_evaluated: tuple[int, float] = (-1, float("nan"))  # step, accuracy

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Return ``eval/top1`` in [0, 1] after ``step`` steps. Collective."""
        if self._last_evaluated[0] != step:
            average_statistics(self._model)
            logits = embed(self._model, self._sets.test, to_input=self._to_input)
            is_correct = logits.argmax(dim=1) == torch.from_numpy(self._sets.test.labels)
            self._last_evaluated = step, float(is_correct.double().mean())
        return {"eval/top1": self._last_evaluated[1]}

    def results(self, step: int, source: Source) -> Results:
        """Return the accuracy after ``step`` steps, with the numbers of images and labels."""
        top1 = self.evaluate(step)["eval/top1"]
        return {
            "top1": top1,
            "num_labels": _num_labels(source),
            "num_test_labels": len(self._sets.test),
            "num_bad_test_images": len(self._sets.test.bad),
            "num_classes": len(self._model.class_names),
        }


def _num_labels(source: Source) -> int:
    if isinstance(source, SubsetSource):
        return len(source.labelled)
    labels = source.labels()
    return 0 if labels is None else int((labels >= 0).sum())


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

"""Time a torch DataLoader with torchvision's transforms, the baseline for the input pipeline.

It runs in a process of its own (``python -m raysl.benchmark.input_peer``, a pickled task in, a JSON
object out): a DataLoader forks its workers, which a process connected to Ray must not do.
"""

import importlib
import importlib.util
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raysl.augment.pipeline import View
from raysl.augment.recipes import SimCLRViews
from raysl.benchmark.own_process import answer, ask
from raysl.benchmark.throughput import measure_batches
from raysl.data.plan import Plan
from raysl.sources.source import DataConfig, Source, Unreadable

PEERS = {
    "torch": "torch DataLoader, torchvision on PIL, float, normalised",
    "torch-uint8": "torch DataLoader, torchvision on PIL, uint8",
    "lightly": "torch DataLoader, lightly's SimCLRTransform",
}
# What Pillow raises for files that are not images, broken, or too large.
_BAD_IMAGE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
_STAND_IN_PX = (500, 375)
_MADE_FOR = {"lightly": "lightly"}  # packages that need not be there


class PeerSpeed(NamedTuple):
    """What the peer reached with ``num_workers`` processes."""

    images_per_s: float
    first_batch_s: float
    num_workers: int
    left_out: list[str]
    """Operations of the recipe that it has no counterpart for."""


def is_installed(peer: str) -> bool:
    """Return whether what a peer needs can be imported."""
    return peer not in _MADE_FOR or importlib.util.find_spec(_MADE_FOR[peer]) is not None


class PeerTask(NamedTuple):
    """What to time."""

    peer: str  # one of PEERS
    source: Source
    plan: Plan  # its global batch is the batch
    data: DataConfig
    num_workers: int
    seconds: float


def run_peer(task: PeerTask) -> PeerSpeed:
    """Time a peer in a process of its own.

    Raises:
        DataError: If the peer fails.
    """
    return PeerSpeed(**ask("raysl.benchmark.input_peer", task, name=PEERS[task.peer]))


class PeerImages(Dataset[Any]):
    """Map-style: the encoded bytes of a row, decoded by PIL, through the transform of each view."""

    def __init__(self, source: Source, transform: Callable[[PIL.Image.Image], Any]) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        data = self.source.read(np.array([index]))[0]
        if isinstance(data, np.ndarray):
            return self.transform(PIL.Image.fromarray(data).convert("RGB"))
        try:
            if isinstance(data, Unreadable):
                raise OSError(data.reason)
            image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        except _BAD_IMAGE:  # it would end a training; here it only must not cost nothing
            image = PIL.Image.new("RGB", _STAND_IN_PX)
        return self.transform(image)


def measure_peer(task: PeerTask) -> PeerSpeed:
    """Time a peer in this process, which must not be connected to Ray."""
    transform, left_out = transform_of(task.peer, task.data)
    loader: DataLoader[Any] = DataLoader(
        PeerImages(task.source, transform),
        batch_sampler=_Batches(task.plan),
        num_workers=task.num_workers,
    )
    seen = measure_batches(
        lambda: iter(loader),
        batch_size=task.plan.global_batch_size,
        round_batches=max(1, task.num_workers),
        size_of=lambda batch: sum(view.nbytes for view in batch),
        seconds=task.seconds,
    )
    return PeerSpeed(seen.images_per_s, seen.first_batch_s, task.num_workers, left_out)


class _Batches:
    """Rows in the plan's order: a source that is quick to read in groups is so for both."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        size = self.plan.global_batch_size
        rows: list[int] = []
        for position in itertools.count():
            rows += self.plan.item(position).indices.tolist()
            while len(rows) >= size:
                yield rows[:size]
                rows = rows[size:]


def transform_of(peer: str, data: DataConfig) -> tuple[Callable[[PIL.Image.Image], Any], list[str]]:
    """Return a function from a PIL image to its views, and the operations it lacks."""
    views = data.views.views()
    if peer == "lightly":
        return _lightly(data), []
    end: list[Any] = [transforms.PILToTensor()]
    if peer == "torch":
        end = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    composed = []
    left_out: list[str] = []
    for view in views:
        ops, missing = torchvision_ops(view)
        crop = transforms.RandomResizedCrop(
            view.size_px,
            scale=view.crop.scale,
            ratio=view.crop.ratio,
            interpolation=transforms.InterpolationMode(view.crop.interpolation),
        )
        composed += [transforms.Compose([crop, *ops, *end])] * view.count
        left_out += [name for name in missing if name not in left_out]
    return _EachView(composed), left_out


class _EachView:
    """The views of an image, each drawn anew."""

    def __init__(self, composed: Sequence[Callable[[PIL.Image.Image], torch.Tensor]]) -> None:
        self.composed = composed

    def __call__(self, image: PIL.Image.Image) -> list[torch.Tensor]:
        return [transform(image) for transform in self.composed]


def torchvision_ops(view: View) -> tuple[list[Any], list[str]]:
    """Return torchvision's operations on PIL images for those of a view, and those it lacks."""
    ops: list[Any] = []
    missing: list[str] = []
    for op in view.ops:
        make = _COUNTERPARTS.get(op.op)
        if make is None:
            missing.append(op.op)
        else:
            ops.append(make(op, view.size_px))
    return ops, missing


def _sometimes(transform: Any, prob: float) -> Any:
    return transforms.RandomApply([transform], p=prob)


def _jitter(op: Any, _: int) -> Any:
    jitter = transforms.ColorJitter(op.brightness, op.contrast, op.saturation, op.hue)
    return _sometimes(jitter, op.prob)


def _blur(op: Any, size_px: int) -> Any:
    taps = 2 * math.ceil(3 * op.sigma_px[1]) + 1
    if op.kernel_fraction is not None:
        taps = max(3, int(size_px * op.kernel_fraction) | 1)
    return _sometimes(transforms.GaussianBlur(taps, op.sigma_px), op.prob)


def _quarter_turn(op: Any, _: int) -> Any:
    turns = [transforms.RandomRotation((degrees, degrees)) for degrees in (90, 180, 270)]
    return _sometimes(transforms.RandomChoice(turns), op.prob)


_COUNTERPARTS: Mapping[str, Callable[[Any, int], Any]] = {
    "flip": lambda op, _: transforms.RandomHorizontalFlip(op.prob),
    "rotate": lambda op, _: _sometimes(transforms.RandomRotation(op.max_deg), op.prob),
    "quarter_turn": _quarter_turn,
    "color_jitter": _jitter,
    "grey": lambda op, _: transforms.RandomGrayscale(op.prob),
    "blur": _blur,
    "solarise": lambda op, _: transforms.RandomSolarize(op.threshold, op.prob),
}


def _lightly(data: DataConfig) -> Callable[[PIL.Image.Image], Any]:
    # By name: not a dependency, only something to compare with.
    simclr = importlib.import_module("lightly.transforms.simclr_transform").SimCLRTransform
    normalize = {"mean": list(data.mean), "std": list(data.std)}
    views = data.views
    if not isinstance(views, SimCLRViews):
        size_px = max(view.size_px for view in views.views())
        return simclr(input_size=size_px, normalize=normalize)  # type: ignore[no-any-return]
    return simclr(  # type: ignore[no-any-return]
        input_size=views.size_px,
        min_scale=views.min_scale,
        cj_prob=views.color_prob,
        cj_strength=views.color_strength,
        random_gray_scale=views.grey_prob,
        gaussian_blur=views.blur_prob,
        hf_prob=views.flip_prob,
        normalize=normalize,
    )


if __name__ == "__main__":
    answer(measure_peer)

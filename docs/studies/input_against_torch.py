"""Compare raysl's input with torch DataLoaders, in turns in one run, on the views of one recipe.

    python docs/studies/input_against_torch.py simclr_resnet50_imagenet data.source=photos

The peers decode with PIL and augment with torchvision, or are lightly's SimCLRTransform; each runs
with one worker per core. All see the same images in the same order. A peer is measured in a process
of its own, because a DataLoader forks its workers, which a process connected to Ray must not do.
"""

import argparse
import importlib
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raysl.augment.pipeline import View
from raysl.augment.recipes import SimCLRViews
from raysl.benchmark.input import InputBenchmark, measure_stream, open_input
from raysl.benchmark.ray_input import cores_of, input_layout, share_source
from raysl.benchmark.throughput import measure_batches
from raysl.benchmark.view_function import time_function
from raysl.data.plan import Plan
from raysl.embed.ray_embed import quiet
from raysl.run.ray_cluster import connect, disconnect
from raysl.run.recipe import load_run
from raysl.sources.source import DataConfig, Source, Unreadable

PEERS = {
    "torch": "torch DataLoader, torchvision on PIL, float, normalised",
    "torch-uint8": "torch DataLoader, torchvision on PIL, uint8",
    "lightly": "torch DataLoader, lightly's SimCLRTransform",
}
# What Pillow raises for files that are not images, broken, or too large.
_BAD_IMAGE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
_STAND_IN_PX = (500, 375)


class PeerTask(NamedTuple):
    """A peer to measure."""

    peer: str
    """Key of :data:`PEERS`."""
    source: Source
    plan: Plan
    """The order of the images; its global batch is the batch size."""
    data: DataConfig
    num_workers: int
    seconds: float


class Speed(NamedTuple):
    """The measured speed of raysl or of a peer."""

    images_per_s: float
    first_batch_s: float
    left_out: tuple[str, ...] = ()
    """Operations of the recipe that the peer lacks."""


class PeerImages(Dataset[Any]):
    """The images of a source by row: decoded by PIL, then transformed."""

    def __init__(self, source: Source, transform: Callable[[PIL.Image.Image], Any]) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        encoded = self.source.read(np.array([index]))[0]
        if isinstance(encoded, np.ndarray):
            return self.transform(PIL.Image.fromarray(encoded).convert("RGB"))
        try:
            if isinstance(encoded, Unreadable):
                raise OSError(encoded.reason)
            image = PIL.Image.open(io.BytesIO(encoded)).convert("RGB")
        except _BAD_IMAGE:  # would end a training; here it must only cost the usual time
            image = PIL.Image.new("RGB", _STAND_IN_PX)
        return self.transform(image)


class Batches:
    """Lists of rows in the plan's order, without end, so that all read the source alike."""

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


class EachView:
    """The views of an image, each drawn anew."""

    def __init__(self, composed: Sequence[Callable[[PIL.Image.Image], torch.Tensor]]) -> None:
        self.composed = composed

    def __call__(self, image: PIL.Image.Image) -> list[torch.Tensor]:
        """Return one tensor per view, ``(3, S, S)``."""
        return [transform(image) for transform in self.composed]


def measure_peer(task: PeerTask) -> Speed:
    """Measure a peer in this process, which must not be connected to Ray."""
    transform, left_out = transform_of(task.peer, task.data)
    loader: DataLoader[Any] = DataLoader(
        PeerImages(task.source, transform),
        batch_sampler=Batches(task.plan),
        num_workers=task.num_workers,
    )
    measured = measure_batches(
        lambda: iter(loader),
        batch_size=task.plan.global_batch_size,
        round_batches=max(1, task.num_workers),
        size_of=lambda batch: sum(view.nbytes for view in batch),
        seconds=task.seconds,
    )
    return Speed(measured.images_per_s, measured.first_batch_s, tuple(left_out))


def in_own_process(measure: Callable[[Any], Any], task: Any) -> Any:
    """Return ``measure(task)``, computed in a fresh process that inherits nothing of this one."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        return pool.submit(measure, task).result()


def transform_of(peer: str, data: DataConfig) -> tuple[Callable[[PIL.Image.Image], Any], list[str]]:
    """Return a function from a PIL image to its views, and the operations that the peer lacks."""
    if peer == "lightly":
        return _lightly(data), []
    end: list[Any] = [transforms.PILToTensor()]
    if peer == "torch":
        end = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    composed = []
    left_out: list[str] = []
    for view in data.views.views():
        ops, missing = torchvision_ops(view)
        crop = transforms.RandomResizedCrop(
            view.size_px,
            scale=view.crop.scale,
            ratio=view.crop.ratio,
            interpolation=transforms.InterpolationMode(view.crop.interpolation),
        )
        composed += [transforms.Compose([crop, *ops, *end])] * view.count
        left_out += [name for name in missing if name not in left_out]
    return EachView(composed), left_out


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
    # By name: no dependency of raysl.
    simclr = importlib.import_module("lightly.transforms.simclr_transform").SimCLRTransform
    normalize = {"mean": list(data.mean), "std": list(data.std)}
    views = data.views
    if not isinstance(views, SimCLRViews):
        return simclr(input_size=max(v.size_px for v in views.views()), normalize=normalize)
    return simclr(
        input_size=views.size_px,
        min_scale=views.min_scale,
        cj_prob=views.color_prob,
        cj_strength=views.color_strength,
        random_gray_scale=views.grey_prob,
        gaussian_blur=views.blur_prob,
        hf_prob=views.flip_prob,
        normalize=normalize,
    )


def local_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def compare(bench: InputBenchmark, peers: Sequence[str], *, rounds: int) -> dict[str, list[Speed]]:
    """Measure raysl and each peer once a round, in turns, on the connected Ray."""
    plan, data = bench.plan(), bench.config.data
    layout, source = input_layout(bench.config), share_source(bench.source)
    short = bench.seconds / 4
    rate = time_function(bench.source, plan, bench.spec(), seconds=short, start=0).images_per_s
    images = rate * cores_of(layout) * bench.seconds
    speeds: dict[str, list[Speed]] = {name: [] for name in ("raysl", *peers)}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for peer in peers:
            task = PeerTask(peer, bench.source, plan, data, local_cores(), bench.seconds)
            speeds[peer].append(in_own_process(measure_peer, task))
        streamed = measure_stream(bench, layout, source, images=images)
        speeds["raysl"].append(Speed(streamed.images_per_s, streamed.first_batch_s))
    return speeds


def print_speeds(speeds: Mapping[str, Sequence[Speed]], names: Mapping[str, str]) -> None:
    """Print the medians, and the ratio of raysl to each peer within a round."""
    print(f"{'':60} {'images/s':>10} {'min-max':>17} {'first, s':>9} {'raysl / this':>13}")
    for name, rows in speeds.items():
        rates = [row.images_per_s for row in rows]
        # Within a round: what else the machine does then slows both.
        pairs = zip(speeds["raysl"], rows, strict=True)
        ratio = statistics.median(ours.images_per_s / row.images_per_s for ours, row in pairs)
        lacks = f", without {', '.join(rows[0].left_out)}" if rows[0].left_out else ""
        print(
            f"{names[name] + lacks:60} {statistics.median(rates):10,.0f} "
            f"{f'{min(rates):,.0f}-{max(rates):,.0f}':>17} "
            f"{statistics.median(row.first_batch_s for row in rows):9.1f} "
            f"{'' if name == 'raysl' else f'{ratio:.2f}':>13}"
        )


def main(words: Sequence[str] | None = None) -> dict[str, list[Speed]]:
    """Measure, print and return the speeds by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="a YAML file or the name of a configuration")
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--peers", default="torch,torch-uint8,lightly", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    arguments = parser.parse_args(words)
    peers = arguments.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        parser.error(f"--peers: unknown {unknown[0]}; give some of {', '.join(PEERS)}")
    if "lightly" in peers and importlib.util.find_spec("lightly") is None:
        print("lightly is not installed: not measured", file=sys.stderr)
        peers.remove("lightly")
    bench = open_input(load_run(arguments.config, arguments.overrides), seconds=arguments.seconds)
    started = connect()
    quiet()
    try:
        speeds = compare(bench, peers, rounds=arguments.rounds)
    finally:
        if started:
            disconnect()
    print_speeds(speeds, PEERS | {"raysl": f"raysl through Ray Data, {local_cores()} cores"})
    return speeds


if __name__ == "__main__":
    main()

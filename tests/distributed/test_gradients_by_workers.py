"""The gradient table: every method, with 1, 2 and 4 workers at one global batch.

In float64, through the data-parallel wrapper, over steps that move queues, centers, statistics and
teachers. All images differ in mean and spread, so the ranks' inputs do. What a method draws for
each of its images is drawn here for the images of all ranks, and each rank takes its part. The
table of docs/results.md:

    pytest tests/distributed/test_gradients_by_workers.py -k table
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Ranks, Results, mine

from raysl.config.base import Duration
from raysl.methods import load_method, method_names
from raysl.methods.base import Batch, LossOutput, Method, Progress, TrainingSet
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.classifier import Classifier, save_classifier
from raysl.nn.collectives import mean_over_ranks, rank_and_size
from raysl.nn.vit import VisionTransformer
from raysl.train.rank_check import compare_ranks, state_of

pytestmark = pytest.mark.distributed

NUM_IMAGES = 200
IMAGES = 44  # 44, 22 or 11 on a rank: no other dimension of a network here has these sizes
SIZE_PX = 16
STEPS = 4
WORKERS = (2, 4)
LIMIT = 1e-8  # the aim is 1e-5
CLASSES = ("cat", "dog", "cow")
HEAD = {"hidden_dim": 8, "projection_dim": 5}
SOON = Duration(steps=0)
CASES: dict[str, dict[str, Any]] = {
    "barlow": HEAD | {"redundancy": 0.1, "loss_scale": 1.0},
    "byol": HEAD | {"ema_momentum": 0.6},
    "context_encoder": {"bottleneck_dim": 8, "decoder_width": 4, "discriminator_width": 4},
    "context_encoder, any shape": {
        "bottleneck_dim": 8, "decoder_width": 4, "discriminator_width": 4, "mask": "region"
    },
    "dino": {
        "hidden_dim": 8, "bottleneck_dim": 5, "num_prototypes": 7, "ema_momentum": 0.5,
        "center_momentum": 0.5, "head_batch_norm": True,
    },
    "distill": {"temperature": 0.5},
    "distill, labels": {"temperature": 0.5, "distillation_weight": 0.4},
    "ebm, mcmc": {
        "training": "mcmc", "buffer_length": 60, "restart_prob": 0.5, "langevin_steps": 2,
        "hidden_dim": 8,
    },
    "ebm, nce": {"training": "nce", "hidden_dim": 8, "num_noise": 1},
    "ebm, score matching": {"training": "score_matching", "hidden_dim": 8},
    "jigsaw": {"grid": 2, "tile_dim": 6},
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "margin": {"projection_dim": 4, "num_others": 5, "margin": 3.0},
    "margin, labels": {"projection_dim": 4, "num_others": 7, "margin": 3.0, "pairs": "labels"},
    "moco": {"queue_length": 60, "projection_dim": 5, "ema_momentum": 0.6},
    "moco, symmetric": {
        "queue_length": 100, "projection_dim": 5, "ema_momentum": 0.6, "symmetric": True
    },
    "moco_v3": HEAD | {"ema_momentum": 0.6},
    "moco_v3, vit": HEAD | {"ema_momentum": 0.6},
    "nce": {"projection_dim": 4, "num_noise": 9},
    "nce, labels": {"projection_dim": 4, "num_noise": 9, "noise": "labels"},
    "rotation": {},
    "rotation, one turn": {"rotations": "one"},
    "sigmoid": {"projection_dim": 5, "initial_bias": -2.0},
    "simclr": {"projection_dim": 5},
    "simclr, memory": {
        "projection_dim": 5, "memory": True, "memory_length": 60, "ema_momentum": 0.6
    },
    "simsiam": HEAD | {"predictor_hidden_dim": 4},
    "supervised": {"label_smoothing": 0.1},
    "swav": HEAD | {"num_prototypes": 7, "frozen": SOON},
    "swav, queue": HEAD | {
        "num_prototypes": 7, "frozen": SOON, "queue_length": 44, "queue_start": Duration(steps=1)
    },
    "vicreg": HEAD,
}  # fmt: skip


def images_of(seed: int) -> Tensor:
    """This rank's, whose rows differ in mean and spread: each part has statistics of its own."""
    rows = torch.linspace(0.3, 2.5, IMAGES).view(-1, 1, 1, 1).double()
    shape = (IMAGES, 3, SIZE_PX, SIZE_PX)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    return mine(noise * rows + rows)


@contextmanager
def one_draw_for_all_ranks() -> Iterator[None]:
    """Where a random tensor has this rank's number of images as a dimension, draw for all ranks."""
    rank, size = rank_and_size()
    local = IMAGES // size

    def part(draw: Callable[..., Tensor], shape: Any) -> Tensor:
        if local not in tuple(shape):
            return draw(tuple(shape))
        along = tuple(shape).index(local)
        whole = draw(tuple(IMAGES if n == along else s for n, s in enumerate(shape)))
        return whole.narrow(along, rank * local, local).clone()

    def sized(function: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
        def drawn(*args: Any, **options: Any) -> Tensor:
            if "generator" in options:  # already the same on all ranks
                return function(*args, **options)
            before, rest = args[:first], args[first:]
            shape = rest[0] if isinstance(rest[0], tuple | torch.Size) else rest
            return part(lambda whole: function(*before, whole, **options), shape)

        return drawn

    def low_high(args: tuple[Any, ...]) -> int:
        return 2 if isinstance(args[1], int) else 1

    randint, uniform, randn = torch.randint, torch.Tensor.uniform_, torch.randn

    def uniform_(tensor: Tensor, *bounds: float, **options: Any) -> Tensor:
        return part(
            lambda whole: uniform(tensor.new_empty(whole), *bounds, **options), tensor.shape
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", sized(torch.rand, 0))
        patch.setattr(torch, "randn", sized(randn, 0))
        patch.setattr(torch, "randint", lambda *a, **o: sized(randint, low_high(a))(*a, **o))
        patch.setattr(
            torch, "randn_like", lambda x: part(lambda s: randn(s, dtype=x.dtype), x.shape)
        )
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        yield


def backbone_of(case: str) -> Backbone:
    if case in ("mae", "moco_v3, vit"):
        vit = VisionTransformer(
            image_size_px=SIZE_PX, patch_size_px=4, embed_dim=12, depth=1, num_heads=2
        )
        return Backbone(vit, embed_dim=12)
    layers = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), embed_dim=8)


def write_teacher(folder: Path) -> Path:
    torch.manual_seed(1)
    config = BackboneConfig(name="resnet18", stem="small", width=0.125)
    teacher = Classifier(build_backbone(config), nn.Sequential(), CLASSES)
    nn.init.normal_(teacher.linear.weight)
    about = {"backbone": config.model_dump(mode="json"), "image_size_px": SIZE_PX}
    save_classifier(folder / "classifier.safetensors", teacher, description=about)
    return folder


def build(case: str) -> tuple[Method, int]:
    """Build a method; return it with the number of its views."""
    kind = load_method(case.partition(",")[0])
    with TemporaryDirectory() as folder:
        given = (
            {"teacher": str(write_teacher(Path(folder)))} if "teacher" in kind.Config.files else {}
        )
        torch.manual_seed(0)
        config = kind.Config(**CASES[case], **given)
        views = (SIZE_PX,) * config.num_views
        data = TrainingSet(
            NUM_IMAGES, IMAGES, views, class_counts=(70, 70, 60), class_names=CLASSES
        )
        method = kind(config, backbone_of(case), data)
    set_batch_norm_scope(method, "sync")
    method.double()  # in float32, rounding turns a few ReLUs, and with them the gradient
    if case == "ebm, mcmc":
        method.buffer.samples = method.buffer.samples.half()  # type: ignore[union-attr]
    return method, config.num_views


def total(output: LossOutput) -> Tensor:
    return output.loss + (0.0 if output.adversary_loss is None else output.adversary_loss)


def train(case: str) -> Results:
    """Return the losses and gradients of three steps, and what differs between the ranks."""
    method, num_views = build(case)
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    index = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(4))[:IMAGES]
    labels = torch.arange(IMAGES) % 3
    if case != "supervised":  # which needs all of them
        labels = torch.where(torch.arange(IMAGES) % 5 < 3, labels, -1)
    found: Results = {"losses": [], "gradients": [], "own_loss": []}
    for step in range(STEPS):
        views = [images_of(100 * step + view) for view in range(num_views)]
        progress = Progress(step, 10, 2, seed=1)
        optimizer.zero_grad()
        torch.manual_seed(step)
        with one_draw_for_all_ranks():
            output = model(Batch(views, mine(index), mine(labels)), progress)
            total(output).backward()
        found["losses"].append(mean_over_ranks(total(output).detach()))
        found["own_loss"].append(total(output).detach())
        found["gradients"].append([p.grad.clone() for p in trainable if p.grad is not None])
        method.before_optimizer_step(progress)
        optimizer.step()
        method.after_optimizer_step(progress)
    if rank_and_size()[1] > 1:
        compare_ranks(state_of(method, []), step=STEPS)
    return found


def everything() -> Results:
    return {case: train(case) for case in CASES}


@pytest.fixture(scope="module")
def found(
    two_ranks: Ranks, alone: Results, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, list[Results]]]:
    """What each rank of each number of workers computed."""
    four = Ranks(tmp_path_factory.mktemp("four"), count=4)
    try:
        yield {1: [alone], 2: two_ranks(everything), 4: four(everything)}
    finally:
        four.end()


def largest(gradients: list[list[Tensor]]) -> float:
    return max(float(gradient.abs().max()) for step in gradients for gradient in step)


def difference(rank: Results, alone: Results, case: str) -> float:
    """Return the largest difference of any gradient of any step."""
    pairs = zip(rank[case]["gradients"], alone[case]["gradients"], strict=True)
    return max(
        float((mine - whole).abs().max())
        for step, expected in pairs
        for mine, whole in zip(step, expected, strict=True)
    )


def test_every_method_is_here() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(method_names())


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_worker(
    found: dict[int, list[Results]], case: str, workers: int
) -> None:
    """And weights, queues, centers, statistics and teachers are bit-equal on all ranks at the end,
    else ``train`` has raised."""
    (alone,) = found[1]
    assert largest(alone[case]["gradients"]) > 1e-4
    for rank in found[workers]:
        assert difference(rank, alone, case) <= LIMIT * max(1.0, largest(alone[case]["gradients"]))
        torch.testing.assert_close(
            torch.stack(rank[case]["losses"]),
            torch.stack(alone[case]["losses"]),
            rtol=LIMIT,
            atol=LIMIT,
        )


@pytest.mark.parametrize("case", CASES)
def test_each_rank_has_images_of_its_own(found: dict[int, list[Results]], case: str) -> None:
    """Only sums over all ranks, such as Barlow Twins', are equal on ranks whose images differ."""
    own = {float(rank[case]["own_loss"][0]) for rank in found[4]}
    assert len(own) == (1 if case in ("barlow",) else 4)


def test_table(found: dict[int, list[Results]], capsys: pytest.CaptureFixture[str]) -> None:
    """Show the table; that all ranks are equal was checked at the end of each training."""
    (alone,) = found[1]
    lines = [
        "| method | largest gradient | difference with 2 workers | with 4 |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        apart = [max(difference(rank, alone, case) for rank in found[w]) for w in WORKERS]
        size = largest(alone[case]["gradients"])
        assert max(apart) <= LIMIT * max(1.0, size)
        lines.append(f"| {case} | {size:.1g} | {apart[0]:.0e} | {apart[1]:.0e} |")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")

"""DINO.

M. Caron, H. Touvron, I. Misra, H. Jegou, J. Mairal, P. Bojanowski, A. Joulin: "Emerging Properties
in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294v2.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Duration, Idle, PositiveFloat, PositiveInt, Probability
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    SizeDefault,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import mean_over_ranks
from raysl.nn.ema import ema_update_
from raysl.nn.precision import at_least_float32
from raysl.nn.prototypes import Prototypes
from raysl.nn.schedules import cosine
from raysl.nn.vit import DropPath, VisionTransformer

NUM_LARGE = 2  # the views that the teacher sees
CIFAR_IMAGES = 50_000
IMAGENET_IMAGES = 1_281_167
IMAGES_PER_PROTOTYPE = 20
MAX_PICTURES = 8


def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    r"""Compute the cross entropy of the student's views with the teacher's other views.

    .. math::
        \min_\theta \sum_{t} \sum_{s \ne t} H(P_t, P_s), \quad
        P_t = softmax((g_t - c)/\tau_t), \quad P_s = softmax(g_s/\tau_s)

    Args:
        student: The student's outputs, one ``(N, K)`` per view, any float dtype.
        teacher: The teacher's outputs for the first views, one ``(N, K)`` per view; no gradient.
        center: c, ``(K,)`` or ``(1, K)``.
        student_temperature: > 0.
        teacher_temperature: > 0; below the student's, it sharpens.

    Returns:
        Scalar float32 >= 0 (float64 for float64), the mean over pairs of different views and over
        images. Uniform outputs give log(K).

    Raises:
        ShapeError: If the shapes do not fit, or no two views differ.

    Source: Eqs. (1) to (3) and Algorithm 1. In float32, also under autocast.
    Departs: A mean over the pairs, as in the authors' code, where Eq. (3) has a sum.
    """
    _check_outputs(student, teacher, center)
    targets = _teacher_probs(teacher, center, temperature=teacher_temperature)
    return _cross_entropy(student, targets, temperature=student_temperature)


def _check_outputs(student: Sequence[Tensor], teacher: Sequence[Tensor], center: Tensor) -> None:
    shapes = [tuple(output.shape) for output in (*student, *teacher)]
    if not student or not teacher or len(student) + len(teacher) < 3:
        given = f"{len(student)} of the student, {len(teacher)} of the teacher"
        raise ShapeError(f"no pair of different views; got {given}")
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ShapeError(f"outputs must be (N, K), the same for every view; got {shapes}")
    if tuple(center.shape) not in ((shapes[0][1],), (1, shapes[0][1])):
        allowed, actual = (shapes[0][1],), tuple(center.shape)
        raise ShapeError(f"center must be {allowed} for outputs of {shapes[0]}; got {actual}")


@torch.no_grad()
def _teacher_probs(
    teacher: Sequence[Tensor], center: Tensor, *, temperature: float
) -> list[Tensor]:
    """Center and sharpen the outputs: the student's targets, one ``(N, K)`` per view."""
    centred = (at_least_float32(output) - center for output in teacher)
    return [(output / temperature).softmax(dim=1) for output in centred]


def _cross_entropy(
    student: Sequence[Tensor], targets: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Return the mean of H(target, student) over pairs of different views and over images."""
    all_targets = torch.stack(list(targets)).sum(dim=0)
    pairs = len(student) * len(targets) - min(len(student), len(targets))
    terms = []
    for view, output in enumerate(student):
        others = [target for number, target in enumerate(targets) if number != view]
        if not others:
            continue
        target = all_targets if len(others) == len(targets) else torch.stack(others).sum(dim=0)
        with torch.autocast(output.device.type, enabled=False):
            log_probs = F.log_softmax(at_least_float32(output) / temperature, dim=1)
            terms.append(-(target * log_probs).sum(dim=1).mean())
    return torch.stack(terms).sum() / pairs


class DINOConfig(MethodConfig):
    """Settings of DINO."""

    beginnings: ClassVar[tuple[str, ...]] = ("teacher_temperature_warmup", "freeze_last_layer")
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("hidden_dim", "head_batch_norm"), {"head_layers": (1,)}),
        Idle(("warmup_teacher_temperature",), {"teacher_temperature_warmup": (0,)}),
    )
    name: Literal["dino"] = "dino"
    takes_more_views: ClassVar[bool] = True
    num_prototypes: PositiveInt | None = None
    """K, number of outputs of the head: 65,536 on ImageNet, 2,048 on CIFAR-10 (lightly's
    benchmark). null takes the power of two nearest to images / 20, which gives both, between 256
    and 65,536."""
    head_layers: Annotated[int, Field(ge=1, le=8)] = 3
    """Number of linear layers before the prototypes (appendix C)."""
    hidden_dim: PositiveInt = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: PositiveInt = 256
    """Width before the prototypes."""
    head_batch_norm: bool = False
    """Batch norm in the head; off, so that vision transformers have none at all (sec. 3.1)."""
    norm_last_layer: bool = True
    """Fix each prototype's length to 1; false learns it: better for small transformers, less stable
    (the authors' --norm_last_layer)."""
    student_temperature: PositiveFloat = 0.1
    """tau_s of Eq. (1) (sec. 3.2)."""
    teacher_temperature: PositiveFloat | None = None
    """Teacher temperature after the warm-up: 0.04 to 0.07; higher is unstable (appendix D). null
    goes from 0.04 for 50,000 images (lightly's CIFAR-10 benchmark) to 0.07 for ImageNet's (the
    authors' best runs): on few images a softer target collapses to the uniform one."""
    warmup_teacher_temperature: PositiveFloat = 0.04
    """Teacher temperature at step 0."""
    teacher_temperature_warmup: Duration = Duration(fraction=0.1)
    """Duration of the linear warm-up: the authors' 30 epochs of 300."""
    center_momentum: Probability = 0.9
    """m of Eq. (4): share of the center kept at each step."""
    ema_momentum: Probability | None = None
    """lambda at step 0, the share of the teacher kept at each step. null goes from 0.99 for 50,000
    images (lightly's CIFAR-10 benchmark) to 0.996 for ImageNet's (sec. 3.1): with few images,
    epochs are short, and a teacher that moves too slowly teaches its random initialisation. The
    authors advise a larger value, 0.9995, for ImageNet at batch 256."""
    final_ema_momentum: Probability = 1.0
    """lambda at the end, approached along half a cosine."""
    freeze_last_layer: Duration = Duration(epochs=1.0)
    """How long to freeze the prototypes at the start (the authors' --freeze_last_layer)."""
    evaluate_network: Literal["teacher", "student"] = "teacher"
    """The network to evaluate and export; the teacher is better (sec. 5.2)."""

    @property
    def norms_images(self) -> bool:
        """Whether there is batch norm in the head."""
        return self.head_batch_norm and self.head_layers > 1

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers before the prototypes."""
        return self.head_layers

    def check(self, shape: RunShape) -> None:
        """Reject views in the wrong order: the teacher sees the first two, the large ones."""
        sizes = shape.view_sizes_px
        if max(sizes) > min(sizes[:NUM_LARGE]):
            raise ConfigError(
                f"method dino shows its teacher the first {NUM_LARGE} views, which must be the "
                f"large ones; data.views makes sizes {list(sizes)}"
            )

    def size_defaults(self, data: TrainingSet) -> Mapping[str, SizeDefault]:
        """Return prototypes, teacher temperature and momentum where they are null."""
        images = data.num_images
        power = round(math.log2(max(1.0, images / IMAGES_PER_PROTOTYPE)))
        prototypes = 2 ** min(max(power, 8), 16)
        formula = (
            f"power of two nearest to {images:,} images / {IMAGES_PER_PROTOTYPE}, within 256 and "
            f"65,536 = {prototypes:,}"
        )
        defaults = {
            "num_prototypes": SizeDefault(prototypes, formula),
            "teacher_temperature": _interpolate(images, 0.04, 0.07),
            "ema_momentum": _interpolate(images, 0.99, 0.996),
        }
        return {name: defaults[name] for name in defaults if getattr(self, name) is None}


def _interpolate(images: int, small: float, large: float) -> SizeDefault:
    """Interpolate between CIFAR's and ImageNet's value, in the log of the number of images."""
    share = math.log(max(images, 1) / CIFAR_IMAGES) / math.log(IMAGENET_IMAGES / CIFAR_IMAGES)
    value = round(small + (large - small) * min(max(share, 0.0), 1.0), 4)
    return SizeDefault(
        value,
        f"{small} up to {CIFAR_IMAGES:,} images, {large} from {IMAGENET_IMAGES:,}, linear in their "
        f"logarithm between: {value} for {images:,}",
    )


class Head(nn.Module):
    """Linear layers with GELU, then unit length, then prototypes (appendix C)."""

    def __init__(self, in_dim: int, config: DINOConfig, *, num_prototypes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(config.head_layers - 1):
            layers.append(nn.Linear(in_dim, config.hidden_dim))
            if config.head_batch_norm:
                layers.append(nn.BatchNorm1d(config.hidden_dim))
            layers.append(nn.GELU())
            in_dim = config.hidden_dim
        layers.append(nn.Linear(in_dim, config.bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        learn = not config.norm_last_layer
        self.last_layer = Prototypes(config.bottleneck_dim, num_prototypes, learn_length=learn)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, embed_dim)`` to ``(N, K)``."""
        return self.last_layer(F.normalize(at_least_float32(self.mlp(features)), dim=1))  # type: ignore[no-any-return]


class Network(nn.Module):
    """A backbone and its head: the student or the teacher."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return features ``(VN, embed_dim)`` and outputs ``(VN, K)``, in the order of views.

        Consecutive views of equal size pass through the backbone together.
        """
        groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-2:])]
        features = torch.cat([self.backbone(torch.cat(group)) for group in groups])
        return features, self.head(features)


class DINO(Method):
    """A student predicts, from any view, the output of its moving average for another view."""

    Config = DINOConfig
    loss_is_mean_over_images = True
    center: Tensor

    def __init__(self, config: DINOConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        settings = {name: value for name, value in config if value is not None}
        settings |= {name: each.value for name, each in config.size_defaults(data).items()}
        num_prototypes = int(settings["num_prototypes"])
        self.teacher_temperature: float = settings["teacher_temperature"]
        self.ema_momentum: float = settings["ema_momentum"]
        head = Head(backbone.embed_dim, config, num_prototypes=num_prototypes)
        self.student = Network(backbone, head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, DropPath):  # the authors' teacher has no stochastic depth
                module.prob = 0.0
        self.register_buffer("center", torch.zeros(num_prototypes))
        # Sum and number of rows in this step.
        self._teacher_outputs = (torch.zeros(num_prototypes), 0)

    @property
    def encoder(self) -> Backbone:
        """The backbone of the network to evaluate, the teacher or the student."""
        teacher = self.config.evaluate_network == "teacher"
        return self.teacher.backbone if teacher else self.student.backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The layers before the prototypes, of the network to evaluate."""
        teacher = self.config.evaluate_network == "teacher"
        return (self.teacher if teacher else self.student).head.mlp

    def temperature_at(self, progress: Progress) -> float:
        """Return the teacher's temperature at a step.

        Departs: It changes at each step, in the authors' code at each epoch.
        """
        steps = progress.in_steps(self.config.teacher_temperature_warmup)
        share = min(progress.step / steps, 1.0) if steps else 1.0
        return (
            self.config.warmup_teacher_temperature * (1 - share) + self.teacher_temperature * share
        )

    def momentum_at(self, progress: Progress) -> float:
        """Return the share of the teacher kept at a step (sec. 3.1)."""
        end = self.config.final_ema_momentum
        return cosine(progress.step, progress.total_steps, start=self.ema_momentum, end=end)

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the cross entropy of all views with the teacher's two large ones."""
        n = batch.views[0].shape[0]
        with torch.no_grad():
            teacher = self.teacher(batch.views[:NUM_LARGE])[1]
        features, student = self.student(batch.views)
        teacher_tau, student_tau = self.temperature_at(progress), self.config.student_temperature
        targets = _teacher_probs(teacher.split(n), self.center, temperature=teacher_tau)
        loss = _cross_entropy(student.split(n), targets, temperature=student_tau)
        if self.training and torch.is_grad_enabled():
            total, rows = self._teacher_outputs  # over the parts of the batch so far
            self._teacher_outputs = teacher.sum(dim=0) + total.to(teacher), rows + len(teacher)
        metrics: dict[str, Tensor] = {}
        if progress.is_logged:
            metrics = self._health(loss.detach(), torch.cat(targets)) | {
                "dino/teacher_temperature": loss.new_tensor(teacher_tau),
                "dino/ema_momentum": loss.new_tensor(self.momentum_at(progress)),
            }
        return LossOutput(loss, features[:n].detach(), metrics)

    @torch.no_grad()
    def _health(self, loss: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return metrics of both kinds of collapse: uniform targets, and a single prototype."""
        entropy = torch.special.entr(targets).sum(dim=1).mean()
        return {
            "dino/teacher_entropy": entropy,  # log(K): uniform
            "dino/student_teacher_kl": loss - entropy,
            # Between 1, one prototype for all images of this worker, and the smaller of K and 2N.
            "dino/prototypes_used": torch.special.entr(targets.mean(dim=0)).sum().exp(),
            "dino/center_norm": self.center.norm(),
        }

    def before_optimizer_step(self, progress: Progress) -> None:
        """Freeze the prototypes at first (the authors' --freeze_last_layer)."""
        if progress.step < progress.in_steps(self.config.freeze_last_layer):
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the teacher, and the center by the outputs for all workers' images (Eq. (4))."""
        ema_update_(self.teacher, self.student, momentum=self.momentum_at(progress))
        total, rows = self._teacher_outputs
        if rows:
            mean = mean_over_ranks(total / rows).to(self.center.dtype)
            self.center.lerp_(mean, 1 - self.config.center_momentum)
            self._teacher_outputs = (torch.zeros_like(mean), 0)

    @torch.no_grad()
    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Return the attention maps of the heads of the last block; none for other backbones."""
        net = self.encoder.net
        if not isinstance(net, VisionTransformer):
            return {}
        images = batch.views[0][:MAX_PICTURES].float()
        heads = net.last_attention(images).float()  # (n, heads, L)
        maps = torch.cat([heads, heads.mean(dim=1, keepdim=True)], dim=1)
        size = images.shape[-2:]
        maps = maps.unflatten(2, (size[0] // net.patch_size_px, size[1] // net.patch_size_px))
        grey = _stretch(F.interpolate(maps, size=size, mode="nearest"), images)
        columns = ("image", *(f"head {head + 1}" for head in range(heads.shape[1])), "mean")
        caption = (
            f"What the class token of the {self.config.evaluate_network} looks at in its last "
            f"block, each map from its least (dark) to its most (bright)."
        )
        return {"attention": ImageGrid(torch.cat([images[:, None], grey], 1), columns, caption)}


def _stretch(maps: Tensor, images: Tensor) -> Tensor:
    """Scale each map ``(n, maps, S, S)`` to its image's range: ``(n, maps, 3, S, S)`` grey."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    share = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    dark, bright = (x.view(-1, 1, 1, 1) for x in (images.amin((1, 2, 3)), images.amax((1, 2, 3))))
    grey = dark + (bright - dark) * share
    return grey[:, :, None].expand(-1, -1, 3, -1, -1)


METHOD = DINO

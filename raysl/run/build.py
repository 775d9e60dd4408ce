"""Build a run's method, optimizers and training loop, and write its networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from raysl.augment.pipeline import device_ops
from raysl.encoder.file import load_weights, save_encoder
from raysl.errors import RayslError
from raysl.folder.whole import disk_errors_named
from raysl.methods import load_method
from raysl.methods.base import Method, TrainingSet
from raysl.nn.backbones import build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.classifier import save_classifier, save_head
from raysl.nn.collectives import rank_and_size
from raysl.nn.depth import depth_scales
from raysl.nn.precision import bf16_slowdown_on_cpu
from raysl.optim.build import ScheduledOptimizer, Special, scheduled_optimizer
from raysl.run.recipe import Derived, RunConfig
from raysl.sources.pixels import Decoding
from raysl.sources.source import Source
from raysl.store.reading import local_copy
from raysl.track.run_folder import RunFolder
from raysl.train.batches import NumpyBatch, batch_converter, view_converter
from raysl.train.health import HealthCheck
from raysl.train.loop import Schedule, Trainer

# With bfloat16 instructions a CPU is faster than in float32; a slowdown of two is not noise.
_NOTABLE_SLOWDOWN = 2.0


def build_method(config: RunConfig[Any], data: TrainingSet, *, device: torch.device) -> Method:
    """Build the method, with weights from the run's seed or from ``backbone.weights``.

    On the device ``meta`` its tensors have shapes without values; ``backbone.weights`` is checked.

    Raises:
        DataError: If ``backbone.weights`` does not fit the backbone.
    """
    if device.type != "meta":
        torch.manual_seed(config.seed)
    with _created_on(device):
        backbone = build_backbone(config.backbone, image_size_px=config.image_size_px)
    if config.backbone.weights is not None:  # before the method, which may copy the backbone
        try:
            load_weights(backbone, config.backbone.weights)
        except RayslError as error:
            raise type(error)(f"backbone.weights: {error}") from None
    with _created_on(device):
        files = {
            name: str(local_copy(value))
            for name in config.method.files
            if (value := getattr(config.method, name)) is not None
        }
        settings = config.method.model_copy(update=files)
        method = load_method(config.method.name)(settings, backbone, data)
        set_batch_norm_scope(
            method,
            config.backbone.batch_norm,
            num_splits=config.backbone.batch_norm_splits,
            on_cuda=device.type == "cuda",
        )
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    placed: Method = method.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    return placed


class _SkipInitialisation(TorchFunctionMode):
    """Skips weight initialisation, some of which imports torch's compiler on the meta device.

    The import would take two seconds, and tensors on that device have no values to initialise.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.Tensor.normal_ or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def _created_on(device: torch.device) -> Iterator[None]:
    """Create tensors on the meta device if that is ``device``, else on CPU, to be moved later."""
    if device.type != "meta":
        yield
        return
    with device, _SkipInitialisation():
        yield


def build_optimizers(
    method: Method, config: RunConfig[Any], derived: Derived
) -> list[ScheduledOptimizer]:
    """Build the optimizer of the method and, if it has an adversary, the adversary's."""
    adversary = set() if method.adversary is None else set(method.adversary.parameters())
    sizes: dict[str, Any] = {
        "global_batch_size": config.train.global_batch_size,
        "steps_per_epoch": derived.steps_per_epoch,
        "total_steps": derived.total_steps,
    }
    parameters = [p for p in method.parameters() if p not in adversary]
    special = _special(method, config)
    optimizers = [scheduled_optimizer(parameters, config.optim, special=special, **sizes)]
    if method.adversary is not None:
        optim = config.adversary_optim or config.optim
        optimizers.append(scheduled_optimizer(method.adversary.parameters(), optim, **sizes))
    return optimizers


def _special(method: Method, config: RunConfig[Any]) -> Special:
    scales: dict[nn.Parameter, float] = {}
    if config.optim.layer_decay < 1:
        scales = depth_scales(method.encoder, config.backbone, decay=config.optim.layer_decay)
    return Special(
        constant_lr={p for module in method.constant_lr_modules for p in module.parameters()},
        unadapted={p for module in method.unadapted_modules for p in module.parameters()},
        lr_scales=scales,
    )


def precision_on(config: RunConfig[Any], device: torch.device) -> Any:
    """Return the precision of the forward pass on a device: ``fp32`` or ``bf16``."""
    if config.train.precision == "by_device":
        return "bf16" if device.type == "cuda" else "fp32"
    return config.train.precision


def precision_note(config: RunConfig[Any], *, use_gpu: bool) -> str | None:
    """Return a warning if the run uses bfloat16 on a CPU that emulates it, else None."""
    if use_gpu or config.train.precision != "bf16":
        return None
    slowdown = bf16_slowdown_on_cpu()
    if slowdown < _NOTABLE_SLOWDOWN:
        return None
    return (
        f"train.precision=bf16: this CPU has no instructions for it; a matrix product takes "
        f"{slowdown:.0f} times as long as with train.precision=fp32"
    )


def describe(config: RunConfig[Any]) -> dict[str, Any]:
    """Return the description of an encoder file: architecture, input and origin."""
    return {
        "backbone": config.backbone.model_dump(mode="json"),
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "image_size_px": config.image_size_px,
        "decoding": config.data.model_dump(mode="json", include=set(Decoding._fields)),
        "method": config.method.name,
        "run": config.name,
    }


def save_networks(folder: RunFolder, method: Method, config: RunConfig[Any]) -> None:
    """Write each network of a finished run to its own file in the run folder.

    Args:
        folder: The run folder.
        method: The trained method.
        config: The run's configuration.

    Raises:
        RunFolderError: If they cannot be written, as on a full disk.
    """
    description = describe(config)
    with disk_errors_named(folder.path):
        save_encoder(folder.encoder, method.encoder, description=description)
        if method.projection_head is not None:
            save_head(folder.projection_head, method.projection_head, description=description)
        if method.label_classifier is not None:
            save_classifier(folder.classifier, method.label_classifier, description=description)


def views_on(
    config: RunConfig[Any], *, device: torch.device
) -> Callable[[NumpyBatch], list[Tensor]]:
    """Return the function that converts a batch of a run's stream to normalised views."""
    return view_converter(
        device=device,
        mean=config.data.mean,
        std=config.data.std,
        channels_last=config.train.channels_last,
        device_ops=[device_ops(view) for view in config.data.views.views()],
    )


def schedule_of(config: RunConfig[Any], derived: Derived) -> Schedule:
    """Return when a run logs, saves and evaluates."""
    return Schedule(
        total_steps=derived.total_steps,
        steps_per_epoch=derived.steps_per_epoch,
        log_every=config.train.log_every,
        checkpoint_every=derived.checkpoint_every_steps,
        evaluate_every=derived.evaluate_every_steps,
        seed=config.seed,
    )


def build_trainer(
    config: RunConfig[Any],
    method: Method,
    optimizers: Sequence[ScheduledOptimizer],
    *,
    schedule: Schedule,
    source: Source,
    device: torch.device,
) -> Trainer:
    """Build the training loop of this rank's method."""
    labels = source.labels() if config.method.uses_labels else None
    return Trainer(
        method,
        optimizers,
        model=data_parallel(config, method, device=device),
        schedule=schedule,
        to_batch=batch_converter(views_on(config, device=device), device=device, labels=labels),
        micro_batch_size=config.train.micro_batch_size,
        precision=precision_on(config, device),
        max_grad_norm=config.optim.max_grad_norm,
        health=HealthCheck(config.health),
        check_ranks=config.health.check_ranks,
    )


def data_parallel(config: RunConfig[Any], method: Method, *, device: torch.device) -> nn.Module:
    """Return the module that the loop calls: the method, wrapped in DDP on several ranks."""
    if rank_and_size()[1] == 1 or config.train.micro_batch_size is not None:
        return method  # the micro-batch step averages gradients itself
    # The method keeps buffers equal on all ranks: queues are the same, statistics are averaged.
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False)

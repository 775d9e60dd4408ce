"""Derive the settings of a fine-tuning or distillation run from a finished run.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2, sec. 3.1. ViTs are fine-tuned as MAE's ViT-Base
(K. He et al. 2021, arXiv:2111.06377v3, and the authors' FINETUNE.md). Overrides take precedence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raysl.augment.ops import Flip
from raysl.config.load import (
    apply_overrides,
    parse_override,
    validate,
    validated,
)
from raysl.encoder.file import read_description
from raysl.errors import ConfigError, DataError
from raysl.evaluate.old_keys import resolve_final
from raysl.evaluate.protocol import EvaluateConfig
from raysl.evaluate.training_source import open_training_source, seen_part
from raysl.methods import load_method
from raysl.nn.backbones import BackboneConfig
from raysl.nn.classifier import CLASSIFIER_FILE, HEAD_FILE, load_classifier, load_head
from raysl.nn.heads import count_layers
from raysl.run.cluster_config import ClusterConfig
from raysl.run.places import read_run
from raysl.run.recipe import RunConfig, drop_idle, run_from_user
from raysl.sources.belonging import named_source, without_other_source
from raysl.sources.place import absolute_config
from raysl.sources.source import DataConfig, Source
from raysl.track.results import TRAINING
from raysl.track.run_folder import RunFolder

_DEEP_HEAD = 3  # fewest layers of a projection head whose first layer SimCLR v2 fine-tunes
_FEW_LABELS, _ALL_LABELS = 0.01, 1.0
_FINETUNE_BATCH, _DISTILL_BATCH = 1024, 4096
_WARMUP_EPOCHS = 5
_VIT_OPTIM: dict[str, Any] = {
    "name": "adamw",
    "base_lr": 5e-4,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "warmup": {"epochs": _WARMUP_EPOCHS},
}
# A fraction of the run, because with few labels an epoch has only a few steps.
_EVERY_QUARTER = {"fraction": 0.25}
_FINAL_KEYS = ("final", *TRAINING)  # keys of section evaluate that do not apply to a classifier


class RunOrigin(NamedTuple):
    """A finished or planned run from which another run starts."""

    name: str
    folder: Path | str
    """Its path, or its address in a store."""
    weights: Path | str
    """Value of ``backbone.weights`` in the next run."""
    head_layers: int
    """Number of layers of the projection head in the folder; 0 without a head."""
    values: dict[str, Any]
    """Settings that the next run inherits."""
    finetuned_pool: str | None = None
    """Value of ``backbone.pool`` if the whole encoder is trained; None keeps the run's value."""


def finetune_values(origin: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a run that fine-tunes a pretrained encoder on labels.

    Args:
        origin: A run folder or an encoder file. If the file is outside a run folder, the overrides
            must name the images (``data.source``).
        overrides: ``section.key=value`` of the new run.

    Returns:
        Plain values of a ``RunConfig`` with method ``supervised``; see :func:`finetune_from`.

    Raises:
        DataError: If there is no encoder, or the images have no labels.
        ConfigError: If an override is wrong.
    """
    folder = (origin if origin.is_dir() else origin.parent).resolve()
    weights = folder / "encoder.safetensors" if origin.is_dir() else origin.resolve()
    if not weights.exists():
        raise DataError(
            f"{origin}: neither a finished run nor an encoder file; give a run folder that "
            f"contains encoder.safetensors, or such a file"
        )
    head = folder / HEAD_FILE
    layers = count_layers(load_head(head)) if head.exists() else 0
    config = RunFolder(folder).config
    if config.exists():
        run = read_run(RunFolder(folder))
        return finetune_from(_origin_from_run(run, folder, weights, layers), overrides)
    return finetune_from(_origin_from_file(folder, weights, layers), overrides)


def finetune_from(
    origin: RunOrigin, overrides: Sequence[str], *, whole: Source | None = None
) -> dict[str, Any]:
    """Return the settings that fine-tune the encoder of ``origin``, which may not exist yet.

    Settings that are not overridden are SimCLR v2's: one crop and flip; LARS with a learning rate
    of 0.005 sqrt(B) (0.002 for wide networks and selective kernels), no weight decay, no warm-up;
    batches of 1,024 images, or of all if there are fewer; 60 epochs with 1 % of the labels, else
    30; with a fraction of the labels, fine-tuning starts from the first layer of a head of three.
    A ViT has MAE's settings without RandAugment and random erasing. If MAE pretrained it, its
    features are the mean of its patches, through a new norm; a frozen one keeps the class token, as
    in the authors' linear probing (their FINETUNE.md).

    Args:
        origin: The run to start from.
        overrides: ``section.key=value`` of the new run.
        whole: All images of the new run, if already open; None opens them.
    """
    values = _on_images_of(origin, overrides)
    values["method"] = {"name": "supervised"}
    if origin.head_layers:
        values["method"]["head"] = str(origin.folder)
    values["backbone"]["weights"] = str(origin.weights)
    values["data"]["labels"] = {"fraction": _ALL_LABELS, "seed": 0, "only": True}
    values = resolve_final(apply_overrides(values, overrides))
    labels = values["data"].get("labels")
    fraction = labels.get("fraction", _ALL_LABELS) if isinstance(labels, dict) else _ALL_LABELS
    method, backbone = values["method"], values["backbone"]
    starts_in_head = fraction < _ALL_LABELS and origin.head_layers >= _DEEP_HEAD
    if method["name"] == "supervised" and method.get("head") is not None:
        method.setdefault("head_layers", int(starts_in_head))
    if method.get("head") == str(origin.folder) and method["head_layers"] > origin.head_layers:
        raise ConfigError(
            f"method.head_layers={method['head_layers']}: the projection head in {origin.folder} "
            f"ends at layer {origin.head_layers}; use at most {origin.head_layers}"
        )
    if str(backbone.get("name")).startswith("vit_"):
        epochs, optim = 100.0, _VIT_OPTIM
        train = values.get("train") or {}
        if train.get("steps") is not None or (train.get("epochs") or epochs) <= _WARMUP_EPOCHS:
            optim = optim | {"warmup": {"fraction": _WARMUP_EPOCHS / epochs}}
        values["method"] = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0} | method
        if not _is_given(overrides, "backbone.drop_path"):
            backbone["drop_path"] = 0.1
        is_trained = not method.get("freeze_encoder", False)
        if origin.finetuned_pool and is_trained and not _is_given(overrides, "backbone.pool"):
            backbone["pool"] = origin.finetuned_pool
    else:
        epochs = 60.0 if fraction <= _FEW_LABELS else 30.0
        wide = backbone.get("width", 1) > 1 or backbone.get("selective_kernels")
        optim = _lars(0.002 if wide else 0.005)
    values["optim"] = _with_defaults(values.get("optim"), optim)
    values["train"] = _train_section(values, epochs=epochs, most=_FINETUNE_BATCH, whole=whole)
    name = _finetuned_name(origin.name, fraction, method.get("head_layers", 0))
    return {"name": name} | values


def distill_values(teacher: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a run that learns a fine-tuned teacher's predictions.

    Args:
        teacher: The run folder of the teacher.
        overrides: ``section.key=value`` of the new run.

    Returns:
        Plain values of a ``RunConfig`` with method ``distill``; see :func:`distill_from`.

    Raises:
        DataError: If the folder holds no classifier.
        ConfigError: If an override is wrong.
    """
    folder = teacher.resolve()
    config = RunFolder(folder).config
    if not (folder / CLASSIFIER_FILE).is_file() or not config.exists():
        raise DataError(
            f"{teacher}: no run with a {CLASSIFIER_FILE} in it; give the folder of a finished run "
            f"of raysl finetune, raysl distill or another run of method supervised"
        )
    load_classifier(folder)  # raises if the file is damaged, before anything starts
    run = read_run(RunFolder(folder))
    return distill_from(_origin_from_run(run, folder, folder, 0), overrides)


def distill_from(
    teacher: RunOrigin, overrides: Sequence[str], *, whole: Source | None = None
) -> dict[str, Any]:
    """Return the settings that distil a teacher into a student.

    Settings that are not overridden are SimCLR v2's: all training images without labels, one crop
    and flip; a student of the teacher's architecture from random weights (as in the authors'
    notebook) with temperature 0.1, or 1 if ``backbone`` sets another architecture; optimizer,
    schedule and batch of pretraining: LARS with a learning rate of 0.1 sqrt(B), weight decay 1e-4,
    warm-up for 5 % of the run, batches of 4,096 images, or of all if there are fewer; 400 epochs.

    Args:
        teacher: The run of the teacher.
        overrides: ``section.key=value`` of the new run.
        whole: All images of the new run, if already open; None opens them.
    """
    values = _on_images_of(teacher, overrides)
    values["backbone"]["weights"] = None
    teacher_architecture = _architecture(values["backbone"])
    values["method"] = {"name": "distill", "teacher": str(teacher.folder)}
    if isinstance(values["data"].get("labels"), dict):
        values["data"]["labels"]["only"] = False
    values = resolve_final(apply_overrides(values, overrides))
    architecture = _architecture(values["backbone"])
    values["method"].setdefault("temperature", 0.1 if architecture == teacher_architecture else 1.0)
    optim = _lars(0.1) | {"weight_decay": 1e-4, "warmup": {"fraction": 0.05}}
    values["optim"] = _with_defaults(values.get("optim"), optim)
    values["train"] = _train_section(values, epochs=400.0, most=_DISTILL_BATCH, whole=whole)
    wide = f"-{architecture['width']:g}x" if architecture["width"] != 1 else ""
    name = f"{teacher.name}-distilled" + (
        "" if architecture == teacher_architecture else f"-{architecture['name']}{wide}"
    )
    return {"name": name} | values


def run_after(values: Mapping[str, Any], overrides: Sequence[str], *, where: str) -> RunConfig[Any]:
    """Validate settings derived from another run; inherited settings without effect are dropped.

    Args:
        values: Plain values, including the overrides.
        overrides: The user's overrides; each must have an effect.
        where: Source of the values, for error messages.

    Raises:
        ConfigError: Lists every bad key at once, and every setting without effect.
    """
    given = [parse_override(override)[0] for override in overrides]
    return run_from_user(drop_idle({}, values, given), where=" ".join([where, *overrides]))


def origin_of(run: RunConfig[Any], folder: Path | str) -> RunOrigin:
    """Return a run, finished or not, as the origin of another run.

    Args:
        run: The run's configuration.
        folder: Path or address of the run folder.
    """
    layers = run.method.projection_head_layers(is_vit=run.backbone.is_vit)
    return _origin_from_run(run, folder, f"{folder}/encoder.safetensors", layers)


def finetune_data(pretrained: RunConfig[Any]) -> dict[str, Any]:
    """Return the section ``data`` of a pretraining with views for fine-tuning: one crop and flip.

    Minimal crop size and interpolation are those of pretraining. Views are flipped only if
    pretraining flipped them.
    """
    data: dict[str, Any] = pretrained.data.model_dump(mode="json")
    kinds = pretrained.data.views.views()
    largest = max(kinds, key=lambda kind: kind.size_px)
    views: dict[str, Any] = {"recipe": "finetune", "size_px": largest.size_px}
    if not any(isinstance(op, Flip) for kind in kinds for op in kind.ops):
        views["flip_prob"] = 0.0
        data["color_on"] = "cpu"  # no operation is left for the accelerator
    if largest.crop.short_side is None:
        views["min_scale"] = largest.crop.scale[0]
    resized = {"interpolation": largest.crop.interpolation, "antialias": largest.crop.antialias}
    data["views"] = views | resized
    return data


def _on_images_of(origin: RunOrigin, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the inherited settings, without those of the images if overrides name other images."""
    values, _ = without_other_source(
        origin.values,
        source=named_source(overrides, "data.source"),
        test_source=named_source(overrides, "evaluate.source"),
    )
    return values


def _origin_from_run(
    run: RunConfig[Any], folder: Path | str, weights: Path | str, head_layers: int
) -> RunOrigin:
    values = run.model_dump(mode="json", exclude={"name", "adversary_optim", "optim", "train"})
    values |= {
        "data": finetune_data(run),
        "evaluate": {k: v for k, v in values["evaluate"].items() if k not in _FINAL_KEYS}
        | {"every": _EVERY_QUARTER},
        "track": values["track"] | {"registered_model": None},
        "train": {"precision": run.train.precision, "channels_last": run.train.channels_last},
        "output_dir": str(folder).rpartition("/")[0],
    }
    return RunOrigin(run.name, folder, weights, head_layers, values, run.method.finetuned_pool)


def _origin_from_file(folder: Path, weights: Path, head_layers: int) -> RunOrigin:
    """Return the origin for an encoder file without a run, from the file's header alone."""
    description = read_description(weights)
    data: dict[str, Any] = {
        "views": {"recipe": "finetune", "size_px": description["image_size_px"]}
    }
    data |= {key: description[key] for key in ("mean", "std") if key in description}
    values = {
        "data": data,
        "backbone": dict(description.get("backbone") or {}),
        "evaluate": {"every": _EVERY_QUARTER},
    }
    return RunOrigin(weights.stem, folder, weights, head_layers, values)


def _train_section(
    values: Mapping[str, Any], *, epochs: float, most: int, whole: Source | None
) -> dict[str, Any]:
    """Return the section ``train`` with a batch size of at most the number of images."""
    train: dict[str, Any] = {"checkpoint_every": _EVERY_QUARTER} | dict(values.get("train") or {})
    if train.get("steps") is None:
        train.setdefault("epochs", epochs)
    if "global_batch_size" not in train:
        num_images = _num_images(values, whole, otherwise=most)
        cluster = validated(ClusterConfig, values.get("cluster") or {})
        # All problems are reported when the whole run is validated.
        multiple = 1 if isinstance(cluster, list) else cluster.batch_multiple
        train["global_batch_size"] = max(1, min(most, num_images) // multiple) * multiple
    return train


def _num_images(values: Mapping[str, Any], whole: Source | None, *, otherwise: int) -> int:
    """Return the number of training images, or ``otherwise`` if the settings are not valid."""
    section = values["data"]
    if "source" not in section:
        raise ConfigError(
            "data.source: this encoder is not in a run folder, which would name its training "
            "images; set data.source=... to labelled images"
        )
    kind = load_method(str(values["method"]["name"])).Config
    data = validated(DataConfig, section)
    evaluate = validated(EvaluateConfig, values.get("evaluate") or {})
    method = validated(kind, values["method"])
    if isinstance(data, list) or isinstance(evaluate, list) or isinstance(method, list):
        return otherwise  # all problems are reported when the whole run is validated
    if whole is None:
        source = open_training_source(absolute_config(data), absolute_config(evaluate), method)
    else:
        source = seen_part(whole, data, evaluate, method)
    return int(source.group_sizes.sum())


def _lars(per_root: float) -> dict[str, Any]:
    """Return SimCLR v2's LARS with a rate of ``per_root`` sqrt(B); ``base_lr`` is for B = 256."""
    return {
        "name": "lars",
        "base_lr": per_root * 16,
        "lr_scaling": "sqrt",
        "weight_decay": 0.0,
    }


def _with_defaults(given: Mapping[str, Any] | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with defaults filled in, unless it names another optimizer."""
    given = dict(given or {})
    return {**default, **given} if given.get("name", default["name"]) == default["name"] else given


def _is_given(overrides: Sequence[str], key: str) -> bool:
    section = key.partition(".")[0]
    return any(override.partition("=")[0] in (key, section) for override in overrides)


def _architecture(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a backbone that define its network, without those of training."""
    section = validate(BackboneConfig, backbone, where="backbone").model_dump(mode="json")
    training = ("weights", "drop_path", "batch_norm", "batch_norm_splits")
    return {key: value for key, value in section.items() if key not in training}


def _finetuned_name(name: str, fraction: float, head_layers: int) -> str:
    labels = "" if fraction == 1 else f"-{100 * fraction:g}percent"
    return f"{name}-finetuned{labels}" + (f"-layer{head_layers}" if head_layers else "")

"""From a finished run to the next one: the settings to fine-tune or to distil it with.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2, sec. 3.1. ViTs are fine-tuned as MAE's (K. He
et al. 2021, arXiv:2111.06377v3, appendix A.1, table 9). Overrides win over all of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.augment.ops import Flip
from raysl.config.load import apply_overrides, read_mapping, validate
from raysl.encoder import read_description
from raysl.errors import ConfigError, DataError
from raysl.evaluate.protocol import EvaluateConfig
from raysl.evaluate.training_source import open_training_source
from raysl.methods import load_method
from raysl.nn.backbones import BackboneConfig
from raysl.nn.classifier import CLASSIFIER_FILE, HEAD_FILE, load_classifier, load_head
from raysl.nn.heads import count_layers
from raysl.recipe import RunConfig, run_from_values
from raysl.sources.source import DataConfig
from raysl.track.run_folder import RunFolder

_DEEP_HEAD = 3  # layers from which on version 2 keeps the first one
_FEW_LABELS, _LABELS = 0.01, 1.0
_FINETUNE_BATCH, _DISTILL_BATCH = 1024, 4096
# Shares of a run: few labels make epochs of a few steps.
_PACE = {"fraction": 0.25}


def finetune_values(origin: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a run that fine-tunes a pretrained encoder on labels.

    Args:
        origin: A run folder, or an encoder file; of one that lies in no run folder the images have
            to be among the overrides (``data.source``).
        overrides: ``section.key=value``, of the new run.

    Returns:
        Plain values of a ``RunConfig`` with method ``supervised``. What overrides leave open is
        SimCLR v2's: one crop and flip; LARS of 0.005 sqrt(B) (0.002 for wide networks and selective
        kernels), no weight decay, no warm-up; 1,024 images, or all if they are fewer; 60 epochs of
        1 % of the labels, else 30; with part of the labels, the first layer of a head of three.

    Raises:
        DataError: If there is no encoder, or the images have no labels.
        ConfigError: If an override is wrong.
    """
    folder, values = _origin(origin)
    values["method"] = {"name": "supervised"}
    head = folder / HEAD_FILE
    if head.exists():
        values["method"]["head"] = str(folder)
    values["backbone"]["weights"] = str(origin.resolve() if origin.is_file() else folder)
    values["data"]["labels"] = {"fraction": _LABELS, "seed": 0, "only": True}
    name = values.pop("name")
    values = apply_overrides(values, overrides)
    fraction = (values["data"].get("labels") or {}).get("fraction", _LABELS)
    method = values["method"]
    if method["name"] == "supervised" and "head_layers" not in method:
        few = fraction < 1 and head.exists() and count_layers(load_head(head)) >= _DEEP_HEAD
        method["head_layers"] = int(few)
    wide = values["backbone"].get("width", 1) > 1 or values["backbone"].get("selective_kernels")
    is_vit = str(values["backbone"].get("name")).startswith("vit_")
    epochs = 100.0 if is_vit else 60.0 if fraction <= _FEW_LABELS else 30.0
    values["optim"] = _with_defaults(
        values.get("optim"), _vit_optim() if is_vit else _lars(0.002 if wide else 0.005)
    )
    if is_vit:
        values["method"] = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0} | method
        if not _is_given(overrides, "backbone.drop_path"):
            values["backbone"]["drop_path"] = 0.1
    values["train"] = _trained(values, epochs=epochs, most=_FINETUNE_BATCH)
    values.setdefault("name", _finetuned_name(name, fraction, method.get("head_layers", 0)))
    return values


def distill_values(teacher: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a run that learns a fine-tuned teacher's predictions.

    Args:
        teacher: The run folder of the teacher.
        overrides: ``section.key=value``, of the new run.

    Returns:
        Plain values of a ``RunConfig`` with method ``distill``. What overrides leave open is SimCLR
        v2's: all training images without labels, one crop and flip; a student of the teacher's
        architecture from random weights (the paper names none other, and the authors' notebook
        starts so) with temperature 0.1, or 1 where ``backbone`` makes it another; optimizer,
        schedule and batch of pretraining: LARS of 0.1 sqrt(B), weight decay 1e-4, warm-up for 5 %
        of the run, 4,096 images, or all if they are fewer; 400 epochs.

    Raises:
        DataError: If the folder holds no classifier.
        ConfigError: If an override is wrong.
    """
    if not (teacher / CLASSIFIER_FILE).is_file():
        raise DataError(
            f"{teacher}: no {CLASSIFIER_FILE} in it; give the folder of a finished run of raysl "
            f"finetune, raysl distill or another run of method supervised"
        )
    folder, values = _origin(teacher)
    load_classifier(folder)  # a damaged file is told before anything starts
    values["backbone"]["weights"] = None
    architecture = dict(values["backbone"])
    values["method"] = {"name": "distill", "teacher": str(folder)}
    labels = values["data"].get("labels")
    values["data"]["labels"] = None if labels is None else labels | {"only": False}
    name = values.pop("name")
    values = apply_overrides(values, overrides)
    ours = _architecture(values["backbone"])
    same = ours == _architecture(architecture)
    values["method"].setdefault("temperature", 0.1 if same else 1.0)
    warmup = {"weight_decay": 1e-4, "warmup": {"fraction": 0.05}}
    values["optim"] = _with_defaults(values.get("optim"), _lars(0.1) | warmup)
    values["train"] = _trained(values, epochs=400.0, most=_DISTILL_BATCH)
    values.setdefault("name", f"{name}-distilled" + ("" if same else f"-{ours['name']}"))
    return values


def finetune_data(pretrained: RunConfig[Any]) -> dict[str, Any]:
    """Return the images of a pretraining with the views to fine-tune on: one crop and flip.

    Crops are as small as in pretraining, and mirrored only if they were there.
    """
    data: dict[str, Any] = pretrained.data.model_dump(mode="json")
    kinds = pretrained.data.views.views()
    largest = max(kinds, key=lambda kind: kind.size_px)
    views: dict[str, Any] = {"recipe": "finetune", "size_px": largest.size_px}
    if not any(isinstance(op, Flip) for kind in kinds for op in kind.ops):
        views["flip_prob"] = 0.0
    if largest.crop.short_side is None:
        views["min_scale"] = largest.crop.scale[0]
    data["views"] = views | {"antialias": largest.crop.antialias}
    return data


def _origin(origin: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a pretrained encoder and what the next run takes over from there."""
    folder = (origin if origin.is_dir() else origin.parent).resolve()
    config = RunFolder(folder).config
    if not (origin / "encoder.safetensors" if origin.is_dir() else origin).exists():
        raise DataError(
            f"{origin}: no finished run and no encoder file; give a run folder that holds "
            f"encoder.safetensors, or such a file"
        )
    if config.exists():
        run = run_from_values(read_mapping(config), where=str(config))
        values = run.model_dump(mode="json", exclude={"adversary_optim", "optim", "train"})
        evaluate = values["evaluate"] | {"finetune": None, "every": _PACE}
        track = values["track"] | {"registered_model": None}
        return folder, values | {
            "data": finetune_data(run),
            "evaluate": evaluate,
            "track": track,
            "train": {"precision": run.train.precision, "channels_last": run.train.channels_last},
            "output_dir": str(folder.parent),
        }
    known = read_description(origin)
    data: dict[str, Any] = {"views": {"recipe": "finetune", "size_px": known["image_size_px"]}}
    data |= {key: known[key] for key in ("mean", "std") if key in known}
    return folder, {
        "name": origin.stem,
        "data": data,
        "backbone": dict(known.get("backbone") or {}),
        "evaluate": {"every": _PACE},
    }


def _trained(values: Mapping[str, Any], *, epochs: float, most: int) -> dict[str, Any]:
    """Return the section ``train``, with a batch that is not larger than the source."""
    train: dict[str, Any] = {"checkpoint_every": _PACE} | dict(values.get("train") or {})
    if train.get("steps") is None:
        train.setdefault("epochs", epochs)
    if "global_batch_size" not in train:
        num_images = _num_images(values)
        workers = max(1, (values.get("cluster") or {}).get("num_train_workers", 1))
        train["global_batch_size"] = max(1, min(most, num_images) // workers) * workers
    return train


def _num_images(values: Mapping[str, Any]) -> int:
    """Count the images that a run would be trained on."""
    section = values["data"]
    if "source" not in section:
        raise ConfigError(
            "data.source: this encoder lies in no run folder, so it is not known on which images "
            "it is to be trained; give data.source=... with labels"
        )
    kind = load_method(str(values["method"]["name"])).Config
    source = open_training_source(
        validate(DataConfig, section, where="data"),
        validate(EvaluateConfig, values.get("evaluate") or {}, where="evaluate"),
        validate(kind, values["method"], where="method"),
    )
    return int(source.group_sizes.sum())


def _lars(per_root: float) -> dict[str, Any]:
    """SimCLR v2's LARS: so much times the root of the batch; raysl's rates are for 256 images."""
    return {
        "name": "lars",
        "base_lr": per_root * 16,
        "lr_scaling": "sqrt",
        "weight_decay": 0.0,
    }


def _vit_optim() -> dict[str, Any]:
    """MAE's fine-tuning of ViT-Base, but for RandAugment and random erasing."""
    return {
        "name": "adamw",
        "base_lr": 5e-4,
        "weight_decay": 0.05,
        "layer_decay": 0.65,
        "warmup": {"epochs": 5},
    }


def _with_defaults(given: Mapping[str, Any] | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a section up; defaults of one optimizer are none for another."""
    given = dict(given or {})
    return {**default, **given} if given.get("name", default["name"]) == default["name"] else given


def _is_given(overrides: Sequence[str], key: str) -> bool:
    section = key.partition(".")[0]
    return any(override.partition("=")[0] in (key, section) for override in overrides)


def _architecture(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two encoders the same network, whatever they are trained with."""
    section = validate(BackboneConfig, backbone, where="backbone").model_dump(mode="json")
    training = ("weights", "drop_path", "batch_norm", "batch_norm_splits")
    return {key: value for key, value in section.items() if key not in training}


def _finetuned_name(name: str, fraction: float, head_layers: int) -> str:
    labels = "" if fraction == 1 else f"-{100 * fraction:g}percent"
    return f"{name}-finetuned{labels}" + (f"-layer{head_layers}" if head_layers else "")

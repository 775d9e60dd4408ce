"""Export files that torchvision, timm and Hugging Face's transformers load."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from raysl.encoder.convnext import timm_name
from raysl.errors import ConfigError
from raysl.exchange.exportable import Exportable, refuse_logits
from raysl.exchange.library_lines import Library, library_lines, plain_problem, timm_call
from raysl.nn.backbones import timm_library

Run = Callable[[Tensor], Tensor]

_FIRST_CONV = {"resnet": "conv1", "vit": "patch_embed.proj", "convnext": "stem.0"}
_CLASSIFIER = {"resnet": "fc", "vit": "head", "convnext": "head.fc"}
WEIGHTS = "model.safetensors"
"""Name of the weight file in a Hugging Face folder."""


def write_plain(exportable: Exportable, path: Path, library: Library) -> None:
    """Write the tensors of an encoder under a library's names.

    Raises:
        ConfigError: If the library has no class for the encoder, or the network is a classifier.
    """
    refuse_logits(exportable, library)
    problem = plain_problem(exportable.config, library)
    if problem is not None:
        raise ConfigError(f"--format {library}: {problem}")
    path.write_bytes(_weights(exportable, library))


def open_plain(exportable: Exportable, path: Path, library: Library) -> Run:
    """Load a file by running the Python lines that users are shown.

    Raises:
        ConfigError: If timm is not installed.
    """
    if library == "timm":
        timm_library()
    lines = library_lines(
        exportable.config, library, image_size_px=exportable.size_px, file=str(path)
    )
    variables: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec("\n".join(lines), variables)
    return variables["model"]  # type: ignore[no-any-return]


def write_huggingface(exportable: Exportable, folder: Path) -> None:
    """Write a folder for timm and transformers, with a model card.

    Raises:
        ConfigError: If timm has no class for the encoder that a config.json can describe, or is not
            installed, or if the network is a classifier.
    """
    refuse_logits(exportable, "huggingface")
    timm_library()
    config = exportable.config
    problem = plain_problem(config, "timm")
    if config.family == "torchvision":
        problem = f"timm has no {config.name} with these names; use --format torchvision"
    elif problem is None and config.family == "resnet" and config.stem != "imagenet":
        problem = (
            f"neither timm nor transformers has an option for the stem {config.stem}; use --format "
            "torchvision or timm, whose lines replace it, or onnx"
        )
    if problem is not None:
        raise ConfigError(f"--format huggingface: {problem}")
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(_weights(exportable, "timm"))
    values = _timm_config(exportable)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_model_card(exportable), encoding="utf-8")


def open_huggingface(folder: Path) -> Run:
    """Load a folder as timm does."""
    model: torch.nn.Module = timm_library().create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _weights(exportable: Exportable, library: Library) -> bytes:
    """Return a safetensors file for torch, with raysl's description in its header."""
    state = exportable.backbone.net.state_dict()
    if library == "timm" and exportable.config.family == "convnext":
        state = {
            timm_name(name): value.flatten() if name.endswith("layer_scale") else value
            for name, value in state.items()
        }
    tensors = {name: value.contiguous() for name, value in state.items()}
    # Readers require the entry "format": it says that torch wrote the tensors.
    header = {"format": "pt", "raysl": json.dumps(exportable.description)}
    return save(tensors, metadata=header)


def _timm_config(exportable: Exportable) -> dict[str, Any]:
    """Return the content of timm's config.json."""
    config, size = exportable.config, exportable.size_px
    call = timm_call(config, size)
    family: str = config.family
    pretrained: dict[str, Any] = {}
    if family == "timm":
        timm_values = getattr(exportable.backbone.net, "pretrained_cfg", {})
        pretrained = {
            key: timm_values.get(key) for key in ("first_conv", "classifier", "pool_size")
        }
    global_pool = {"cls": "token"}.get(config.pool, "avg") if family == "vit" else "avg"
    pretrained |= {
        "tag": "raysl",
        "custom_load": False,
        "input_size": [3, size, size],
        # If true, timm builds position embeddings for this size; convolutional networks have none.
        "fixed_input_size": "img_size" in call.options,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": exportable.mean,
        "std": exportable.std,
        "num_classes": 0,
    }
    if family in _FIRST_CONV:
        pretrained |= {"first_conv": _FIRST_CONV[family], "classifier": _CLASSIFIER[family]}
        pretrained |= {"pool_size": None}
    values = {
        "architecture": call.architecture,
        "num_classes": 0,
        "num_features": exportable.width,
        "model_args": call.options,
        "pretrained_cfg": pretrained,
    }
    return values if family == "timm" else {**values, "global_pool": global_pool}


def _model_card(exportable: Exportable) -> str:
    description = exportable.description
    method = description.get("method")
    how = f"pretrained without labels by {method}" if method else "pretrained without labels"
    imported = description.get("imported")
    if isinstance(imported, dict):
        how = f"imported from `{imported.get('file')}` ({imported.get('layout')})"
    run = f", run `{description['run']}`" if "run" in description else ""
    lines = [
        *("---", "library_name: timm", "tags:", "- image-feature-extraction", "- timm"),
        *("- transformers", "- self-supervised", "---"),
        f"# {exportable.config.name}, {exportable.width} features",
        "",
        f"An image encoder, {how} with raysl{run}. It takes RGB images of {exportable.size_px} px "
        f"in [0, 1], minus the mean {_numbers(exportable.mean)}, divided by the standard "
        f"deviation {_numbers(exportable.std)}.",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:PATH", pretrained=True).eval()',
        f"features = model(images)  # (N, {exportable.width})",
        "```",
        "",
        "```python",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'processor, model = AutoImageProcessor.from_pretrained("PATH"), '
        'AutoModel.from_pretrained("PATH")',
        'features = model(**processor(image, return_tensors="pt")).pooler_output',
        "```",
        "",
        "`raysl import PATH` converts it back to an encoder file of raysl.",
        "",
    ]
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"

"""`raysl export`: write an encoder in other formats, and verify each copy."""

import argparse
import difflib
import shlex
import time
from pathlib import Path
from typing import Any

from raysl.config.help_text import settings_text
from raysl.config.load import apply_overrides, validate
from raysl.errors import ConfigError, ExportError, RayslError
from raysl.exchange.export import FORMATS, ExportConfig, Exported, export
from raysl.exchange.exportable import Exportable, largest_difference, open_exportable
from raysl.folder.address import is_address, path_or_address
from raysl.report.terminal import console, mapping_table, print_json, say
from raysl.run.environment import packages
from raysl.track.mlflow_record import TrackedRun, read_tracked_run
from raysl.track.run_folder import RunFolder
from raysl.track.uri import same_store, tracking_uri, without_password

_MLFLOW = "mlflow"
_NAMES = (*FORMATS, _MLFLOW)
_MIB = 1 << 20

_EPILOG = """\
The formats:
  torchvision   safetensors for torchvision's classes: ResNet, ConvNeXt, torchvision:NAME
  timm          safetensors for timm's classes: ResNet, ViT, ConvNeXt, timm:NAME
  onnx          one file for any batch size; mean and std in its metadata (pip install raysl[onnx])
  torchscript   a traced program for libtorch and mobile devices; deprecated by torch
  torch_export  a program of torch.export for any batch size
  huggingface   a folder that timm and transformers open, with a model card
  mlflow        a new version of a registered model, linked to the run that trained it

A classifier.safetensors of `raysl finetune` gives logits; it can be written in all formats but
torchvision, timm and huggingface.

All formats take normalised float32 images (N, 3, S, S). Each copy is written under a temporary
name, loaded as its users load it, and compared with the encoder on random images in several batch
sizes; only then does it replace an earlier export.

The settings:
{settings}

  raysl export runs/mine --format onnx
  raysl export runs/mine --format timm,torch_export,huggingface -o for_the_team
  raysl export encoder.safetensors --format onnx -o photos.onnx
  raysl export runs/mine --format mlflow --name photos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(settings=settings_text(ExportConfig))
    parser.add_argument(
        "encoder",
        type=path_or_address,
        help="a run folder or its address in a store, its encoder.safetensors, or its "
        "classifier.safetensors",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, typed as YAML")
    parser.add_argument(
        "--format",
        action="append",
        required=True,
        metavar="NAME[,NAME]",
        help=f"one or more of {', '.join(_NAMES)}",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="folder for the exports (default: exports beside the encoder); for a single format "
        "also the path of the file, or of the folder for huggingface",
    )
    parser.add_argument("--name", help="name of the registered model, for --format mlflow")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Export to every requested format.

    Raises:
        ConfigError: If a format, a path or a setting is wrong.
        ExportError: If a format could not be written; the other formats are written.
    """
    names = _formats(arguments)
    config = validate(ExportConfig, apply_overrides({}, arguments.overrides), where="raysl export")
    if is_address(arguments.encoder) and arguments.output is None:
        raise ConfigError(f"{arguments.encoder}: give a folder for the exports: -o FOLDER")
    exportable = open_exportable(arguments.encoder)
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for name in names:
        say(f"{name}: writing and verifying")
        began = time.monotonic()
        try:
            if name == _MLFLOW:
                results[name] = _register(exportable, arguments, config)
            else:
                path = _path(exportable, arguments.output, name, alone=len(names) == 1)
                results[name] = _values(export(exportable, name, path, config))
        except RayslError as error:
            if len(names) == 1:
                raise
            failed.append(f"{type(error).__name__}: {error}")
            continue
        results[name]["seconds"] = time.monotonic() - began
        _say(name, results[name])
    if arguments.json:
        print_json({"encoder": str(exportable.path), "exports": results, "failed": failed})
    if failed:
        text = f"{len(results)} of {len(names)} formats were written; the others failed:"
        raise ExportError("\n  ".join([text, *failed]))
    return 0


def _formats(arguments: argparse.Namespace) -> list[str]:
    names = [name for text in arguments.format for name in text.split(",") if name]
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        near = difflib.get_close_matches(unknown[0], _NAMES, n=1) if unknown else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--format {', '.join(unknown)}: known are {', '.join(_NAMES)}{hint}")
    if (_MLFLOW in names) != (arguments.name is not None):
        raise ConfigError("--format mlflow and --name NAME_IN_THE_REGISTRY go together")
    return list(dict.fromkeys(names))


def _path(exportable: Exportable, output: Path | None, name: str, *, alone: bool) -> Path:
    """Return the path of a format's file or folder."""
    file_name = FORMATS[name].file
    if exportable.output == "logits":
        file_name = file_name.replace("encoder", "classifier")
    if output is None:
        return exportable.path.parent.absolute() / "exports" / file_name
    suffix = Path(file_name).suffix
    if alone and not suffix:
        return output.absolute()
    if alone and output.suffix and not output.is_dir():
        if output.suffix != suffix:
            raise ConfigError(f"-o {output}: a file of --format {name} ends with {suffix}")
        return output.absolute()
    if output.is_file():
        raise ConfigError(f"-o {output} is a file; give a folder for several formats")
    return output.absolute() / file_name


def _register(
    exportable: Exportable, arguments: argparse.Namespace, config: ExportConfig
) -> dict[str, Any]:
    trained_in = read_tracked_run(RunFolder(exportable.path.parent).mlflow)
    uri, run_id = _address(trained_in, config)
    size = exportable.size_px

    def check(model: Any) -> float:
        difference = largest_difference(exportable, model)
        if difference > config.tolerance:
            raise ExportError(f"--format mlflow: the stored model differs by {difference:.2g}")
        return difference

    from raysl.track.mlflow_model import register_encoder  # noqa: PLC0415 - mlflow takes seconds

    registered = register_encoder(
        exportable.model,
        uri=uri,
        name=arguments.name,
        run_id=run_id,
        experiment=(trained_in and trained_in.experiment) or "raysl",
        size_px=size,
        embed_dim=exportable.width,
        packages=packages("torch", "torchvision"),
        check=check,
    )
    return {
        "name": registered.name,
        "version": registered.version,
        "run_id": registered.run_id,
        "tracking_uri": without_password(uri),
        "difference": registered.difference,
        "usage": [
            "import mlflow",
            "",
            f'mlflow.set_tracking_uri("{without_password(uri)}")',
            f'model = mlflow.pytorch.load_model("models:/{registered.name}/{registered.version}")',
        ],
    }


def _address(trained_in: TrackedRun | None, config: ExportConfig) -> tuple[str, str | None]:
    """Return MLflow's address, and the id of the training run if that address has it, else None."""
    configured = config.tracking_uri
    if trained_in is None:
        return tracking_uri(configured, folder=Path.cwd()), None
    address = trained_in.whole_uri if configured is None else configured
    uri = tracking_uri(address, folder=Path.cwd())
    return uri, trained_in.run_id if same_store(trained_in.uri, uri) else None


def _values(exported: Exported) -> dict[str, Any]:
    return {
        "path": str(exported.path),
        "bytes": exported.size_bytes,
        "difference": exported.difference,
        "usage": exported.usage,
    }


def _say(name: str, result: dict[str, Any]) -> None:
    summary = {
        "largest difference": f"{result['difference']:.1e} (random images, batches of 1 to 5)"
    }
    if "bytes" in result:
        summary["size"] = f"{result['bytes'] / _MIB:,.1f} MiB"
        title = f"{name}: {shlex.quote(result['path'])}"
    else:
        title = f"{name}: version {result['version']} of {result['name']}"
        summary["run"] = result["run_id"]
        summary["tracking"] = result["tracking_uri"]
    out = console()
    out.print(mapping_table(title, summary))
    out.print("\n".join(f"    {line}" for line in result["usage"]) + "\n", markup=False)

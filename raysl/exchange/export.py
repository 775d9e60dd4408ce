"""Export an encoder to other formats; each copy is verified before it gets its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from raysl.config.base import Config, PositiveFloat
from raysl.errors import ConfigError, ExportError
from raysl.exchange.exportable import Exportable, largest_difference
from raysl.exchange.graphs import (
    open_onnx,
    open_torch_export,
    open_torchscript,
    write_onnx,
    write_torch_export,
    write_torchscript,
)
from raysl.exchange.library_files import (
    WEIGHTS,
    open_huggingface,
    open_plain,
    write_huggingface,
    write_plain,
)
from raysl.exchange.library_lines import library_lines
from raysl.folder.whole import appears_whole

Run = Callable[[Tensor], Tensor]


class ExportConfig(Config):
    """The settings of an export."""

    opset: Annotated[int, Field(ge=18, le=30)] = 18
    """ONNX opset; readers must be recent enough for it."""
    tolerance: PositiveFloat = 1e-5
    """Largest allowed difference of a feature, relative to the largest feature if it is above 1."""
    tracking_uri: str | None = None
    """MLflow's address for --format mlflow; null takes the run's, else MLFLOW_TRACKING_URI, else
    sqlite:///mlflow.db."""


class Format(NamedTuple):
    """A file format to export."""

    file: str
    """File name in the folder of exports; without suffix if the export is a folder."""
    write: Callable[[Exportable, Path, ExportConfig], None]
    """Writes the file."""
    read: Callable[[Exportable, Path], Run]
    """Loads the file in the way that its users load it."""
    usage: Callable[[Exportable, Path], list[str]]
    """Returns Python lines that load the file."""


class Exported(NamedTuple):
    """A written and verified file."""

    format: str
    path: Path
    size_bytes: int
    difference: float
    """Largest difference from the encoder's outputs, on random images in several batch sizes."""
    usage: list[str]
    """Python lines that load the file."""


def _plain(library: str) -> Format:
    return Format(
        f"{library}.safetensors",
        lambda exportable, path, _: write_plain(exportable, path, library),  # type: ignore[arg-type]
        lambda exportable, path: open_plain(exportable, path, library),  # type: ignore[arg-type]
        lambda exportable, path: library_lines(
            exportable.config,
            library,  # type: ignore[arg-type]
            image_size_px=exportable.size_px,
            file=str(path),
        ),
    )


def _lines(*template: str) -> Callable[[Exportable, Path], list[str]]:
    return lambda exportable, path: [
        line.replace("PATH", str(path)).replace("OUTPUT", exportable.output) for line in template
    ]


FORMATS = {
    "torchvision": _plain("torchvision"),
    "timm": _plain("timm"),
    "onnx": Format(
        "encoder.onnx",
        lambda exportable, path, config: write_onnx(exportable, path, opset=config.opset),
        lambda _, path: open_onnx(path),
        _lines(
            *("import onnxruntime", "", 'session = onnxruntime.InferenceSession("PATH")'),
            '(OUTPUT,) = session.run(None, {"images": images})  # float32, normalised',
        ),
    ),
    "torchscript": Format(
        "encoder.torchscript.pt",
        lambda exportable, path, _: write_torchscript(exportable, path),
        lambda _, path: open_torchscript(path),
        _lines("import torch", "", 'model = torch.jit.load("PATH")', "OUTPUT = model(images)"),
    ),
    "torch_export": Format(
        "encoder.pt2",
        lambda exportable, path, _: write_torch_export(exportable, path),
        lambda _, path: open_torch_export(path),
        _lines(
            *("import torch", "", 'model = torch.export.load("PATH").module()'),
            "OUTPUT = model(images)",
        ),
    ),
    "huggingface": Format(
        "huggingface",
        lambda exportable, path, _: write_huggingface(exportable, path),
        lambda _, path: open_huggingface(path),
        _lines("import timm", "", 'model = timm.create_model("local-dir:PATH", pretrained=True)'),
    ),
}
"""The formats, by the name that ``--format`` takes."""


def export(exportable: Exportable, format_name: str, path: Path, config: ExportConfig) -> Exported:
    """Write a copy, load it as its users do, compare its outputs, and only then give it its name.

    Args:
        exportable: The network to export.
        format_name: Key of :data:`FORMATS`.
        path: File or folder to write; an existing one is kept until the new one is verified.
        config: The settings of the export.

    Raises:
        ConfigError: If the format does not support such a network, or a package is missing.
        ExportError: If the copy does not run or computes other numbers.
    """
    chosen = FORMATS[format_name]
    _check_path(path, chosen)
    with appears_whole(path) as temporary:
        chosen.write(exportable, temporary, config)
        try:
            with torch.no_grad():
                run = chosen.read(exportable, temporary)
                difference = largest_difference(exportable, run)
        except ExportError as error:
            raise ExportError(f"--format {format_name}: {error}; nothing was written") from None
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ExportError(
                f"--format {format_name}: the copy of {exportable.config.name} does not run: "
                f"{reason}; nothing was written"
            ) from None
        if difference > config.tolerance:
            raise ExportError(
                f"--format {format_name}: the copy differs by {difference:.2g}, more than "
                f"tolerance={config.tolerance:g}; nothing was written"
            )
        size = _size(temporary)
    return Exported(format_name, path, size, difference, chosen.usage(exportable, path))


def _check_path(path: Path, chosen: Format) -> None:
    """Refuse to overwrite anything but an earlier export."""
    is_folder = not Path(chosen.file).suffix
    if path.is_dir() != is_folder and path.exists():
        kind = "a file" if is_folder else "a folder"
        raise ConfigError(f"{path} is {kind}; give another path by -o")
    if is_folder and path.is_dir() and any(path.iterdir()) and not (path / WEIGHTS).exists():
        raise ConfigError(f"{path} holds files that are not an export; give another path by -o")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

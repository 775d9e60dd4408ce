"""Export programs that run without raysl and the model's code: ONNX, TorchScript, torch.export.

All accept any batch size. They contain torch's convolutions: the matrix products by which raysl
replaces some of them (:mod:`raysl.nn.convolution`) are disabled while tracing.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysl.errors import ConfigError, ExportError
from raysl.exchange.exportable import Exportable

Run = Callable[[Tensor], Tensor]

_INPUT = "images"
_MAX_BATCH = 1 << 16
_MAX_ONNX_BYTES = 2_000_000_000  # a protobuf message ends at 2 GiB; the rest is for the graph


def write_torchscript(exportable: Exportable, path: Path) -> None:
    """Trace a network into a TorchScript archive."""
    with _quiet():
        traced = torch.jit.trace(exportable.model, exportable.example(), check_trace=False)
        torch.jit.save(traced, path)


def open_torchscript(path: Path) -> Run:
    """Load a TorchScript archive."""
    with _quiet():
        return torch.jit.load(path, map_location="cpu")  # type: ignore[no-any-return]


def write_torch_export(exportable: Exportable, path: Path) -> None:
    """Write a network as a program of torch.export.

    Raises:
        ExportError: If torch cannot trace the network.
    """
    with _quiet():
        torch.export.save(_program(exportable), path)


def open_torch_export(path: Path) -> Run:
    """Load a program of torch.export."""
    with _quiet():
        return torch.export.load(path).module()


def write_onnx(exportable: Exportable, path: Path, *, opset: int) -> None:
    """Write a network as an ONNX file with one input, ``images``.

    The file's metadata holds ``mean``, ``std``, ``image_size_px``, the backbone's settings and the
    class names.

    Raises:
        ConfigError: If a package is missing, or the network is too large for an ONNX file.
        ExportError: If torch cannot trace the network.
    """
    onnx = _package("onnx")
    _package("onnxscript")
    _package("onnxruntime")
    size = sum(p.numel() * p.element_size() for p in exportable.model.state_dict().values())
    if size > _MAX_ONNX_BYTES:
        raise ConfigError(
            f"--format onnx: {size:,} bytes of weights exceed the 2 GiB of an ONNX file; use "
            "--format torch_export"
        )
    with _quiet():
        program: Any = torch.onnx.export(
            _program(exportable),
            (exportable.example(),),
            input_names=[_INPUT],
            output_names=[exportable.output],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    properties = {
        "mean": exportable.mean,
        "std": exportable.std,
        "image_size_px": exportable.size_px,
        "backbone": exportable.description.get("backbone"),
        "class_names": exportable.description.get("class_names"),
    }
    onnx.helper.set_model_props(
        model, {key: json.dumps(value) for key, value in properties.items() if value is not None}
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def open_onnx(path: Path) -> Run:
    """Load an ONNX file with onnxruntime, on the CPU."""
    runtime = _package("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (result,) = session.run(None, {_INPUT: images.numpy()})
        return torch.from_numpy(result)

    return run


def _program(exportable: Exportable) -> torch.export.ExportedProgram:
    """Return a network as a program of torch.export, for any batch size.

    Raises:
        ExportError: If torch cannot trace the network.
    """
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    try:
        return torch.export.export(
            exportable.model, (exportable.example(),), dynamic_shapes=({0: batch},)
        )
    except Exception as error:  # a user's network may raise anything in torch's compiler
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"torch.export cannot trace {exportable.config.name}: {reason}; try --format "
            "torchscript"
        ) from None


def _package(name: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the package is there, but lacks one that it needs
            raise
        raise ConfigError(f"{name} is not installed; pip install raysl[onnx]") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings about its own exporters."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)

"""Write and read checkpoints. A checkpoint folder that exists is complete."""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysl.errors import RunFolderError
from raysl.folder.whole import appears_whole, clear_unfinished, give_up_name
from raysl.track.run_folder import checkpoint_path, list_checkpoints
from raysl.train.keep import Keep

_STATE = "state.pt"
# Errors of zipfile for files that are missing, cut, or damaged in their headers.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    FileNotFoundError,
    NotImplementedError,
    RuntimeError,
)
_SHOWN = 3  # differences in an error message


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    keep: Keep,
    also: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write a checkpoint atomically, then delete old ones.

    The state goes to a temporary folder, is synced to disk, and the folder is renamed. A process
    killed at any moment, or a full disk, leaves earlier checkpoints intact.

    Args:
        folder: The run's checkpoint folder.
        state: Tensors, numbers, strings, and lists and dicts of them.
        step: Number of optimizer steps done.
        keep: Chooses the checkpoints to keep.
        also: Writes more files into the folder of the checkpoint.

    Raises:
        RunFolderError: If it cannot be written; earlier checkpoints are untouched.
    """
    final = checkpoint_path(folder, step)
    try:
        # Shared: a worker that Ray presumes dead may write the same step. An existing checkpoint
        # of this step was written before the run resumed from an earlier one.
        with appears_whole(final, shared=True, lasting=True) as temporary:
            temporary.mkdir()
            with open(temporary / _STATE, "wb") as file:
                torch.save(state, file)
            also(temporary)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        raise RunFolderError(
            f"{final}: the checkpoint cannot be written: {_reason(error)}"
        ) from None
    steps = list_checkpoints(folder)
    for old in sorted({*steps} - {*keep(steps)}):
        with contextlib.suppress(OSError):
            give_up_name(checkpoint_path(folder, old))
    clear_unfinished(folder)
    return final


def load_checkpoint(folder: Path, *, step: int, device: torch.device) -> dict[str, Any]:
    """Read the checkpoint of a step, without running any code in the file.

    Raises:
        RunFolderError: If it is damaged.
    """
    path = checkpoint_path(folder, step) / _STATE
    try:
        if problem := _damage(path):
            raise ValueError(problem)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise RunFolderError(
            f"{path}: the checkpoint is damaged: {_reason(error)}. The same command sets it aside "
            f"and resumes from the one before it"
        ) from None
    return state


def is_damaged(folder: Path, *, step: int) -> bool:
    """Return whether the checkpoint of a step is damaged."""
    return _damage(checkpoint_path(folder, step) / _STATE) is not None


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename damaged checkpoints, newest first, until one is intact; return a line about each.

    No other process may write to the folder meanwhile.

    Args:
        folder: The run's checkpoint folder.
    """
    lines = []
    for step in reversed(list_checkpoints(folder)):
        path = checkpoint_path(folder, step)
        problem = _damage(path / _STATE)
        if problem is None:
            break
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            give_up_name(aside)
        path.rename(aside)
        earlier = list_checkpoints(folder)
        follows = f"resumes from step {earlier[-1]}" if earlier else "starts over"
        lines.append(
            f"{path}: the checkpoint is damaged: {problem}. It is now in {aside.name}, and the run "
            f"{follows}"
        )
    clear_unfinished(folder)
    return lines


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``; None if it is intact.

    torch writes a checksum (CRC-32) for each tensor but, as of 2.13, does not compare it when it
    loads the file: a flipped bit becomes another weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except _DAMAGED as error:
        return _reason(error)
    return None if part is None else f"{part} does not match its checksum"


def load_state(module: nn.Module, state: Mapping[str, Any], *, owner: str) -> None:
    """Load a checkpoint's state into a module; sizes may depend on the training images.

    Args:
        module: A module of the current run.
        state: The saved ``module.state_dict()``.
        owner: Name of the module in the error message.

    Raises:
        RunFolderError: If a size differs, such as that of a memory bank with one entry per image.
    """
    current = module.state_dict()
    differences = [
        f"{name} {tuple(state[name].shape)} in the checkpoint, {tuple(value.shape)} now"
        for name, value in current.items()
        if isinstance(value, Tensor) and name in state and state[name].shape != value.shape
    ]
    if differences:
        raise RunFolderError(
            f"{owner} cannot continue with these images: its state has the size of the images that "
            f"the run began with: {'; '.join(differences[:_SHOWN])}. Restore the images, or start "
            f"anew with --fresh or another name=..."
        )
    module.load_state_dict(state)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Check that the tensors of a file fit a network, and load them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from raysl.encoder.stored import State, StoredTensor, stored
from raysl.errors import DataError

# Stored beside an encoder under the same prefix: classifiers, heads, decoders.
_BESIDE = (
    *("fc.", "head.", "heads.", "classifier.", "head_dist.", "linear.", "mask_token", "decoder_"),
    *("projection_head.", "projector.", "predictor.", "prototypes.", "pooler."),
)
# The norm of a vision transformer's tokens, and the norm of their mean.
_NORM_BEFORE, _NORM_AFTER = ("norm.weight", "norm.bias"), ("fc_norm.weight", "fc_norm.bias")
_NAMES_SHOWN = 5


def fitted(state: State, net: nn.Module, *, where: str | Path) -> dict[str, Tensor]:
    """Read the tensors that a network needs; heads beside them are left out.

    Args:
        state: Tensors of a file under the network's names.
        net: The network; not changed.
        where: The file, for messages.

    Raises:
        DataError: If tensors are missing, left over, of another shape, or not finite.
    """
    wanted = net.state_dict()
    # Files from before torch 0.4 have no batch counts, and raysl never reads the counts.
    counts = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")}
    kept = {n: v for n, v in state.items() if n in wanted or not n.startswith(_BESIDE)}
    problems = _misfits(kept, wanted, may_lack=counts)
    if problems:
        raise DataError(f"{where}: its weights do not fit the backbone: {'; '.join(problems)}")
    tensors = counts | {name: _read(value, name, where) for name, value in kept.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise DataError(f"{where}: its weights are not all finite: {name}")
    return tensors


def pooled_anew(state: State, net: nn.Module) -> State:
    """Adapt a vision transformer's tensors to a network that takes the mean before its norm.

    The file's norm of tokens does not apply to the mean of tokens: it is dropped, and the norm of
    the mean keeps the network's values. All other tensors are unchanged.

    Args:
        state: Tensors of a file under the network's names.
        net: The network; not changed.

    Source: facebookresearch/mae, main_finetune.py:252, which loads everything but ``fc_norm`` in
    this way.
    """
    wanted = net.state_dict()
    after, before = set(_NORM_AFTER), set(_NORM_BEFORE)
    if not after <= wanted.keys() or before & wanted.keys() or after & state.keys():
        return state
    kept = {name: value for name, value in state.items() if name not in before}
    return kept | {name: stored(wanted[name].detach().clone()) for name in _NORM_AFTER}


def fill(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, without checking module versions, which files do not store."""
    own = net.state_dict()
    versioned = type(own)(state)
    if hasattr(own, "_metadata"):
        versioned._metadata = own._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned)


def _read(value: StoredTensor, name: str, where: str | Path) -> Tensor:
    try:
        return value.read()
    except Exception as error:  # sizes and strides that do not match the storage
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{where}: {name} cannot be read: {reason}") from None


def _misfits(
    state: State, wanted: Mapping[str, Tensor], *, may_lack: Mapping[str, Tensor]
) -> list[str]:
    """Describe why a state dict does not fit, one phrase for each reason; empty if it fits."""
    shapes = [
        f"{name} {state[name].shape} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != tuple(wanted[name].shape)
    ]
    kinds = {
        "missing": [name for name in wanted if name not in state and name not in may_lack],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": shapes,
    }
    return [f"{what}: {_first(names)}" for what, names in kinds.items() if names]


def _first(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    examples = ", ".join(names[:_NAMES_SHOWN])
    return f"{examples} and {more} more" if more > 0 else examples

"""Check that the tensors of a file fit a network, and load them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from raysl.encoder.stored import State, StoredTensor, stored
from raysl.errors import DataError

# Parts that files store under the same prefix as the encoder: classifiers, heads, decoders.
_OTHER_PARTS = (
    *("fc.", "head.", "heads.", "classifier.", "head_dist.", "linear.", "mask_token", "decoder_"),
    *("projection_head.", "projector.", "predictor.", "prototypes.", "pooler."),
)
# The norm of a vision transformer's tokens, and the norm of their mean.
_TOKEN_NORM, _MEAN_NORM = ("norm.weight", "norm.bias"), ("fc_norm.weight", "fc_norm.bias")
_NAMES_SHOWN = 5


def fitted(state: State, net: nn.Module, *, where: str | Path) -> dict[str, Tensor]:
    """Read the tensors that a network needs; heads and classifiers are left out.

    Args:
        state: Tensors of a file under the network's names.
        net: The network; not changed.
        where: Path of the file, for messages.

    Raises:
        DataError: If tensors are missing, unexpected, of another shape, or not finite.
    """
    wanted = net.state_dict()
    # Files from before torch 0.4 lack the batch counts of norms, which raysl does not use.
    counts = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")}
    encoder = {n: v for n, v in state.items() if n in wanted or not n.startswith(_OTHER_PARTS)}
    problems = _misfits(encoder, wanted, may_lack=counts)
    if problems:
        raise DataError(f"{where}: its weights do not fit the backbone: {'; '.join(problems)}")
    tensors = counts | {name: _read(value, name, where) for name, value in encoder.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise DataError(f"{where}: its weights are not all finite: {name}")
    return tensors


def without_token_norm(state: State, net: nn.Module) -> State:
    """Adapt a vision transformer's tensors to a network that normalises the mean of the tokens.

    The file's norm of single tokens does not apply to their mean: it is dropped, and the norm of
    the mean keeps the network's values. Other tensors and other networks are unchanged.

    Args:
        state: Tensors of a file under the network's names.
        net: The network; not changed.

    Source: facebookresearch/mae, main_finetune.py:252, which loads everything but ``fc_norm`` in
    this way.
    """
    wanted = net.state_dict()
    mean_norm, token_norm = set(_MEAN_NORM), set(_TOKEN_NORM)
    if not mean_norm <= wanted.keys() or token_norm & wanted.keys() or mean_norm & state.keys():
        return state
    others = {name: value for name, value in state.items() if name not in token_norm}
    return others | {name: stored(wanted[name].detach().clone()) for name in _MEAN_NORM}


def fill(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, as if it had the network's module versions: files store none."""
    current = net.state_dict()
    versioned = type(current)(state)
    if hasattr(current, "_metadata"):
        versioned._metadata = current._metadata  # type: ignore[attr-defined]
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
    """Return one phrase for each reason why a state dict does not fit; empty if it fits."""
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
    return [f"{what}: {_examples(names)}" for what, names in kinds.items() if names]


def _examples(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    examples = ", ".join(names[:_NAMES_SHOWN])
    return f"{examples} and {more} more" if more > 0 else examples

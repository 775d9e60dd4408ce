"""Where the training codes of others keep an encoder in their files: one table, and its reader.

An encoder is found by a name that every network of its kind has (``layer1.0.conv1.weight``); what
stands before that name, together with the keys that lead to its state dict, is its address, such as
``state_dict/module.encoder_q.``. A layout says which addresses are its own, the best one first.

The facts are those of the authors' repositories: main_moco.py of moco and moco-v3, main_dino.py,
main_pretrain.py and main_finetune.py of mae, simclr.py of sthalles/SimCLR, simclr/simclr.py of
Spijkervet/SimCLR, convert.py of tonylins/simclr-converter, the checkpoints of VISSL (converted by
its extra_scripts/convert_vissl_to_torchvision.py), the examples of lightly and lightly-train.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from raysl.weights.convnext import OF_TIMM, from_timm
from raysl.weights.stored import Content, State, StoredTensor

_DEEPEST = 6
_OF_TORCHVISION = (
    "layer1.0.conv1.weight",
    "layer1.0.conv1.conv.weight",
    "features.1.0.block.0.weight",
)
_OF_VIT = ("patch_embed.proj.weight",)

# torchvision's children in an nn.Sequential, and those of lightly's ResNetGenerator, which has
# neither ReLU nor pooling among them.
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_GENERATED = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
_OF_GENERATED, _IN_SEQUENTIAL = "2.0.conv1.weight", "4.0.conv1.weight"

ANCHORS = (*_OF_TORCHVISION, *_OF_VIT, OF_TIMM, _OF_GENERATED, _IN_SEQUENTIAL)
"""Names that tell where an encoder begins."""


# torchvision's figures.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Network(NamedTuple):
    """An encoder in a file, with what stands beside it behind the same prefix."""

    address: str
    state: State
    """Under torchvision's or timm's names."""
    renamed: bool
    """Whether the file has other names for it."""


class Layout(NamedTuple):
    """How one training code writes its files."""

    name: str
    whose: str
    addresses: tuple[str, ...]
    """Regular expressions; of several networks the first one's is taken."""
    taken: tuple[str, ...]
    """What each of these addresses is called in its paper."""
    sign: Callable[[Network], bool] = lambda _: True
    """Whether a network at such an address is really of this layout."""
    num_heads: Mapping[int, int] = MappingProxyType({})
    """Attention heads by width, where they are not those of the DeiT paper."""
    positions: Literal["learned", "sincos"] = "learned"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of its training images, which no file tells."""
    std: tuple[float, float, float] = IMAGENET_STD


def _has(*names: str) -> Callable[[Network], bool]:
    return lambda network: any(name in network.state for name in names)


def _is_lightly(network: Network) -> bool:
    """Renamed children of a Sequential, or addresses that only lightly has."""
    return network.renamed or ".vit." in network.address or "wrapped_model" in network.address


_STATE = r"((state_dict|model|model_state|model_state_dict)/)?(module\.)?"
_TRAIN = r"wrapped_model\.(_model|_features)\."

LAYOUTS = (
    Layout(
        "vissl",
        "VISSL",
        (r"(.*/)?trunk/(base_model\.)?(_feature_blocks\.)?", r"(.*[/.])?_feature_blocks\."),
        ("the trunk", "the trunk"),
    ),
    Layout(
        "dino",
        "DINO (main_dino.py)",
        (r"teacher/(module\.)?(backbone\.)?", r"student/(module\.)?(backbone\.)?"),
        ("the teacher", "the student"),
    ),
    Layout(
        "moco_v3",
        "MoCo v3",
        (rf"{_STATE}base_encoder\.", rf"{_STATE}momentum_encoder\."),
        ("the base encoder", "the momentum encoder"),
        num_heads=MappingProxyType({384: 12}),  # vits.py: ViT-Small has 12, DeiT's has 6
        positions="sincos",
    ),
    Layout(
        "moco",
        "MoCo v1 and v2",
        (rf"{_STATE}encoder_q\.", rf"{_STATE}encoder_k\."),
        ("the query encoder", "the key encoder"),
    ),
    Layout(
        "mae",
        "MAE, pretrained or fine-tuned",
        (_STATE,),
        ("the encoder",),
        sign=_has("mask_token", "decoder_embed.weight", "fc_norm.weight"),
        positions="sincos",
    ),
    Layout(
        "lightly",
        "lightly and lightly-train",
        (
            rf"{_STATE}teacher_backbone\.(vit\.)?",
            rf"{_STATE}(.*\.)?teacher_embedding_model\.{_TRAIN}",
            rf"{_STATE}student_backbone\.(vit\.)?",
            rf"{_STATE}(.*\.)?student_embedding_model\.{_TRAIN}",
            rf"{_STATE}backbone\.(vit\.)?",
            rf"{_STATE}(.*\.)?(embedding_model\.)?{_TRAIN}",
            rf"{_STATE}(backbone_momentum|momentum_backbone)\.(vit\.)?",
            _STATE,
        ),
        (
            *("the teacher's backbone", "the teacher's model"),
            *("the student's backbone", "the student's model"),
            *("the backbone", "the model", "the momentum backbone", "the backbone"),
        ),
        sign=_is_lightly,
    ),
    Layout(
        "simclr",
        "PyTorch ports of SimCLR",
        (
            rf"{_STATE}backbone\.",
            rf"{_STATE}encoder\.",
            rf"{_STATE}(convnet|net|f|resnet)\.",
            _STATE,  # of tonylins' converter, if asked for: its names are torchvision's
        ),
        ("the backbone", "the encoder", "the network", "the network"),
        sign=lambda network: re.fullmatch(_STATE, network.address) is None,
        mean=(0.0, 0.0, 0.0),  # the pixels as they are, in all three
        std=(1.0, 1.0, 1.0),
    ),
    Layout(
        "torchvision",
        "torchvision's names",
        (_STATE,),
        ("the network",),
        sign=_has(*_OF_TORCHVISION),
    ),
    Layout(
        "timm",
        "timm's names, also DINO's backbones alone and Hugging Face's folders",
        (rf"{_STATE}(timm_model\.)?",),
        ("the network",),
    ),
)
"""In the order in which ``auto`` tries them: the first one that has an address of the file."""

_PLAIN = Layout("other", "none of the known ones", (r".*",), ("the network",))


class Found(NamedTuple):
    """A network, and whose layout it was found by."""

    network: Network
    layout: Layout
    taken: str
    """What is taken, in words, and of how many."""


def find_networks(content: Content, anchors: Collection[str] = ANCHORS) -> list[Network]:
    """Return every encoder in a file.

    Args:
        content: What the file holds.
        anchors: Names of which an encoder has at least one.
    """
    wanted = {*anchors}
    found = []
    for keys, state in _state_dicts(content, (), set()):
        for prefix in sorted({p for name in state for p in _prefixes(name, wanted)}):
            inner = {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }
            address = "".join(f"{key}/" for key in keys) + prefix
            plain = _renamed(inner)
            found.append(Network(address, plain, plain.keys() != inner.keys()))
            if plain.keys() != inner.keys():
                found.append(Network(address, inner, renamed=False))
    return found


def choose(networks: list[Network], layout: str = "auto") -> Found | None:
    """Return the network to take, None if a layout has none of them.

    Args:
        networks: Not empty.
        layout: Name of one of :data:`LAYOUTS`, or ``auto``.
    """
    for known in LAYOUTS:
        if layout not in ("auto", known.name):
            continue
        for address, taken in zip(known.addresses, known.taken, strict=True):
            matching = [n for n in networks if re.fullmatch(address, n.address)]
            fitting = [n for n in matching if layout != "auto" or known.sign(n)]
            if fitting:
                return Found(fitting[0], known, _said(taken, fitting[0], networks))
    if layout == "auto":
        best = max(networks, key=lambda network: len(network.state))
        return Found(best, _PLAIN, _said("the network", best, networks))
    return None


def _said(taken: str, network: Network, networks: list[Network]) -> str:
    others = sorted({n.address for n in networks} - {network.address})
    at = f"{taken} ({network.address or 'the whole file'})"
    return f"{at}; not {', '.join(other or 'the whole file' for other in others)}" if others else at


def _state_dicts(
    content: Content, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping that holds tensors, with the keys that lead to it."""
    if id(content) in seen or len(keys) > _DEEPEST:  # a pickle's mapping may hold itself
        return
    seen.add(id(content))
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if tensors:
        yield keys, tensors
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield from _state_dicts(value, (*keys, name), seen)


def _prefixes(name: str, wanted: Collection[str]) -> Iterator[str]:
    """What stands before each wanted name that this one ends with."""
    start = 0
    while start >= 0:
        if name[start:] in wanted:
            yield name[:start]
        dot = name.find(".", start)
        start = dot + 1 if dot >= 0 else -1


def _renamed(state: State) -> State:
    """An encoder under torchvision's or timm's names."""
    if OF_TIMM in state:
        return from_timm(state)
    children: dict[str, str] = {}
    if "0.weight" in state and _OF_GENERATED in state:
        children = _GENERATED
    elif "0.weight" in state and _IN_SEQUENTIAL in state:
        children = _SEQUENTIAL
    renamed = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        new = children.get(first, first) + dot + rest
        renamed[new.replace(".shortcut.", ".downsample.")] = value
    return renamed

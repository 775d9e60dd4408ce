"""A table of where other projects' training code stores an encoder.

A layout lists its addresses, the best one first, and a sign that distinguishes it from layouts with
the same addresses. It also lists what its code fixes without storing it: attention heads, the
padding of a stem, the normalisation of images.

Sources are the authors' repositories: main_moco.py, main_lincls.py and convert_to_deit.py of
moco-v3, main_moco.py of moco, main_dino.py of dino, train/train.py of dinov2, main_pretrain.py and
main_finetune.py of mae, main.py of barlowtwins, main_vicreg.py of vicreg, simsiam/builder.py,
solo/methods/base.py of solo-learn, simclr.py of sthalles/SimCLR, simclr/simclr.py of
Spijkervet/SimCLR, model.py of leftthomas/SimCLR, networks/resnet_big.py of SupContrast, convert.py
of Separius/SimCLRv2-Pytorch, the checkpoints of VISSL (converted by its
extra_scripts/convert_vissl_to_torchvision.py), the examples and benchmarks of lightly, and
lightly-train.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from raysl.encoder.dinov2_names import LAYER_SCALE_NAME
from raysl.encoder.naming import TORCHVISION_NAMES, NamingName
from raysl.encoder.normalisation import (
    CIFAR10_WITHIN_IMAGE,
    IMAGENET,
    PIXELS,
    SOLO_LEARN,
    Normalisation,
)
from raysl.encoder.positions import fixed_positions
from raysl.encoder.stored import State
from raysl.nn.vit import VIT_SIZES

ANYWHERE = r".*"
"""The address of layouts that are recognised by tensor names alone."""

_STATE = r"((state_dict|model|model_state|model_state_dict)/)?(module\.)?"
_TRAIN = r"wrapped_model\.(_model|_features)\."


class Network(NamedTuple):
    """An encoder in a file, and the other tensors of its state dict."""

    address: str
    """The keys that lead to the state dict, and the prefix of the encoder's tensors."""
    state: State
    """The encoder's tensors, under torchvision's or timm's names."""
    naming: NamingName
    """The convention of the tensor names in the file."""
    beside: State
    """The other tensors of the same state dict, with ``module.`` removed from their names."""


class Place(NamedTuple):
    """An address where a layout stores a network."""

    address: str
    """A regular expression."""
    what: str
    """The network's name in its paper."""
    sign: Callable[[Network], bool] = lambda _: True
    """Returns whether a network at such an address has this layout."""


class FileLayout(NamedTuple):
    """How a project's training code stores encoders."""

    name: str
    origin: str
    """The project, for messages."""
    places: tuple[Place, ...]
    """Where it stores networks; the first place that a file has is used."""
    fixed: Callable[[Network], Mapping[str, Any]] = lambda _: {}
    """Returns settings of :class:`BackboneConfig` that the code fixes but does not store."""
    normalisation: Callable[[Network], Normalisation] = lambda _: IMAGENET
    """Returns the normalisation of the training images."""


def _has(*names: str) -> Callable[[Network], bool]:
    """Return a sign: the network has a tensor with one of these names."""
    return lambda network: any(name in network.state for name in names)


def _has_beside(network: Network, *names: str) -> bool:
    """Return whether a tensor beside the network has one of these names or prefixes.

    Names that end with a dot are prefixes.
    """
    prefixes = tuple(name for name in names if name.endswith("."))
    return any(name in names or name.startswith(prefixes or ("\0",)) for name in network.beside)


def _is_lightly(network: Network) -> bool:
    """Recognise it by children of a Sequential, or heads or addresses that only lightly uses."""
    return (
        network.naming == "sequential"
        or ".vit." in network.address
        or "wrapped_model" in network.address
        or _has_beside(network, "projection_head.", "prediction_head.", "online_classifier.")
    )


def _is_solo_learn(network: Network) -> bool:
    """Recognise it by the linear classifier that it trains beside every method."""
    return "classifier.weight" in network.beside


def _is_mae(network: Network) -> bool:
    """Recognise it by its decoder or its norm of the mean; released files by their positions."""
    names = ("mask_token", "decoder_embed.weight", "fc_norm.weight")
    return _has(*names)(network) or fixed_positions(network.state) == "mae"


def _is_simsiam(network: Network) -> bool:
    """Recognise it by the projector in place of the classifier, and a predictor."""
    return "fc.0.weight" in network.state and _has_beside(network, "predictor.")


def _is_leftthomas(network: Network) -> bool:
    """Recognise it by children of a Sequential, and a head named g."""
    return network.naming == "sequential" and _has_beside(network, "g.")


def _is_barlow(network: Network) -> bool:
    return "bn.running_mean" in network.beside and _has_beside(network, "projector.")


def _is_vicreg(network: Network) -> bool:
    """Recognise it by a projector with norms, without predictor or classifier."""
    others = ("predictor.", "classifier.", "bn.", "momentum_")
    normalised = "projector.1.running_mean" in network.beside
    return normalised and not any(n.startswith(others) for n in network.beside)


def _is_sthalles(network: Network) -> bool:
    """Recognise it by a head of two layers without norms, inside the backbone."""
    head = {"fc.0.weight", "fc.2.weight"} <= network.state.keys()
    return head and not any(name.startswith("fc.1.") for name in network.state)


def _is_spijkervet(network: Network) -> bool:
    """Recognise it by a head without norms and biases, and no other part."""
    head = "projector.0.weight" in network.beside
    others = ("projector.1.", "projector.0.bias", "predictor.", "classifier.", "momentum_")
    return head and not any(name.startswith(others) for name in network.beside)


def _is_supcontrast(network: Network) -> bool:
    return "head.0.weight" in network.beside and _small_stem(network)


def _small_stem(network: Network) -> bool:
    stem = network.state.get("conv1.weight")
    return stem is not None and stem.shape[-1] == 3


def _width(network: Network) -> int:
    token = network.state.get("cls_token")
    return 0 if token is None else token.shape[-1]


def _deit_heads(network: Network) -> dict[str, Any]:
    """Return the number of heads as in the DeiT paper, for the sizes that DINO and MAE name."""
    heads = {size.embed_dim: size.num_heads for size in VIT_SIZES.values()}.get(_width(network))
    return {"num_heads": heads} if heads else {}


def _fixed_by_moco_v3(network: Network) -> dict[str, Any]:
    """Source: vits.py. Both sizes have 12 heads; DeiT's small size has 6."""
    if "patch_embed.proj.weight" not in network.state:
        return {}
    return {"num_heads": 12, "positions": "sincos"}


def _fixed_by_mae(network: Network) -> dict[str, Any]:
    """Source: models_mae.py, for base, large and huge; smaller models are from other projects."""
    is_named = _width(network) >= VIT_SIZES["vit_base"].embed_dim
    fixed = {} if "fc_norm.weight" in network.state else {"positions": "sincos"}
    return fixed | (_deit_heads(network) if is_named else {})


def _fixed_by_solo_learn(network: Network) -> dict[str, Any]:
    """Return what solo-learn fixes.

    Stems of 3 x 3, for CIFAR, are padded by 2. In MAE and MoCo v3, tiny and small have 12 heads.
    """
    if _small_stem(network):
        return {"stem": "cifar_padded"}
    fixed = fixed_positions(network.state)
    if fixed is None:
        return _deit_heads(network)
    heads = 12 if _width(network) < VIT_SIZES["vit_base"].embed_dim else None
    return {"positions": "sincos"} | ({"num_heads": heads} if heads else _deit_heads(network))


def _normalised_by_solo_learn(network: Network) -> Normalisation:
    """Return the normalisation of its data set, by the stem and the number of classes."""
    classes = network.beside["classifier.weight"].shape[0] if _is_solo_learn(network) else 0
    if _small_stem(network):
        return SOLO_LEARN["cifar100" if classes == 100 else "cifar10"]
    return IMAGENET


def _fixed_by_simclr_v2(network: Network) -> dict[str, Any]:
    """Source: resnet.py. Means of the shortcuts include zero padding at the edges."""
    selective = any(".squeeze." in name for name in network.state)
    return {"shortcut_edge": "zeros"} if selective else {}


LAYOUTS = (
    FileLayout(
        "vissl",
        "VISSL",
        (
            Place(r"(.*/)?trunk/(base_model\.)?(_feature_blocks\.)?", "the trunk"),
            Place(r"(.*[/.])?_feature_blocks\.", "the trunk"),
        ),
    ),
    FileLayout(
        "transformers",
        "Hugging Face's transformers: ViT, ViTMAE, DINOv2, ResNet",
        (Place(ANYWHERE, "the encoder", lambda network: network.naming == "transformers"),),
    ),
    FileLayout(
        "simclr_v2",
        "SimCLR v2, converted by Separius/SimCLRv2-Pytorch",
        (Place(ANYWHERE, "the network", lambda network: network.naming == "simclr_v2"),),
        fixed=_fixed_by_simclr_v2,
        normalisation=lambda _: PIXELS,
    ),
    FileLayout(
        "dinov2",
        "DINOv2",
        (
            Place(r"teacher/(module\.)?(backbone\.)?", "the teacher", _has(LAYER_SCALE_NAME)),
            Place(rf"{_STATE}(backbone\.)?", "the network", _has(LAYER_SCALE_NAME)),
            Place(r"student/(module\.)?(backbone\.)?", "the student", _has(LAYER_SCALE_NAME)),
        ),
    ),
    FileLayout(
        "dino",
        "DINO (main_dino.py)",
        (
            Place(r"teacher/(module\.)?(backbone\.)?", "the teacher"),
            Place(r"student/(module\.)?(backbone\.)?", "the student"),
        ),
        fixed=_deit_heads,
    ),
    FileLayout(
        "moco_v3",
        "MoCo v3, also converted or after linear training",
        (
            Place(rf"{_STATE}base_encoder\.", "the base encoder"),
            Place(
                _STATE,
                "the encoder",
                lambda network: fixed_positions(network.state) == "moco_v3",
            ),
            Place(rf"{_STATE}momentum_encoder\.", "the momentum encoder"),
        ),
        fixed=_fixed_by_moco_v3,
    ),
    FileLayout(
        "moco",
        "MoCo v1 and v2",
        (
            Place(rf"{_STATE}encoder_q\.", "the query encoder"),
            Place(rf"{_STATE}encoder_k\.", "the key encoder"),
        ),
    ),
    FileLayout(
        "mae",
        "MAE, pretrained or fine-tuned",
        (Place(_STATE, "the encoder", _is_mae),),
        fixed=_fixed_by_mae,
    ),
    FileLayout(
        "barlow",
        "Barlow Twins",
        (Place(rf"{_STATE}backbone\.", "the backbone", _is_barlow),),
    ),
    FileLayout(
        "vicreg",
        "VICReg",
        (Place(rf"{_STATE}backbone\.", "the backbone", _is_vicreg),),
    ),
    FileLayout(
        "simsiam",
        "SimSiam",
        (Place(rf"{_STATE}encoder\.", "the encoder", _is_simsiam),),
    ),
    FileLayout(
        "solo_learn",
        "solo-learn",
        (
            Place(rf"{_STATE}(backbone|encoder)\.", "the backbone", _is_solo_learn),
            Place(
                rf"{_STATE}momentum_(backbone|encoder)\.", "the momentum backbone", _is_solo_learn
            ),
        ),
        fixed=_fixed_by_solo_learn,
        normalisation=_normalised_by_solo_learn,
    ),
    FileLayout(
        "simclr_cifar",
        "SimCLR on CIFAR by leftthomas and by HobbitLong (SupContrast)",
        (
            Place(rf"{_STATE}f\.", "the network", _is_leftthomas),
            Place(rf"{_STATE}encoder\.", "the encoder", _is_supcontrast),
        ),
        fixed=lambda network: {"stem": "cifar"} if _small_stem(network) else {},
        normalisation=lambda _: CIFAR10_WITHIN_IMAGE,
    ),
    FileLayout(
        "lightly",
        "lightly and lightly-train",
        (
            Place(rf"{_STATE}backbone\.(vit\.)?", "the backbone", _is_lightly),
            Place(rf"{_STATE}teacher_backbone\.(vit\.)?", "the teacher's backbone", _is_lightly),
            Place(
                rf"{_STATE}(.*\.)?teacher_embedding_model\.{_TRAIN}",
                "the teacher's model",
                _is_lightly,
            ),
            Place(rf"{_STATE}student_backbone\.(vit\.)?", "the student's backbone", _is_lightly),
            Place(
                rf"{_STATE}(.*\.)?student_embedding_model\.{_TRAIN}",
                "the student's model",
                _is_lightly,
            ),
            Place(rf"{_STATE}(.*\.)?(embedding_model\.)?{_TRAIN}", "the model", _is_lightly),
            Place(
                rf"{_STATE}(backbone_momentum|momentum_backbone|key_backbone)\.(vit\.)?",
                "the momentum backbone",
                _is_lightly,
            ),
            Place(_STATE, "the backbone", _is_lightly),
        ),
    ),
    FileLayout(
        "simclr",
        "SimCLR by sthalles and by Spijkervet",
        (
            Place(rf"{_STATE}backbone\.", "the backbone", _is_sthalles),
            Place(rf"{_STATE}encoder\.", "the encoder", _is_spijkervet),
        ),
        normalisation=lambda _: PIXELS,  # both train on the unnormalised pixels of ToTensor
    ),
    FileLayout(
        "torchvision",
        "torchvision's names",
        (Place(_STATE, "the network", _has(*TORCHVISION_NAMES)),),
    ),
    FileLayout(
        "timm",
        "timm's names, also DINO's backbones alone and raysl's folders for Hugging Face",
        (Place(rf"{_STATE}(timm_model\.)?", "the network"),),
    ),
)
"""The known layouts, in the order in which ``auto`` tries them; the first that fits is used."""

OTHER = FileLayout("other", "an unknown layout", (Place(ANYWHERE, "the network"),))

"""Layer-wise learning rate decay: scale a parameter's rate by its depth in the encoder.

H. Bao, L. Dong, S. Piao, F. Wei: "BEiT: BERT Pre-Training of Image Transformers", 2021,
arXiv:2106.08254v2; MAE (arXiv:2111.06377v3, appendix A.1) fine-tunes with it.
"""

import re

from torch import nn

from raysl.errors import ConfigError
from raysl.nn.backbones import Backbone, BackboneConfig

_VIT_FIRST = ("patch_embed.", "cls_token", "pos_embed")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_STAGE = re.compile(r"^layer(\d)\.")
_STAGES = 4


def check_layer_decay(config: BackboneConfig, decay: float) -> None:
    """Reject layer decay for encoders whose layers have no known order.

    Raises:
        ConfigError: If it is neither a ResNet nor a vision transformer of raysl.
    """
    if decay < 1 and config.family not in ("vit", "resnet"):
        raise ConfigError(
            f"optim.layer_decay counts the blocks of a vision transformer or the stages of a "
            f"ResNet; backbone.name={config.name} is neither: set it to 1"
        )


def depth_scales(
    backbone: Backbone, config: BackboneConfig, *, decay: float
) -> dict[nn.Parameter, float]:
    """Return the factor on the learning rate of each parameter of an encoder.

    Args:
        backbone: The encoder.
        config: Its settings. A vision transformer of L blocks has L + 2 layers: patches, class
            token and positions are layer 0, blocks 1 to L, the last norm L + 1, like everything on
            top of the encoder. A ResNet has 6: its stem, four stages, and everything on top.
        decay: In (0, 1]. Layer l gets ``decay ** (last - l)``.

    Raises:
        ConfigError: If its layers have no known order.
    """
    check_layer_decay(config, decay)
    names = dict(backbone.net.named_parameters())
    if config.family == "resnet":
        last = _STAGES + 1
        layers = {name: _number(_STAGE, name, otherwise=0) for name in names}
    else:
        last = 1 + max(_number(_BLOCK, name, otherwise=-1) + 1 for name in names)
        layers = {
            name: 0
            if name.startswith(_VIT_FIRST)
            else _number(_BLOCK, name, otherwise=last - 1) + 1
            for name in names
        }
    return {parameter: decay ** (last - layers[name]) for name, parameter in names.items()}


def _number(pattern: re.Pattern[str], name: str, *, otherwise: int) -> int:
    layer = pattern.match(name)
    return int(layer.group(1)) if layer else otherwise

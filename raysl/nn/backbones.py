"""Build encoders by name: ResNets, vision transformers, ConvNeXt, torchvision, timm."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysl.config.base import Config, Idle, PositiveInt
from raysl.errors import ConfigError
from raysl.nn.batchnorm import BatchNormScope
from raysl.nn.resnet import LAYOUTS, NormName, ResNet, ShortcutEdge, Stem
from raysl.nn.vit import VIT_SIZES, Init, VisionTransformer

Family = Literal["resnet", "vit", "convnext", "torchvision", "timm"]

# The settings that only some families have; all other settings hold for all families.
_FIELDS: dict[Family, tuple[str, ...]] = {
    "resnet": (
        *("stem", "width", "selective_kernels", "shortcut_edge", "norm", "zero_init_residual"),
    ),
    "vit": (
        *("patch_size_px", "depth", "num_heads", "drop_path", "pool"),
        *("positions", "init", "norm_eps"),
    ),
    "convnext": ("drop_path",),
    "torchvision": (),
    "timm": (),
}


_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base")

NAMES = (*LAYOUTS, *VIT_SIZES, *_CONVNEXTS)
"""All built-in names; ``torchvision:`` and ``timm:`` names are not listed."""


class BackboneConfig(Config):
    """The encoder to pretrain."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("batch_norm_splits",), {"batch_norm": ("worker", "sync")}),
    )
    name: str = "resnet50"
    """resnet18 to resnet152, resnext50_32x4d, wide_resnet50_2, wide_resnet101_2; vit_tiny,
    vit_small, vit_base, vit_large, vit_huge; convnext_tiny, convnext_small, convnext_base; any
    other classifier of torchvision as torchvision:NAME, or of timm as timm:NAME (pip install
    raysl[timm])."""
    stem: Stem = "imagenet"
    """ResNets. imagenet: 7 x 7 convolution of stride 2, then max-pool, as in torchvision. cifar:
    3 x 3 of stride 1, no max-pool (SimCLR, appendix B.9), for images of 32 px or so; 10 to 16 times
    the work on the same image. cifar_padded: cifar with two pixels of zeros around the image, as in
    solo-learn. small: 3 x 3 of stride 2, no max-pool: a quarter of cifar's work."""
    width: Annotated[float, Field(ge=0.125, le=16)] = 1.0
    """ResNets: factor on all channels, rounded to multiples of 8. SimCLR v2 uses 1, 2 and 3
    (arXiv:2006.10029v2, table 1); the minimum is 0.125, with 8 channels in the first stage."""
    selective_kernels: bool = False
    """ResNets: selective kernels, ResNet-D's shortcuts and stem, as in SimCLR v2 (table 1, SK)."""
    shortcut_edge: ShortcutEdge = "inside"
    """ResNets with selective kernels: whether the pools of the shortcuts ignore pixels beyond the
    edge (inside), or count them as zeros, as in Separius/SimCLRv2-Pytorch."""
    norm: NormName = "batch"
    """ResNets. group: group norm with 32 groups. none: a learnt scale and shift for each channel,
    for energy-based models, which train without batch norm (JEM, arXiv:1912.03263v3); best with
    zero_init_residual, because nothing else limits the features."""
    zero_init_residual: bool = False
    """ResNets: start each residual branch at zero (Goyal et al. 2017, arXiv:1706.02677v2, sec.
    5.1)."""
    patch_size_px: PositiveInt = 16
    """ViT: side of a patch; must divide the side of every view."""
    depth: Annotated[int, Field(gt=0, le=200)] | None = None
    """ViT: number of blocks; null is 12, in vit_large 24, in vit_huge 32."""
    num_heads: Annotated[int, Field(gt=0, le=64)] | None = None
    """ViT: number of attention heads, a divisor of the features; null: one per 64 features, in
    vit_huge per 80. MoCo v3's small model has 12."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """ViT and ConvNeXt: stochastic depth of the last block, rising linearly from 0 in the first."""
    pool: Literal["cls", "mean", "mean_norm"] = "cls"
    """ViT: the features of an image are its class token, or the mean of its patch tokens; mean_norm
    takes the mean before the last norm, as MAE does in fine-tuning. If the loaded weights have that
    norm before the mean, it is reinitialised."""
    positions: Literal["learned", "sincos"] = "learned"
    """ViT: learnt positions, or fixed sines and cosines (MAE, MoCo v3)."""
    init: Init = "normal"
    """ViT: initialisation; dino, mae and moco_v3 follow their authors. normal and dino: truncated
    normals of standard deviation 0.02; dino initialises the patch projection as a convolution. mae
    and moco_v3: Xavier-uniform; the class token has a standard deviation of 0.02 (mae) or 1e-6."""
    norm_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-6
    """ViT: epsilon added to a token's variance in the norms; 1e-12 in transformers."""
    batch_norm: BatchNormScope = "worker"
    """Images over which batch norm computes its statistics in training: those of this worker, of
    all workers (sync), or of each of batch_norm_splits parts of this worker's batch (split). The
    shipped configs say sync where the authors do, which is every method except MoCo v1 and v2."""
    batch_norm_splits: PositiveInt = 8
    """Number of parts for batch_norm: split."""
    weights: str | None = None
    """Start from these weights instead of random ones: a run folder, its encoder.safetensors, or a
    .safetensors, .pth or .pt file of the same layout, without the classifier. The results before
    training (``untrained_...``) then refer to the encoder with these weights."""

    @property
    def family(self) -> Family:
        """The family that the name belongs to."""
        library, colon, _ = self.name.partition(":")
        if colon:
            return "timm" if library == "timm" else "torchvision"
        if self.is_vit:
            return "vit"
        return "resnet" if self.name in LAYOUTS else "convnext"

    @property
    def is_vit(self) -> bool:
        """Whether it is one of raysl's own vision transformers."""
        return self.name.startswith("vit_")

    @model_validator(mode="after")
    def _name_is_known(self) -> "BackboneConfig":
        library, colon, _ = self.name.partition(":")
        if self.name not in NAMES and not (colon and library in ("torchvision", "timm")):
            raise ValueError(
                f"name {self.name!r} is not known; allowed: {', '.join(NAMES)}, torchvision:NAME, "
                f"timm:NAME{_near(self.name, NAMES)}"
            )
        return self

    @model_validator(mode="after")
    def _fields_are_of_this_family(self) -> "BackboneConfig":
        foreign = {name for names in _FIELDS.values() for name in names} - {*_FIELDS[self.family]}
        for name in sorted(foreign):
            if getattr(self, name) != type(self).model_fields[name].default:
                families = [family for family, names in _FIELDS.items() if name in names]
                raise ValueError(f"{name} is for {' and '.join(families)}; {self.name} has none")
        return self

    @model_validator(mode="after")
    def _layout_can_be_changed(self) -> "BackboneConfig":
        if self.family == "resnet" and (self.width != 1 or self.selective_kernels):
            plain = [name for name, layout in LAYOUTS.items() if layout[2:] == (1, 64)]
            if self.name not in plain:
                raise ValueError(
                    f"width and selective_kernels are for {', '.join(plain)}; not for {self.name}"
                )
        if self.shortcut_edge != "inside" and not self.selective_kernels:
            raise ValueError("shortcut_edge needs selective_kernels: true")
        return self

    @model_validator(mode="after")
    def _heads_share_the_features(self) -> "BackboneConfig":
        if self.is_vit and self.num_heads and VIT_SIZES[self.name].embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide the {VIT_SIZES[self.name].embed_dim} "
                f"features of {self.name}"
            )
        return self

    def check_view_sizes(self, sizes_px: Iterable[int]) -> None:
        """Reject views that do not divide into patches.

        Raises:
            ConfigError: If a vision transformer would receive such a view.
        """
        for size in sizes_px:
            if self.is_vit and size % self.patch_size_px:
                raise ConfigError(
                    f"backbone.patch_size_px={self.patch_size_px} does not divide views of {size} "
                    "px; change the patches or the views"
                )


class Backbone(nn.Module):
    """An encoder without its classifier: images to features.

    ``net`` is a ResNet or VisionTransformer of raysl, whose state dict loads into the classes of
    torchvision and timm, or one of their modules with its classifier replaced by the identity.
    """

    def __init__(self, net: nn.Module, *, embed_dim: int) -> None:
        super().__init__()
        self.net = net
        self.embed_dim = embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float, normalised, to ``(N, embed_dim)``."""
        return self.net(images)  # type: ignore[no-any-return]


def build_backbone(config: BackboneConfig, *, image_size_px: int = 224) -> Backbone:
    """Build an encoder with random weights from the global generator.

    Args:
        config: The encoder; the caller applies ``weights`` and ``batch_norm``.
        image_size_px: Side of its images; sets the grid of a vision transformer's positions.

    Raises:
        ConfigError: If a model of torchvision or timm is unknown, timm is missing, or the model
            cannot take images of this size.
    """
    if config.family == "resnet":
        resnet = ResNet(
            LAYOUTS[config.name],
            stem=config.stem,
            width=config.width,
            selective_kernels=config.selective_kernels,
            shortcut_edge=config.shortcut_edge,
            norm=config.norm,
            zero_init_residual=config.zero_init_residual,
        )
        return Backbone(resnet, embed_dim=resnet.embed_dim)
    if config.family == "vit":
        config.check_view_sizes([image_size_px])
        size = VIT_SIZES[config.name]
        vit = VisionTransformer(
            image_size_px=image_size_px,
            patch_size_px=config.patch_size_px,
            embed_dim=size.embed_dim,
            depth=config.depth or size.depth,
            num_heads=config.num_heads or size.num_heads,
            drop_path=config.drop_path,
            pool=config.pool,
            positions=config.positions,
            init=config.init,
            norm_eps=config.norm_eps,
        )
        return Backbone(vit, embed_dim=size.embed_dim)
    check_model_name(config)
    if config.family == "timm":
        net = timm_model(config, image_size_px)[0]
    else:
        net = _torchvision_model(config, image_size_px)
    if config.batch_norm != "worker":
        _refuse_special_batch_norms(net, config)
    return Backbone(net, embed_dim=_num_features(net, config, image_size_px))


def check_model_name(config: BackboneConfig) -> None:
    """Reject names that torchvision or timm do not know; fast, but loads that library.

    Raises:
        ConfigError: If the name is unknown, or timm is not installed.
    """
    if config.family not in ("torchvision", "timm"):
        return
    name = library_name(config)
    if config.family == "timm":
        # A tag after a dot selects pretrained weights; here weights are random.
        allowed_names, name = timm_library().list_models(), name.partition(".")[0]
    else:
        models = _torchvision_models()
        allowed_names = models.list_models(module=models)
    if name not in allowed_names:
        raise ConfigError(
            f"backbone.name={config.name}: {config.family} has no classifier of this name"
            f"{_near(name, allowed_names)}"
        )


def library_name(config: BackboneConfig) -> str:
    """Return a model's name in torchvision or timm."""
    return config.name.partition(":")[2] or config.name


def _near(name: str, allowed_names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed_names), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _torchvision_models() -> Any:
    # Imported lazily: torchvision loads torch's compiler, which a driver does not need.
    return importlib.import_module("torchvision.models")


def timm_library() -> Any:
    """Import timm, an optional dependency.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module("timm")  # optional dependency
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError("timm is not installed; pip install raysl[timm]") from None


def torchvision_options(config: BackboneConfig, image_size_px: int) -> dict[str, Any]:
    """Return the arguments of torchvision's constructor for a model, except its name."""
    name = library_name(config)
    if config.family == "convnext":
        return {"stochastic_depth_prob": config.drop_path}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": image_size_px}
    if name.startswith("maxvit"):
        return {"input_size": (image_size_px, image_size_px)}
    return {}


def torchvision_classifier(net: nn.Module) -> str:
    """Return the path of a model's last layer, a convolution in SqueezeNet."""
    layers = (nn.Linear, nn.Conv2d)
    paths: list[str] = [path for path, layer in net.named_modules() if isinstance(layer, layers)]
    return paths[-1]


def whole_torchvision_model(config: BackboneConfig, image_size_px: int) -> nn.Module:
    """Build a torchvision model with its classifier.

    Raises:
        ConfigError: If it cannot take such images.
    """
    options = torchvision_options(config, image_size_px)
    try:
        return _torchvision_models().get_model(library_name(config), weights=None, **options)  # type: ignore[no-any-return]
    except (AssertionError, ValueError, RuntimeError) as error:  # built for one size only
        raise _wrong_size(config, image_size_px, error) from None


def _torchvision_model(config: BackboneConfig, image_size_px: int) -> nn.Module:
    """Build a torchvision model with its last layer replaced by the identity."""
    net = whole_torchvision_model(config, image_size_px)
    net.set_submodule(torchvision_classifier(net), nn.Identity())
    return net


def timm_model(config: BackboneConfig, image_size_px: int) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model without its classifier, for the given size if it depends on one.

    Returns:
        The model, and the size arguments passed to ``timm.create_model``.

    Raises:
        ConfigError: If timm is not installed, or the model cannot take such images.
    """
    create, name = timm_library().create_model, library_name(config)
    # Transformers accept both arguments, some networks only the first, convolutional ones neither.
    size_options: list[dict[str, Any]] = [
        {"img_size": image_size_px, "dynamic_img_size": True},
        {"img_size": image_size_px},
        {},
    ]
    for options in size_options:
        try:
            net: nn.Module = create(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            if not options or "unexpected keyword argument" not in str(error):
                raise
        except (AssertionError, ValueError, RuntimeError) as error:
            raise _wrong_size(config, image_size_px, error) from None
        else:
            break
    return net, options


def _refuse_special_batch_norms(net: nn.Module, config: BackboneConfig) -> None:
    """Reject batch norms with extra functions, which a replacement would lose."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in plain:
            raise ConfigError(
                f"backbone.batch_norm={config.batch_norm} cannot replace the "
                f"{type(module).__name__} of {config.name}; use batch_norm=worker"
            )


@torch.no_grad()
def _num_features(net: nn.Module, config: BackboneConfig, image_size_px: int) -> int:
    """Return a model's number of features, from passing one black image."""
    training = net.training
    device = next(net.parameters()).device
    image = torch.zeros(1, 3, image_size_px, image_size_px, device=device)
    try:
        features = net.eval()(image)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise _wrong_size(config, image_size_px, error) from None
    net.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"backbone.name={config.name} gives {shape} for an image, not (1, features)"
        )
    return features.shape[1]


def _wrong_size(config: BackboneConfig, image_size_px: int, error: Exception) -> ConfigError:
    reason = str(error).strip().partition("\n")[0]
    return ConfigError(
        f"backbone.name={config.name} cannot take images of {image_size_px} px: {reason}"
    )

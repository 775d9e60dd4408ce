"""The lines of Python that load an encoder file, without raysl where its library can."""

from raysl.nn.backbones import BackboneConfig


def encoder_lines(config: BackboneConfig, *, image_size_px: int) -> list[str]:
    """Return Python that makes ``model`` out of ``encoder.safetensors``.

    Args:
        config: The backbone.
        image_size_px: Side of the images that it was trained for.
    """
    library, model = _plain_model(config, image_size_px)
    if library is None:
        return ["import raysl", "", 'model = raysl.load_encoder("encoder.safetensors")']
    return [
        f"import safetensors.torch, torch, {library}",
        "",
        *model,
        'model.load_state_dict(safetensors.torch.load_file("encoder.safetensors"))',
        "model.eval()",
    ]


def _plain_model(config: BackboneConfig, image_size_px: int) -> tuple[str | None, list[str]]:
    """Return the library that has the same module, and the lines that build it; None for none."""
    family, name = config.family, config.name
    if family == "resnet" and config.width == 1 and not config.selective_kernels:
        return ("torchvision", _resnet(config)) if config.norm != "none" else (None, [])
    if family == "vit":
        pool = {"cls": "token", "mean": "avg"}[config.pool]
        depth = "" if config.depth is None else f", depth={config.depth}"
        return "timm", [
            f'model = timm.create_model("{name}_patch16_224", num_classes=0, '
            f"img_size={image_size_px},",
            f'    patch_size={config.patch_size_px}{depth}, global_pool="{pool}", fc_norm=False)',
        ]
    if family == "convnext":
        lines = [
            f"model = torchvision.models.{name}()",
            "model.classifier[2] = torch.nn.Identity()",
        ]
        return "torchvision", lines
    return None, []


def _resnet(config: BackboneConfig) -> list[str]:
    norm = "norm_layer=lambda c: torch.nn.GroupNorm(32, c)" if config.norm == "group" else ""
    lines = [f"model = torchvision.models.{config.name}({norm})", "model.fc = torch.nn.Identity()"]
    if config.stem != "imagenet":
        stride = ", stride=2" if config.stem == "small" else ""
        lines += [
            f"model.conv1 = torch.nn.Conv2d(3, 64, 3{stride}, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    return lines

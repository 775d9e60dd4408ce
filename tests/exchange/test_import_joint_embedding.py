"""Checkpoints with a torchvision ResNet behind a prefix: which code wrote one, and what follows.

Each author's network is built here of torchvision's, as the author's code builds it.
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from raysl.encoder.file import load_encoder, load_weights
from raysl.errors import ConfigError, DataError
from raysl.exchange.import_encoder import ImportConfig, Imported, import_encoder
from raysl.nn.backbones import BackboneConfig, build_backbone

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# solo/data/pretrain_dataloader.py; utils.py of leftthomas/SimCLR.
SOLO_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
SOLO_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
PORTS_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


class Case(NamedTuple):
    layout: str
    content: Any
    expected: nn.Module
    normalisation: tuple[Any, Any]
    stem: str = "imagenet"


def resnet(seed: int = 0, *, padding: int | None = None) -> nn.Module:
    """torchvision's ResNet-18 at an eighth of its width, without its classifier.

    With a padding its first convolution is 3 x 3 and it does not pool.
    """
    torch.manual_seed(seed)
    block = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(block, [2, 2, 2, 2])
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    net.inplanes = 8
    for stage in range(4):
        layer = net._make_layer(block, 8 * 2**stage, 2, stride=1 + (stage > 0))
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Identity()  # type: ignore[assignment]
    if padding is not None:
        net.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=padding, bias=False)
        net.maxpool = nn.Identity()  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return net.eval()


def behind(prefix: str, net: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in net.state_dict().items()}


def mlp(*sizes: int, norm: bool, bias: bool = True, last_bias: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(inner, outer, bias=last_bias if last else bias))
        if not last:
            layers += [nn.BatchNorm1d(outer)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers)


def barlow() -> Case:
    """main.py: BarlowTwins has backbone, projector and bn, and is saved through DDP."""
    net = resnet()
    model = nn.ModuleDict(
        {
            "backbone": net,
            "projector": mlp(64, 16, 16, 8, norm=True, bias=False),
            "bn": nn.BatchNorm1d(8, affine=False),
        }
    )
    content = {"epoch": 3, "model": behind("module.", model), "optimizer": {"state": {}}}
    return Case("barlow", content, net, IMAGENET)


def barlow_alone() -> Case:
    """main.py writes resnet50.pth, a plain state dict, at its end."""
    net = resnet()
    return Case("torchvision", net.state_dict(), net, IMAGENET)


def vicreg() -> Case:
    """main_vicreg.py: VICReg has backbone and projector, whose last layer has no bias."""
    net = resnet()
    model = nn.ModuleDict({"backbone": net, "projector": mlp(64, 16, 16, 8, norm=True)})
    content = {"epoch": 3, "model": behind("module.", model), "optimizer": {"state": {}}}
    return Case("vicreg", content, net, IMAGENET)


def simsiam() -> Case:
    """simsiam/builder.py: the projector takes the place of the encoder's fc."""
    net = resnet()
    fc = nn.Sequential(
        *mlp(64, 16, 16, 8, norm=True, bias=False, last_bias=True),
        nn.BatchNorm1d(8, affine=False),
    )
    state = behind("module.encoder.", net) | behind("module.encoder.fc.", fc)
    state |= behind("module.predictor.", mlp(8, 4, 8, norm=True, bias=False, last_bias=True))
    content = {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    return Case("simsiam", content, net, IMAGENET)


def solo(
    *, classes: int, padding: int | None, momentum: bool = False, old: bool = False
) -> dict[str, Any]:
    """solo/methods/base.py, saved by Lightning; before 2022 the backbone was called encoder."""
    name = "encoder" if old else "backbone"
    state = behind(f"{name}.", resnet(padding=padding))
    state |= behind("classifier.", nn.Linear(64, classes))
    state |= behind("projector.", mlp(64, 16, 8, norm=momentum, last_bias=True))
    if momentum:
        state |= behind(f"momentum_{name}.", resnet(1, padding=padding))
        state |= behind("predictor.", mlp(8, 4, 8, norm=True))
    return {"epoch": 9, "state_dict": state, "pytorch-lightning_version": "2.0.2", "loops": {}}


def solo_imagenet() -> Case:
    content = solo(classes=100, padding=None, momentum=True)
    return Case("solo_learn", content, resnet(), IMAGENET)


def solo_cifar(classes: int) -> Case:
    """Its first convolution is 3 x 3 with padding 2, and there is no pooling."""
    content = solo(classes=classes, padding=2, old=classes == 100)
    normalisation = SOLO_CIFAR100 if classes == 100 else SOLO_CIFAR10
    return Case("solo_learn", content, resnet(padding=2), normalisation, "cifar_padded")


def lightly_benchmark() -> Case:
    """benchmarks/imagenet/resnet50/byol.py: it evaluates the backbone, not the teacher."""
    state = behind("backbone.", resnet()) | behind("teacher_backbone.", resnet(1))
    state |= behind("projection_head.layers.", mlp(64, 16, 8, norm=True))
    state |= behind("prediction_head.layers.", mlp(8, 4, 8, norm=True))
    content = {"epoch": 9, "state_dict": state, "hyper_parameters": {"num_classes": 1000}}
    return Case("lightly", content, resnet(), IMAGENET)


def simclr_of_sthalles() -> Case:
    net = resnet()
    state = behind("backbone.", net) | behind("backbone.fc.", mlp(64, 64, 32, norm=False))
    return Case("simclr", {"epoch": 9, "arch": "resnet18", "state_dict": state}, net, PIXELS)


def simclr_of_spijkervet() -> Case:
    net = resnet()
    state = behind("encoder.", net) | behind("projector.", mlp(64, 64, 32, norm=False, bias=False))
    return Case("simclr", state, net, PIXELS)


def simclr_of_leftthomas() -> Case:
    """model.py: f are torchvision's children without max-pool and fc, g is the head."""
    net = resnet(padding=1)
    left = [child for name, child in net.named_children() if name not in ("maxpool", "fc")]
    state = behind("f.", nn.Sequential(*left)) | behind("g.", mlp(64, 16, 8, norm=True))
    return Case("simclr_cifar", state, net, PORTS_CIFAR10, "cifar")


def supcontrast() -> Case:
    """networks/resnet_big.py: a 3 x 3 stem, and shortcut for downsample."""
    net = resnet(padding=1)
    state = {name.replace("downsample", "shortcut"): v for name, v in net.state_dict().items()}
    state = {f"encoder.{name}": value for name, value in state.items()}
    state |= behind("head.", mlp(64, 64, 32, norm=False, last_bias=True))
    content = {"opt": {"lr": 0.5}, "model": state, "optimizer": {}, "epoch": 9}
    return Case("simclr_cifar", content, net, PORTS_CIFAR10, "cifar")


def unknown_code() -> Case:
    net = resnet()
    return Case("other", {"state_dict": behind("backbone.", net)}, net, IMAGENET)


CASES: dict[str, Callable[[], Case]] = {
    "barlow": barlow,
    "barlow_alone": barlow_alone,
    "vicreg": vicreg,
    "simsiam": simsiam,
    "solo_imagenet": solo_imagenet,
    "solo_cifar10": partial(solo_cifar, 10),
    "solo_cifar100": partial(solo_cifar, 100),
    "lightly_benchmark": lightly_benchmark,
    "simclr_sthalles": simclr_of_sthalles,
    "simclr_spijkervet": simclr_of_spijkervet,
    "simclr_leftthomas": simclr_of_leftthomas,
    "supcontrast": supcontrast,
    "unknown_code": unknown_code,
}


def bring(folder: Path, content: Any, **settings: Any) -> tuple[Imported, nn.Module]:
    torch.save(content, folder / "checkpoint.pth")
    output = folder / "encoder.safetensors"
    config = ImportConfig(**settings)
    imported = import_encoder(folder / "checkpoint.pth", config, output, layout="auto")
    return imported, load_encoder(output)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_and_normalisation_are_those_of_the_authors_code(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]()
    imported, encoder = bring(tmp_path, case.content)
    images = torch.randn(2, 3, 33, 33).double()
    expected = case.expected.double()(images)
    torch.testing.assert_close(encoder.double()(images), expected, rtol=1e-7, atol=1e-7)
    assert (imported.layout, imported.backbone.stem) == (case.layout, case.stem)
    assert (imported.mean, imported.std) == case.normalisation
    assert imported.image_size_px == (224 if case.stem == "imagenet" else 32)
    backbone = build_backbone(imported.backbone).eval()
    load_weights(backbone, tmp_path / "checkpoint.pth")
    torch.testing.assert_close(backbone.double()(images), expected, rtol=1e-7, atol=1e-7)


class TestWhatIsAssumed:
    def guesses(self, folder: Path, content: Any, **settings: Any) -> dict[str, str]:
        guessed = bring(folder, content, **settings)[0].guessed
        return {guess.partition("=")[0]: guess for guess in guessed}

    def test_each_is_an_override_with_another_one_beside(self, tmp_path: Path) -> None:
        found = self.guesses(tmp_path, unknown_code().content)
        assert set(found) == {"image_size_px", "mean"}
        assert found["mean"].startswith("mean=[0.485,0.456,0.406] std=[0.229,0.224,0.225] (ImageN")
        assert "as in most training code" in found["mean"]
        assert "otherwise mean=[0,0,0] std=[1,1,1]" in found["mean"]

    def test_what_is_given_is_not_assumed(self, tmp_path: Path) -> None:
        given = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size_px": 64}
        assert self.guesses(tmp_path, unknown_code().content, **given) == {}

    def test_a_stem_that_no_code_tells(self, tmp_path: Path) -> None:
        content = behind("backbone.", resnet(padding=1))
        found = self.guesses(tmp_path, content)
        assert found["backbone.stem"].endswith("backbone.stem=cifar_padded or backbone.stem=small")
        assert "backbone.stem" not in self.guesses(
            tmp_path, content, backbone={"stem": "cifar_padded"}
        )

    @torch.no_grad()
    def test_which_network_and_how_to_take_the_other_one(self, tmp_path: Path) -> None:
        content = solo_imagenet().content
        found = self.guesses(tmp_path, content)
        assert found["network"].endswith("otherwise network=state_dict/momentum_backbone.")
        other = "state_dict/momentum_backbone."
        imported, encoder = bring(tmp_path, content, network=other)
        images = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(encoder(images), resnet(1)(images))
        assert imported.taken.startswith(f"the momentum backbone ({other})")
        assert not any(guess.startswith("network=") for guess in imported.guessed)
        with pytest.raises(ConfigError, match=r"no network=teacher; it holds: state_dict/backbone"):
            bring(tmp_path, content, network="teacher")

    def test_solo_learns_own_arguments_tell_the_data_set(self, tmp_path: Path) -> None:
        arguments = {"data": {"dataset": "stl10"}, "augmentations": [{"crop_size": 96}]}
        (tmp_path / "args.json").write_text(json.dumps(arguments))
        imported, _ = bring(tmp_path, solo(classes=10, padding=None))
        assert imported.mean == (0.4914, 0.4823, 0.4466)
        assert imported.image_size_px == 96
        assert imported.guessed == ()
        assert "stl10" in imported.told


def test_a_run_does_not_start_from_weights_of_another_padding(tmp_path: Path) -> None:
    torch.save(solo(classes=10, padding=2), tmp_path / "last.ckpt")
    backbone = build_backbone(BackboneConfig(name="resnet18", stem="cifar", width=0.125))
    with pytest.raises(DataError, match=r"solo-learn has the stem cifar_padded; set backbone\.st"):
        load_weights(backbone, tmp_path / "last.ckpt")

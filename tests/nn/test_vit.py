import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ShapeError
from raysl.nn.vit import (
    Attention,
    DropPath,
    TransformerBlock,
    VisionTransformer,
    sincos_positions,
)


def tiny(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**(sizes | options))


def images(n: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


class TestAgainstTimm:
    @pytest.mark.parametrize("pool", ["cls", "mean", "mean_norm"])
    def test_weights_load_strictly_and_give_the_same_features(
        self, pool: Literal["cls", "mean", "mean_norm"], timm: Any
    ) -> None:
        vit = tiny(embed_dim=192, pool=pool).eval()
        theirs = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            depth=2,
            num_classes=0,
            global_pool="token" if pool == "cls" else "avg",
            fc_norm=pool == "mean_norm",
        ).eval()
        theirs.load_state_dict(vit.state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(vit(images()), theirs(images()), rtol=0, atol=1e-5)

    def test_names_and_shapes_are_those_of_its_base_model(self, timm: Any) -> None:
        with torch.device("meta"):
            vit = tiny(image_size_px=224, patch_size_px=16, embed_dim=768, depth=12, num_heads=12)
            theirs = timm.create_model("vit_base_patch16_224", num_classes=0)
        ours = {name: value.shape for name, value in vit.state_dict().items()}
        assert ours == {name: value.shape for name, value in theirs.state_dict().items()}


class TestAttention:
    def test_rows_add_up_to_one_with_what_the_class_token_gives_itself(self) -> None:
        vit = tiny()
        tokens = vit.with_class_token(vit.embed_patches(images()))
        weights = Attention(24, 3).weights(tokens)
        assert weights.shape == (2, 3, 17, 17)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 17))
        last = vit.last_attention(images())
        assert last.shape == (2, 3, 16)
        assert (last > 0).all()
        assert (last.sum(dim=-1) < 1).all()

    def test_is_the_weighted_mean_of_the_values(self) -> None:
        attention, tokens = Attention(6, 2), torch.randn(2, 5, 6)
        value = attention.qkv(tokens)[..., 12:].view(2, 5, 2, 3).transpose(1, 2)
        mixed = attention.weights(tokens) @ value
        expected = attention.proj(mixed.transpose(1, 2).reshape(2, 5, 6))
        torch.testing.assert_close(attention(tokens), expected)

    def test_of_the_last_block_is_what_that_block_uses(self) -> None:
        vit = tiny(depth=1)
        tokens = vit.with_class_token(vit.embed_patches(images()))
        block = vit.blocks[0]
        expected = block.attn.weights(block.norm1(tokens))[:, :, 0, 1:]
        assert torch.equal(vit.last_attention(images()), expected)

    def test_weights_are_float32_under_autocast_too(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert tiny().last_attention(images()).dtype == torch.float32

    def test_heads_must_divide_the_features(self) -> None:
        with pytest.raises(ShapeError, match="24 features cannot be shared among 5"):
            tiny(num_heads=5)


class TestPositions:
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 48), (8, 40)])
    def test_of_another_size_are_resampled_bicubically(self, height: int, width: int) -> None:
        vit = tiny()
        content = vit.patch_embed(images(2, height, width)).flatten(2).transpose(1, 2)
        grid = vit.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
        moved = F.interpolate(grid, size=(height // 8, width // 8), mode="bicubic")
        expected = content + moved.flatten(2).transpose(1, 2)
        torch.testing.assert_close(vit.embed_patches(images(2, height, width)), expected)

    def test_of_the_own_size_are_as_they_are(self) -> None:
        vit = tiny()
        content = vit.patch_embed(images()).flatten(2).transpose(1, 2)
        assert torch.equal(vit.embed_patches(images()), content + vit.pos_embed[:, 1:])

    def test_of_patches_have_a_gradient_through_any_size(self) -> None:
        vit = tiny()
        vit(images(2, 16, 24)).square().sum().backward()
        assert (vit.pos_embed.grad.abs().sum(dim=-1) > 0).all()

    def test_that_are_fixed_follow_the_formula(self) -> None:
        table = sincos_positions(8, rows=2, columns=3)
        assert table.shape == (1, 7, 8)
        assert not table[0, 0].any()
        for row in range(2):
            for column in range(3):
                halves = []
                for place in (column, row):
                    angles = [place / 10_000 ** (k / 2) for k in range(2)]
                    halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                torch.testing.assert_close(table[0, 1 + 3 * row + column], torch.tensor(halves))

    def test_that_are_fixed_are_not_trained(self) -> None:
        vit = tiny(positions="sincos")
        assert torch.equal(vit.pos_embed, sincos_positions(24, 4, 4))
        assert not vit.pos_embed.requires_grad
        assert tiny().pos_embed.requires_grad

    def test_that_are_fixed_need_four_parts(self) -> None:
        with pytest.raises(ShapeError, match="multiple of 4; got 6"):
            sincos_positions(6, 2, 2)


class TestDropPath:
    def test_drops_whole_images_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
        assert (dropped == dropped[:, :1, :1]).all()
        kept = dropped[:, 0, 0]
        assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
        assert float(kept.mean()) == pytest.approx(1, abs=0.03)

    def test_is_off_in_evaluation(self) -> None:
        vit = tiny(drop_path=0.9)
        assert torch.equal(vit.eval()(images()), tiny().eval()(images()))
        vit.train()
        assert not torch.equal(vit(images()), vit(images()))

    def test_rises_linearly_over_the_blocks(self) -> None:
        probs = [block.drop_path.prob for block in tiny(depth=5, drop_path=0.4).blocks]
        assert probs == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
        assert tiny(depth=1, drop_path=0.4).blocks[0].drop_path.prob == 0

    def test_of_a_block_leaves_the_tokens_of_an_image_that_is_dropped_twice(self) -> None:
        torch.manual_seed(0)
        block, tokens = TransformerBlock(6, 2, drop_path=0.9), torch.randn(64, 4, 6)
        same = (block(tokens) == tokens).flatten(1).all(dim=1)
        assert 30 < int(same.sum()) < 64


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_norm"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_trainable_parameter_gets_a_gradient(
    pool: Any, positions: Any, bfloat16: bool
) -> None:
    vit = tiny(pool=pool, positions=positions, drop_path=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        features = vit(images(8))
    (features.float() * torch.linspace(-1, 1, 24)).square().sum().backward()
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
            assert parameter.grad.isfinite().all(), name


def test_pools_are_parts_of_what_the_blocks_give() -> None:
    by_class, by_mean = tiny(pool="cls"), tiny(pool="mean")
    tokens = by_class.encode(by_class.with_class_token(by_class.embed_patches(images())))
    assert tokens.shape == (2, 17, 24)
    assert torch.equal(by_class(images()), tokens[:, 0])
    torch.testing.assert_close(by_mean(images()), tokens[:, 1:].mean(dim=1))


def test_blocks_see_only_the_tokens_they_are_given() -> None:
    vit = tiny()
    patches = vit.embed_patches(images())
    visible = vit.encode(vit.with_class_token(patches[:, [3, 5, 6]]))
    assert visible.shape == (2, 4, 24)
    shuffled = vit.encode(vit.with_class_token(patches[:, [6, 3, 5]]))
    torch.testing.assert_close(visible[:, 0], shuffled[:, 0])


def test_channels_last_gives_the_same_features() -> None:
    vit, last = tiny(), tiny().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(vit(images()), last(given))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ShapeError, match="images of 30 px do not divide into patches of 8 px"):
        tiny(image_size_px=30)
    with pytest.raises(ShapeError, match=r"images of 32 x 36 px do not divide .* 8 px"):
        tiny()(images(1, 32, 36))


def uniform(bound: float, value: Tensor) -> Tensor:
    """Share of a uniform distribution in [-bound, bound] below each value."""
    return ((value / bound + 1) / 2).clamp(0, 1)


def normal(std: float, value: Tensor) -> Tensor:
    """Share of a normal distribution below each value."""
    return torch.special.ndtr(value / std)


def distance(drawn: Tensor, share_below: Any) -> float:
    """Largest gap between the two distribution functions, times the root of the values.

    For values that are of that distribution it is above 1.95 once in a thousand times
    (Kolmogorov and Smirnov).
    """
    values = drawn.detach().flatten().double().sort().values
    n = len(values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    return float((share_below(values) - steps).abs().max()) * n**0.5


class TestInit:
    """Each against its authors' code; D = 96, patches of 8 px, perceptrons of 4 D."""

    @pytest.mark.parametrize(
        ("init", "bounds", "class_token_std"),
        [
            # models_mae.py, initialize_weights and _init_weights: qkv is one map of D to 3 D.
            ("mae", {"qkv": 6 / (4 * 96), "proj": 6 / (2 * 96), "fc": 6 / (5 * 96)}, 0.02),
            # vits.py, VisionTransformerMoCo: queries, keys and values each a map of D to D.
            ("moco_v3", {"qkv": 6 / (2 * 96), "proj": 6 / (2 * 96), "fc": 6 / (5 * 96)}, 1e-6),
        ],
    )
    def test_of_mae_and_moco_v3_is_that_of_their_authors(
        self, init: Any, bounds: dict[str, float], class_token_std: float
    ) -> None:
        vit = tiny(embed_dim=96, init=init)
        for block in vit.blocks:
            named = {"qkv": block.attn.qkv, "proj": block.attn.proj}
            for part, linear in [*named.items(), ("fc", block.mlp.fc1), ("fc", block.mlp.fc2)]:
                drawn = partial(uniform, math.sqrt(bounds[part]))
                assert distance(linear.weight, drawn) < 1.95, part
                assert not linear.bias.any()
            assert torch.equal(block.norm1.weight, torch.ones(96))
        patch = partial(uniform, math.sqrt(6 / (3 * 8 * 8 + 96)))
        assert distance(vit.patch_embed.proj.weight, patch) < 1.95
        assert not vit.patch_embed.proj.bias.any()
        assert distance(vit.cls_token, partial(normal, class_token_std)) < 1.95

    def test_of_moco_v3_draws_queries_keys_and_values_alike_and_apart(self) -> None:
        qkv = tiny(embed_dim=96, init="moco_v3").blocks[0].attn.qkv.weight.detach()
        query, key, value = qkv.chunk(3)
        for part in (query, key, value):
            assert distance(part, partial(uniform, math.sqrt(6 / (96 + 96)))) < 1.95
        assert not torch.equal(query, key)
        # As one map, Xavier-uniform would be narrower by the root of two.
        assert distance(query, partial(uniform, math.sqrt(6 / (96 + 288)))) > 10

    @pytest.mark.parametrize(
        ("init", "patch_bound", "has_patch_bias"),
        # vision_transformer.py: a convolution as torch makes it (126), and normals (161 to 169).
        [("normal", math.sqrt(6 / (96 + 3 * 8 * 8)), False), ("dino", (3 * 8 * 8) ** -0.5, True)],
    )
    def test_is_otherwise_small_truncated_normals(
        self, init: Any, patch_bound: float, has_patch_bias: bool
    ) -> None:
        vit = tiny(embed_dim=96, init=init)
        for linear in (vit.blocks[0].mlp.fc1, vit.blocks[0].attn.qkv):
            assert distance(linear.weight, partial(normal, 0.02)) < 1.95
            assert not linear.bias.any()
        assert distance(vit.cls_token, partial(normal, 0.02)) < 1.95
        patch = vit.patch_embed.proj
        assert distance(patch.weight, partial(uniform, patch_bound)) < 1.95
        assert bool(patch.bias.any()) == has_patch_bias

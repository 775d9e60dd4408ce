"""Vision transformers with the parameter names of timm and of the official DINO and MAE files.

Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929v2.
"""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysl.errors import ShapeError

Init = Literal["normal", "dino", "mae", "moco_v3"]

_CLASS_TOKEN_STD = {"mae": 0.02, "moco_v3": 1e-6}  # of the Xavier-uniform initialisations


class ViTSize(NamedTuple):
    """The dimensions of one vision transformer."""

    embed_dim: int
    num_heads: int
    depth: int = 12


# Touvron et al. 2021, arXiv:2012.12877v2, table 1; Dosovitskiy et al. 2021, table 1, from base on.
VIT_SIZES = {
    "vit_tiny": ViTSize(192, 3),
    "vit_small": ViTSize(384, 6),
    "vit_base": ViTSize(768, 12),
    "vit_large": ViTSize(1024, 16, depth=24),
    "vit_huge": ViTSize(1280, 16, depth=32),
}


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for some images of the batch.

    Kept branches are divided by the keep probability, so the mean is unchanged. Off in evaluation
    mode.

    Source: Huang et al. 2016, arXiv:1603.09382v3, per image as in timm and DINO.
    """

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob
        """Probability that an image's branch is dropped, in [0, 1)."""

    def forward(self, branch: Tensor) -> Tensor:
        """Map ``(N, ...)`` to the same shape."""
        if not self.training or self.prob == 0:
            return branch
        keep = 1 - self.prob
        mask = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)


class Attention(nn.Module):
    """Multi-head self-attention (sec. 3.1, Eq. (2))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(f"{dim} features cannot be shared among {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T, D)`` to the same shape."""
        query, key, value = self._heads(tokens)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (N, heads, T, D / heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def weights(self, tokens: Tensor) -> Tensor:
        """Return the attention weights: ``(N, heads, T, T)``, rows add up to 1."""
        query, key, _value = self._heads(tokens)
        logits: Tensor = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each ``(N, heads, T, D / heads)``."""
        n, length, dim = tokens.shape
        qkv = self.qkv(tokens).view(n, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value


class Mlp(nn.Module):
    """Two linear layers with GELU in between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T, D)`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and perceptron, each with pre-norm and a residual connection (Eq. (2), (3)).

    Args:
        dim: Features of a token.
        num_heads: Attention heads; divides ``dim``.
        mlp_ratio: Hidden features of the perceptron for each feature of a token.
        drop_path: Probability that a branch is dropped for an image while training, in [0, 1).
        norm_eps: Epsilon added to a token's variance in the norms, > 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T, D)`` to the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """One linear map from each patch's pixels to a token, as a convolution."""

    def __init__(self, patch_size_px: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size_px, stride=patch_size_px)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to ``(N, D, H / P, W / P)``."""
        return self.proj(images)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Map images to features by a transformer over patches (sec. 3.1).

    Args:
        image_size_px: Side of the images that ``pos_embed`` is made for; it is interpolated for
            other sizes.
        patch_size_px: Side P of a patch; must divide every image's sides.
        embed_dim: Features D of a token.
        depth: Number of blocks.
        num_heads: Number of attention heads of a block.
        mlp_ratio: Hidden features of the perceptrons for each feature of a token.
        drop_path: Stochastic depth of the last block; rises linearly from 0 at the first.
        pool: Features of an image: its class token, or the mean of its patches' tokens. The class
            token takes part in attention in any case. mean_norm normalises the mean instead of the
            tokens (MAE's fine-tuned models), by ``fc_norm`` as in timm.
        positions: learned, or fixed sines and cosines (MAE, MoCo v3).
        init: Initialisation: truncated normals of standard deviation 0.02, with a Xavier-uniform
            patch projection, or as the authors of DINO, MAE or MoCo v3 do.
        norm_eps: Epsilon added to a token's variance in the norms, > 0.

    Departs: no dropout; DINO, MAE and MoCo v3 use none.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size_px: int,
        patch_size_px: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        pool: Literal["cls", "mean", "mean_norm"] = "cls",
        positions: Literal["learned", "sincos"] = "learned",
        init: Init = "normal",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if image_size_px % patch_size_px:
            raise ShapeError(
                f"images of {image_size_px} px do not divide into patches of {patch_size_px} px"
            )
        self.image_size_px = image_size_px
        self.patch_size_px = patch_size_px
        self.embed_dim = embed_dim
        self.pool = pool
        self.side = image_size_px // patch_size_px
        self.num_patches = self.side**2
        self.patch_embed = PatchEmbed(patch_size_px, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        drops = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=drop, norm_eps=norm_eps
            )
            for drop in drops
        )
        norm, is_after_pool = nn.LayerNorm(embed_dim, eps=norm_eps), pool == "mean_norm"
        self.norm: nn.Module = nn.Identity() if is_after_pool else norm
        self.fc_norm: nn.Module = norm if is_after_pool else nn.Identity()
        self._init_weights(init)
        if positions == "sincos":
            with torch.no_grad():
                self.pos_embed.copy_(sincos_positions(embed_dim, self.side, self.side))
            self.pos_embed.requires_grad_(False)

    def _init_weights(self, init: Init) -> None:
        """Draw the weights; biases start at zero, positions as truncated normals.

        ``patch_embed.proj`` is drawn like a linear map, Xavier-uniform (MAE, MoCo v3). With dino,
        and in timm, it keeps the default of a convolution, +-1 / sqrt(3 P^2) with its bias, which
        depends on the patch alone, not on D.

        Source: the authors' vision_transformer.py for dino, models_mae.py (initialize_weights) for
        mae, and vits.py (VisionTransformerMoCo) for moco_v3, where queries, keys and values are
        three maps of D to D.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                maps = 3 if init == "moco_v3" and name.endswith("attn.qkv") else 1
                for weight in module.weight.detach().chunk(maps):
                    if init in _CLASS_TOKEN_STD:
                        nn.init.xavier_uniform_(weight)
                    else:
                        nn.init.trunc_normal_(weight, std=0.02)
                nn.init.zeros_(module.bias)
        if init != "dino":
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
            nn.init.zeros_(cast("Tensor", self.patch_embed.proj.bias))
        if init in _CLASS_TOKEN_STD:
            nn.init.normal_(self.cls_token, std=_CLASS_TOKEN_STD[init])
        else:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Convert images to patch tokens with positions, without the class token.

        Args:
            images: ``(N, 3, H, W)`` float, normalised; H and W are multiples of P.

        Returns:
            ``(N, L', D)`` in reading order, L' = H / P * W / P.

        Raises:
            ShapeError: If the images do not divide into patches.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size_px or width % self.patch_size_px:
            raise ShapeError(
                f"images of {height} x {width} px do not divide into patches of "
                f"{self.patch_size_px} px; use a size that is a multiple of it"
            )
        grid = self.patch_embed(images)  # (N, D, rows, columns)
        return grid.flatten(2).transpose(1, 2) + self._positions(*grid.shape[-2:])  # type: ignore[no-any-return]

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """Prepend the class token and its position: ``(N, T, D)`` to ``(N, 1 + T, D)``."""
        token = self.cls_token + self.pos_embed[:, :1]
        batch = tokens.shape[0]  # traced as a dynamic batch size, unlike len()
        return torch.cat([token.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """Run the blocks and the last norm: ``(N, T, D)`` to the same shape."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float, normalised, to ``(N, D)``."""
        tokens = self.encode(self.with_class_token(self.embed_patches(images)))
        if self.pool == "cls":
            return tokens[:, 0]
        return self.fc_norm(tokens[:, 1:].mean(dim=1))  # type: ignore[no-any-return]

    def last_attention(self, images: Tensor) -> Tensor:
        """Return the class token's attention in the last block: ``(N, heads, L')``, >= 0.

        The rest of each row, up to 1, is its attention to itself.
        """
        tokens = self.with_class_token(self.embed_patches(images))
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = cast("TransformerBlock", self.blocks[-1])
        return last.attn.weights(last.norm1(tokens))[:, :, 0, 1:]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return the positions of a grid of patches, ``(1, rows * columns, D)``.

        Departs: DINO's code resamples with a scale that is off by 0.1 / rows, to guard against
        rounding.
        """
        patches = self.pos_embed[:, 1:]
        if rows == self.side and columns == self.side:
            return patches
        # Separable bicubic, as matrix products: F.interpolate has no deterministic gradient on
        # CUDA.
        grid = patches.reshape(self.side, self.side, self.embed_dim)
        row_weights = _bicubic_weights(self.side, rows).to(grid)
        column_weights = _bicubic_weights(self.side, columns).to(grid)
        with torch.autocast(grid.device.type, enabled=False):
            resampled = torch.einsum("ri,cj,ijd->rcd", row_weights, column_weights, grid)
        return resampled.reshape(1, rows * columns, self.embed_dim)


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Return fixed positions on a grid; half the features encode the column, half the row.

    Each half holds the sines, then the cosines, of the coordinate over ``10000**(4k / dim)``.

    Args:
        dim: Number of features, a multiple of 4.
        rows: Patches from top to bottom.
        columns: Patches from left to right.

    Returns:
        ``(1, 1 + rows * columns, dim)`` float32 in [-1, 1]; the class token's row, the first, is 0.

    Raises:
        ShapeError: If ``dim`` is not a multiple of 4.

    Source: MAE, arXiv:2111.06377v3, appendix A.1, in the order of the authors' code (columns
    first); MoCo v3's differs by a permutation of the features.
    """
    if dim % 4:
        raise ShapeError(f"sine-cosine positions need features in a multiple of 4; got {dim}")
    rate = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    halves = []
    for coordinate in (column, row):
        angle = coordinate.reshape(-1, 1) * rate  # (rows * columns, dim / 4)
        halves += [angle.sin(), angle.cos()]
    patches = torch.cat(halves, dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]


def _bicubic_weights(size: int, new_size: int) -> Tensor:
    """Return weights ``(new_size, size)`` that resample ``size`` samples; rows add up to 1."""
    line = torch.eye(size)[None, None]
    return F.interpolate(line, size=(new_size, size), mode="bicubic", align_corners=False)[0, 0]

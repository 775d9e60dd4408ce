"""Jigsaw puzzles.

M. Noroozi, P. Favaro: "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
2016, arXiv:1603.09246v3. The head for residual networks is that of P. Goyal, D. Mahajan, A. Gupta,
I. Misra: "Scaling and Benchmarking Self-Supervised Visual Representation Learning", 2019,
arXiv:1905.01235v2, as VISSL has it (jigsaw_8gpu_resnet.yaml). Optionally, one image made of the
shuffled tiles: F. M. Carlucci, A. D'Innocente, S. Bucci, B. Caputo, T. Tommasi: "Domain
Generalization by Solving Jigsaw Puzzles", 2019, arXiv:1903.06864 (JiGen).
"""

import itertools
import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveInt
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.geometry import entropy
from raysl.nn.precision import at_least_float32

MIN_TILE_PX = 8
TILE_SHARE = 64 / 85  # VISSL: tiles of 64 px from cells of 85; the paper: of 75


@cache
def distant_permutations(num_tiles: int, num_permutations: int) -> NDArray[np.int64]:
    """Choose distant permutations greedily.

    The first is drawn; each next one has the largest mean Hamming distance to those before it.

    Args:
        num_tiles: T, at most 9 (all T! candidates are examined).
        num_permutations: P, at most T!.

    Returns:
        ``(P, T)`` with one permutation of 0 .. T - 1 per row, all different; deterministic. In the
        first T rows, the next T, ... each tile is once in each slot, unless the required
        permutation was chosen before.

    Source: Algorithm 1.
    Departs: Of candidates with the same mean distance, the one whose nearest chosen permutation is
    farthest comes first; the paper does not say.
    """
    count = math.factorial(num_tiles)
    flat = itertools.chain.from_iterable(itertools.permutations(range(num_tiles)))
    candidates = np.fromiter(flat, np.uint8, count * num_tiles).reshape(count, num_tiles)
    candidates = candidates[np.random.default_rng(0).permutation(count)]
    tiles_by_slot = np.ascontiguousarray(candidates.T)  # (T, T!)
    same_as_all = np.zeros(count, np.int32)  # slots in common, summed over the chosen ones
    same_as_one = np.zeros(count, np.int32)  # with the most similar chosen one
    chosen = [0]
    while len(chosen) < num_permutations:
        same = np.zeros(count, np.uint8)
        for tile_in_slot, tile in zip(tiles_by_slot, candidates[chosen[-1]], strict=True):
            same += tile_in_slot == tile
        same_as_all += same
        np.maximum(same_as_one, same, out=same_as_one)
        same_as_all[chosen[-1]] = np.iinfo(np.int32).max >> 4  # never chosen again
        chosen.append(int(np.argmin(same_as_all * (num_tiles + 1) + same_as_one)))
    return candidates[chosen].astype(np.int64)


def tile_size_px(view_px: int, grid: int) -> int:
    """Return the side of a tile: smaller than its cell, so that neighbours have a gap."""
    return max(1, round(view_px // grid * TILE_SHARE))


def cut_tiles(images: Tensor, cells: Tensor, offsets: Tensor, *, grid: int) -> Tensor:
    """Crop square tiles from the cells of a grid.

    Args:
        images: ``(N, C, S, S)``.
        cells: The cell of each tile, ``(N, T)`` int64, numbered by rows.
        offsets: Position of each tile in its cell, vertical and horizontal, ``(N, T, 2)`` in [0,
            1]: 0 is the cell's upper or left end, 1 the lower or right.
        grid: Cells along a side.

    Returns:
        ``(N, T, C, t, t)``, t from :func:`tile_size_px`.

    Raises:
        ShapeError: If the images are not square or too small for the grid.

    Source: Sec. 4, "Implementation details": random gaps prevent recognising neighbours by their
    edges.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[2] < grid:
        raise ShapeError(
            f"images must be (N, C, S, S) with S >= {grid} to be cut; got {tuple(images.shape)}"
        )
    cell, tile = images.shape[2] // grid, tile_size_px(images.shape[2], grid)
    starts = torch.stack([cells // grid, cells % grid], dim=2) * cell  # (N, T, 2)
    # Each of the cell - tile + 1 positions has an equal share of [0, 1].
    starts += (offsets * (cell - tile + 1)).long().clamp_max(cell - tile)
    along = torch.arange(tile, device=images.device)
    down = starts[:, :, :1, None] + along[:, None]  # (N, T, t, 1)
    right = starts[:, :, 1:, None] + along  # (N, T, 1, t)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return images[image, :, down, right].permute(0, 1, 4, 2, 3)


def normalise_tiles(tiles: Tensor) -> Tensor:
    """Give each channel of each tile mean 0 and standard deviation 1, against colour shortcuts.

    Args:
        tiles: ``(..., t, t)``, float32 or float64. A tile of one colour becomes 0.

    Source: Sec. 4, "Low level statistics": adjacent tiles have similar means and
    standard deviations.
    """
    centred = tiles - tiles.mean(dim=(-2, -1), keepdim=True)
    std = centred.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return centred / std.clamp_min(1e-3)


def mosaic(tiles: Tensor) -> Tensor:
    """Arrange tiles side by side, row by row.

    Args:
        tiles: ``(N, T, C, t, t)``, T a square number.

    Returns:
        ``(N, C, S, S)`` with S = sqrt(T) t.
    """
    side = math.isqrt(tiles.shape[1])
    rows = tiles.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)  # (N, C, side, t, side, t)
    whole: Tensor = rows.flatten(4, 5).flatten(2, 3)
    return whole


def jigsaw_loss(logits: Tensor, answer: Tensor) -> Tensor:
    """Compute the cross entropy of the permutation that shuffled the tiles.

    Args:
        logits: ``(N, P)``, any float dtype.
        answer: ``(N,)`` int64 in 0 .. P - 1.

    Returns:
        Scalar >= 0, float32 (float64 for float64 logits). Equal logits give log P.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Sec. 3.3.
    """
    if logits.ndim != 2 or answer.shape != logits.shape[:1]:
        raise ShapeError(
            f"logits must be (N, P) and answer (N,); got {tuple(logits.shape)}, "
            f"{tuple(answer.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), answer)


class JigsawConfig(MethodConfig):
    """Settings of jigsaw puzzles."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("tile_dim",), {"arrangement": ("mosaic",)}),)
    name: Literal["jigsaw"] = "jigsaw"
    grid: Annotated[int, Field(ge=2, le=3)] = 3
    """Tiles along a side: 3 in the paper; 2 is for small images."""
    num_permutations: PositiveInt | None = None
    """P, the number of classes. null takes the paper's 1,000, or all if there are fewer (24 for
    grid 2). VISSL has 100, 2,000 and 10,000."""
    arrangement: Literal["apart", "mosaic"] = "apart"
    """apart: the encoder sees one tile at a time, and a head sees all their features (the paper).
    mosaic: it sees the shuffled tiles side by side, as one image, which is closer to the whole
    images it sees later; its features are classified without a head (JiGen)."""
    normalise_tiles: bool = True
    """Give each tile mean 0 and standard deviation 1 (the paper; JiGen does not)."""
    tile_dim: PositiveInt = 1000
    """apart: width of a tile's features before concatenation (VISSL)."""

    @property
    def num_views(self) -> int:
        """One view, which the method cuts into tiles."""
        return 1

    @property
    def num_classes(self) -> int:
        """Number of permutations to classify."""
        return self.num_permutations or min(1000, math.factorial(self.grid**2))

    def check(self, shape: RunShape) -> None:
        """Reject tiles too small to be useful, and more permutations than exist."""
        most = math.factorial(self.grid**2)
        if self.num_classes > most:
            raise ConfigError(
                f"method.num_permutations={self.num_permutations}: {self.grid**2} tiles have "
                f"{most:,} orders; use fewer, or null"
            )
        view = shape.view_sizes_px[0]
        tile = tile_size_px(view, self.grid)
        if tile < MIN_TILE_PX:
            enough = next(s for s in range(view, 10**4) if tile_size_px(s, self.grid) >= 8)
            raise ConfigError(
                f"data.views.size_px={view}: method.grid={self.grid} cuts it into tiles of {tile} "
                f"px; they need {MIN_TILE_PX}. Use views of {enough} px or more, or a smaller grid"
            )


class Jigsaw(Method):
    """Classify in which of P orders the tiles of an image were shuffled.

    Departs:
        mosaic: the tiles keep the gaps of the paper, and all orders are equally likely; JiGen has
        no gaps and keeps most images in order.
    """

    Config = JigsawConfig
    loss_is_mean_over_images = True
    permutations: Tensor

    def __init__(self, config: JigsawConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.backbone = backbone
        tiles, classes = config.grid**2, config.num_classes
        self.register_buffer("permutations", torch.empty(classes, tiles, dtype=torch.int64))
        if not self.permutations.is_meta:  # the choice takes seconds
            self.permutations.copy_(torch.from_numpy(distant_permutations(tiles, classes)))
        self.tile_head = nn.Sequential()
        width = backbone.embed_dim
        if config.arrangement == "apart":
            self.tile_head = nn.Sequential(
                nn.Linear(backbone.embed_dim, config.tile_dim, bias=False),
                nn.BatchNorm1d(config.tile_dim),
                nn.ReLU(inplace=True),
            )
            width = tiles * config.tile_dim
        self.classifier = nn.Linear(width, classes)

    @property
    def encoder(self) -> Backbone:
        """The backbone; it sees tiles or mosaics in training and whole images afterwards."""
        return self.backbone

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Shuffle the tiles of each image by one of P permutations and classify which one.

        The features are the mosaic's, or the mean over an image's tiles: no whole image passes
        through the backbone here.
        """
        images = batch.views[0]
        n, tiles = len(images), self.permutations.shape[1]
        answer = torch.randint(len(self.permutations), (n,), device=images.device)
        offsets = torch.rand(n, tiles, 2, device=images.device)
        of_tiles, logits = self._solve(self._cut(images, answer, offsets))
        loss, features = jigsaw_loss(logits, answer), of_tiles.mean(1).detach()
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        with torch.no_grad():
            guess = logits.argmax(dim=1)
            is_in_place = self.permutations[guess] == self.permutations[answer]
            metrics = {
                "jigsaw/accuracy": (guess == answer).float().mean(),
                "jigsaw/tiles_in_place": is_in_place.float().mean(),
                # log P at chance level.
                "jigsaw/entropy": entropy(logits.softmax(dim=1)),
            }
        return LossOutput(loss, features, metrics)

    def _cut(self, images: Tensor, answer: Tensor, offsets: Tensor) -> Tensor:
        """Return ``(N, T, 3, t, t)``: slot i holds the tile of cell ``permutation[i]``."""
        cells = self.permutations[answer]
        tiles = cut_tiles(at_least_float32(images), cells, offsets, grid=self.config.grid)
        return normalise_tiles(tiles) if self.config.normalise_tiles else tiles

    def _solve(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``(N, T, embed_dim)`` and logits ``(N, P)``, at least float32.

        A mosaic has one row of features, ``(N, 1, embed_dim)``.
        """
        if self.config.arrangement == "mosaic":
            features = self.backbone(mosaic(tiles))
            return features[:, None], at_least_float32(self.classifier(features))
        features = self.backbone(tiles.flatten(0, 1))  # (NT, embed_dim)
        concatenated = self.tile_head(features).view(len(tiles), -1)
        return features.view(*tiles.shape[:2], -1), at_least_float32(self.classifier(concatenated))

    @torch.no_grad()
    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Show views, their tiles as the network sees them, and as it would rearrange them."""
        images = batch.views[0]
        n, device = len(images), images.device
        # Not random: permutations from the first Latin squares, tiles in the middle of their cells.
        answer = torch.arange(n, device=device) * 7 % len(self.permutations)
        offsets = torch.full((n, self.permutations.shape[1], 2), 0.5, device=device)
        tiles = self._cut(images, answer, offsets)
        _, logits = self._solve(tiles)
        slots = torch.arange(self.permutations.shape[1], device=device).expand(n, -1)
        shuffled = self._lay_out(tiles, slots, images.shape[2])
        solved = self._lay_out(tiles, self.permutations[logits.argmax(dim=1)], images.shape[2])
        grid = torch.stack([at_least_float32(images), shuffled, solved], dim=1)
        config = self.config
        treatment = "shuffled and each normalised" if config.normalise_tiles else "shuffled"
        layout = "one by one" if config.arrangement == "apart" else "side by side, without the gaps"
        caption = (
            f"A view; its tiles, {treatment}, as the network gets them, {layout}; the same tiles "
            f"in the order that it finds most likely of {len(self.permutations):,}."
        )
        return {"jigsaw": ImageGrid(grid, ("view", "puzzle", "solution"), caption)}

    def _lay_out(self, tiles: Tensor, cells: Tensor, size_px: int) -> Tensor:
        """Return images ``(N, 3, S, S)`` with tile i in the middle of the cell ``cells[:, i]``."""
        grid, tile = self.config.grid, tiles.shape[-1]
        cell = size_px // grid
        margin = (cell - tile) // 2
        framed = F.pad(tiles, (margin, cell - tile - margin) * 2)  # (N, T, 3, cell, cell)
        ordered = torch.zeros_like(framed).scatter_(
            1, cells.view(*cells.shape, 1, 1, 1).expand_as(framed), framed
        )
        return F.pad(mosaic(ordered), (0, size_px - grid * cell) * 2)


METHOD = Jigsaw

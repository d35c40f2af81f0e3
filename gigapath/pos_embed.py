"""2-D sine-cosine positions of a square grid of cells, computed only at the cells in use.

Cell (gx, gy) of a grid of n x n has the row `gx * n + gy + 1` of a fixed table; row 0 is the class token's and zero.
A row of width D is `[e(gy), e(gx)]` with `e(p) = [sin(p w_0), sin(p w_1), ..., cos(p w_0), ...]` and the D / 4
frequencies `w_k = 10000 ** (-k / (D / 4))`, in float64, rounded to float32. The whole table of the released models
would be 1,000,001 rows, 3 GB.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigapath.devices import send

__all__ = ["get_1d_sincos_pos_embed_from_grid", "get_2d_sincos_pos_embed", "get_2d_sincos_pos_embed_from_grid"]


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


Floats = np.ndarray[Any, np.dtype[np.float64]]


def _frequencies(embed_dim: int) -> Floats:
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"pos_embed: expected a width that 4 divides, got {embed_dim}. Choose a multiple of 4.")
    quarter = embed_dim // 4
    return 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: Any) -> Floats:
    """e(p) (M, embed_dim) float64 of numbers of any shape with M entries; 2 must divide the width."""
    angles = np.outer(np.asarray(pos, dtype=np.float64), _frequencies(2 * embed_dim))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: Any) -> Floats:
    """Rows (M, embed_dim) float64 for M cells of any grid.

    Args:
        embed_dim: width D, a multiple of 4.
        grid: (2, ...) with M entries each: what the first half of a row tells (gy of ours), then what the second does.
    """
    first, second = (get_1d_sincos_pos_embed_from_grid(embed_dim // 2, axis) for axis in grid)
    return np.concatenate([first, second], axis=1)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int, cls_token: bool = False) -> Floats:
    """The whole table of a small grid, by the published name.

    Args:
        embed_dim: width D, a multiple of 4.
        grid_size: cells of a side, n.
        cls_token: whether the zero row of the class token comes first.

    Returns:
        (n * n, D) float64, or (n * n + 1, D) with the class token; row `gx * n + gy` (+ 1).
    """
    axis = get_1d_sincos_pos_embed_from_grid(embed_dim // 2, np.arange(grid_size))  # (n, D / 2)
    table = np.zeros((grid_size * grid_size + int(cls_token), embed_dim))
    rows = table[int(cls_token) :].reshape(grid_size, grid_size, embed_dim)
    rows[..., : embed_dim // 2] = axis[None, :, :]
    rows[..., embed_dim // 2 :] = axis[:, None, :]
    return table


class LazyPosEmbed:
    """Stands for the (1, n * n + 1, D) float32 table and computes the rows that are asked for.

    `pos_embed[:, rows, :]` takes a tensor of row numbers of any shape and returns (1, *rows.shape, D) on the rows'
    device; `pos_embed[:, :1, :]` and other indices return their rows on `device`. It is no parameter and no buffer: the
    table is not in the checkpoints; its model sets `device` and `dtype`.
    """

    ndim, requires_grad = 3, False

    def __init__(self, embed_dim: int, grid_size: int) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._frequencies = torch.from_numpy(_frequencies(embed_dim))
        self.grid_size = grid_size
        self.shape = torch.Size((1, grid_size * grid_size + 1, embed_dim))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    def numel(self) -> int:
        """As of a tensor."""
        return self.shape.numel()

    def __getitem__(self, index: Any) -> Tensor:
        given = list(index) if isinstance(index, tuple) else [index]
        at = next((i for i, part in enumerate(given) if part is ...), len(given))
        given[at : at + 1] = [slice(None)] * (3 - at - len(given[at + 1 :]))  # as many as the ellipsis stands for
        if len(given) != 3 or any(part is None or getattr(part, "dtype", None) == torch.bool for part in given):
            raise IndexError("pos_embed: expected an index of at most three dimensions by numbers or slices.")
        batch, rows, columns = given
        if isinstance(rows, Tensor):
            found = self.rows(rows)
        elif isinstance(rows, slice):
            found = self.rows(torch.arange(*rows.indices(self.shape[1]), device="cpu"), self.device)
        else:
            found = self.rows(torch.as_tensor(rows, device="cpu"), self.device)
        result = found[None].to(self.dtype)[batch]
        return result if columns == slice(None) else result[..., columns]

    def rows(self, positions: Tensor, device: torch.device | None = None) -> Tensor:
        """Rows (*positions.shape, D) float32 of the table at whole row numbers of any shape.

        On `device`, by default that of `positions`. A GPU is not waited for where they lie in the host's memory.
        """
        limit, device = self.shape[1], device or positions.device
        if positions.numel() and not (-limit <= int(positions.min()) and int(positions.max()) < limit):
            raise IndexError(f"pos_embed: expected rows below {limit}, got up to {int(positions.max())}.")
        if device.type == "cuda":
            positions = send(positions, device)
        positions = torch.where(positions < 0, positions + limit, positions)
        cells = (positions - 1).clamp_(min=0)
        gx, gy = cells // self.grid_size, cells % self.grid_size
        found = torch.cat([self._axis(gy), self._axis(gx)], dim=-1)
        return found.masked_fill_((positions == 0).unsqueeze(-1), 0.0).to(device)

    def _axis(self, cells: Tensor) -> Tensor:
        """e(p) (*cells.shape, D / 2) float32; each cell in use is computed once, in float64 on the CPU."""
        if cells.device.type == "cuda":  # which cells are in use would have to be waited for
            return _axis_table(self.shape[2], self.grid_size, cells.device)[cells]
        unique, inverse = torch.unique(cells, return_inverse=True)
        return _axis_of(unique.cpu(), self._frequencies).to(cells.device)[inverse]


def _axis_of(cells: Tensor, frequencies: Tensor) -> Tensor:
    angles = cells.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


@lru_cache(maxsize=4)
def _axis_table(embed_dim: int, grid_size: int, device: torch.device) -> Tensor:
    """e(p) (n, D / 2) of every cell of a side, kept on a GPU."""
    with torch.inference_mode(False):  # training takes it too
        return _axis_of(torch.arange(grid_size, device="cpu"), torch.from_numpy(_frequencies(embed_dim))).to(device)


def cells_of(coords: Tensor, tile_size: float) -> Tensor:
    """Cells floor(coords / tile_size) (..., 2) float64, of pixel coordinates (..., 2) of any dtype, as (x, y)."""
    wide = coords.cpu() if coords.device.type == "mps" else coords
    return torch.floor(wide.double() / tile_size)


def checked_coords(coords: Tensor, tile_size: float, grid_size: int, lengths: Sequence[int] | None = None) -> Tensor:
    """Pixel coordinates that all lie in the grid of cells.

    Cell -1, that is coordinates above -tile_size, is moved to 0 with one warning; TRIDENT's own test makes such.

    Args:
        coords: (B, L, 2), (x, y) in pixels; half precision is widened.
        tile_size: pixels of a cell's side, in the coordinates' unit.
        grid_size: cells of a side.
        lengths: tiles of each slide where coords is (1, T, 2), slides one after another; for the message.

    Returns:
        The coordinates, float32 where they came in half precision, else in their own dtype.

    Raises:
        ValueError: NaN, infinite or outside of the grid; names the first offending row. Or no size of a tile.
    """
    if not 0 < tile_size < math.inf:
        raise ValueError(
            f"slide encoder: expected a tile_size above 0, got {tile_size:g}. Give the distance of neighbouring tiles "
            "in the unit of the coordinates."
        )
    if coords.dtype in (torch.float16, torch.bfloat16):
        coords = coords.float()
    cells = cells_of(coords, tile_size)
    wrong = ~((cells >= -1) & (cells < grid_size)).all(-1)  # NaN compares false
    if bool(wrong.any()):
        slide, row = (int(i) for i in wrong.nonzero()[0])
        found = tuple(coords[slide, row].tolist())
        slides = coords.shape[0]
        if lengths is not None and slides == 1:
            slides = len(lengths)
            while row >= lengths[slide]:
                slide, row = slide + 1, row - lengths[slide]
        raise ValueError(
            f"slide encoder: expected coordinates within {grid_size} x {grid_size} cells of {tile_size:g} pixels, got "
            f"(x, y) = {found} in row {row}"
            + (f" of slide {slide}" if slides > 1 else "")
            + ". Check that coordinates and tile_size are in the same pixels, and that half precision did not overflow."
        )
    if bool((cells < 0).any()):
        warnings.warn(
            "slide encoder: coordinates up to one tile below zero were moved to cell 0; expected none below zero.",
            stacklevel=3,
        )
        coords = coords.clamp(min=0)
    return coords

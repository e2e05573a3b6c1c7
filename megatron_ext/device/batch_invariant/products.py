"""Matrix products in which a row's result depends on that row and the matrix alone.

rows      in tiles of TILE, the last one filled up with zeros: a product of one shape, whatever the number of rows
columns   at least COLUMNS: over narrower matrices MKL treats the rows of a product differently
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE = 16
"""Few rows are filled up to it, which costs time in steps of generation; many small products cost time in training."""
COLUMNS = 16


def product(x_TK: torch.Tensor, w_KN: torch.Tensor) -> torch.Tensor:
    """[T, N]."""
    rows = len(x_TK)
    tiles = filled(x_TK, 0, TILE).unflatten(0, (-(-rows // TILE), TILE))
    return tile_products(tiles, w_KN.expand(len(tiles), -1, -1)).flatten(0, 1)[:rows]


def products(x_BTK: torch.Tensor, w_BKN: torch.Tensor) -> torch.Tensor:
    """[B, T, N]."""
    made = [tile_products(tile.contiguous(), w_BKN) for tile in filled(x_BTK, 1, TILE).split(TILE, dim=1)]
    return torch.cat(made, dim=1)[:, : x_BTK.shape[1]]


def tile_products(tiles_BTK: torch.Tensor, w_BKN: torch.Tensor) -> torch.Tensor:
    """[B, TILE, N]. `out` is given because torch.bmm without it is replaced inside `batch_invariant()`."""
    columns = w_BKN.shape[2]
    wide_BKN = F.pad(w_BKN, (0, COLUMNS - columns)) if columns < COLUMNS else w_BKN
    made = torch.bmm(tiles_BTK, wide_BKN, out=tiles_BTK.new_empty(*tiles_BTK.shape[:2], wide_BKN.shape[2]))
    return made[:, :, :columns]


def filled(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Contiguous, with zeros behind, so that `size` divides the length of axis `dim`."""
    missing = -x.shape[dim] % size
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)).contiguous() if missing else x.contiguous()

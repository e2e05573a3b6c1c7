"""What the model takes: tokens and images of a batch as torch tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ext.batch import Tiles
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class ModelInputs:
    """`tokens_BS` int64, right-padded; `tiles_ICHW` float32 in [-1, 1], the distinct image tiles of the batch; `row_tiles_BM` int64 names the tiles
    of each row (-1: none); `places_I5` as in `batch/tiles.py` (None: every tile is a picture of its own).

    Packed samples stand one after another in a single row: sample n is the positions [bounds[n], bounds[n + 1]). Empty: every row is one sample.
    `padding_BS` is true where there is only padding, which balancing losses leave out (None: nowhere). `aux_weight` is what those losses are multiplied by:
    the number of targets of the whole batch where the main loss is a sum over targets. `hidden_BS` is true at image tokens that self-attention does without
    (None: at none).
    """

    tokens_BS: torch.Tensor
    tiles_ICHW: torch.Tensor
    row_tiles_BM: torch.Tensor
    bounds: tuple[int, ...] = ()
    padding_BS: torch.Tensor | None = None
    aux_weight: float = 1.0
    places_I5: torch.Tensor | None = None
    hidden_BS: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, length = self.tokens_BS.shape
        check_shape("tiles_ICHW", self.tiles_ICHW, None, 3, None, None)
        check_shape("row_tiles_BM", self.row_tiles_BM, rows, None)
        if self.places_I5 is not None:
            check_shape("places_I5", self.places_I5, len(self.tiles_ICHW), 5)
        for name in ("padding_BS", "hidden_BS"):
            if getattr(self, name) is not None:
                check_shape(name, getattr(self, name), rows, length)
        if self.bounds and (rows != 1 or self.bounds[0] != 0 or self.bounds[-1] != length or list(self.bounds) != sorted(set(self.bounds))):
            raise ValueError(f"bounds {self.bounds} do not divide one row of {length} positions into samples (there are {rows} rows)")

    @property
    def num_samples(self) -> int:
        return len(self.bounds) - 1 if self.bounds else len(self.tokens_BS)

    def samples_BS(self) -> torch.Tensor:
        """Int64: the sample that each position belongs to."""
        rows, length = self.tokens_BS.shape
        numbers = torch.arange(self.num_samples, device=self.tokens_BS.device)
        if not self.bounds:
            return numbers[:, None].expand(rows, length)
        return numbers.repeat_interleave(torch.tensor(self.bounds, device=numbers.device).diff())[None]


def model_inputs(tokens_BS: np.ndarray, tiles: Tiles, row_tiles_BM: np.ndarray, device: torch.device, **more: Any) -> ModelInputs:
    """From the arrays of a batch: bytes become float [-1, 1]. `more` are the optional fields."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles.pixels_IHWC)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    tokens, rows = (torch.from_numpy(np.ascontiguousarray(x)).to(device, torch.int64) for x in (tokens_BS, row_tiles_BM))
    return ModelInputs(tokens, pixels, rows, places_I5=torch.from_numpy(tiles.places_I5).to(device), **more)

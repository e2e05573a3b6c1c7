"""What the model takes: tokens and images of a batch as torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class ModelInputs:
    """`tokens_BS` int64, right-padded; `tiles_ICHW` float32 in [-1, 1], the distinct image tiles of the batch; `row_tiles_BM` int64 names the tiles
    of each row (-1: none)."""

    tokens_BS: torch.Tensor
    tiles_ICHW: torch.Tensor
    row_tiles_BM: torch.Tensor

    def __post_init__(self) -> None:
        check_shape("tiles_ICHW", self.tiles_ICHW, None, 3, None, None)
        check_shape("row_tiles_BM", self.row_tiles_BM, self.tokens_BS.shape[0], None)


def model_inputs(tokens_BS: np.ndarray, tiles_IHWC: np.ndarray, row_tiles_BM: np.ndarray, device: torch.device) -> ModelInputs:
    """From the arrays of a batch: uint8 [I, h, w, 3] images become float [-1, 1]."""
    tiles = torch.from_numpy(np.ascontiguousarray(tiles_IHWC)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    tokens, rows = (torch.from_numpy(np.ascontiguousarray(x)).to(device, torch.int64) for x in (tokens_BS, row_tiles_BM))
    return ModelInputs(tokens, tiles, rows)

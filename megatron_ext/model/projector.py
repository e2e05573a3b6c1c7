"""From ViT features to image tokens of the language model: pixel unshuffle, then LayerNorm -> Linear -> GELU -> Linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.config.schema import VisionConfig


def pixel_unshuffle(features_IVH: torch.Tensor, factor: int) -> torch.Tensor:
    """Folds factor x factor neighbouring ViT tokens into one: [I, h * w, C] -> [I, h * w / factor^2, C * factor^2], for square grids.

    Token order stays row-major; the channel order is that of InternVL's `pixel_shuffle`, version v2.
    """
    images, tokens, channels = features_IVH.shape
    side = int(tokens**0.5)
    small = side // factor
    x = features_IVH.reshape(images, side, small, channels * factor).transpose(1, 2)
    x = x.reshape(images, small, small, channels * factor * factor).transpose(1, 2)
    return x.reshape(images, small * small, channels * factor * factor)


class Projector(nn.Module):
    """Features [I, V, H_vit] -> image embeddings [I, V / downsample^2, H]. LayerNorm's eps is 1e-5, unlike the ViT's 1e-6 (InternVL `mlp1`)."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.hidden_size * config.downsample**2
        self.downsample = config.downsample
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features_IVH: torch.Tensor) -> torch.Tensor:
        x = self.layer_norm(pixel_unshuffle(features_IVH, self.downsample))
        return self.linear_2(F.gelu(self.linear_1(x)))

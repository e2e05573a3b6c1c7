"""What a tap looks at: from the features that the model's first stage makes to the tokens that keys and values are made of.

    sources [I, V, W]   of the ViT's last layer, or of several side by side, or behind the projector; of the tile itself or of another picture
      learned           -> trained vectors instead, the same for every tile
      several layers    -> m = sum_l w_l (n_l + (n_l A_l) B_l),  n_l = LayerNorm(f_l) without weights;  w_l = 1 / L and B_l = 0 at first
      unshuffled        -> neighbours folded into one token, as before the projector
    kv      [I, V', W']

Of several layers one sum is made, so that memory, masks and costs are those of one layer; deep layers have far larger norms than early ones, hence n_l. The
low-rank maps let each layer speak in its own basis (CLI, arXiv 2601.10710). Every rank has all of this: its gradients come out whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.config.clvr_sizes import LORA_RANK, kv_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.projector import pixel_unshuffle


class LayerMixture(nn.Module):
    """[I, V, L * H] -> [I, V, H]."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((num_layers,), 1 / num_layers))
        self.lora_in = nn.Parameter(torch.zeros(num_layers, width, LORA_RANK))
        self.lora_out = nn.Parameter(torch.zeros(num_layers, LORA_RANK, width))

    def forward(self, sources_IVW: torch.Tensor) -> torch.Tensor:
        layers_IVLH = sources_IVW.unflatten(-1, (len(self.share), -1))
        normed_LIVH = F.layer_norm(layers_IVLH, layers_IVLH.shape[-1:]).movedim(2, 0)
        turned_LIVH = normed_LIVH + normed_LIVH @ self.lora_in[:, None] @ self.lora_out[:, None]
        return torch.einsum("l,livh->ivh", self.share, turned_LIVH)


class VisionSources(nn.Module):
    """Sources to kv of one tap. Without parameters unless the configuration asks for what has some."""

    def __init__(self, model: ModelConfig, tap: int) -> None:
        super().__init__()
        clvr, width = model.clvr, model.vision.hidden_size
        self.learned = nn.Parameter(torch.zeros(kv_shape(model))) if clvr.memory == "learned" else None
        own_layers = clvr.fusion == "addition"
        self.mixture = LayerMixture(len(clvr.kv_layers), width) if clvr.kv_layers and not own_layers else None
        self._slice = slice(tap * width, (tap + 1) * width) if clvr.kv_layers and own_layers else slice(None)
        self._fold = model.vision.downsample if clvr.kv_tokens == "unshuffled" else 1

    def forward(self, sources_IVW: torch.Tensor) -> torch.Tensor:
        if self.learned is not None:
            return self.learned.expand(len(sources_IVW), -1, -1)
        features_IVH = sources_IVW[..., self._slice] if self.mixture is None else self.mixture(sources_IVW)
        return features_IVH if self._fold == 1 else pixel_unshuffle(features_IVH, self._fold)

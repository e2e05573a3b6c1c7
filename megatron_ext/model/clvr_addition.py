"""CLVR's rival without a query: vision tokens are added to the residual stream at the image's own positions before a deeper layer.

    x^j_t = h^{j-1}_t + g o_n      t: the position of image token n;   o = W_o LayerNorm(z), z the features behind pixel unshuffle or the projector

DeepStack (Meng et al. 2024, arXiv 2406.04334), with a ViT layer of its own for each tap where `kv_layers` names them. Nothing asks, so decoding has nothing to
do. Every rank makes all of o, as it does of the image embeddings, and keeps its slice of the sequence.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_ext.config.clvr_sizes import kv_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.clvr_gate import gate_parameter, gate_values
from megatron_ext.model.clvr_sources import VisionSources
from megatron_ext.model.sight import Sight


class AdditionTap(MegatronModule):
    """Stands where a `ClvrTap` would, with the same two verbs."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tap: int, pgs: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.clvr, self.tp_group = model.clvr, pgs.tp
        width = kv_shape(model)[1]
        self.gate = gate_parameter(config, model.clvr)
        self.sources = VisionSources(model, tap)
        self.vision_norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_out = nn.Linear(width, config.hidden_size, bias=False)
        if model.clvr.gate == "zero_out":
            nn.init.zeros_(self.linear_out.weight)

    def memory(self, sources_IVW: torch.Tensor, places_I5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys without width, and o as the values of one head: [I, n, 1, 0] and [I, n, 1, H]. `places_I5` plays no part."""
        values = self.linear_out(self.vision_norm(self.sources(sources_IVW)))[:, :, None]
        return values[..., :0], values

    def forward(self, hidden_SBH: torch.Tensor, keys_BNVD: torch.Tensor, values_B1VH: torch.Tensor, sight: Sight) -> torch.Tensor:
        """What is added, shaped like `hidden_SBH`; 0 but at image tokens."""
        assert sight.image_BS is not None
        index_BSH = sight.image_BS.clamp(min=0)[..., None].expand(-1, -1, values_B1VH.shape[3])
        added_BSH = values_B1VH[:, 0].gather(1, index_BSH) * (sight.image_BS >= 0)[..., None]
        out_SBH = added_BSH.transpose(0, 1)
        if self.config.sequence_parallel:
            out_SBH = scatter_to_sequence_parallel_region(out_SBH.contiguous(), group=self.tp_group)
        return out_SBH if self.gate is None else gate_values(self.clvr, self.gate, hidden_SBH) * out_SBH

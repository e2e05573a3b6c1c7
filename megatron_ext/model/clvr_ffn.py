"""The MLP behind a tap's attention: o + W_down GELU(W_up RMSNorm(o)), W_down = 0 at first. Where nothing was seen, o = 0 stays 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_ext.model.norm import RMSNorm


class RefinementFFN(MegatronModule):
    """Takes and gives sequence slices [S, B, H] under sequence parallelism, like the MLPs of the decoder. A module of Megatron's, so that checkpoints ask
    its layers which part of a tensor they hold."""

    def __init__(self, config: TransformerConfig, ffn_hidden: int, pgs: ProcessGroupCollection) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.norm = RMSNorm(config, hidden, config.layernorm_epsilon)
        self.linear_up = ColumnParallelLinear(
            hidden, ffn_hidden, config=config, init_method=config.init_method, bias=False, gather_output=False, tp_group=pgs.tp
        )
        self.linear_down = RowParallelLinear(
            ffn_hidden, hidden, config=config, init_method=nn.init.zeros_, bias=False, input_is_parallel=True, skip_bias_add=True, tp_group=pgs.tp
        )

    def forward(self, refined_SBH: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.linear_up(self.norm(refined_SBH))[0])
        return refined_SBH + self.linear_down(inner)[0]

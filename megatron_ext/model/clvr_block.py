"""The decoder layers with their CLVR taps.

    for layer l:
        hidden += refinement of every tap that ends at l          (zero, and absent, without images)
        hidden  = TransformerLayer l (attention, mixture of experts)
        every tap that starts at l asks the vision memory with `hidden`

What a tap answers waits in a local variable until its target layer: nothing is stashed on a module, so several microbatches can be in flight.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from megatron_ext.config.schema import ClvrConfig
from megatron_ext.model.attention import KVCache
from megatron_ext.model.clvr import ClvrTap, Sight, VisionMemory
from megatron_ext.model.norm import RMSNorm


class ShardedList(nn.ModuleList):
    """A module list that Megatron's checkpoints walk: by default they take the contents of a plain list as replicated."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        sharded: dict[str, Any] = {}
        for index, module in enumerate(self):
            sharded.update(sharded_state_dict_default(module, f"{prefix}{index}.", sharded_offsets, metadata))
        return sharded


class Injection(nn.Module):
    """Where a refinement enters the residual stream. A module without weights, so that whoever measures CLVR can hook it."""

    def forward(self, hidden_SBH: torch.Tensor, refinement_SBH: torch.Tensor) -> torch.Tensor:
        return hidden_SBH + refinement_SBH


class ClvrBlock(MegatronModule):
    """Decoder layers, taps, final norm. Hidden states are [S, B, H], sequence slices under sequence parallelism."""

    def __init__(self, config: TransformerConfig, layer_spec: ModuleSpec, clvr: ClvrConfig, vision_hidden: int, pgs: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.layers = ShardedList(build_module(layer_spec, config=config, layer_number=number + 1, pg_collection=pgs) for number in range(config.num_layers))
        self.tap_ends = clvr.taps if clvr.enabled else ()
        self.taps = ShardedList(ClvrTap(config, clvr, vision_hidden, pgs) for _ in self.tap_ends)
        self.injections = nn.ModuleList(Injection() for _ in self.tap_ends)
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def remember(self, features_IVH: torch.Tensor, row_tiles_BM: torch.Tensor) -> VisionMemory:
        """Keys and values of every tap, once per tile, gathered for the rows that share them. Absent tiles (-1) repeat tile 0 and are never visible."""
        tiles = row_tiles_BM.clamp(min=0)

        def rows(x_IVND: torch.Tensor) -> torch.Tensor:
            return x_IVND[tiles].flatten(1, 2).transpose(1, 2)

        made = [tap.memory(features_IVH) for tap in self._clvr_taps()]
        return VisionMemory(tuple(rows(key) for key, _ in made), tuple(rows(value) for _, value in made))

    def forward(
        self,
        hidden_SBH: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        memory: VisionMemory | None,
        sight: Sight | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        cos, sin = rope
        taps = self._clvr_taps()
        waiting: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for number, layer in enumerate(self.layers):
            for index, refinement in waiting.pop(number, ()):
                hidden_SBH = self.injections[index](hidden_SBH, refinement)
            hidden_SBH, _ = layer(hidden_SBH, attention_mask=None, rotary_pos_cos=cos, rotary_pos_sin=sin, inference_context=cache)
            if memory is None or sight is None:
                continue
            for index, (source, target) in enumerate(self.tap_ends):
                if source == number:
                    refinement = taps[index](hidden_SBH, memory.keys[index], memory.values[index], sight)
                    waiting.setdefault(target, []).append((index, refinement))
        return self.final_layernorm(hidden_SBH)

    def _clvr_taps(self) -> list[ClvrTap]:
        return [tap for tap in self.taps if isinstance(tap, ClvrTap)]

"""The decoder layers of one pipeline stage with their CLVR taps.

    for layer l:
        hidden += refinement of every tap that ends at l          (zero, and absent, without images)
        hidden  = TransformerLayer l (attention, mixture of experts)
        every tap that starts at l asks the vision memory with `hidden`

What a tap answers waits in a local variable until its target layer, or leaves with the hidden states where that lies on a later stage: nothing is stashed on a
module, so several micro-batches can be in flight. Layers and taps keep the names they have in the whole model, on whatever stage they live.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from megatron_ext.batch.tiles import WHOLE
from megatron_ext.config.schema import ClvrConfig, ParallelConfig
from megatron_ext.model.clvr import ClvrTap, patch_positions
from megatron_ext.model.dispatch import LocalDispatcher, dispatches_locally
from megatron_ext.model.frame import Frame
from megatron_ext.model.memory import Memory, PromptKeys
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.recompute import recomputed
from megatron_ext.model.router import Router, pad_where_tokens_are_dropped
from megatron_ext.model.sight import Sight, VisionMemory
from megatron_ext.parallel.stages import Stage


class Numbered(nn.Module):
    """Modules by their number in the whole model; iterating gives those that are here, in order."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for number, module in modules.items():
            self.add_module(str(number), module)

    def __getitem__(self, number: int) -> Any:
        return self._modules[str(number)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Megatron's checkpoints walk this; by default they take the contents of a plain container as replicated."""
        sharded: dict[str, Any] = {}
        for number, module in self.named_children():
            sharded.update(sharded_state_dict_default(module, f"{prefix}{number}.", sharded_offsets, metadata))
        return sharded


class Injection(nn.Module):
    """Where a refinement enters the residual stream. A module without weights, so that whoever measures CLVR can hook it."""

    def __init__(self, tap: int) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, hidden_SBH: torch.Tensor, refinement_SBH: torch.Tensor) -> torch.Tensor:
        return hidden_SBH + refinement_SBH


@dataclass(frozen=True)
class Call:
    """What one forward pass brings along: rope angles, the vision memory and who may look at what (None without images to look at), and, in training, the
    frame and which positions [B, S] are padding; in generation, the cache."""

    rope: tuple[torch.Tensor, torch.Tensor]
    memory: VisionMemory | None
    sight: Sight | None
    frame: Frame | None = None
    padding_BS: torch.Tensor | None = None
    cache: Memory | PromptKeys | None = None


class ClvrBlock(MegatronModule):
    """Decoder layers, taps, and on the last stage the final norm. Hidden states are [S, B, H], sequence slices under sequence parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_specs: Sequence[ModuleSpec],
        clvr: ClvrConfig,
        vision_hidden: int,
        pgs: ProcessGroupCollection,
        stage: Stage,
        parallel: ParallelConfig,
    ) -> None:
        super().__init__(config)
        numbered = copy.copy(config)
        numbered.pipeline_model_parallel_size = 1  # layers are numbered here, over all stages: Megatron would add a stage's offset
        numbered.virtual_pipeline_model_parallel_size = None
        self.stage, self.ends = stage, clvr.active_taps
        self._recompute_layers = parallel.recompute_layers if parallel.recompute == "full" else 0
        self.layers = Numbered(
            {number: build_module(layer_specs[number], config=numbered, layer_number=number + 1, pg_collection=pgs) for number in stage.layers}
        )
        self.taps = Numbered({tap: ClvrTap(config, clvr, vision_hidden, pgs) for tap in stage.asks})
        self.injections = Numbered({tap: Injection(tap) for tap, (_, target) in enumerate(self.ends) if target in stage.layers})
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if stage.last else None
        for layer in self.layers:
            layer.self_attention.recompute = parallel.recompute == "selective"
            if not isinstance(layer.mlp, MoELayer):
                continue
            if dispatches_locally(config):
                layer.mlp.token_dispatcher = LocalDispatcher(config, pgs)
            if config.moe_pad_expert_input_to_capacity:
                layer.mlp.register_forward_pre_hook(pad_where_tokens_are_dropped)

    def remember(self, features_IVH: torch.Tensor, row_tiles_BM: torch.Tensor, places_I5: torch.Tensor | None) -> VisionMemory:
        """Keys and values of every tap here, once per tile, gathered for the rows that share them. Absent tiles (-1) repeat tile 0 and are never visible.
        `places_I5` None: every tile is a picture of its own."""
        tiles = row_tiles_BM.clamp(min=0)

        def rows(x_IVND: torch.Tensor) -> torch.Tensor:
            return x_IVND[tiles].flatten(1, 2).transpose(1, 2)

        if places_I5 is None:
            places_I5 = torch.tensor([WHOLE], device=features_IVH.device)
        positions = patch_positions(features_IVH.shape[1], features_IVH.shape[2], places_I5)
        made = [self.taps[tap].memory(features_IVH, positions, places_I5[:, 4]) for tap in self.stage.asks]
        return VisionMemory(tuple(rows(key) for key, _ in made), tuple(rows(value) for _, value in made))

    def forward(self, hidden_SBH: torch.Tensor, waiting: dict[int, torch.Tensor], call: Call) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(hidden states, refinements that wait for a target on a later stage). `waiting`: those that arrived, by tap."""
        layers = self.stage.layers
        if self._recompute_layers and torch.is_grad_enabled():
            for start in range(layers.start, layers.stop, self._recompute_layers):
                hidden_SBH, waiting = self._recomputed(range(start, min(start + self._recompute_layers, layers.stop)), hidden_SBH, waiting, call)
        else:
            hidden_SBH, waiting = self._run(layers, hidden_SBH, waiting, call)
        return hidden_SBH if self.final_layernorm is None else self.final_layernorm(hidden_SBH), waiting

    def routers(self, layers: Sequence[int] | None = None) -> list[Router]:
        """The routers of those of the given layers (by default of all layers here) that have experts, in order."""
        blocks = [self.layers[number].mlp for number in (self.stage.layers if layers is None else layers)]
        return [block.router for block in blocks if isinstance(block, MoELayer)]

    def _run(
        self, layers: Sequence[int], hidden_SBH: torch.Tensor, waiting: dict[int, torch.Tensor], call: Call
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        cos, sin = call.rope

        def layer(number: int, hidden_SBH: torch.Tensor) -> torch.Tensor:
            computed: torch.Tensor = self.layers[number](
                hidden_SBH,
                attention_mask=None,
                rotary_pos_cos=cos,
                rotary_pos_sin=sin,
                packed_seq_params=call.frame,
                padding_mask=call.padding_BS,
                inference_context=call.cache,
            )[0]
            return computed

        return self.walk(layers, hidden_SBH, waiting, call.memory, call.sight, layer)

    def walk(
        self,
        layers: Sequence[int],
        hidden_SBH: torch.Tensor,
        waiting: Mapping[int, torch.Tensor],
        memory: VisionMemory | None,
        sight: Sight | None,
        layer: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The given layers in turn, each computed by `layer`, between what ends and what starts there."""
        waiting = dict(waiting)
        for number in layers:
            for tap in [tap for tap in waiting if self.ends[tap][1] == number]:
                hidden_SBH = self.injections[tap](hidden_SBH, waiting.pop(tap))
            hidden_SBH = layer(number, hidden_SBH)
            if memory is None or sight is None:
                continue
            for place, tap in enumerate(self.stage.asks):
                if self.ends[tap][0] == number:
                    waiting[tap] = self.taps[tap](hidden_SBH, memory.keys[place], memory.values[place], sight)
        return hidden_SBH, waiting

    def _recomputed(
        self, layers: range, hidden_SBH: torch.Tensor, waiting: dict[int, torch.Tensor], call: Call
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """`_run` with its activations dropped. What waits, and the vision memory, are inputs; what waits afterwards is an output."""
        arrived = tuple(waiting)
        memory = call.memory if call.memory is not None else VisionMemory((), ())
        left = [
            tap
            for tap, (source, target) in enumerate(self.ends)
            if (tap in arrived or (source in layers and call.memory is not None)) and target >= layers.stop
        ]

        def run(hidden: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            before, keys, values = (tensors[: len(arrived)], tensors[len(arrived) :][: len(memory.keys)], tensors[len(arrived) + len(memory.keys) :])
            own = VisionMemory(keys, values) if call.memory is not None else None
            hidden, after = self._run(layers, hidden, dict(zip(arrived, before, strict=True)), Call(call.rope, own, call.sight, call.frame, call.padding_BS))
            return hidden, *(after[tap] for tap in left)

        hidden_SBH, *after = recomputed(run, self.routers(layers), hidden_SBH, *waiting.values(), *memory.keys, *memory.values)
        return hidden_SBH, dict(zip(left, after, strict=True))

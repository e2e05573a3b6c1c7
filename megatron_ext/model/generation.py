"""The model as generation uses it: reads prompts once, then takes one token per row and step, with the modules and weights of training.

    prefill(model, prompts)      -> logits after each prompt, Memory
    decode(model, token, memory) -> logits after it; the memory has grown by one token per row

For layouts without pipeline stages and context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.attention import KVCache
from megatron_ext.model.clvr import Sight, VisionMemory
from megatron_ext.model.clvr_block import Call
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.rope import rope_angles


@dataclass(frozen=True)
class Memory:
    """What generation keeps of its rows: self-attention cache, vision memory, and how much of it the next token sees."""

    cache: KVCache
    vision: VisionMemory | None
    until_B: torch.Tensor

    def select(self, rows: torch.Tensor) -> Memory:
        """The memory of the given rows, repeated or dropped as asked. Changes the cache in place."""
        self.cache.select(rows)
        return replace(self, vision=None if self.vision is None else self.vision.select(rows), until_B=self.until_B[rows])


def prefill(model: VisionLanguageModel, inputs: ModelInputs, lengths_B: torch.Tensor, capacity: int) -> tuple[torch.Tensor, Memory]:
    """Reads prompts of the given lengths. Returns the logits [B, vocab / tp] after each row's last token, and the memory to decode from."""
    frame = model.frame(inputs)
    payload = model.embed(inputs, frame)
    vision, sight = model.look(inputs, frame, payload.features_IVH)
    cache = KVCache(capacity)
    hidden, _ = model.decoder(payload.hidden_SBH, {}, Call(model.rope(frame), vision, sight, cache=cache))
    cache.start_decode(lengths_B)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=model.tp_group)
    rows = torch.arange(len(lengths_B), device=hidden.device)
    last_B1H = hidden[lengths_B - 1, rows][:, None]
    until_B = torch.zeros_like(lengths_B) if sight is None else sight.until_BS[rows, lengths_B - 1]
    return model.logits(model.scatter(last_B1H))[: len(rows), 0], Memory(cache, vision, until_B)


def decode(model: VisionLanguageModel, tokens_B: torch.Tensor, memory: Memory) -> torch.Tensor:
    """One new token per row -> logits [B, vocab / tp] after it. The rows stand on the first axis, which sequence parallelism splits."""
    positions_B = memory.cache.lengths_B
    padded_B = F.pad(positions_B, (0, -len(positions_B) % model.tp_group.size()))
    rope = rope_angles(padded_B[:, None], model.model_config)
    nothing_B, everywhere_B = torch.zeros_like(memory.until_B), torch.ones_like(memory.until_B, dtype=torch.bool)
    sight = Sight(nothing_B[:, None], memory.until_B[:, None], everywhere_B[:, None], decoding=True)
    hidden = model.scatter(model.embed_tokens(tokens_B[:, None]).transpose(0, 1))
    hidden, _ = model.decoder(hidden, {}, Call(rope, memory.vision, sight, cache=memory.cache))
    memory.cache.advance()
    return model.logits(hidden)[: len(tokens_B), 0]

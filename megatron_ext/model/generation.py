"""The model as generation uses it: reads prompts once, then takes one token per row and step, with the modules and weights of training.

    read(model, prompts)          -> logits after each prompt, and what its answers need of it
    memory.admit(...)             as many rows for each prompt as are to answer it
    decode(model, tokens, memory) -> logits after one more token of every row

For layouts without pipeline stages and context parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.clvr_block import Call
from megatron_ext.model.decode_step import decode_step
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.memory import Memory, PromptKeys
from megatron_ext.model.rope import rope_angles
from megatron_ext.model.sight import Sight, VisionMemory


@dataclass(frozen=True)
class Reading:
    """What reading P prompts gave: `logits_PV` [P, vocab / tp] after the last token of each, and what is remembered of them; `until_P`: how many vision tokens
    stand before that token."""

    logits_PV: torch.Tensor
    lengths_P: np.ndarray
    keys: PromptKeys
    vision: VisionMemory | None
    until_P: np.ndarray

    def seat(self, memory: Memory, rows_P: Sequence[int]) -> torch.Tensor:
        """Admits the prompts, prompt p with `rows_P[p]` rows; the logits [rows, vocab / tp] that their first tokens are drawn from."""
        vision = () if self.vision is None else zip(self.vision.keys, self.vision.values, strict=True)
        memory.admit(self.keys, self.lengths_P, dict(enumerate(vision)), self.until_P, rows_P)
        return self.logits_PV.repeat_interleave(torch.tensor(rows_P, device=self.logits_PV.device), dim=0)


def read(model: VisionLanguageModel, inputs: ModelInputs, lengths_P: np.ndarray, parts: int = 1) -> Reading:
    """Reads right-padded prompts of the given lengths, in so many equal parts, one after the other: what a layer needs beside the keys and values goes with the
    length of a part. Their length divides by `parts` times the tensor-parallel size."""
    frame = model.frame(inputs)
    payload = model.embed(inputs, frame)
    vision, sight = model.look(inputs, frame, payload.sources_IVW)
    keys = PromptKeys()
    rows_P, last_P = torch.arange(len(lengths_P), device=inputs.tokens_BS.device), torch.from_numpy(lengths_P - 1).to(inputs.tokens_BS.device)
    last_PH = payload.hidden_SBH.new_empty(len(lengths_P), payload.hidden_SBH.shape[2])
    for part, hidden_SBH, call in _parts(model, payload.hidden_SBH, Call(model.rope(frame), vision, sight, cache=keys), parts):
        hidden_SBH = _gather(model, model.decoder(hidden_SBH, {}, call)[0])
        ends_P = (last_P >= part.start) & (last_P < part.stop)
        last_PH[ends_P] = hidden_SBH[last_P[ends_P] - part.start, rows_P[ends_P]]
    until_P = np.zeros_like(lengths_P) if sight is None else sight.until_BS[rows_P, last_P].cpu().numpy()
    logits = model.logits(model.scatter(last_PH[:, None]))[: len(rows_P), 0]
    return Reading(logits, lengths_P, keys, vision if model.model_config.clvr.answers_look else None, until_P)


def _parts(model: VisionLanguageModel, hidden_SBH: torch.Tensor, whole: Call, parts: int) -> Iterator[tuple[slice, torch.Tensor, Call]]:
    """Positions of each part, its hidden states (a slice of the part under sequence parallelism), and its call."""
    length = whole.rope[0].shape[0]
    if parts == 1:
        yield slice(0, length), hidden_SBH, whole
        return
    hidden_SBH, cos, sin, sight = _gather(model, hidden_SBH), *whole.rope, whole.sight
    for start in range(0, length, length // parts):
        part = slice(start, start + length // parts)
        seen = None if sight is None else sight.part(part)
        yield part, model.scatter(hidden_SBH[part]), Call((cos[part], sin[part]), whole.memory, seen, cache=whole.cache)


def _gather(model: VisionLanguageModel, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """What `model.scatter` undoes."""
    if not model.config.sequence_parallel:
        return hidden_SBH
    return gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False, group=model.tp_group)


def decode(model: VisionLanguageModel, tokens_R: torch.Tensor, memory: Memory) -> torch.Tensor:
    """One new token per row -> logits [R, vocab / tp] after it; the memory grows by it. The rows stand on the first axis, which sequence parallelism splits. A
    rank without rows takes part with rows of padding."""
    memory_of_images = memory.vision() if len(tokens_R) else None
    looks = (None, None) if memory_of_images is None else (VisionMemory(*memory_of_images), _sight(memory))
    if model.decodes_whole and len(tokens_R):
        rope = rope_angles(memory.positions_R, model.model_config)
        hidden = decode_step(model.decoder, model.embed_tokens(tokens_R[None]), rope, memory, *looks)
    else:
        hidden = _over_ranks(model, tokens_R, memory, *looks)
    memory.advance()
    return model.logits(hidden)[: len(tokens_R), 0]


def _over_ranks(model: VisionLanguageModel, tokens_R: torch.Tensor, memory: Memory, vision: VisionMemory | None, sight: Sight | None) -> torch.Tensor:
    """The layers of training, padded to a row a rank at least: [rows, 1, H]."""
    rows, ranks = len(tokens_R), model.tp_group.size()
    padding = max(rows + -rows % ranks, ranks) - rows
    tokens, positions = (F.pad(x, (0, padding)) for x in (tokens_R, memory.positions_R))
    hidden = model.scatter(model.embed_tokens(tokens[:, None]).transpose(0, 1))
    return model.decoder(hidden, {}, Call(rope_angles(positions[:, None], model.model_config), vision, sight, cache=memory))[0]


def _sight(memory: Memory) -> Sight:
    until_P1 = memory.until_P[:, None]
    return Sight(torch.zeros_like(until_P1), until_P1, torch.ones_like(until_P1, dtype=torch.bool), memory.seats)

"""The memory of generation where an answer must be attended to as the learner attends to it: prompt and answer as one row.

`Memory` reads a prompt once for all of its answers and takes the mean of two softmaxes, which rounds otherwise than one softmax over the row. This one
stores the same, and lays the row's keys end to end in every step, which costs their copy.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from megatron_ext.device.batch_invariant.attention import BLOCK, attention
from megatron_ext.model.memory import Memory
from megatron_ext.shapes import round_up


class WholeMemory(Memory):
    def attend(self, layer: int, query_RKQD: torch.Tensor, key_RKD: torch.Tensor, value_RKD: torch.Tensor) -> torch.Tensor:
        pairs = zip(self._prompts.used(layer, self._longest_prompt), self._write(layer, key_RKD, value_RKD), strict=True)
        keys, values = (self._laid_out(prompt, answer) for prompt, answer in pairs)
        return attention(query_RKQD, keys, values, self._row_mask)[0]

    def advance(self) -> None:
        super().advance()
        self._forget("_places_RS", "_row_mask")

    def _changed(self) -> None:
        super()._changed()
        self._forget("_prompts_R", "_places_RS", "_row_mask")

    def _laid_out(self, prompt_PNSD: torch.Tensor, answer_RNTD: torch.Tensor) -> torch.Tensor:
        """[R, N_kv, S, D], every answer right behind its prompt."""
        side_by_side = torch.cat([prompt_PNSD[self._prompts_R], answer_RNTD], dim=2)
        rows, heads, places, size = side_by_side.shape
        run_RN1 = places * torch.arange(rows * heads, device=side_by_side.device).view(rows, heads, 1)
        return side_by_side.view(-1, size)[(run_RN1 + self._places_RS[:, None]).flatten()].view(rows, heads, -1, size)

    @cached_property
    def _prompts_R(self) -> torch.Tensor:
        return torch.from_numpy(self._prompt_R).to(self._device)

    @cached_property
    def _places_RS(self) -> torch.Tensor:
        """Int64: where the keys of a row's positions stand when prompt and answer lie side by side, each padded to the longest. Whole blocks; what is beyond
        the row is hidden."""
        lengths_R1 = self._lengths_P[self._prompt_R][:, None]
        last = self._longest_prompt + self._longest_answer - 1
        place_1S = np.arange(round_up(last + 1, BLOCK))[None]
        behind = np.minimum(self._longest_prompt + place_1S - lengths_R1, last)
        return torch.from_numpy(np.where(place_1S < lengths_R1, place_1S, behind)).to(self._device)

    @cached_property
    def _row_mask(self) -> torch.Tensor:
        """True at the tokens that are there, the newest included: [R, 1, 1, S]."""
        lengths_R1 = (self._lengths_P[self._prompt_R] + self._lengths_R + 1)[:, None]
        return torch.from_numpy(np.arange(self._places_RS.shape[1])[None] < lengths_R1).to(self._device)[:, None, None]

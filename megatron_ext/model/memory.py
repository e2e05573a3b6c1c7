"""What generation keeps between steps: keys and values of prompts once, of answers row by row, and what CLVR's taps look at.

    prompt p   [P, N_kv, S, D] a layer     made by its prefill, shared by all rows that answer it
               [P, N_kv, V, D] a tap       made from its images
    row r      [R, N_kv, T, D] a layer     what its answer has added, a token a step

A row that leaves is overwritten by the last one, and so is a prompt without rows: what is alive always stands side by side, so that a step gathers nothing and
skips nothing. Attention over a prompt and an answer is joined from both (`attend.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_ext.batch import Prompt
from megatron_ext.config.clvr_sizes import kv_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.attend import attend, hide_beyond, join
from megatron_ext.model.seats import Seats
from megatron_ext.model.shelf import Pair, Shelf, filled

FIRST_LENGTH = 32
"""Tokens that an answer has room for at first; the room is doubled as the longest one grows."""


class PromptKeys:
    """What the layers compute while prompts are read."""

    def __init__(self) -> None:
        self.layers: dict[int, Pair] = {}

    def keep(self, layer: int, key_SPND: torch.Tensor, value_SPND: torch.Tensor) -> Pair:
        """Keys and values [P, N_kv, S, D] of all positions so far."""
        pair = key_SPND.permute(1, 2, 0, 3), value_SPND.permute(1, 2, 0, 3)
        if layer in self.layers:
            keys, values = (torch.cat([before, new], dim=2) for before, new in zip(self.layers[layer], pair, strict=True))
            pair = keys, values
        self.layers[layer] = pair
        return pair


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank of one token's keys and values in all layers, and of one tile's in all taps."""

    token: int
    tile: int

    @classmethod
    def of(cls, model: ModelConfig, tp: int) -> Footprint:
        pair, clvr = 2 * (2 if model.dtype == "bf16" else 4), model.clvr
        looks = model.vision.enabled and clvr.answers_look
        tile = kv_shape(model)[0] * len(clvr.active_taps) * clvr.num_kv_heads * clvr.head_dim if looks else 0
        return cls(pair * model.num_layers * model.num_query_groups * model.head_dim // tp, pair * tile // tp)


class Memory:
    """Starts empty; `admit` seats prompts with their rows, `retire` lets rows go. The rows' order is their places in every tensor of a step.

    `most_new`: tokens that an answer may have.
    """

    def __init__(self, most_new: int, device: torch.device) -> None:
        self._most_new, self._device = most_new, device
        self._prompts, self._answers, self._vision = Shelf(), Shelf(), Shelf()
        self._prompt_R = np.zeros(0, np.int64)
        self._lengths_P, self._lengths_R, self._until_P = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def num_rows(self) -> int:
        return len(self._prompt_R)

    @cached_property
    def seats(self) -> Seats:
        return Seats.of(self._prompt_R, len(self._lengths_P), self._device)

    @cached_property
    def positions_R(self) -> torch.Tensor:
        """Int64 [R]: where in its sequence each row's next token stands."""
        return torch.from_numpy(self._lengths_P[self._prompt_R] + self._lengths_R).to(self._device)

    @cached_property
    def until_P(self) -> torch.Tensor:
        """Int64 [P]: how many of its vision tokens the answers to a prompt look at."""
        return torch.from_numpy(self._until_P).to(self._device)

    def vision(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None:
        """Keys and values [P, N_kv, V, D] of every tap; None without taps."""
        pairs = [self._vision.used(tap, None) for tap in self._vision.layers()]
        return (tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)) if pairs else None

    def admit(self, keys: PromptKeys, lengths_P: np.ndarray, taps: Mapping[int, Pair], until_P: np.ndarray, rows_P: Sequence[int]) -> None:
        """Seats prompts of the given lengths behind those that are here; prompt p is answered by `rows_P[p]` new rows."""
        first = len(self._lengths_P)
        self._prompts.extend(keys.layers)
        self._vision.extend(taps)
        self._lengths_P, self._until_P = np.concatenate([self._lengths_P, lengths_P]), np.concatenate([self._until_P, until_P])
        self._prompt_R = np.concatenate([self._prompt_R, np.repeat(np.arange(first, first + len(rows_P)), rows_P)])
        self._lengths_R = np.concatenate([self._lengths_R, np.zeros(int(np.sum(rows_P)), np.int64)])
        self._changed()

    def retire(self, left_R: np.ndarray) -> np.ndarray:
        """Lets the rows go where `left_R` is true. Returns which old row stands at each place now."""
        kept_R = filled(left_R)
        self._answers.arrange(kept_R)
        self._prompt_R, self._lengths_R = self._prompt_R[kept_R], self._lengths_R[kept_R]
        kept_P = filled(np.bincount(self._prompt_R, minlength=len(self._lengths_P)) == 0)
        self._prompts.arrange(kept_P)
        self._vision.arrange(kept_P)
        place_P = np.zeros(len(self._lengths_P), np.int64)
        place_P[kept_P] = np.arange(len(kept_P))
        self._prompt_R = place_P[self._prompt_R]
        self._lengths_P, self._until_P = self._lengths_P[kept_P], self._until_P[kept_P]
        self._changed()
        return kept_R

    def attend(self, layer: int, query_RKQD: torch.Tensor, key_RKD: torch.Tensor, value_RKD: torch.Tensor) -> torch.Tensor:
        """Stores the keys and values of one token of each row and returns what its queries attend to, [R, K, Q, D]: K heads of keys with Q queries each."""
        answer = attend(query_RKQD, *self._write(layer, key_RKD, value_RKD), self._answer_bias)
        query_PKGQD = self.seats.by_prompt(query_RKQD).transpose(1, 2)
        found = attend(query_PKGQD.flatten(2, 3), *self._prompts.used(layer, self._longest_prompt), self._prompt_bias)
        out, lse = (self.seats.by_row(x.unflatten(2, query_PKGQD.shape[2:4]).transpose(1, 2)) for x in found)
        return join((out, lse), answer)

    def advance(self) -> None:
        """Every layer has stored its token."""
        self._lengths_R = self._lengths_R + 1
        self._forget("positions_R", "room", "_longest_answer", "_answer_bias", "_places_R")

    @cached_property
    def room(self) -> int:
        """Tokens that every answer has room for in the next step: they stand in one tensor, so all have as much as the longest."""
        return min(self._most_new, max(FIRST_LENGTH, 1 << (self._longest_answer - 1).bit_length()))

    def need_bytes(self, footprint: Footprint, rows: int, joining: Sequence[Prompt] = ()) -> int:
        """What the next step takes with `rows` rows in all, and with prompts that join those that are here."""
        longest = max([int(self._lengths_P.max(initial=0)), *(len(prompt.tokens_S) for prompt in joining)])
        tokens = rows * self.room + (len(self._lengths_P) + len(joining)) * longest
        return footprint.token * tokens + footprint.tile * sum(len(prompt.tiles) for prompt in joining) + self._vision.num_bytes

    def num_bytes(self) -> int:
        """What the tensors take."""
        return self._prompts.num_bytes + self._answers.num_bytes + self._vision.num_bytes

    def _write(self, layer: int, key_RKD: torch.Tensor, value_RKD: torch.Tensor) -> Pair:
        rows, longest = self.num_rows, self._longest_answer
        keys, values = self._answers.reserve(layer, rows, self.room, key_RKD)
        keys[self._rows_R, :, self._places_R] = key_RKD
        values[self._rows_R, :, self._places_R] = value_RKD
        return keys[:rows, :, :longest], values[:rows, :, :longest]

    @cached_property
    def _rows_R(self) -> torch.Tensor:
        return torch.arange(self.num_rows, device=self._device)

    @cached_property
    def _places_R(self) -> torch.Tensor:
        return torch.from_numpy(self._lengths_R).to(self._device)

    @cached_property
    def _longest_answer(self) -> int:
        """With the token that is written now."""
        return int(self._lengths_R.max(initial=0)) + 1

    @cached_property
    def _longest_prompt(self) -> int:
        return int(self._lengths_P.max())

    @cached_property
    def _answer_bias(self) -> torch.Tensor:
        """0 at the tokens that are there, the newest included, else -inf: [R, 1, 1, T]."""
        return hide_beyond(self._lengths_R + 1, self._device)

    @cached_property
    def _prompt_bias(self) -> torch.Tensor:
        return hide_beyond(self._lengths_P, self._device)

    def _changed(self) -> None:
        self._forget("seats", "positions_R", "until_P", "room", "_rows_R", "_places_R", "_longest_answer", "_longest_prompt", "_answer_bias", "_prompt_bias")

    def _forget(self, *names: str) -> None:
        for name in names:
            self.__dict__.pop(name, None)

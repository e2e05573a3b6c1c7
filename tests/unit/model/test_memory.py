"""The memory of generation against a plain one that keeps every row's whole sequence: the same attention, whoever joins and leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.model.memory import FIRST_LENGTH, Memory, PromptKeys
from megatron_ext.model.seats import Seats
from megatron_ext.model.whole_memory import WholeMemory

HEADS, KV_HEADS, SIZE, LAYERS = 4, 2, 3, 2


@dataclass
class PlainRow:
    """All keys and values of a row, [length, N_kv, D] a layer."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def attend(self, layer: int, query_ND: torch.Tensor, key_ND: torch.Tensor, value_ND: torch.Tensor) -> torch.Tensor:
        self.keys[layer] = torch.cat([self.keys[layer], key_ND[None]])
        self.values[layer] = torch.cat([self.values[layer], value_ND[None]])
        keys, values = (x[layer].repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1) for x in (self.keys, self.values))
        weights = torch.softmax(query_ND[:, None] @ keys.transpose(1, 2) / SIZE**0.5, dim=-1)
        return (weights @ values)[:, 0]


class Both:
    """The memory beside plain rows, fed the same random numbers."""

    def __init__(self, seed: int, most_new: int = 100, kind: type[Memory] = Memory) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.memory, self.rows = kind(most_new, torch.device("cpu")), list[PlainRow]()

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def admit(self, lengths: list[int], rows: list[int]) -> None:
        keys, longest = PromptKeys(), max(lengths)
        made = [[self.draw(longest, len(lengths), KV_HEADS, SIZE) for _ in range(2)] for _ in range(LAYERS)]
        for layer, (key, value) in enumerate(made):
            keys.keep(layer, key, value)
        self.memory.admit(keys, np.array(lengths), {}, np.zeros(len(lengths), np.int64), rows)
        for prompt, (length, count) in enumerate(zip(lengths, rows, strict=True)):
            for _ in range(count):
                self.rows.append(PlainRow(*([pair[kind][:length, prompt] for pair in made] for kind in (0, 1))))

    def step(self) -> None:
        count = len(self.rows)
        for layer in range(LAYERS):
            query, key, value = self.draw(count, HEADS, SIZE), self.draw(count, KV_HEADS, SIZE), self.draw(count, KV_HEADS, SIZE)
            found = self.memory.attend(layer, query.unflatten(1, (KV_HEADS, -1)), key, value).flatten(1, 2)
            plain = torch.stack([row.attend(layer, query[i], key[i], value[i]) for i, row in enumerate(self.rows)])
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)  # softmax is in float32
        self.memory.advance()

    def retire(self, left: list[bool]) -> None:
        self.rows = [self.rows[row] for row in self.memory.retire(np.array(left))]
        assert self.memory.num_rows == len(self.rows) == left.count(False)


@pytest.mark.parametrize("kind", [Memory, WholeMemory])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention_is_that_of_whole_sequences_whoever_joins_and_leaves(kind: type[Memory], data: st.DataObject) -> None:
    both = Both(seed=data.draw(st.integers(0, 1000)), kind=kind)
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()) or not both.rows:
            lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
            both.admit(lengths, data.draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths))))
        for _ in range(data.draw(st.integers(0, 3))):
            both.step()
        left = data.draw(st.lists(st.booleans(), min_size=len(both.rows), max_size=len(both.rows)))
        both.retire(left)


def test_an_answer_grows_beyond_the_room_it_began_with() -> None:
    both = Both(seed=0)
    both.admit([5, 3], [2, 1])
    for _ in range(FIRST_LENGTH + 3):
        both.step()


def test_room_is_never_made_for_more_tokens_than_an_answer_may_have() -> None:
    both = Both(seed=0, most_new=FIRST_LENGTH + 8)
    both.admit([1], [1])
    for _ in range(FIRST_LENGTH + 8):
        both.step()
    of_answer, of_prompt = (2 * LAYERS * KV_HEADS * SIZE * 8 * length for length in (FIRST_LENGTH + 8, 1))
    assert both.memory.num_bytes() == of_answer + of_prompt


def test_a_prompt_is_stored_once_however_many_answer_it() -> None:
    one, many = Both(seed=0), Both(seed=0)
    one.admit([50], [1])
    many.admit([50], [64])
    assert one.memory.num_bytes() == many.memory.num_bytes()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_seats_go_to_prompts_and_back(prompts: list[int]) -> None:
    prompt_R = np.array(prompts)
    seats = Seats.of(prompt_R, 5, torch.device("cpu"))
    rows = torch.arange(len(prompts))
    by_prompt = seats.by_prompt(rows)
    assert seats.by_row(by_prompt).tolist() == rows.tolist()
    for prompt in range(5):
        assert by_prompt[prompt, : prompts.count(prompt)].tolist() == np.flatnonzero(prompt_R == prompt).tolist()

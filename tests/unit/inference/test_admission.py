"""Who is read when: everyone once, never more than there is room for, in few readings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.inference.admission import Request, WaitingRoom


def requests(lengths: list[int], samples: int) -> list[Request]:
    prompts = [Prompt(str(number), "none", np.zeros(length, np.int32), NO_TILES, "") for number, length in enumerate(lengths)]
    return [Request(number, prompt, tuple((sample, 0) for sample in range(samples))) for number, prompt in enumerate(prompts)]


def room(asked: list[Request], places: int, most_tokens: int) -> WaitingRoom:
    waiting = WaitingRoom(places, most_tokens)
    waiting.add(asked)
    return waiting


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 5), st.integers(1, 12), st.integers(1, 60), st.randoms(use_true_random=False))
def test_everyone_is_read_once_and_there_is_room_for_all(lengths: list[int], samples: int, places: int, most_tokens: int, random: object) -> None:
    waiting, taken, seen = room(requests(lengths, samples), places, most_tokens), 0, []
    for _ in range(1000):
        joining = waiting.next(taken)
        taken += samples * len(joining)
        seen += [request.number for request in joining]
        if joining:
            assert taken <= places or len(joining) * samples == taken == samples
            assert len(joining) == 1 or len(joining) * max(len(request.prompt.tokens_S) for request in joining) <= most_tokens
        if not taken:
            break
        taken -= random.randint(1, taken)  # type: ignore[attr-defined]
    assert sorted(seen) == list(range(len(lengths)))


def test_the_longest_prompts_are_read_first() -> None:
    waiting = room(requests([3, 9, 5, 9], 1), 4, 1000)
    assert [request.number for request in waiting.next(0)] == [1, 3, 2, 0]


@pytest.mark.parametrize(("taken", "read"), [(16, 0), (13, 0), (12, 4), (8, 8)])
def test_places_are_filled_once_a_quarter_is_free(taken: int, read: int) -> None:
    assert len(room(requests([4] * 40, 1), 16, 1000).next(taken)) == read


def test_the_last_ones_do_not_wait_for_a_quarter() -> None:
    assert len(room(requests([4] * 2, 1), 16, 1000).next(14)) == 2

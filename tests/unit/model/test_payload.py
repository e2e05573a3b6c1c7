"""What travels between pipeline stages arrives as it left, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.model.payload import Payload, pack, unpack
from megatron_ext.parallel.stages import Stage

EMPTY = Stage(0, 2, range(1), (), (), (), True, False, False)


def ends(taps: tuple[int, ...], features: bool) -> tuple[Stage, Stage]:
    return replace(EMPTY, sends=taps, sends_features=features), replace(EMPTY, number=1, receives=taps, receives_features=features)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.sets(st.integers(0, 3)), st.booleans(), st.integers(1, 3))
def test_a_payload_comes_back_whole(length: int, rows: int, hidden: int, taps: set[int], features: bool, tiles: int) -> None:
    sender, receiver = ends(tuple(sorted(taps)), features)
    made = Payload(torch.randn(length, rows, hidden), {tap: torch.randn(length, rows, hidden) for tap in taps}, torch.randn(tiles, 5, 3))
    back = unpack(pack(made, sender), receiver, length, tiles, 5, 3)
    assert torch.equal(back.hidden_SBH, made.hidden_SBH)
    assert back.waiting.keys() == taps and all(torch.equal(back.waiting[tap], made.waiting[tap]) for tap in taps)
    assert (back.sources_IVW is not None) == features
    assert back.sources_IVW is None or torch.equal(back.sources_IVW, made.sources_IVW)


def test_gradients_reach_every_part() -> None:
    sender, receiver = ends((1,), True)
    hidden, refinement, features = (torch.randn(*shape, requires_grad=True) for shape in ((2, 1, 4), (2, 1, 4), (1, 3, 3)))
    back = unpack(pack(Payload(hidden, {1: refinement}, features), sender), receiver, 2, 1, 3, 3)
    assert back.sources_IVW is not None
    (back.hidden_SBH.sum() + 2 * back.waiting[1].sum() + 3 * back.sources_IVW.sum()).backward()
    assert [float(x.grad.unique()) for x in (hidden, refinement, features) if x.grad is not None] == [1.0, 2.0, 3.0]


def test_stages_that_read_different_batches_are_told_apart_by_size() -> None:
    sender, receiver = ends((), False)
    sent = pack(Payload(torch.zeros(6, 1, 4), {}, None), sender)
    with pytest.raises(ValueError, match="stage 1 received 6 rows where its inputs make 4: do all stages read the same batch"):
        unpack(sent, receiver, 4, 1, 3, 3)

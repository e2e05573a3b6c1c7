"""The attention of CLVR's taps: what pictures show is what the model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ext.model.seats import Seats
from megatron_ext.model.sight import Sight, attention_weights, look

FROM, UNTIL = torch.tensor([[0, 0, 2]]), torch.tensor([[0, 3, 5]])
EVERYWHERE = Sight(FROM, UNTIL, torch.ones(1, 3, dtype=torch.bool))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_weights_sum_to_one_over_what_is_visible_and_are_zero_elsewhere() -> None:
    """Three positions see nothing, tokens 0 to 2, and tokens 2 to 4."""
    weights = attention_weights(random(3, 1, 4, 8), random(1, 2, 6, 8), EVERYWHERE)
    assert weights.shape == (1, 4, 3, 6)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(3), torch.tensor([0.0, 1.0, 1.0]).expand(1, 4, 3))
    assert (weights[0, 0] > 0).tolist() == [[False] * 6, [True] * 3 + [False] * 3, [False] * 2 + [True] * 3 + [False]]


def test_weights_times_values_are_what_the_fused_attention_gives() -> None:
    query, keys, values = random(3, 1, 4, 8), random(1, 2, 6, 8), random(1, 2, 6, 8)
    expected = look(query.permute(1, 2, 0, 3), keys, values, EVERYWHERE)
    torch.testing.assert_close(attention_weights(query, keys, EVERYWHERE) @ values.repeat_interleave(2, dim=1), expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_in_decode_every_row_has_the_weights_of_its_prompt(padding: int) -> None:
    """Rows 0 and 2 answer prompt 1, row 1 answers prompt 0; a row of padding has none."""
    keys, query = random(2, 2, 6, 8), random(3 + padding, 1, 4, 8)
    seats = Seats.of(np.array([1, 0, 1]), 2, torch.device("cpu"))
    until = torch.tensor([[4], [6]])
    found = attention_weights(query, keys, Sight(torch.zeros_like(until), until, until > 0, seats))
    for row, prompt in enumerate([1, 0, 1]):
        own = Sight(torch.zeros(1, 1), until[prompt : prompt + 1], until[:1] > 0)
        torch.testing.assert_close(found[row : row + 1], attention_weights(query[row : row + 1], keys[prompt : prompt + 1], own))
    assert len(found) == 3

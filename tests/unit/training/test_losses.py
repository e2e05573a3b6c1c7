"""The supervised loss against torch's cross entropy and by hand."""

from __future__ import annotations

import torch

from megatron_ext.batch.metric import Metric
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.losses import POSITIONS_PER_ROW, TILES_PER_ROW, TOKENS_PER_ROW, NextToken, masked_nll
from tests.support.training import own_microbatches, start


def test_only_marked_tokens_count() -> None:
    """-(-1) - (-4) = 5 over two tokens; the -2 in between is not a target."""
    loss, count = masked_nll(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    assert (float(loss), int(count)) == (5.0, 2)


def test_position_s_is_scored_on_the_token_after_it(context: ParallelContext) -> None:
    state = start(context)
    (batch,) = own_microbatches(0, 8, context)
    with torch.no_grad():
        output = state.wrapped[0](batch.inputs)
        loss, count, metrics = NextToken().loss(state.wrapped[0], batch, output)
        logits = output.transpose(0, 1)
    rows, positions = batch.mask_BS[:, 1:].nonzero(as_tuple=True)
    expected = torch.nn.functional.cross_entropy(logits[rows, positions], batch.inputs.tokens_BS[rows, positions + 1], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert int(count) == len(rows)
    assert metrics == {TOKENS_PER_ROW: Metric(batch.num_tokens, 8), POSITIONS_PER_ROW: Metric(8 * 24, 8), TILES_PER_ROW: Metric(8, 8)}

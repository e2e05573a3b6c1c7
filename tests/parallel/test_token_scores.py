"""Log-probs over a vocabulary that two ranks share are those of one rank, in supervised training and of the policy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.parallel.local import run_ranks
from tests.support.token_scores import VOCABULARY, inputs, scored, scores_of_a_rank


@pytest.mark.parametrize("banned", [0, 2, VOCABULARY // 2])
def test_two_ranks_with_half_of_the_vocabulary_each_agree_with_one(banned: int) -> None:
    """Banned tokens are all on the first rank, which may have no other. Without any it is the supervised loss."""
    logits_SBV, targets_BS, banned_V, weights_BS = inputs(banned)
    logits = logits_SBV.clone().requires_grad_()
    expected = scored(logits, targets_BS, banned_V if banned else None, SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    expected[0].backward(weights_BS)
    found = run_ranks(scores_of_a_rank, 2, banned, timeout_s=60)
    for part in found:
        for ours, whole in zip(part[:-1], expected, strict=True):
            torch.testing.assert_close(ours, whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[-1] for part in found], dim=-1), logits.grad, rtol=1e-5, atol=1e-6)

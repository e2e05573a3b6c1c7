"""The policy's log-probs over a vocabulary that two ranks share are those of one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.model.policy_head import policy_scores
from megatron_ext.parallel.local import run_ranks
from tests.support.policy_head import VOCABULARY, inputs, scores_of_a_rank


@pytest.mark.parametrize("banned", [2, VOCABULARY // 2])
def test_two_ranks_with_half_of_the_vocabulary_each_agree_with_one(banned: int) -> None:
    """Banned tokens are all on the first rank, which may have no other."""
    logits_SBV, targets_BS, banned_V, weights_BS = inputs(banned)
    logits = logits_SBV.clone().requires_grad_()
    logprobs, entropy = policy_scores(logits, targets_BS, 0.7, banned_V, SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    logprobs.backward(weights_BS)
    found = run_ranks(scores_of_a_rank, 2, banned, timeout_s=60)
    for part in found:
        torch.testing.assert_close(part[0], logprobs.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part[1], entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[2] for part in found], dim=-1), logits.grad, rtol=1e-5, atol=1e-6)

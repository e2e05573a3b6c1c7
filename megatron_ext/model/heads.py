"""From logits to the policy: which tokens may be sampled, at which temperature, with which log-probability.

Rollout and learner both go through these functions, so that the learner recomputes the very numbers that the rollout sampled from. Nothing gathers
the vocabulary here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def banned_tokens(vocab_size: int, usable: int, image_token: int, tp_group: Any, device: torch.device) -> torch.Tensor:
    """Bool [vocab / tp] of this rank: ids beyond the tokenizer, and the image placeholder, which would break re-scoring if it were generated."""
    ids = torch.arange(vocab_size, device=device).chunk(tp_group.size())[tp_group.rank()]
    return (ids >= usable) | (ids == image_token)


def policy_logits(logits: torch.Tensor, temperature: float, banned_V: torch.Tensor) -> torch.Tensor:
    """Float32 logits [..., vocab / tp] of the distribution that is sampled from: banned tokens at -inf, divided by the temperature (0, greedy,
    divides by 1)."""
    return (logits.float() / (temperature or 1.0)).masked_fill(banned_V, float("-inf"))


def token_logprobs(logits_SBV: torch.Tensor, targets_BS: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """log softmax of the vocabulary-parallel logits at the targets, float32 [B, S]. The caller shifts: `targets[:, s]` is what position s predicts.

    With tensor parallelism Megatron's cross entropy works in place: float32 logits are overwritten, so read them before, not after.
    """
    targets_SB = targets_BS.transpose(0, 1).contiguous()
    if tp_group.size() == 1:
        losses = F.cross_entropy(logits_SBV.float().flatten(0, 1), targets_SB.flatten(), reduction="none").view_as(targets_SB)
    else:
        losses = vocab_parallel_cross_entropy(logits_SBV.float(), targets_SB)  # over Megatron's own tensor-parallel group
    return -losses.transpose(0, 1)

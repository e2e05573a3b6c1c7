"""From logits to the policy: which tokens may be sampled, at which temperature, with which log-probability.

Rollout and learner both go through these functions, so that the learner recomputes the very numbers that the rollout sampled from. Nothing gathers
the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def banned_tokens(vocab_size: int, usable: int, never_said: Sequence[int], tp_group: Any, device: torch.device) -> torch.Tensor:
    """Bool [vocab / tp] of this rank: ids beyond the tokenizer, and `never_said`, the model's (`VisionLanguageModel.never_said`)."""
    ids = torch.arange(vocab_size, device=device).chunk(tp_group.size())[tp_group.rank()]
    return (ids >= usable) | torch.isin(ids, torch.tensor(never_said, device=device))


def policy_logits(logits: torch.Tensor, temperature: float, banned_V: torch.Tensor) -> torch.Tensor:
    """Float32 logits [..., vocab / tp] of the distribution that is sampled from: banned tokens at -inf, divided by the temperature (0, greedy,
    divides by 1)."""
    warm = logits.float() if temperature in (0, 1) else logits.float() / temperature
    return warm.masked_fill(banned_V, float("-inf"))


def decided(x_BS: torch.Tensor) -> torch.Tensor:
    """What stands at a token moves to the position that decides it; the last position decides nothing and holds 0."""
    return F.pad(x_BS[:, 1:], (0, 1))

"""What a tensor-parallel rank says of its part of a vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model.token_scores import policy_scores, token_logprobs
from megatron_ext.parallel.groups import open_parallel

VOCABULARY, LENGTH, ROWS = 12, 5, 2


def inputs(banned: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets, banned tokens (the first ones) and the gradient that arrives."""
    generator = torch.Generator().manual_seed(0)
    logits_SBV = 5 * torch.randn(LENGTH, ROWS, VOCABULARY, generator=generator)
    targets_BS = torch.randint(banned, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return logits_SBV, targets_BS, torch.arange(VOCABULARY) < banned, torch.randn(ROWS, LENGTH, generator=generator)


def scored(logits: torch.Tensor, targets_BS: torch.Tensor, banned_V: torch.Tensor | None, group: Any) -> tuple[torch.Tensor, ...]:
    """(log-probs, entropies) of a policy, (log-probs,) in supervised training."""
    chunk_numel = 3 * logits.shape[-1]
    if banned_V is not None:
        return policy_scores(logits, targets_BS, 0.7, banned_V, group, chunk_numel)
    return (token_logprobs(logits, targets_BS, group, chunk_numel),)


def scores_of_a_rank(rank: int, world_size: int, init_method: str, banned: int) -> tuple[torch.Tensor, ...]:
    """What `scored` gives, and the gradient of this rank's logits."""
    with open_parallel(ParallelConfig(num_ranks=world_size, tp=world_size), rank, world_size, init_method, seed=0) as context:
        logits_SBV, targets_BS, banned_V, weights_BS = inputs(banned)
        logits = logits_SBV.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
        found = scored(logits, targets_BS, banned_V.chunk(world_size)[rank] if banned else None, context.pgs.tp)
        found[0].backward(weights_BS)
        assert logits.grad is not None
        return (*(score.detach() for score in found), logits.grad)

"""From logits to the policy: which tokens may be sampled, at which temperature, with which log-probability.

Rollout and learner both go through these functions, so that the learner recomputes the very numbers that the rollout sampled from. Nothing gathers
the vocabulary here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.autograd.function import once_differentiable

CHUNKED_FROM = 4096
"""Vocabulary from which chunks are faster than one cross entropy over all positions (docs/benchmarks/cross_entropy.md)."""
CHUNK_NUMEL = 1 << 20
"""Logits of one chunk."""


def banned_tokens(vocab_size: int, usable: int, image_token: int, tp_group: Any, device: torch.device) -> torch.Tensor:
    """Bool [vocab / tp] of this rank: ids beyond the tokenizer, and the image placeholder, which would break re-scoring if it were generated."""
    ids = torch.arange(vocab_size, device=device).chunk(tp_group.size())[tp_group.rank()]
    return (ids >= usable) | (ids == image_token)


def policy_logits(logits: torch.Tensor, temperature: float, banned_V: torch.Tensor) -> torch.Tensor:
    """Float32 logits [..., vocab / tp] of the distribution that is sampled from: banned tokens at -inf, divided by the temperature (0, greedy,
    divides by 1)."""
    warm = logits.float() if temperature in (0, 1) else logits.float() / temperature
    return warm.masked_fill(banned_V, float("-inf"))


def decided(x_BS: torch.Tensor) -> torch.Tensor:
    """What stands at a token moves to the position that decides it; the last position decides nothing and holds 0."""
    return F.pad(x_BS[:, 1:], (0, 1))


def token_logprobs(logits_SBV: torch.Tensor, targets_BS: torch.Tensor, tp_group: Any) -> torch.Tensor:
    """log softmax of the vocabulary-parallel logits at the targets, float32 [B, S]. The caller shifts (`decided`): `targets[:, s]` is what position s predicts.

    With tensor parallelism Megatron's cross entropy works in place: float32 logits are overwritten, so read them before, not after. Without it, large
    vocabularies go in chunks of positions: no float32 copy of all logits, nor their log-softmax, is ever held.
    """
    targets_SB = targets_BS.transpose(0, 1).contiguous()
    if tp_group.size() == 1 and logits_SBV.shape[-1] >= CHUNKED_FROM:
        return chunked_logprobs(logits_SBV.flatten(0, 1), targets_SB.flatten()).view_as(targets_SB).transpose(0, 1)
    if tp_group.size() == 1:
        losses = F.cross_entropy(logits_SBV.float().flatten(0, 1), targets_SB.flatten(), reduction="none").view_as(targets_SB)
    else:
        losses = vocab_parallel_cross_entropy(logits_SBV.float(), targets_SB)  # over Megatron's own tensor-parallel group
    return -losses.transpose(0, 1)


def chunked_logprobs(logits_NV: torch.Tensor, targets_N: torch.Tensor, chunk_numel: int = CHUNK_NUMEL) -> torch.Tensor:
    """log softmax of the logits at the targets, float32 [N]; the gradient, softmax minus one-hot, is made chunk by chunk from the logits themselves."""
    return _ChunkedLogprobs.apply(logits_NV, targets_N, max(1, chunk_numel // logits_NV.shape[1]))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, rows: int) -> torch.Tensor:
        partition_N = torch.cat([chunk.float().logsumexp(-1) for chunk in logits_NV.split(rows)])
        ctx.rows = rows
        ctx.save_for_backward(logits_NV, targets_N, partition_N)
        return logits_NV.gather(1, targets_N[:, None])[:, 0].float() - partition_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_NV, targets_N, partition_N = ctx.saved_tensors
        d_logits_NV = torch.empty_like(logits_NV)
        parts = (tensor.split(ctx.rows) for tensor in (logits_NV, targets_N, partition_N, grad_N, d_logits_NV))
        for logits, targets, partition, grad, d_logits in zip(*parts, strict=True):
            exact = d_logits if d_logits.dtype == torch.float32 else torch.empty_like(d_logits, dtype=torch.float32)
            torch.sub(logits.float(), partition[:, None], out=exact)
            exact.exp_().mul_(-grad[:, None]).scatter_add_(1, targets[:, None], grad[:, None])
            if exact is not d_logits:
                d_logits.copy_(exact)
        return d_logits_NV, None, None

"""RMSNorm as Megatron needs it: built from a `TransformerConfig` and marked for sequence parallelism.

Megatron's own torch wrapper refuses sequence parallelism, because it does not mark its weight. The mark says: every tensor-parallel rank holds only
part of this weight's gradient (its slice of the sequence, or its heads), so Megatron sums the gradient over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

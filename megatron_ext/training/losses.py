"""The supervised objective: cross entropy of the next token, over the tokens that the loss mask marks.

loss = - sum_bs m[b, s + 1] log p(x[b, s + 1] | x[b, <= s]) / sum_bs m[b, s + 1]          sums over all microbatches of all data-parallel ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_ext.batch.metric import Metric
from megatron_ext.model.heads import decided
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.token_scores import token_logprobs
from megatron_ext.observe.metrics_file import POSITIONS_PER_ROW, TILES_PER_ROW
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward pass. `mask_BS` float32: 1 where the token at s is a target, which position s - 1 predicts. `num_tokens`: all but padding;
    `num_samples`: conversations."""

    inputs: ModelInputs
    mask_BS: torch.Tensor
    num_tokens: int
    num_samples: int

    def __post_init__(self) -> None:
        check_shape("mask_BS", self.mask_BS, *self.inputs.tokens_BS.shape)


def masked_nll(logprobs_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the masked negative log-probabilities, int32 count of them).

    >>> masked_nll(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    (tensor(5.), tensor(2, dtype=torch.int32))
    """
    return -(logprobs_BS * mask_BS).sum(), mask_BS.sum().to(torch.int32)


TOKENS_PER_ROW = "data/tokens_per_row"


class NextToken:
    """The objective of both supervised stages: (sum of losses, number of targets, and per row its tokens, its positions with padding, its image tiles)."""

    def forward(self, model: DistributedDataParallel, batch: Microbatch) -> torch.Tensor:
        return model(batch.inputs)

    def loss(self, model: DistributedDataParallel, batch: Microbatch, logits_SBV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        bare = model.module
        frame = bare.frame(batch.inputs)
        # The last position predicts nothing. Its logits stay, masked: cutting them off would copy the rest. A packed sample's first token is never a target.
        targets_BS, mask_BS = (frame.take(decided(x_BS)) for x_BS in (batch.inputs.tokens_BS, batch.mask_BS))
        loss, num_tokens = masked_nll(token_logprobs(logits_SBV, targets_BS, bare.tp_group), mask_BS)
        return loss, num_tokens, row_metrics(batch, frame.local_S is None or bare.cp_group.rank() == 0)


def row_metrics(batch: Microbatch, counted: bool) -> dict[str, Metric]:
    """Per row its tokens, its positions with padding, its image tiles. `counted`: whether of the ranks that share the rows this is the one that counts them."""
    of_rows = {TOKENS_PER_ROW: batch.num_tokens, POSITIONS_PER_ROW: batch.inputs.tokens_BS.numel(), TILES_PER_ROW: len(batch.inputs.tiles_ICHW)}
    return {name: Metric(total if counted else 0, batch.num_samples if counted else 0) for name, total in of_rows.items()}

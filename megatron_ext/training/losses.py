"""The supervised objective: cross entropy of the next token, over the tokens that the loss mask marks.

loss = - sum_bs m[b, s + 1] log p(x[b, s + 1] | x[b, <= s]) / sum_bs m[b, s + 1]          sums over all microbatches of all data-parallel ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel

from megatron_ext.batch.metric import Metric
from megatron_ext.model.heads import token_logprobs
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward pass. `mask_BS` float32: 1 where the token at s is a target, which position s - 1 predicts. `num_tokens`: all but padding."""

    inputs: ModelInputs
    mask_BS: torch.Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        check_shape("mask_BS", self.mask_BS, *self.inputs.tokens_BS.shape)


def masked_nll(logprobs_BS: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the masked negative log-probabilities, int32 count of them).

    >>> masked_nll(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    (tensor(5.), tensor(2, dtype=torch.int32))
    """
    return -(logprobs_BS * mask_BS).sum(), mask_BS.sum().to(torch.int32)


TOKENS_PER_ROW = "data/tokens_per_row"


def next_token_loss(model: DistributedDataParallel, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
    """The loss function of both supervised stages: (sum of losses, number of targets, tokens per row)."""
    logits_SBV = model(batch.inputs)
    # The last position predicts nothing. Its logits stay, masked: cutting them off would copy the rest.
    targets_BS, mask_BS = (F.pad(x_BS[:, 1:], (0, 1)) for x_BS in (batch.inputs.tokens_BS, batch.mask_BS))
    loss, num_tokens = masked_nll(token_logprobs(logits_SBV, targets_BS, model.module.tp_group), mask_BS)
    return loss, num_tokens, {TOKENS_PER_ROW: Metric(batch.num_tokens, len(targets_BS))}

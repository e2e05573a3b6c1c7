"""How the losses of tokens become one number: a weight for each token, and what the weighted sum is divided by.

    token_mean                sum_it x_it / sum_i |o_i|                 DAPO, arXiv 2503.14476
    seq_mean_token_mean       sum_i 1/|o_i| sum_t x_it / n              GRPO, arXiv 2402.03300
    seq_mean_token_sum        sum_i sum_t x_it / n                      the log-prob of an answer is that of its tokens together
    seq_mean_token_sum_norm   sum_i sum_t x_it / (n c)                  Dr. GRPO, arXiv 2503.20783; c: the longest answer that is allowed

n answers, |o_i| tokens in answer i. verl `agg_loss` (which divides the last by c alone); TRL's loss types dapo, grpo and dr_grpo are first, second and last.

Sums and divisors are added over micro-batches and ranks before dividing, so that the loss is the same however the batch is split. A rank may hold a slice of
each answer only (context parallelism): weights are of whole answers, and one of the ranks that share an answer counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config.algorithms import Aggregation


def _nothing_to_add(values_B: Tensor) -> Tensor:
    return values_B


@dataclass(frozen=True)
class Rows:
    """Whole answers, as a rank that holds a slice of each knows them. `lengths_B`: their response tokens, 0 for filler; `counted`: whether this rank is the one
    that counts them; `joined`: a value per row, summed over the ranks that share it; `stale_B`: which of them older weights than the learner's sampled, at
    least in part; None where none may be."""

    lengths_B: Tensor
    counted: bool = True
    joined: Callable[[Tensor], Tensor] = _nothing_to_add
    stale_B: Tensor | None = None

    @property
    def count(self) -> Tensor:
        return (self.lengths_B > 0).sum() * self.counted


def token_weights(how: Aggregation, lengths_n: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Of tokens whose answers have `lengths_n` tokens: the weight of each in the sum, and its share of the divisor. `constant`: c."""
    ones_n = torch.ones_like(lengths_n)
    if how == "token_mean":
        return ones_n, ones_n
    if how == "seq_mean_token_mean":
        return 1 / lengths_n, 1 / lengths_n
    return ones_n, (constant if how == "seq_mean_token_sum_norm" else 1) / lengths_n


def divisor(how: Aggregation, rows: Rows, num_tokens: Tensor, constant: int) -> Tensor:
    """What this rank adds to the divisor, a whole number. `num_tokens`: the response tokens it holds."""
    if how == "token_mean":
        return num_tokens
    return rows.count * constant if how == "seq_mean_token_sum_norm" else rows.count

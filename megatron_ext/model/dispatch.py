"""Tokens to experts and back where all experts of a layer are whole on one rank: no map is exchanged, no row is moved twice.

    x_NH --rows of expert 0, of expert 1, ...--> x_TH -> experts -> y_TH --added where they came from--> y_NH          T = N K

Megatron's dispatcher, made for experts on other ranks, sorts what it has just sorted and copies what it would have sent. It stays where experts are spread or
split, and where an expert may be full.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch.autograd.function import once_differentiable


class LocalDispatcher(MoETokenDispatcher):
    """In Megatron's steps. What leads back is kept from one step to the next, as Megatron's own dispatchers do. The number of rows is known beforehand, so that
    nothing waits for a GPU."""

    def dispatch_preprocess(self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [S, B, H], map and gates [N, E] -> rows by expert [T, H], their gates [T]."""
        self.shape, self.counts_E = tokens.shape, routing_map.sum(0)
        rows = len(routing_map) * self.config.moe_router_topk
        expert_T, self.token_T = routing_map.t().contiguous().nonzero_static(size=rows).unbind(1)
        gates_T = probs.flatten().index_select(0, self.token_T * routing_map.shape[1] + expert_T)
        return _RowsOfTokens.apply(tokens.flatten(0, 1), self.token_T), gates_T

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return hidden_states, self.counts_E, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _SumByToken.apply(hidden_states, self.token_T, self.shape[:-1].numel())

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.view(self.shape)


class _RowsOfTokens(torch.autograd.Function):
    """A row for every expert of a token."""

    @staticmethod
    def forward(ctx: Any, x_NH: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
        ctx.num_tokens = len(x_NH)
        ctx.save_for_backward(token_T)
        return x_NH.index_select(0, token_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return sum_by_token(grad_TH, ctx.saved_tensors[0], ctx.num_tokens), None


class _SumByToken(torch.autograd.Function):
    """And back. Torch's own `index_add` would keep the rows for its backward pass, which needs their shape alone."""

    @staticmethod
    def forward(ctx: Any, rows_TH: torch.Tensor, token_T: torch.Tensor, num_tokens: int) -> torch.Tensor:
        ctx.save_for_backward(token_T)
        return sum_by_token(rows_TH, token_T, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_NH.index_select(0, ctx.saved_tensors[0]), None, None


def sum_by_token(rows_TH: torch.Tensor, token_T: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[N, H]. Every token has as many rows. A GPU adds rows in an order of its own, and slowly in 16 bits: there a token's rows are brought side by side."""
    if rows_TH.is_cpu:
        return rows_TH.new_zeros(num_tokens, rows_TH.shape[1]).index_add_(0, token_T, rows_TH)
    return rows_TH.index_select(0, token_T.argsort(stable=True)).view(num_tokens, -1, rows_TH.shape[1]).sum(1)


def dispatches_locally(config: TransformerConfig) -> bool:
    whole = config.expert_model_parallel_size == config.expert_tensor_parallel_size == 1
    return whole and config.moe_expert_capacity_factor is None

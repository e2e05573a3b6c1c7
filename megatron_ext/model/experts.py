"""All SwiGLU experts of a layer in one differentiable function, in place of one Megatron module after another.

    y_t = fc2_e (silu(u) * v * gate_t),   [u; v] = fc1_e x_t        for the tokens t of expert e, which lie side by side

    in place       matrix products and activation expert by expert, written where they belong; weight gradients straight into Megatron's buffer
    grouped_mm     torch's call for the products of all experts; weights are stacked for it

Which of them runs is chosen in `device/kernels.py`. Either way the backward pass keeps only x, the gates and fc1's outputs, and makes the activation again.
Parameters stay those of Megatron's `SequentialMLP`, one pair of matrices per expert under the same names, so checkpoints, shards and published weights do not
know which computed. Under expert tensor parallelism these are slices: fc2's partial sums are added by the token dispatcher, as they are for `SequentialMLP`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.autograd.function import once_differentiable

MANY = 16
"""Experts for each token from which, on a CPU, calls for those that have one cost less than a call that looks at all (docs/benchmarks/generation.md)."""


class GroupedExperts(SequentialMLP):
    """Takes and returns what `SequentialMLP` does: tokens sorted by local expert, how many each expert has, their gates. `grouped`: through grouped_mm.

    `piece`: the weights of all experts, fc1 [E, H, 2 F] and fc2 [E, F, H], where they lie in one piece (`weight_storage.py`); the parameters are views of it.
    """

    def __init__(self, *args: Any, grouped: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grouped = grouped
        self.piece: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.piece is not None and not torch.is_grad_enabled():
            ends_E = tokens_per_expert.to(permuted_probs.device).cumsum(0, dtype=torch.int32)
            return from_one_piece(permuted_local_hidden_states, permuted_probs, ends_E, *self.piece), None
        fc1, fc2 = ([getattr(expert, name).weight for expert in self.local_experts] for name in ("linear_fc1", "linear_fc2"))
        return swiglu_experts(permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist(), fc1, fc2, self._grouped), None


def swiglu_experts(
    x_TH: torch.Tensor, gates_T: torch.Tensor, counts: Sequence[int], fc1: Sequence[torch.Tensor], fc2: Sequence[torch.Tensor], grouped: bool
) -> torch.Tensor:
    """[T, H]. `fc1` [2 F, H] and `fc2` [H, F] by expert. `grouped`: through grouped_mm, otherwise in place."""
    return _SwigluExperts.apply(x_TH, gates_T, list(counts), grouped, *fc1, *fc2)


def from_one_piece(x_TH: torch.Tensor, gates_T: torch.Tensor, ends_E: torch.Tensor, fc1_EHF: torch.Tensor, fc2_EFH: torch.Tensor) -> torch.Tensor:
    """The same without gradients, in two calls: `ends_E` int32 says where each expert's tokens end."""
    return F.grouped_mm(_activated(F.grouped_mm(x_TH, fc1_EHF, offs=ends_E), gates_T), fc2_EFH, offs=ends_E)


def chosen_experts(experts: Any, x_TH: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
    """[T, H]: what each token's experts make of it, without gradients and without Megatron's dispatch, for steps of generation. `experts`: of a layer that is
    whole on this rank."""
    expert_N, order_N = experts_TK.flatten().sort(stable=True)
    token_N = order_N // experts_TK.shape[1]
    x_NH, gates_N = x_TH.index_select(0, token_N), gates_TK.flatten().index_select(0, order_N)
    number_E = torch.arange(len(experts.local_experts), device=x_TH.device)
    ends_E = torch.searchsorted(expert_N, number_E, right=True, out_int32=True)
    piece = getattr(experts, "piece", None)
    if piece is None or (x_TH.is_cpu and len(number_E) > MANY * len(x_NH)):
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        made_NH = few_experts(x_NH, gates_N, counts, experts.local_experts)
    else:
        made_NH = from_one_piece(x_NH, gates_N, ends_E, *piece)
    return torch.zeros_like(x_TH).index_add_(0, token_N, made_NH)


def few_experts(x_TH: torch.Tensor, gates_T: torch.Tensor, counts: Sequence[int], experts: Iterable[Any]) -> torch.Tensor:
    """The same, touching only the experts that have tokens."""
    out_TH, start = torch.empty_like(x_TH), 0
    for count, expert in zip(counts, experts, strict=True):
        if count:
            tokens = slice(start, start + count)
            active = _activated(torch.mm(x_TH[tokens], expert.linear_fc1.weight.t()), gates_T[tokens])
            torch.mm(active, expert.linear_fc2.weight.t(), out=out_TH[tokens])
            start += count
    return out_TH


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, gates_T: torch.Tensor, counts: list[int], grouped: bool, *weights: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = weights[: len(counts)], weights[len(counts) :]
        ctx.counts, ctx.grouped = counts, grouped
        if grouped:
            offsets = _offsets(counts, x_TH.device)
            hidden_TF = F.grouped_mm(x_TH, torch.stack(fc1).transpose(1, 2), offs=offsets)
            out_TH = F.grouped_mm(_activated(hidden_TF, gates_T), torch.stack(fc2).transpose(1, 2), offs=offsets)
        else:
            hidden_TF, out_TH = x_TH.new_empty(len(x_TH), len(fc1[0])), x_TH.new_empty(len(x_TH), len(fc2[0]))
            parts = (tensor.split(counts) for tensor in (x_TH, gates_T, hidden_TF, out_TH))
            for x, gates, hidden, out, first, second in zip(*parts, fc1, fc2, strict=True):
                torch.mm(x, first.t(), out=hidden)
                torch.mm(_activated(hidden, gates), second.t(), out=out)
        ctx.save_for_backward(x_TH, gates_T, hidden_TF, *weights)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, gates_T, hidden_TF, *weights = ctx.saved_tensors
        fc1, fc2 = weights[: len(ctx.counts)], weights[len(ctx.counts) :]
        learns = any(ctx.needs_input_grad[4:])
        grad_TH = grad_TH.contiguous()
        if ctx.grouped:
            offsets = _offsets(ctx.counts, x_TH.device)
            d_active = F.grouped_mm(grad_TH, torch.stack(fc2), offs=offsets)
            active, d_hidden, d_gates_T = _activation_backward(hidden_TF, gates_T, d_active)
            d_x_TH = F.grouped_mm(d_hidden, torch.stack(fc1), offs=offsets)
            pairs = ((d_hidden, x_TH), (grad_TH, active)) if learns else ()
            d_weights = [grad for left, right in pairs for grad in F.grouped_mm(left.t(), right, offs=offsets).unbind()]
            return (d_x_TH, d_gates_T, None, None, *(d_weights or len(weights) * (None,)))
        d_x_TH, d_gates_T = torch.empty_like(x_TH), torch.empty_like(gates_T)
        d_fc1, d_fc2 = [], []
        parts = (tensor.split(ctx.counts) for tensor in (x_TH, gates_T, hidden_TF, grad_TH, d_x_TH, d_gates_T))
        for x, gates, hidden, grad, d_x, d_gates, first, second in zip(*parts, fc1, fc2, strict=True):
            active, d_hidden, own_gates = _activation_backward(hidden, gates, grad @ second)
            d_gates.copy_(own_gates)
            torch.mm(d_hidden, first, out=d_x)
            if learns:  # an expert without tokens learns a zero: whoever waits for its gradient must get one
                d_fc1.append(_learn(first, d_hidden, x))
                d_fc2.append(_learn(second, grad, active))
        return (d_x_TH, d_gates_T, None, None, *([*d_fc1, *d_fc2] or len(weights) * (None,)))


def _learn(weight: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T right, the gradient of a weight. Where Megatron's data parallelism keeps a gradient buffer it is added there in the same product, as with Apex's
    `gradient_accumulation_fusion`, and what is returned only says that it has been: Megatron does not read it."""
    if not hasattr(weight, "grad_added_to_main_grad") or weight.main_grad.dtype != left.dtype:
        return left.t() @ right
    weight.main_grad.addmm_(left.t(), right)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    """Where each expert's tokens end."""
    return torch.tensor(counts).cumsum(0).to(device, torch.int32)


def _activated(hidden_TF: torch.Tensor, gates_T: torch.Tensor) -> torch.Tensor:
    u, v = hidden_TF.chunk(2, dim=-1)
    return (F.silu(u).mul_(v) * gates_T[:, None]).to(hidden_TF.dtype)


def _activation_backward(hidden_TF: torch.Tensor, gates_T: torch.Tensor, d_active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the activation made again, gradient of fc1's output, gradient of the gates)."""
    u, v = hidden_TF.chunk(2, dim=-1)
    silu = F.silu(u)
    product = silu * v
    d_gates_T = torch.linalg.vecdot(d_active.to(gates_T.dtype), product.to(gates_T.dtype))
    active = (product * gates_T[:, None]).to(hidden_TF.dtype)
    d_product = (d_active * gates_T[:, None]).to(hidden_TF.dtype)
    d_hidden = torch.empty_like(hidden_TF)
    d_u, d_v = d_hidden.chunk(2, dim=-1)
    torch.mul(d_product, silu, out=d_v)
    d_u.copy_(torch.ops.aten.silu_backward(d_product.mul_(v), u))
    return active, d_hidden, d_gates_T

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
        counts = tokens_per_expert if self._grouped else tokens_per_expert.tolist()
        return swiglu_experts(permuted_local_hidden_states, permuted_probs, counts, fc1, fc2, self._grouped), None


def swiglu_experts(
    x_TH: torch.Tensor,
    gates_T: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    fc1: Sequence[torch.Tensor],
    fc2: Sequence[torch.Tensor],
    grouped: bool,
) -> torch.Tensor:
    """[T, H]. `fc1` [2 F, H] and `fc2` [H, F] by expert. `grouped`: through grouped_mm, which waits for no GPU where `counts` is a tensor; otherwise in
    place, with `counts` a list."""
    return _SwigluExperts.apply(x_TH, gates_T, counts, grouped, *fc1, *fc2)


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
    if x_TH.is_cpu:
        return torch.zeros_like(x_TH).index_add_(0, token_N, made_NH)
    return torch.empty_like(made_NH).index_copy_(0, order_N, made_NH).view(*experts_TK.shape, -1).sum(1)


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
    def forward(ctx: Any, x_TH: torch.Tensor, gates_T: torch.Tensor, counts: Any, grouped: bool, *weights: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        multiply = _Grouped(counts, x_TH.device) if grouped else _InPlace(counts)
        hidden_TF = multiply.forward(x_TH, fc1)
        ctx.multiply = multiply
        ctx.save_for_backward(x_TH, gates_T, hidden_TF, *weights)
        return multiply.forward(_activated(hidden_TF, gates_T), fc2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, gates_T, hidden_TF, *weights = ctx.saved_tensors
        fc1, fc2, multiply = weights[: len(weights) // 2], weights[len(weights) // 2 :], ctx.multiply
        grad_TH = grad_TH.contiguous()
        active_TF, d_hidden_TF, d_gates_T = _activation_backward(hidden_TF, gates_T, multiply.backward(grad_TH, fc2))
        d_weights: Sequence[torch.Tensor | None] = len(weights) * (None,)
        if any(ctx.needs_input_grad[4:]):
            d_weights = [*multiply.learn(fc1, d_hidden_TF, x_TH), *multiply.learn(fc2, grad_TH, active_TF)]
        return multiply.backward(d_hidden_TF, fc1), d_gates_T, None, None, *d_weights


class _InPlace:
    """A product for each expert that has tokens, written where it belongs."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts

    def forward(self, x_TI: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, O]: times the weights [O, I], transposed."""
        return self.backward(x_TI, [weight.t() for weight in weights])

    def backward(self, x_TO: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, I]: times the weights [O, I]."""
        out_TI = x_TO.new_empty(len(x_TO), weights[0].shape[1])
        for x, out, weight in zip(x_TO.split(self.counts), out_TI.split(self.counts), weights, strict=True):
            if len(x):
                torch.mm(x, weight, out=out)
        return out_TI

    def learn(self, weights: Sequence[torch.Tensor], left_TO: torch.Tensor, right_TI: torch.Tensor) -> list[torch.Tensor]:
        """Gradients [O, I] of the weights. An expert without tokens learns a zero: whoever waits for its gradient must get one."""
        parts = zip(weights, left_TO.split(self.counts), right_TI.split(self.counts), strict=True)
        return [_learn(weight, left, right) for weight, left, right in parts]


class _Grouped:
    """The same by torch's one call for all experts."""

    def __init__(self, counts: Sequence[int] | torch.Tensor, device: torch.device) -> None:
        self.ends_E = torch.as_tensor(counts, device=device).cumsum(0, dtype=torch.int32)

    def forward(self, x_TI: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return F.grouped_mm(x_TI, torch.stack(tuple(weights)).transpose(1, 2), offs=self.ends_E)

    def backward(self, x_TO: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return F.grouped_mm(x_TO, torch.stack(tuple(weights)), offs=self.ends_E)

    def learn(self, weights: Sequence[torch.Tensor], left_TO: torch.Tensor, right_TI: torch.Tensor) -> list[torch.Tensor]:
        return list(F.grouped_mm(left_TO.t(), right_TI, offs=self.ends_E).unbind())


def _learn(weight: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T right, the gradient of a weight. Where Megatron's data parallelism keeps a gradient buffer it is added there in the same product, as with Apex's
    `gradient_accumulation_fusion`, and what is returned only says that it has been: Megatron does not read it."""
    if not hasattr(weight, "grad_added_to_main_grad") or weight.main_grad.dtype != left.dtype:
        return left.t() @ right
    weight.main_grad.addmm_(left.t(), right)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _activated(hidden_TF: torch.Tensor, gates_T: torch.Tensor) -> torch.Tensor:
    u, v = hidden_TF.chunk(2, dim=-1)
    return F.silu(u).mul_(v).mul_(gates_T[:, None])


def _activation_backward(hidden_TF: torch.Tensor, gates_T: torch.Tensor, d_active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the activation made again, gradient of fc1's output, gradient of the gates). `d_active` is overwritten."""
    u, v = hidden_TF.chunk(2, dim=-1)
    silu = F.silu(u)
    active = silu * v
    d_gates_T = torch.linalg.vecdot(d_active.to(gates_T.dtype), active.to(gates_T.dtype))
    active.mul_(gates_T[:, None])
    d_hidden = torch.empty_like(hidden_TF)
    d_u, d_v = d_hidden.chunk(2, dim=-1)
    torch.mul(d_active.mul_(gates_T[:, None]), silu, out=d_v)
    torch.ops.aten.silu_backward.grad_input(d_active.mul_(v), u, grad_input=d_u)
    return active, d_hidden, d_gates_T

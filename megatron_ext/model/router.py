"""Megatron's top-k router with balancing of our own: losses, an expert bias and a capacity that mean the same in every layout.

    logits --z-loss--> scores (+ expert bias) --top-k, or replayed routes--> gates, map --capacity--> balancing loss --> dispatcher

Gradients are summed over micro-batches and ranks and divided once by the number of targets of the step. A balancing loss is a mean over a micro-batch's
tokens; so that it weighs like the targets of its micro-batch, whatever the split, it is multiplied by their number, `RouterCall.weight`. (Megatron multiplies
by the positions of a rank instead, prompt included, which inflates it by positions / targets.)

Everything is counted where the router decides, before tokens are dropped, padding left out, and in passes with gradients only: so recompute, which runs a
layer twice, counts once. The expert bias follows these counts after the optimizer's update (`training/moe_metrics.py`). Megatron would move it before the step
is known to be sound, and its count fails where there is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class RouterCall:
    """What the routers have to know of the micro-batch that they route.

    `weight` is what balancing losses are multiplied by (`ModelInputs.aux_weight`). `samples_T` int64 says to which of `num_samples` samples each position of
    this rank belongs, in the router's flat order (sequence, row); None: the micro-batch is balanced as one. `drops`: experts may be full. In training alone:
    an answer must not depend on who else is being answered.
    """

    weight: float = 1.0
    samples_T: torch.Tensor | None = None
    num_samples: int = 1
    drops: bool = False


@contextmanager
def called(routers: Sequence[Router], call: RouterCall) -> Iterator[None]:
    """Inside, the routers route this micro-batch."""
    before = [router.call for router in routers]
    for router in routers:
        router.call = call
    try:
        yield
    finally:
        for router, old in zip(routers, before, strict=True):
            router.call = old


class Router(TopKRouter):
    """`tally` sums what happened since it was last cleared: `chosen` [E], `kept` (of these; absent without a capacity), `aux_loss`, `z_loss`; of losses this
    rank's part, without coefficients. `expert_bias_rate`: how far the bias moves in a step; None: there is no bias."""

    expert_bias: torch.Tensor | None

    def __init__(self, config: Any, pg_collection: Any = None, expert_bias_rate: float | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.call = RouterCall()
        self.tally: dict[str, torch.Tensor] = {}
        self.expert_bias_rate = expert_bias_rate
        if expert_bias_rate is not None:
            del self.expert_bias  # Megatron's place for it, empty: its own update would come in between
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """A bias moves in steps of a thousandth, which bfloat16 loses: it stays in float32 whatever the model is turned into."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return self

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, B, E], true where there is padding [S, B] -> (gates, map), both [S * B, E]."""
        logits_TE = logits.view(-1, self.config.num_moe_experts)
        real_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if padding_mask is None else ~padding_mask.reshape(-1)
        learns = self.training and torch.is_grad_enabled()
        if learns and self.config.moe_z_loss_coeff:
            logits_TE = self._with_z_loss(logits_TE, real_T)
        gates_TK, experts_TK = self.choose(logits_TE)
        gates_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, gates_TK)
        map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        if learns:
            self._add("chosen", (map_TE & real_T[:, None]).sum(0, dtype=torch.float32))
        factor = self.config.moe_expert_capacity_factor
        if factor is not None and self.call.drops:
            capacity = math.ceil(factor * self.topk * len(map_TE) / self.num_experts)
            map_TE = within_capacity(gates_TE, map_TE & real_T[:, None], capacity, self.config.moe_token_drop_policy)
            gates_TE = gates_TE * map_TE
            if learns:
                self._add("kept", map_TE.sum(dtype=torch.float32))
        if learns and self.config.moe_router_load_balancing_type != "none" and self.config.moe_aux_loss_coeff:
            gates_TE = self._with_balancing_loss(gates_TE, logits_TE, real_T)
        return gates_TE, map_TE

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and experts [T, K], in the order of the choice: what Megatron's `topk_routing_with_score_function` spreads over all experts. A sigmoid's bias
        decides who is chosen, and is no part of the gates."""
        scores_TE = logits_TE
        if self.score_function == "sigmoid":
            scores_TE = torch.sigmoid(logits_TE.float()).type_as(logits_TE)
        elif self.config.moe_router_pre_softmax:
            scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).type_as(logits_TE)
        ranked_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
        if self.router_replay is None:
            chosen_TK, experts_TK = _topk(ranked_TE, self.topk)
        else:
            chosen_TK, experts_TK = self.router_replay.get_replay_topk(ranked_TE, self.topk, None, None, _topk)
        gates_TK = self._gates(chosen_TK if self.expert_bias is None else scores_TE.gather(1, experts_TK))
        if self.router_replay is not None:
            self.router_replay.take_gates(gates_TK)
        return gates_TK, experts_TK

    def _gates(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        """From the scores of the chosen ones."""
        if self.score_function == "sigmoid":
            return chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + 1e-20) if self.topk > 1 else chosen_TK
        return chosen_TK if self.config.moe_router_pre_softmax else torch.softmax(chosen_TK, dim=-1, dtype=torch.float32).type_as(chosen_TK)

    def _with_balancing_loss(self, gates_TE: torch.Tensor, logits_TE: torch.Tensor, real_T: torch.Tensor) -> torch.Tensor:
        """The loss hangs on the gates. It looks at the router's own choice, without bias or replay."""
        map_TE, scores_TE = compute_routing_scores_for_aux_loss(logits_TE, self.topk, self.score_function, padding_mask=~real_T)
        call = self.call
        if call.samples_T is None:
            counts_NE, scores_NE = map_TE.sum(0, keepdim=True, dtype=torch.float32), scores_TE.sum(0, keepdim=True)
        else:
            nothing_NE = scores_TE.new_zeros(call.num_samples, self.num_experts)
            counts_NE, scores_NE = (nothing_NE.index_add(0, call.samples_T, x_TE.to(scores_TE)) for x_TE in (map_TE, scores_TE))
        loss = balancing_loss(self._over_slices(counts_NE), scores_NE, self.topk)
        self._add("aux_loss", loss)
        return MoEAuxLossAutoScaler.apply(gates_TE, self.config.moe_aux_loss_coeff * loss * call.weight)

    def _with_z_loss(self, logits_TE: torch.Tensor, real_T: torch.Tensor) -> torch.Tensor:
        """mean over the micro-batch's tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
        squares_T = torch.logsumexp(logits_TE.float(), dim=-1).square()
        total = self._over_slices(real_T.sum(dtype=torch.float32))
        loss = (squares_T * real_T).sum() / total.clamp(min=1)
        self._add("z_loss", loss)
        return MoEAuxLossAutoScaler.apply(logits_TE, self.config.moe_z_loss_coeff * loss * self.call.weight)

    def _over_slices(self, x: torch.Tensor) -> torch.Tensor:
        """Summed over the ranks that share this micro-batch: sequence slices of tensor and context parallelism."""
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(x, group=self.tp_cp_group)
        return x

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.tally[name] = self.tally[name] + value.detach() if name in self.tally else value.detach()


def _topk(scores_TE: torch.Tensor, topk: int, **_: None) -> tuple[torch.Tensor, torch.Tensor]:
    return scores_TE.topk(topk, dim=1)


def pad_where_tokens_are_dropped(layer: Any, _inputs: Any) -> None:
    """A hook before Megatron's mixture-of-experts layer: its dispatcher would also cut what exceeds the capacity where nothing may be dropped."""
    dispatcher = layer.token_dispatcher
    dispatcher.drop_and_pad = layer.router.call.drops
    if dispatcher.drop_and_pad:
        dispatcher.input_splits = dispatcher.output_splits = dispatcher.output_splits_tp = None  # all are equal: not those of an earlier, unpadded pass


def balancing_loss(counts_NE: torch.Tensor, scores_NE: torch.Tensor, topk: int) -> torch.Tensor:
    """How unevenly N samples spread their tokens: 1 is even, E / K is all tokens at the same K experts.

    L = mean_n  E sum_e f_ne P_ne,   f_ne = counts_ne / (K T_n),   P_ne = scores_ne / T_n,   T_n = sum_e counts_ne / K

    `counts_NE`: tokens of sample n whose top-k holds expert e; `scores_NE`: sums of the scores, which each sum to 1 over e, of a rank's tokens: the losses of
    ranks that share samples add up. With one sample this is the loss of Switch Transformers (arXiv 2101.03961, eq. 4-6), with sequences as samples the
    sequence-wise one of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20). Samples without tokens are left out.

    >>> balancing_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.4, 1.6]]), topk=1)  # 2 (3/4 * 0.6 + 1/4 * 0.4)
    tensor(1.1000)
    """
    tokens_N = counts_NE.sum(1) / topk
    losses_N = (counts_NE * scores_NE).sum(1) * (counts_NE.shape[1] / (topk * tokens_N.clamp(min=1).square()))
    return losses_N.sum() / (tokens_N > 0).sum().clamp(min=1)


def within_capacity(gates_TE: torch.Tensor, map_TE: torch.Tensor, capacity: int, policy: Literal["probs", "position"]) -> torch.Tensor:
    """The part of the map that remains when an expert takes at most `capacity` tokens: those with the largest gates (`probs`),
    or those that come first (`position`, as in Switch Transformers, arXiv 2101.03961).

    >>> within_capacity(torch.tensor([[0.3], [0.9], [0.5]]), torch.tensor([[True], [True], [True]]), 2, "position").tolist()
    [[True], [True], [False]]
    """
    if policy == "position":
        return map_TE & (map_TE.cumsum(0) <= capacity)
    best_TE = gates_TE.detach().masked_fill(~map_TE, -1.0).argsort(dim=0, descending=True, stable=True)[:capacity]
    return map_TE & torch.zeros_like(map_TE).scatter(0, best_TE, True)

"""The router tap: records, or replays, which experts every token goes to. Where EARL begins.

Megatron's router calls `router_replay.get_replay_topk` where it would take its top-k; a `LayerTap` answers. By default it changes nothing. Megatron's
own `RouterReplay` keeps one
list per process, in which policy, reference and rollout would collide; ours belongs to one model.

    with model.router_tap.record() as routes:          with model.router_tap.replay(experts_BSLK) as routes:
        model(inputs)                                      model(inputs)
    routes.experts(tokens)  # what was used            routes.experts(tokens)  # what was used: the given ids, live where -1

Only ids are replayed, in their top-k order; gates come from the live logits, so gradients reach the router. Read on: `batch/routing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_ext.model.router import Router

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Steer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [tokens, E], experts [tokens, K], values [tokens, K]) -> the same values, with whose gradient another may come; see `router_steering.py`."""


class LayerTap:
    """Stands in one router. Knows nothing of batches: tokens come flat, in the order of its rank's slice."""

    def __init__(self) -> None:
        self.listening = False
        self.targets: torch.Tensor | None = None
        self.draw: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.steer: Steer | None = None
        self.experts: list[torch.Tensor] = []
        self.gates: list[torch.Tensor] = []

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's hook: scores [tokens, E], with the expert bias where there is one -> (values, ids), both [tokens, K]."""
        if self.targets is None:
            values, experts = default(scores if self.draw is None else self.draw(scores), topk, num_groups=num_groups, group_topk=group_topk)
            if self.draw is not None:
                values = scores.gather(1, experts)
        else:
            experts = self._replayed(self.targets, scores, topk, num_groups, group_topk, default)
            values = scores.gather(1, experts)
        if self.steer is not None:
            values = self.steer(scores, experts, values)
        if self.listening:
            self.experts.append(experts.detach())
        return values, experts

    def take_gates(self, gates_TK: torch.Tensor) -> None:
        """The gates that the router made of its latest choice."""
        if self.listening:
            self.gates.append(gates_TK.detach())

    def _replayed(self, targets: torch.Tensor, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK) -> torch.Tensor:
        """The ids [tokens, K] to use: the targets, and the router's own where they are -1."""
        if targets.shape != (scores.shape[0], topk):
            raise ValueError(f"routes to replay have shape {tuple(targets.shape)}, the router sees {(scores.shape[0], topk)}")
        given = targets >= 0
        if bool(given.all()):
            return targets
        with torch.no_grad():
            _, live = default(scores, topk, num_groups=num_groups, group_topk=group_topk)
        return torch.where(given, targets, live)


class Routes:
    """What the routers of one model (of one pipeline stage's layers) did during one forward pass (or several, in order). L counts layers with experts."""

    def __init__(self, taps: list[LayerTap], topk: int, tp_group: Any) -> None:
        self._taps, self._topk, self._tp_group = taps, topk, tp_group

    def experts(self, tokens: int) -> torch.Tensor:
        """Int64 [tokens, L, K]: the first `tokens` in (sequence, row) order of the whole tensor-parallel group. Collective when TP > 1."""
        return self._gather([tap.experts for tap in self._taps], tokens, torch.int64)

    def gates(self, tokens: int) -> torch.Tensor:
        """Float32 [tokens, L, K], summing to 1 over K; aligned with `experts`."""
        gates_TLK = self._gather([tap.gates for tap in self._taps], tokens, torch.float32).float()
        return gates_TLK / gates_TLK.sum(-1, keepdim=True)

    def _gather(self, layers: list[list[torch.Tensor]], tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """`layers`: of each layer, of each pass."""
        if not layers:
            return torch.zeros(tokens, 0, self._topk, dtype=dtype)
        passes = [self._over_ranks(torch.stack(of_layers, dim=1)) for of_layers in zip(*layers, strict=True)]
        return (passes[0] if len(passes) == 1 else torch.cat(passes))[:tokens]

    def _over_ranks(self, local_TLK: torch.Tensor) -> torch.Tensor:
        if self._tp_group.size() == 1:
            return local_TLK
        parts = [torch.empty_like(local_TLK) for _ in range(self._tp_group.size())]
        torch.distributed.all_gather(parts, local_TLK, group=self._tp_group)
        return torch.cat(parts)


class RouterTap:
    """The taps of one model's MoE layers, or of those that a pipeline stage holds."""

    def __init__(self, model: MegatronModule, tp_group: Any) -> None:
        self._topk, self._tp_group = model.config.moe_router_topk, tp_group
        self._taps: list[LayerTap] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.router_replay = LayerTap()
                self._taps.append(module.router_replay)

    @property
    def taps(self) -> Sequence[LayerTap]:
        """One a layer with experts, in order."""
        return self._taps

    @contextmanager
    def record(self) -> Iterator[Routes]:
        """Routes as the router takes them."""
        with self._listening() as routes:
            yield routes

    @contextmanager
    def replay(self, experts_BSLK: torch.Tensor) -> Iterator[Routes]:
        """Routes as given, int [B, S, L, K] for the positions and layers held here; a position with -1 is routed live. For one forward pass: every layer
        must consume its routes exactly once.

        Raises ValueError where shapes disagree, RuntimeError where a layer did not run once.
        """
        if experts_BSLK.shape[2] != len(self._taps):
            raise ValueError(f"routes to replay have {experts_BSLK.shape[2]} layers, the model has {len(self._taps)}")
        ranks, rank = self._tp_group.size(), self._tp_group.rank()
        flat_TLK = experts_BSLK.transpose(0, 1).to(torch.int64).chunk(ranks, dim=0)[rank].flatten(0, 1)
        with self._listening() as routes:
            for layer, tap in enumerate(self._taps):
                tap.targets = flat_TLK[:, layer].contiguous()
            yield routes
            runs = [len(tap.experts) for tap in self._taps]
            if any(run != 1 for run in runs):
                raise RuntimeError(f"replayed routes must be consumed once per layer, were consumed {runs} times")

    @contextmanager
    def _listening(self) -> Iterator[Routes]:
        for tap in self._taps:
            if tap.listening:
                raise RuntimeError("this model's routes are already being recorded or replayed")
            tap.listening, tap.experts, tap.gates = True, [], []
        try:
            yield Routes(self._taps, self._topk, self._tp_group)
        finally:
            for tap in self._taps:
                tap.listening, tap.targets = False, None

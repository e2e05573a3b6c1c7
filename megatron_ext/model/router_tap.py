"""The router tap: records, replays or restricts which experts every token goes to. Where EARL begins.

Megatron's router calls `router_replay.get_replay_topk` where it would take its top-k; a `LayerTap` answers. By default it changes nothing. Megatron's
own `RouterReplay` keeps one
list per process, in which policy, reference and rollout would collide; ours belongs to one model.

    with model.router_tap.record() as routes:          with model.router_tap.replay(experts_BSLK) as routes:
        model(inputs)                                      model(inputs)
    routes.experts(tokens)  # what was used            routes.experts(tokens)  # what was used: the given ids, live where -1

    with model.router_tap.mask([(0, 3), (1, 5)]):      whoever runs the model, training, generation or evaluation, does without
        engine.generate(...)                           expert 3 of layer 0 and expert 5 of layer 1

Only ids are replayed, in their top-k order; gates come from the live logits, so gradients reach the router. Read on: `batch/routing.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_ext.config.sizes import expert_layers, expert_layers_among
from megatron_ext.errors import UserError
from megatron_ext.model.router import Router

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Steer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [tokens, E], experts [tokens, K], values [tokens, K]) -> the same values, with whose gradient another may come; see `router_steering.py`."""


class LayerTap:
    """Stands in one router. Knows nothing of batches: tokens come flat, in the order of its rank's slice."""

    def __init__(self) -> None:
        self.listening = False
        self.targets: torch.Tensor | None = None
        self.masked_E: torch.Tensor | None = None
        self.draw: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.steer: Steer | None = None
        self.experts: list[torch.Tensor] = []
        self.gates: list[torch.Tensor] = []

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's hook: scores [tokens, E], with the expert bias where there is one -> (values, ids), both [tokens, K]. A masked expert scores -inf where
        the router chooses, so that the gates are those of whom it chose instead."""
        open_to = scores if self.masked_E is None else scores.masked_fill(self.masked_E, -torch.inf)
        if self.targets is None:
            values, experts = default(open_to if self.draw is None else self.draw(open_to), topk, num_groups=num_groups, group_topk=group_topk)
            if self.draw is not None:
                values = scores.gather(1, experts)
        else:
            experts = self._replayed(self.targets, open_to, topk, num_groups, group_topk, default)
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
    """The taps of one `VisionLanguageModel`'s MoE layers, or of those that a pipeline stage holds."""

    def __init__(self, model: Any, tp_group: Any) -> None:
        self._topk, self._tp_group = model.config.moe_router_topk, tp_group
        self._num_layers, self._num_experts = len(expert_layers(model.model_config)), model.model_config.num_experts
        self._first = expert_layers_among(model.model_config, model.stage.layers).start
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._taps = [LayerTap() for _ in self._routers]
        for router, tap in zip(self._routers, self._taps, strict=True):
            router.router_replay = tap

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
    def mask(self, pairs: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Inside, the routers cannot choose these (layer, expert) pairs. Layers count as in routes: those with experts, over the whole model. A pipeline stage
        takes what concerns it, so that every rank can be told the same. Routes that are replayed are obeyed nevertheless.

        Raises UserError for a pair that the model does not have, and for a layer that is left with fewer experts than a token needs.
        """
        pairs = set(pairs)
        self._require_possible(pairs)
        if any(tap.masked_E is not None for tap in self._taps):
            raise RuntimeError("experts of this model are already masked")
        for layer, (router, tap) in enumerate(zip(self._routers, self._taps, strict=True), self._first):
            if experts := [expert for of, expert in pairs if of == layer]:
                tap.masked_E = torch.zeros(self._num_experts, dtype=torch.bool, device=router.weight.device)
                tap.masked_E[experts] = True
        try:
            yield
        finally:
            for tap in self._taps:
                tap.masked_E = None

    def _require_possible(self, pairs: set[tuple[int, int]]) -> None:
        for layer, expert in sorted(pairs):
            if not (0 <= layer < self._num_layers and 0 <= expert < self._num_experts):
                have = f"{self._num_layers} layers of {self._num_experts} experts"
                raise UserError("the mask", f"names expert {expert} of layer {layer}, and the model has {have}", "layers and experts count from 0")
        for layer, masked in sorted(Counter(layer for layer, _ in pairs).items()):
            if self._num_experts - masked < self._topk:
                left = f"{self._num_experts - masked} of {self._num_experts} experts in layer {layer}, and a token needs {self._topk}"
                raise UserError("the mask", f"leaves {left}", f"mask at most {self._num_experts - self._topk} of a layer")

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

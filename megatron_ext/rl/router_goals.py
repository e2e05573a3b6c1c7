"""The routers' terms of the loss, on one learner rank: from goals that came with the rollouts to a gradient in every layer of a cluster.

    begin(microbatches) -> [pulling(micro-batch): forward, backward]* -> ... -> finish() -> metrics, ceilings

    loss += - lambda_p mean_i 1[correct_i] mean_{t,l} min(p_C, q)                        earl.mode = pathwise        objective/router.py
    loss += weight mean_i mean_{t,l} surrogate of the route's log-prob and A_i           earl.mode = router_pg
    loss += router_kl mean_i mean_{t,l} KL(p || p of the first router)                   earl.router_kl

i: all answers of the optimizer step, on all ranks; t: positions of the answer whose skill has a cluster; l: that cluster's layers. A rank adds its positions
and layers to its loss sum (`model/router_steering.py`), which is divided by the step's divisor D; so a position weighs D / (answers * positions * layers) here,
and the loss is the same over any micro-batches, ranks and stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from megatron_ext.config.schema import RunConfig
from megatron_ext.earl.ceilings import BINS, ceiling_of
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.heads import decided
from megatron_ext.model.router import Router
from megatron_ext.model.router_steering import Term, log_softmax_of, pulling
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.batching import Shard
from megatron_ext.rl.goals import NO_GOAL, Clusters
from megatron_ext.rl.objective.aggregation import Rows, divisor
from megatron_ext.rl.objective.router import cluster_mass, pathwise_loss, route_logprob, route_loss, router_kl

NAMES = ("count", "softmax_mass", "pathwise", "route_loss", "route_clipfrac", "router_kl")


def watches_routers(config: RunConfig) -> bool:
    """Whether goals have a meaning: where scores are a distribution over experts, and the routes are those of the answers."""
    return config.model.moe_score_function == "softmax" and config.rl.replay_routes


class Goaled(Protocol):
    """What is needed of a `policy_step.PolicyBatch`."""

    @property
    def shard(self) -> Shard: ...
    @property
    def mask_BS(self) -> torch.Tensor: ...
    @property
    def advantages_B(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Places:
    """The positions of a micro-batch that this rank's routers see and that have a goal, n of them: `place_n` in the router's flat order; whose goal and what
    each weighs, before the mean over layers; the advantage of its answer."""

    place_n: torch.Tensor
    skill_n: torch.Tensor
    weight_n: torch.Tensor
    advantage_n: torch.Tensor


class RouterGoals:
    """`ceilings`: q by skill, learnt in the step that first has correct answers of the skill, which they then begin to pull in the next one. `start`: the
    router's weights that RL started from, by layer number; empty where the KL is not measured."""

    def __init__(self, config: RunConfig, context: ParallelContext, ceilings: Mapping[str, float], start: Mapping[int, torch.Tensor]) -> None:
        self._config, self._context, self._start = config, context, start
        self.ceilings = dict(ceilings)
        self._probabilities = not config.model.norm_topk_prob
        self._scale, self._recording = 0.0, False
        self._watched: set[int] = set()
        self._forget()

    def _forget(self) -> None:
        self._clusters: Clusters | None = None
        self._answers = 0.0
        self._old: dict[tuple[int, int], torch.Tensor] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=self._context.device) for name in NAMES}

    def begin(self, batches: Sequence[Goaled]) -> None:
        """Before an optimizer step, with its micro-batches. Collective over the data-parallel ranks."""
        clusters = batches[0].shard.clusters
        if clusters is None:
            return
        if self._clusters is None:
            self._clusters = clusters
            self._seen_XN = torch.zeros(len(clusters.skills), BINS, dtype=torch.int64, device=self._context.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self._context.device)
        for batch in batches:
            rows = Rows(batch.mask_BS.sum(1))
            totals += torch.stack([divisor(self._config.rl.aggregation, rows, batch.mask_BS.sum(), self._config.rollout.max_new_tokens), rows.count])
        if self._context.layout.dp > 1:
            torch.distributed.all_reduce(totals, group=self._context.pgs.dp)
        divided, answers = totals.tolist()
        self._scale = divided / answers
        self._answers += answers

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, passes leave the routes' log-probs as the old ones, and pull nothing."""
        self._recording = self._config.earl.mode == "router_pg"
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def pulling(self, bare: VisionLanguageModel, batch: Goaled, layers: Sequence[int]) -> Iterator[None]:
        """Around a forward pass. `layers`: those with experts that `bare` holds, counted over the whole model."""
        clusters = batch.shard.clusters
        if clusters is None:
            yield
            return
        places = self._places(bare, batch)
        member_XLE = torch.from_numpy(clusters.member_XLE).to(self._context.device)
        routers = bare.decoder.routers()
        self._watch(routers)
        terms = [self._term(batch, places, member_XLE, layer, router.layer_number) for layer, router in zip(layers, routers, strict=True)]
        with pulling(bare.router_tap, terms, self._probabilities):
            yield

    def finish(self) -> dict[str, float]:
        """After the step's last backward pass: its metrics; ceilings are learnt. Collective over all ranks."""
        clusters = self._clusters
        if clusters is None:
            return {}
        unknown = [index for index, skill in enumerate(clusters.skills) if skill not in self.ceilings and self._config.earl.mode == "pathwise"]
        table = torch.cat([torch.stack([self._sums[name] for name in NAMES]), self._seen_XN[unknown].flatten().double()])
        for group in (self._context.pgs.tp, self._context.pgs.dp_cp, self._context.pgs.pp):
            if group.size() > 1:
                torch.distributed.all_reduce(table, group=group)
        sums, seen = np.split(table.cpu().numpy(), [len(NAMES)])
        learnt = {clusters.skills[x]: ceiling_of(counts_N) for x, counts_N in zip(unknown, seen.reshape(len(unknown), BINS), strict=True)}
        self.ceilings |= {skill: ceiling for skill, ceiling in learnt.items() if np.isfinite(ceiling)}
        metrics = self._metrics(dict(zip(NAMES, sums.tolist(), strict=True)))
        self._forget()
        return metrics

    def _metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Losses are means over answers, without their weights; the others means over positions and layers."""
        mode, count = self._config.earl.mode, max(sums["count"], 1.0)
        metrics = {"earl/softmax_mass": sums["softmax_mass"] / count}
        if self._start:
            metrics["earl/router_kl"] = sums["router_kl"] / count
        if mode == "pathwise":
            metrics["earl/pathwise"] = sums["pathwise"] / max(self._answers, 1.0)
        if mode == "router_pg":
            metrics |= {"earl/route_loss": sums["route_loss"] / max(self._answers, 1.0), "earl/route_clipfrac": sums["route_clipfrac"] / count}
        return metrics

    def _places(self, bare: VisionLanguageModel, batch: Goaled) -> Places:
        goal_BS = torch.from_numpy(batch.shard.goal_BS).to(self._context.device, torch.int64)
        positions_B = (goal_BS != NO_GOAL).sum(1)
        frame = bare.frame(batch.inputs)  # type: ignore[attr-defined]
        row_BS = torch.arange(len(goal_BS), device=goal_BS.device)[:, None].expand_as(goal_BS)
        goal_T, row_T = (self._flat(frame.take(x_BS)) for x_BS in (decided(goal_BS), row_BS))
        place_n = (goal_T != NO_GOAL).nonzero()[:, 0]
        row_n = row_T[place_n]
        return Places(place_n, goal_T[place_n] - 1, 1.0 / positions_B[row_n], batch.advantages_B[row_n])

    def _flat(self, x_BS: torch.Tensor) -> torch.Tensor:
        """In the router's order, this rank's slice of it."""
        return x_BS.transpose(0, 1).chunk(self._context.layout.tp, dim=0)[self._context.tp_rank].flatten()

    def _term(self, batch: Goaled, places: Places, member_XLE: torch.Tensor, layer: int, number: int) -> Term:
        earl, clusters = self._config.earl, batch.shard.clusters
        assert clusters is not None
        here_n = member_XLE[places.skill_n, layer].any(1)
        layers_n = member_XLE.any(2).sum(1)[places.skill_n][here_n]
        place_n, skill_n, advantage_n = places.place_n[here_n], places.skill_n[here_n], places.advantage_n[here_n]
        share_n, member_nE = places.weight_n[here_n] / layers_n, member_XLE[skill_n, layer]
        ceiling_n = torch.tensor([self.ceilings.get(skill, 0.0) for skill in clusters.skills], device=skill_n.device)[skill_n]
        key, pull = (id(batch.shard), number), self._scale * clusters.weight

        def term(logprobs_TE: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor | None:
            if not len(place_n):
                return None
            logprobs_nE = logprobs_TE[place_n]
            if self._recording:
                self._old[key] = route_logprob(logprobs_nE, experts_TK[place_n]).detach()
                return None
            if not torch.is_grad_enabled():
                return None
            mass_n = cluster_mass(logprobs_nE, member_nE)
            losses, told = [], {"count": torch.ones_like(mass_n), "softmax_mass": mass_n}
            if earl.mode == "pathwise":
                losses.append(earl.pathwise_weight * pathwise_loss(mass_n, ceiling_n, share_n))
                told["pathwise"] = share_n * torch.minimum(mass_n, ceiling_n)
                self._see(mass_n.detach(), skill_n)
            elif earl.mode == "router_pg":
                new_n = route_logprob(logprobs_nE, experts_TK[place_n])
                old_n = self._old.get(key, new_n.detach())
                losses.append(earl.router_weight * route_loss(new_n, old_n, advantage_n, share_n, earl.router_clip))
                told["route_loss"] = losses[-1][None] / earl.router_weight
                told["route_clipfrac"] = ((new_n - old_n).exp() - 1).abs() > earl.router_clip
            if number in self._start:
                start_nE = self._started(number, place_n)
                told["router_kl"] = router_kl(logprobs_nE, start_nE)
                if earl.router_kl > 0:
                    losses.append(earl.router_kl * (share_n * told["router_kl"]).sum())
            for name, value_n in told.items():
                self._sums[name] += value_n.detach().double().sum()
            return pull * torch.stack(losses).sum() if losses else None

        return term

    def _see(self, mass_n: torch.Tensor, skill_n: torch.Tensor) -> None:
        bins_n = (mass_n * BINS).long().clamp(max=BINS - 1)
        self._seen_XN.index_put_((skill_n, bins_n), torch.ones_like(bins_n), accumulate=True)

    def _started(self, number: int, place_n: torch.Tensor) -> torch.Tensor:
        hidden_nH = self._hidden.pop(number).flatten(0, 1)[place_n].float()
        scores_nE = torch.nn.functional.linear(hidden_nH, self._start[number].float())
        return log_softmax_of(scores_nE, False)

    def _watch(self, routers: Sequence[Router]) -> None:
        """From now on, what a router is given is at hand when its term is asked."""

        def keep(router: Any, args: tuple[torch.Tensor, ...]) -> None:
            if router.router_replay.steer is not None:
                self._hidden[router.layer_number] = args[0].detach()

        for router in routers if self._start else ():
            if id(router) not in self._watched:
                router.register_forward_pre_hook(keep)
                self._watched.add(id(router))

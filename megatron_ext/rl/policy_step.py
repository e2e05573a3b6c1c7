"""The policy's objective in an update: replayed routes, log-probs, the two checks, the loss.

    l[b, s] = log pi(token s + 1 | tokens up to s), at the position s that decides it, under the distribution that is sampled from (temperature, banned tokens)

Everything per token stands at the position that decides it, and is cut to the positions that this rank computes (`model/frame.py`). With one minibatch the old
log-probs are the current ones, detached: the ratio is exactly 1 and its gradient that of log pi. With several they are computed first, in `prepared`, by
the same forward pass without gradients; so are those of the reference model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_ext.batch import route_digest
from megatron_ext.batch.metric import Metric
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.sizes import expert_layers_among
from megatron_ext.errors import RouteMismatch, UserError
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.frame import Frame
from megatron_ext.model.heads import banned_tokens, decided
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.router_tap import Routes
from megatron_ext.model.token_scores import policy_scores
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.batching import FILLER_KEY, Shard
from megatron_ext.rl.objective.aggregation import Rows
from megatron_ext.rl.objective.divergence import kl_estimate
from megatron_ext.rl.objective.loss import LossSettings, policy_loss
from megatron_ext.rl.objective.metrics import largest, per_token
from megatron_ext.rl.router_goals import RouterGoals
from megatron_ext.training.step import LossParts, run_schedule


@dataclass(frozen=True)
class PolicyBatch:
    """A microbatch on the device; `mask_BS`, `rollout_BS` and `experts_BSLK` as in `LearnerBatch`. `age_BS`: how many versions older than the present weights
    those were that sampled a token; 0 where none was sampled. `old_BS` and `reference_BS` hold this rank's positions; None
    where the current log-probs are the old ones, and where there is no reference."""

    inputs: ModelInputs
    shard: Shard
    mask_BS: torch.Tensor
    rollout_BS: torch.Tensor
    advantages_B: torch.Tensor
    experts_BSLK: torch.Tensor
    age_BS: torch.Tensor
    old_BS: torch.Tensor | None = None
    reference_BS: torch.Tensor | None = None

    @property
    def stale_B(self) -> torch.Tensor:
        """Answers that older weights had a part in."""
        return (self.age_BS > 0).any(1)


def policy_batch(shard: Shard, device: torch.device, version: int) -> PolicyBatch:
    """`version`: that of the present weights."""
    batch = shard.batch
    age_BS = np.where(batch.response_mask_BS > 0, version - batch.versions_BS, 0)
    inputs = model_inputs(batch.tokens_BS, batch.tiles, batch.row_tiles_BM, device)
    arrays = (batch.response_mask_BS.astype(bool), batch.logprobs_BS, batch.advantages_B, batch.experts_BSLK, age_BS)
    return PolicyBatch(inputs, shard, *(torch.from_numpy(array).to(device) for array in arrays))


def loss_settings(config: RunConfig) -> LossSettings:
    rl = config.rl
    return LossSettings(
        surrogate=rl.surrogate,
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        dual_clip=rl.dual_clip,
        kl_coeff=rl.kl_coeff if rl.kl_placement == "loss" else 0.0,
        kl_estimator=rl.kl_estimator,
        correction=rl.mismatch_correction,
        tis_cap=rl.tis_cap,
        icepop_band=rl.icepop_band,
        sequence_band=rl.sequence_band,
        aggregation=rl.aggregation,
        longest=config.rollout.max_new_tokens,
    )


class Policy:
    """The objective of `optimizer_step`. `wrapped`: the chunks of the model that is trained, as the schedule calls them; `reference`: those of its frozen
    reference (empty: no KL); `goals`: what routers are taught beside (None: nothing)."""

    def __init__(
        self,
        wrapped: Sequence[Any],
        reference: Sequence[VisionLanguageModel],
        config: RunConfig,
        usable_tokens: int,
        context: ParallelContext,
        goals: RouterGoals | None = None,
    ) -> None:
        self._wrapped, self._reference, self._config, self._context = wrapped, reference, config, context
        self._goals = goals or RouterGoals(config, context, {}, {})
        self._banned_V = banned_tokens(config.model.vocab_size, usable_tokens, wrapped[0].module.never_said, context.pgs.tp, context.device)
        self._settings = loss_settings(config)

    def forward(self, model: Any, batch: PolicyBatch) -> torch.Tensor:
        """The output of a model chunk with the rollout's routes."""
        with self._routed(model.module, batch):
            return model(batch.inputs)

    def loss(self, model: Any, batch: PolicyBatch, logits_SBV: torch.Tensor) -> LossParts:
        frame = model.module.frame(batch.inputs)
        mask_BS, rollout_BS = self._sampled(batch, frame)
        logprobs_BS, entropy_BS = self.scores(logits_SBV, batch, frame)
        if batch.old_BS is None:
            self._require_agreement(logprobs_BS.detach(), mask_BS, rollout_BS, batch, frame)
        parts = policy_loss(
            logprobs_BS,
            logprobs_BS.detach() if batch.old_BS is None else batch.old_BS,
            rollout_BS,
            batch.advantages_B,
            mask_BS,
            self._settings,
            ref_logprobs_BS=batch.reference_BS,
            entropy_BS=entropy_BS,
            rows=Rows(batch.mask_BS.sum(1), self._context.cp_rank == 0, self._joined, batch.stale_B if self._config.rl.max_staleness else None),
        )
        told = {**parts.metrics, **self._coverage(batch, frame, mask_BS), **self._staleness(batch, frame, mask_BS)}
        return parts.loss_sum, parts.divisor.to(torch.int32), told

    @torch.no_grad()
    def prepared(self, batches: Sequence[PolicyBatch], with_old: bool) -> list[PolicyBatch]:
        """The batches with the reference's log-probs, where the loss has a term of them, and (`with_old`) those of the present weights. Raises like `loss`
        where the rollout disagrees with them."""
        if with_old:
            with self._goals.recording():
                batches = [replace(batch, old_BS=old_BS) for batch, old_BS in self._scored(_Scorer(self, replays=True), self._wrapped, batches)]
        if self._settings.kl_coeff > 0:
            batches = [replace(batch, reference_BS=logprobs_BS) for batch, logprobs_BS in self._referred(batches)]
        return list(batches)

    @torch.no_grad()
    def reference_kl(self, batches: Sequence[PolicyBatch]) -> dict[str, float]:
        """Of every rollout, by key, the estimate of KL(rollout || reference) summed over its tokens. Empty but on the last pipeline stage."""
        found: dict[str, float] = {}
        for batch, reference_BS in self._referred(batches):
            if reference_BS is None:
                continue
            mask_BS, rollout_BS = self._sampled(batch, self._reference[-1].frame(batch.inputs))
            kl_BS = kl_estimate(self._config.rl.kl_estimator, rollout_BS, reference_BS)
            kl_B = self._joined(torch.where(mask_BS, kl_BS, 0.0).sum(1))
            found |= {key: kl for key, kl in zip(batch.shard.keys_B, kl_B.tolist(), strict=True) if key != FILLER_KEY}
        return found

    def _referred(self, batches: Sequence[PolicyBatch]) -> list[tuple[PolicyBatch, torch.Tensor | None]]:
        return self._scored(_Scorer(self, replays=False), self._reference, batches)

    def _scored(self, scorer: _Scorer, chunks: Sequence[Any], batches: Sequence[PolicyBatch]) -> list[tuple[PolicyBatch, torch.Tensor | None]]:
        """Every batch with its log-probs, which only the last pipeline stage gets to see."""
        run_schedule(chunks, batches, scorer, self._context, forward_only=True)
        return list(zip(batches, scorer.found or [None] * len(batches), strict=True))

    def _sampled(self, batch: PolicyBatch, frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's mask of response tokens and their log-probs at rollout, where they are decided."""
        return frame.take(decided(batch.mask_BS)), frame.take(decided(batch.rollout_BS))

    def _joined(self, values_B: torch.Tensor) -> torch.Tensor:
        """A value per row, summed over the ranks that hold slices of the row. Collective under context parallelism."""
        if self._context.layout.cp > 1:
            torch.distributed.all_reduce(values_B, group=self._context.pgs.cp)
        return values_B

    @contextmanager
    def _routed(self, bare: VisionLanguageModel, batch: PolicyBatch) -> Iterator[None]:
        if not self._config.rl.replay_routes:
            yield
            return
        here = expert_layers_among(bare.model_config, bare.stage.layers)
        experts_BSLK = bare.frame(batch.inputs).take(batch.experts_BSLK)[:, :, here]
        with bare.router_tap.replay(experts_BSLK) as routes, self._goals.pulling(bare, batch, range(here.start, here.stop)):
            yield
            require_replayed(routes, experts_BSLK, batch.shard)

    def scores(self, logits_SBV: torch.Tensor, batch: PolicyBatch, frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the tokens and entropies, [B, S] at this rank's positions; meaningless where a row ends."""
        targets_BS = frame.take(decided(batch.inputs.tokens_BS))
        return policy_scores(logits_SBV, targets_BS, self._config.rollout.temperature, self._banned_V, self._context.pgs.tp)

    def _require_agreement(self, logprobs_BS: torch.Tensor, mask_BS: torch.Tensor, rollout_BS: torch.Tensor, batch: PolicyBatch, frame: Frame) -> None:
        """Where rollout and learner have the same weights, their log-probs may differ by rounding only, and in the deterministic mode by nothing. Answers that
        older weights had a part in are not looked at: even their latest tokens attend to what the older ones left."""
        diff_BS = torch.where(mask_BS & ~batch.stale_B[:, None], logprobs_BS - rollout_BS, 0.0).abs()
        exact = self._config.rollout.deterministic
        limit = 0.0 if exact else self._config.rl.max_logprob_diff
        if bool((diff_BS <= limit).all()):
            return
        row, place = divmod(int(diff_BS.argmax()), diff_BS.shape[1])
        token = 1 + (place if frame.local_S is None else int(frame.local_S[place]))
        raise UserError(
            "rollout.deterministic" if exact else "rl.max_logprob_diff",
            f"the learner gives token {token} of {batch.shard.keys_B[row]} the log-prob {float(logprobs_BS[row, place]):.8g}, the rollout had "
            f"{float(rollout_BS[row, place]):.8g} under the same weights (version {int(batch.shard.batch.versions_BS[row].max())}); allowed is {limit:g}",
            "let both run on machines of one kind, or set it to false"
            if exact
            else "keep rl.replay_routes on and both in fp32, or raise the limit if the precision explains it",
        )

    def _staleness(self, batch: PolicyBatch, frame: Frame, mask_BS: torch.Tensor) -> dict[str, Metric]:
        """Of the response tokens: by how many versions their weights were older than the learner's."""
        if not self._config.rl.max_staleness:
            return {}
        age_n = frame.take(decided(batch.age_BS))[mask_BS].float()
        return {**per_token({"staleness/mean": age_n}), **largest({"staleness/max": age_n})}

    def _coverage(self, batch: PolicyBatch, frame: Frame, mask_BS: torch.Tensor) -> dict[str, Metric]:
        """The share of response tokens whose deciding position was replayed; `digest_ok` is 1, or the run has stopped."""
        if not self._config.rl.replay_routes:
            return {}
        covered_BS = (frame.take(batch.experts_BSLK) >= 0).flatten(2).all(-1)
        tokens = float(mask_BS.sum())
        return {"route/coverage": Metric(float((covered_BS & mask_BS).sum()), tokens), "route/digest_ok": Metric(tokens, tokens)}


class _Scorer:
    """An objective without a gradient: leaves the log-probs of every batch in `found`. `replays`: the trained policy with the rollout's routes, which must
    agree with the rollout; otherwise the reference, which routes by itself: its router is part of what it is."""

    def __init__(self, policy: Policy, replays: bool) -> None:
        self._policy, self._replays = policy, replays
        self.found: list[torch.Tensor | None] = []

    def forward(self, model: Any, batch: PolicyBatch) -> torch.Tensor:
        return self._policy.forward(model, batch) if self._replays else model(batch.inputs)

    def loss(self, model: Any, batch: PolicyBatch, logits_SBV: torch.Tensor) -> LossParts:
        frame = getattr(model, "module", model).frame(batch.inputs)
        logprobs_BS, _ = self._policy.scores(logits_SBV, batch, frame)
        if self._replays:
            self._policy._require_agreement(logprobs_BS, *self._policy._sampled(batch, frame), batch, frame)
        self.found.append(logprobs_BS)
        return logprobs_BS.sum(), torch.ones((), dtype=torch.int32), {}


def require_replayed(routes: Routes, experts_BSLK: torch.Tensor, shard: Shard) -> None:
    """Raises RouteMismatch unless the routes that arrived are, row by row, what the rollouts recorded, and those of this rank's positions and layers
    (`experts_BSLK`, -1 where there is none) are what its routers used. Collective over the tensor-parallel group."""
    rows, length = experts_BSLK.shape[:2]
    used_BSLK = routes.experts(length * rows).unflatten(0, (length, rows)).transpose(0, 1)
    same_B = ((used_BSLK == experts_BSLK) | (experts_BSLK < 0)).flatten(1).all(1)
    for row, key in enumerate(shard.keys_B):
        if key == FILLER_KEY:
            continue
        arrived = route_digest(shard.batch.experts_BSLK[row, : shard.lengths_B[row] - 1])
        if arrived != shard.digests_B[row] or not bool(same_B[row]):
            raise RouteMismatch(f"the learner did not replay the routes that rollout {key} recorded")

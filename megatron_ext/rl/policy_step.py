"""The policy's forward pass in an update: replayed routes, log-probs, the two checks, the loss.

    l[b, s] = log pi(token s | tokens before s), from position s - 1, under the distribution that is sampled from (temperature, banned tokens)

With one minibatch the old log-probs are the current ones, detached: the ratio is exactly 1 and its gradient that of log pi. With several they are computed
first, in `with_old_logprobs`, by the same forward pass without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.batch import route_digest
from megatron_ext.batch.metric import Metric
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import RouteMismatch, UserError
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.heads import banned_tokens, policy_logits, token_logprobs
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.router_tap import Routes
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.batching import FILLER_KEY, Shard
from megatron_ext.rl.loss import LossSettings, policy_loss


@dataclass(frozen=True)
class PolicyBatch:
    """A microbatch on the device. `old_BS` is None where the current log-probs are the old ones."""

    inputs: ModelInputs
    shard: Shard
    mask_BS: torch.Tensor
    rollout_BS: torch.Tensor
    advantages_B: torch.Tensor
    experts_BSLK: torch.Tensor
    old_BS: torch.Tensor | None = None


def policy_batch(shard: Shard, device: torch.device) -> PolicyBatch:
    batch = shard.batch
    inputs = model_inputs(batch.tokens_BS, batch.tiles_IHWC, batch.row_tiles_BM, device)
    arrays = (batch.response_mask_BS.astype(bool), batch.logprobs_BS, batch.advantages_B, batch.experts_BSLK)
    return PolicyBatch(inputs, shard, *(torch.from_numpy(array).to(device) for array in arrays))


class Policy:
    """The model that is trained, wrapped for data parallelism, with its frozen reference (None: no KL term)."""

    def __init__(self, model: Any, reference: VisionLanguageModel | None, config: RunConfig, usable_tokens: int, context: ParallelContext) -> None:
        self._model, self._reference, self._config, self._context = model, reference, config, context
        rl, bare = config.rl, model.module
        self._banned_V = banned_tokens(config.model.vocab_size, usable_tokens, bare.image_token, context.pgs.tp, context.device)
        constant = config.rollout.max_new_tokens if rl.algorithm == "dr_grpo" else None
        self._settings = LossSettings(rl.clip_low, rl.clip_high, rl.dual_clip, rl.kl_coeff, constant)

    def loss(self, model: Any, batch: PolicyBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        """The loss function of `optimizer_step`."""
        logits_SBV = self._logits(model, model.module, batch)
        entropy_BS = self._entropy(logits_SBV, batch)  # before the log-probs: Megatron's cross entropy overwrites the logits
        logprobs_BS = self._logprobs(logits_SBV, batch)
        if batch.old_BS is None:
            self._require_agreement(logprobs_BS.detach(), batch)
        parts = policy_loss(
            logprobs_BS,
            logprobs_BS.detach() if batch.old_BS is None else batch.old_BS,
            batch.rollout_BS,
            batch.advantages_B,
            batch.mask_BS,
            self._settings,
            ref_logprobs_BS=self._reference_logprobs(batch),
            entropy_BS=entropy_BS,
        )
        return parts.loss_sum, parts.divisor.to(torch.int32), {**parts.metrics, **self._coverage(batch)}

    @torch.no_grad()
    def with_old_logprobs(self, batch: PolicyBatch) -> PolicyBatch:
        """The batch with the log-probs of the present weights. Raises like `loss` where the rollout disagrees with them."""
        old_BS = self._logprobs(self._logits(self._model, self._model.module, batch), batch)
        self._require_agreement(old_BS, batch)
        return replace(batch, old_BS=old_BS)

    def _logits(self, model: Any, bare: VisionLanguageModel, batch: PolicyBatch) -> torch.Tensor:
        """Policy logits [S, B, V / tp] with the rollout's routes."""
        with self._routed(bare, batch):
            logits_SBV = model(batch.inputs)
        return policy_logits(logits_SBV, self._config.rollout.temperature, self._banned_V)

    @contextmanager
    def _routed(self, bare: VisionLanguageModel, batch: PolicyBatch) -> Iterator[None]:
        if not self._config.rl.replay_routes:
            yield
            return
        with bare.router_tap.replay(batch.experts_BSLK) as routes:
            yield
            require_replayed(routes, batch.shard)

    def _logprobs(self, logits_SBV: torch.Tensor, batch: PolicyBatch) -> torch.Tensor:
        """[B, S], 0 in the first position, which nothing predicts."""
        return F.pad(token_logprobs(logits_SBV[:-1], batch.inputs.tokens_BS[:, 1:], self._context.pgs.tp), (1, 0))

    @torch.no_grad()
    def _reference_logprobs(self, batch: PolicyBatch) -> torch.Tensor | None:
        """The reference routes by itself: its router is part of what it is."""
        if self._reference is None:
            return None
        logits_SBV = policy_logits(self._reference(batch.inputs), self._config.rollout.temperature, self._banned_V)
        return self._logprobs(logits_SBV, batch)

    @torch.no_grad()
    def _entropy(self, logits_SBV: torch.Tensor, batch: PolicyBatch) -> torch.Tensor:
        """Entropy [B, S] of the distribution that each response token was sampled from, 0 elsewhere."""
        decided_BS = batch.mask_BS[:, 1:]
        logits_nV = gather_from_tensor_model_parallel_region(logits_SBV[:-1].transpose(0, 1)[decided_BS], group=self._context.pgs.tp)
        entropy_BS = torch.zeros(batch.mask_BS.shape, device=logits_nV.device)
        entropy_BS[:, 1:][decided_BS] = torch.special.entr(torch.softmax(logits_nV, dim=-1)).sum(-1)
        return entropy_BS

    def _require_agreement(self, logprobs_BS: torch.Tensor, batch: PolicyBatch) -> None:
        """Rollout and learner have the same weights here, so that their log-probs may differ by rounding only."""
        diff_BS = torch.where(batch.mask_BS, logprobs_BS - batch.rollout_BS, 0.0).abs()
        limit = self._config.rl.max_logprob_diff
        if bool((diff_BS <= limit).all()):
            return
        row, position = divmod(int(diff_BS.argmax()), diff_BS.shape[1])
        raise UserError(
            "rl.max_logprob_diff",
            f"the learner gives token {position} of {batch.shard.keys_B[row]} the log-prob {float(logprobs_BS[row, position]):.5f}, the rollout had "
            f"{float(batch.rollout_BS[row, position]):.5f} under the same weights (version {batch.shard.batch.version}); allowed is {limit:g}",
            "keep rl.replay_routes on and both in fp32, or raise the limit if the precision explains it",
        )

    def _coverage(self, batch: PolicyBatch) -> dict[str, Metric]:
        """The share of response tokens whose deciding position was replayed; `digest_ok` is 1, or the run has stopped."""
        if not self._config.rl.replay_routes:
            return {}
        decided_BS = batch.mask_BS[:, 1:]
        covered_BS = (batch.experts_BSLK[:, :-1] >= 0).flatten(2).all(-1)
        tokens = float(decided_BS.sum())
        return {"route/coverage": Metric(float((covered_BS & decided_BS).sum()), tokens), "route/digest_ok": Metric(tokens, tokens)}


def require_replayed(routes: Routes, shard: Shard) -> None:
    """Raises RouteMismatch unless what the routers used is, row by row, what the rollouts recorded."""
    rows, length = shard.batch.tokens_BS.shape
    used_BSLK = routes.experts().unflatten(0, (length, rows)).transpose(0, 1).cpu().numpy()
    for row, key in enumerate(shard.keys_B):
        if key != FILLER_KEY and route_digest(used_BSLK[row, : shard.lengths_B[row] - 1]) != shard.digests_B[row]:
            raise RouteMismatch(f"the learner did not replay the routes that rollout {key} recorded")

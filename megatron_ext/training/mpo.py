"""One step of mixed preference optimisation: what the pairs of a micro-batch are worth to the model and to its frozen reference.

    micro-batches of rows, right and wrong answers in turn
      -> sums of log-probs under the reference, without gradients
      -> optimizer_step: the same sums under the policy -> implicit rewards -> the loss of `preference.py`
      -> the mean of all rewards so far, for the next step

A context-parallel rank holds a slice of each answer: sums are added over those ranks, each of which has the gradient of its own slice, and one counts the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.batch.metric import Metric
from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.folder import digest_of, find_checkpoint
from megatron_ext.config.schema import MpoConfig, RunConfig
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.errors import CheckpointError
from megatron_ext.model.assembly import VisionLanguageModel, build_chunks
from megatron_ext.model.heads import decided
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.token_scores import token_logprobs
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.engine import Engine
from megatron_ext.training.losses import Microbatch, row_metrics
from megatron_ext.training.preference import RunningMean, bco_pair, dpo
from megatron_ext.training.reduce import total
from megatron_ext.training.step import LossParts, optimizer_step, run_schedule


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of pairs: its rows are right and wrong answers in turn. `token_weight`: of a token of a right answer, where a pair counts 1. `reference_R`
    float64: the log-prob of each answer under the reference, known on the last pipeline stage."""

    rows: Microbatch
    token_weight: float
    reference_R: Tensor | None = None


class MixedPreference:
    """The update of the stage `mpo`. `reference`: the chunks of the model that it started from, frozen. `rewards`: the implicit rewards of the steps so far."""

    def __init__(self, engine: Engine, reference: Sequence[VisionLanguageModel], settings: MpoConfig, context: ParallelContext, rewards: RunningMean) -> None:
        self._engine, self._reference, self._settings, self._context = engine, reference, settings, context
        self.rewards = rewards

    def update(self, microbatches: Sequence[Microbatch], lap: Callable[[str], None] = lambda phase: None) -> dict[str, float]:
        """An optimizer step (`loop.Update`). Every rank passes whole pairs. `mpo/delta` is what the step's quality loss compared with."""
        batches = self.prepared(microbatches)
        lap("ref")
        delta = self.rewards.mean
        metrics = optimizer_step(self._engine, batches, Preferences(self._settings, delta, self._context), self._context, lap)
        num_pairs = int(metrics.pop("num_tokens"))  # the divisor of the loss
        self.rewards = self.rewards.joined((metrics["mpo/reward_chosen"] + metrics["mpo/reward_rejected"]) / 2, 2 * num_pairs)
        return {**metrics, "mpo/delta": delta}

    @torch.no_grad()
    def prepared(self, microbatches: Sequence[Microbatch]) -> list[Pairs]:
        """With the log-probs of the reference, and with the weight of tokens that the right answers of all ranks together give them. Collective."""
        context, settings = self._context, self._settings
        targets = sum(float(_by_answer(decided(rows.mask_BS), rows.inputs, 1)[0::2].sum()) for rows in microbatches)
        weight = settings.sft_weight * settings.global_batch / total(targets, context.pgs.dp, context.device)
        batches = [Pairs(_weighed_by_pairs(rows), weight) for rows in microbatches]
        scorer = _Scorer(context)
        run_schedule(self._reference, batches, scorer, context, forward_only=True)
        return [replace(batch, reference_R=found_R) for batch, found_R in zip(batches, scorer.found or [None] * len(batches), strict=True)]


class Preferences:
    """Of a step: the loss of `preference.py` as a sum over pairs."""

    def __init__(self, settings: MpoConfig, delta: float, context: ParallelContext) -> None:
        self._settings, self._delta, self._context = settings, delta, context

    def forward(self, model: Any, batch: Pairs) -> Tensor:
        output: Tensor = model(batch.rows.inputs)
        return output

    def loss(self, model: Any, batch: Pairs, logits_SBV: Tensor) -> LossParts:
        settings, counted = self._settings, self._context.cp_rank == 0
        own_R, targets_R = _answers(model.module, batch, logits_SBV)
        policy_R = _joined(own_R, self._context)
        assert batch.reference_R is not None
        chosen_P, rejected_P = (settings.beta * (policy_R - batch.reference_R)).unflatten(0, (-1, 2)).unbind(1)
        dpo_P, bco_P = dpo(chosen_P, rejected_P), bco_pair(chosen_P, rejected_P, self._delta)
        pairs = (settings.dpo_weight * dpo_P + settings.bco_weight * bco_P).sum()
        nll = -own_R[0::2].sum()
        # Every rank has the gradient of a pair with respect to the tokens it holds; its value is one rank's.
        loss = (pairs if counted else pairs - pairs.detach()) + batch.token_weight * nll
        values = {
            "dpo": dpo_P,
            "bco": bco_P,
            "accuracy": (chosen_P > rejected_P).double(),
            "margin": chosen_P - rejected_P,
            "reward_chosen": chosen_P,
            "reward_rejected": rejected_P,
            "logprob_chosen": policy_R[0::2],
            "logprob_rejected": policy_R[1::2],
        }
        num_pairs = len(chosen_P) * counted
        sums = torch.stack([value_P.detach().sum() for value_P in values.values()]).tolist()
        metrics = {f"mpo/{name}": Metric(value * counted, num_pairs) for name, value in zip(values, sums, strict=True)}
        metrics["mpo/sft"] = Metric(float(nll.detach()), float(targets_R[0::2].sum()))
        divisor = torch.tensor(num_pairs, dtype=torch.int32, device=loss.device)
        return loss.float(), divisor, {**metrics, **row_metrics(batch.rows, counted)}


class _Scorer:
    """Leaves the log-probs of the answers of every micro-batch under a model without gradients in `found`."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self.found: list[Tensor | None] = []

    def forward(self, model: Any, batch: Pairs) -> Tensor:
        output: Tensor = model(batch.rows.inputs)
        return output

    def loss(self, model: Any, batch: Pairs, logits_SBV: Tensor) -> LossParts:
        own_R, _ = _answers(model, batch, logits_SBV)
        self.found.append(_joined(own_R, self._context))
        return own_R.sum(), torch.ones((), dtype=torch.int32), {}


def _answers(bare: VisionLanguageModel, batch: Pairs, logits_SBV: Tensor) -> tuple[Tensor, Tensor]:
    """Of every answer: the sum of its tokens' log-probs at this rank's positions, in float64 because only differences of large sums count, and the number of
    these tokens."""
    inputs = batch.rows.inputs
    frame = bare.frame(inputs)
    targets_BS, mask_BS = (frame.take(decided(x_BS)) for x_BS in (inputs.tokens_BS, batch.rows.mask_BS))
    logprobs_BS = token_logprobs(logits_SBV, targets_BS, bare.tp_group).double()
    parts = 1 if frame.local_S is None else bare.cp_group.size()
    return _by_answer(logprobs_BS * mask_BS, inputs, parts), _by_answer(mask_BS, inputs, parts)


def _by_answer(values_BS: Tensor, inputs: ModelInputs, parts: int) -> Tensor:
    """[R]: sums over the samples of padded or packed rows, of each of which a rank holds one of `parts` equal parts."""
    if not inputs.bounds:
        return values_BS.sum(1)
    lengths = [(stop - start) // parts for start, stop in pairwise(inputs.bounds)]
    return torch.stack([of_sample.sum() for of_sample in values_BS[0].split(lengths)])


def _joined(own_R: Tensor, context: ParallelContext) -> Tensor:
    """Summed over the ranks that hold slices of the answers, with the gradient of this rank's slice. Collective under context parallelism."""
    if context.layout.cp == 1:
        return own_R
    all_R = own_R.detach().clone()
    torch.distributed.all_reduce(all_R, group=context.pgs.cp)
    return own_R + (all_R - own_R.detach())


def _weighed_by_pairs(rows: Microbatch) -> Microbatch:
    """Balancing losses count as many times as there are pairs, as the main loss is a sum over pairs."""
    return replace(rows, inputs=replace(rows.inputs, aux_weight=rows.inputs.num_samples / 2))


def open_preference(
    config: RunConfig, engine: Engine, init_from: Path, tokenizer: Tokenizer, resumed: Mapping[str, Any], context: ParallelContext
) -> MixedPreference:
    """The update with its reference, the model of `init_from`. `resumed`: what `kept` once gave, or nothing. Collective."""
    digest = digest_of(find_checkpoint(init_from))
    if resumed and resumed["reference"] != digest:
        raise CheckpointError(str(init_from), "is not the checkpoint that this stage began with, its reference", "put that one back, or begin again (--force)")
    chunks = build_chunks(config.model, tokenizer.image_id, context, vision_trains=False, markers=tokenizer.markers)
    load_checkpoint(init_from, chunks, context=context, model_config=config.model)
    rewards = RunningMean(**resumed["rewards"]) if resumed else RunningMean()
    return MixedPreference(engine, [chunk.requires_grad_(False).eval() for chunk in chunks], config.mpo, context, rewards)


def kept(preference: MixedPreference, init_from: Path) -> dict[str, Any]:
    """What a checkpoint of the stage has besides the model and its optimizer."""
    return {"rewards": asdict(preference.rewards), "reference": digest_of(find_checkpoint(init_from))}

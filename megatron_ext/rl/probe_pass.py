"""The probe's forward pass on a rank of any layout: of the learner through its pipeline, its routes recorded; of a rollout replica with the learner's routes.

Collective over the world's ranks. Log-probs and routes of positions, stages and vocabulary parts that other ranks hold are put together: one rank of each copy
of the model has the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from megatron_ext.config.schema import RunConfig
from megatron_ext.config.sizes import expert_layers, expert_layers_among
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.frame import Frame
from megatron_ext.model.heads import banned_tokens, decided
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.router_tap import Routes
from megatron_ext.model.token_scores import policy_scores
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.probe import Probe, Probed
from megatron_ext.training.step import LossParts, run_schedule


class ProbePass:
    """One pass of the probe: an objective without a gradient. `usable_tokens`: of the vocabulary, those that the tokenizer has;
    `placeholders`: those that are never sampled."""

    def __init__(self, probe: Probe, config: RunConfig, usable_tokens: int, placeholders: Sequence[int], context: ParallelContext) -> None:
        self._probe, self._config, self._context = probe, config, context
        self._banned_V = banned_tokens(config.model.vocab_size, usable_tokens, placeholders, context.pgs.tp, context.device)
        tiles = np.arange(max(1, len(probe.tiles)))[None] if len(probe.tiles) else np.full((1, 1), -1)
        self._inputs = model_inputs(probe.tokens_S[None], probe.tiles, tiles, context.device)
        length = len(probe.tokens_S)
        self._logprobs_S = torch.zeros(length, device=context.device)
        shape = length, len(expert_layers(config.model)), config.model.experts_per_token
        self._experts_SLK = torch.full(shape, -1, dtype=torch.int32, device=context.device)
        self._given_SLK: torch.Tensor | None = None

    @torch.no_grad()
    def of_learner(self, wrapped: Sequence[Any], version: int) -> Probed:
        """The answer of the chunks that the schedule runs. Whole on the last pipeline stage."""
        layout = self._context.layout
        rounds = layout.pp if layout.vpp > 1 else 1  # interleaved pipelines take micro-batches in multiples of pp
        with batch_invariant(self._config.rollout.deterministic):
            run_schedule(wrapped, [self._inputs] * rounds, self, self._context, forward_only=True)
        for size, group in ((layout.cp, self._context.pgs.cp), (layout.pp, self._context.pgs.pp)):
            if size > 1:
                torch.distributed.all_reduce(self._experts_SLK, torch.distributed.ReduceOp.MAX, group=group)
        return self._probed(version)

    @torch.no_grad()
    def of_rollout(self, model: VisionLanguageModel, version: int, experts_SLK: np.ndarray | None) -> Probed:
        """The answer of a whole model; `experts_SLK`: the routes to replay (None: its own)."""
        self._given_SLK = None if experts_SLK is None else torch.from_numpy(experts_SLK).to(self._context.device)
        was_training = model.training
        model.eval()
        try:
            with batch_invariant(self._config.rollout.deterministic):
                self._score(model, self._run(model, model, self._inputs))
        finally:
            model.train(was_training)
        return self._probed(version)

    def forward(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        return self._run(model, model.module, inputs)

    def loss(self, model: Any, inputs: ModelInputs, logits_SBV: torch.Tensor) -> LossParts:
        self._score(model.module, logits_SBV)
        return self._logprobs_S.sum(), torch.ones((), dtype=torch.int32), {}

    def _run(self, model: Any, bare: VisionLanguageModel, inputs: ModelInputs) -> torch.Tensor:
        frame = bare.frame(inputs)
        here = expert_layers_among(bare.model_config, bare.stage.layers)
        with self._tapped(bare, frame, here) as routes:
            output: torch.Tensor = model(inputs)
            places_S = self._places(frame)
            self._experts_SLK[places_S, here] = routes.experts(len(places_S)).int()
        return output

    def _tapped(self, bare: VisionLanguageModel, frame: Frame, here: slice) -> AbstractContextManager[Routes]:
        if self._given_SLK is None:
            return bare.router_tap.record()
        return bare.router_tap.replay(frame.take(self._given_SLK[None])[:, :, here])

    def _score(self, bare: VisionLanguageModel, logits_SBV: torch.Tensor) -> None:
        """Every position is scored by one context-parallel rank."""
        frame = bare.frame(self._inputs)
        targets_BS = frame.take(decided(self._inputs.tokens_BS))
        logprobs_BS, _ = policy_scores(logits_SBV, targets_BS, self._config.rollout.temperature, self._banned_V, self._context.pgs.tp)
        self._logprobs_S.zero_()[self._places(frame)] = logprobs_BS[0]
        if self._context.layout.cp > 1:
            torch.distributed.all_reduce(self._logprobs_S, group=self._context.pgs.cp)

    def _places(self, frame: Frame) -> torch.Tensor:
        return torch.arange(len(self._probe.tokens_S), device=self._context.device) if frame.local_S is None else frame.local_S

    def _probed(self, version: int) -> Probed:
        logprobs_S = np.where(self._probe.compared_S, self._logprobs_S.cpu().numpy(), np.float32(0))
        return Probed(version, logprobs_S, self._experts_SLK.cpu().numpy().astype(np.int16))

"""One rank of the learner: updates the policy on its shard of scored rollouts, publishes and saves the weights. Lives in a process of its own, as long as
that process.

    open -> (update -> send_weights)* -> save -> finish_saving

An update replays the routes that the rollouts recorded, so that the learner's log-probs are of the very experts that answered. Two checks stand between a
rollout and the optimizer: the routes that were really replayed must have the digest that the rollout recorded, and the log-probs must agree with the
rollout's where both have the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.dist import latest_step, load_checkpoint
from megatron_ext.checkpoint.folder import CHECKPOINTS
from megatron_ext.checkpoint.saver import open_saver
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.device import device_name
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.errors import WeightSyncError
from megatron_ext.model.assembly import VisionLanguageModel, build_chunks
from megatron_ext.observe.metrics_file import STEP_S
from megatron_ext.observe.profiler import UNPROFILED, Profiler
from megatron_ext.observe.stopwatch import TIMING, Stopwatch
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.parallel.store import open_store
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.hosts.ranks import WORLD_TIMEOUT_S, Place, confine_gloo
from megatron_ext.rl.objective.metrics import effective_sample_size
from megatron_ext.rl.parcels import Parcel
from megatron_ext.rl.policy_step import Policy, PolicyBatch, policy_batch
from megatron_ext.rl.probe import Probe, Probed
from megatron_ext.rl.probe_pass import ProbePass
from megatron_ext.rl.refit.plan import Bucket, Part
from megatron_ext.rl.refit.staging import own_parts, own_tensors
from megatron_ext.rl.refit.weight_sync import Meeting, send
from megatron_ext.rl.router_goals import RouterGoals, watches_routers
from megatron_ext.rl.staleness import require_versions
from megatron_ext.rl.turns import LearnerMemory
from megatron_ext.training.engine import Engine
from megatron_ext.training.engines import start_engine
from megatron_ext.training.rank_work import RankWork, WorkMeter
from megatron_ext.training.step import optimizer_step

STORE_TIMEOUT_S = 60.0
CEILINGS = "earl_ceilings"
"""Where a checkpoint keeps them."""


@dataclass(frozen=True)
class LearnerPlace:
    """What a rank tells the driver once it is open: which shard is its own, how many steps its checkpoint had finished, and what torch calls its device."""

    dp_rank: int
    dp_size: int
    finished_steps: int
    device_name: str


@dataclass(frozen=True)
class Updated:
    """What a rank says of an update: metrics, equal on all ranks but for `timing_s/*`, and its own work."""

    metrics: dict[str, float]
    work: RankWork


@dataclass(frozen=True)
class Opened:
    """`first_routers`: weights that RL started from, by layer number, where their distance is measured; `saved`: what the checkpoint that was resumed says."""

    engine: Engine
    first_routers: dict[int, torch.Tensor]
    saved: dict[str, Any]


class LearnerRank:
    """The role; see `ranks.Host`. Its methods are the verbs."""

    def open(self, config: RunConfig, stage_dir: Path, init_from: Path, place: Place) -> LearnerPlace:
        """Joins the learner's world; resumes from the stage's latest checkpoint, or starts from the weights of `init_from`."""
        confine_gloo(place.address)
        checkpoints = stage_dir / CHECKPOINTS
        self._config = config
        self._world = ExitStack()  # stays open as long as the process
        world = open_parallel(config.parallel, place.rank, place.world_size, place.meeting_point, config.seed, WORLD_TIMEOUT_S)
        self._context = self._world.enter_context(world)
        self._tokenizer = load_tokenizer(config.tokenizer_dir)
        opened = _engine(config, checkpoints, init_from, self._tokenizer, self._context)
        self._engine, self._finished = opened.engine, int(opened.saved.get("step", 0))
        self._reference = _reference(config, init_from, self._tokenizer, self._context) if config.rl.kl_coeff > 0 else []
        self._memory: LearnerMemory | None = None
        self._goals = RouterGoals(config, self._context, opened.saved.get(CEILINGS, {}), opened.first_routers)
        self._policy = Policy(self._engine.wrapped, self._reference, config, self._tokenizer.vocab_size, self._context, self._goals)
        self._saver = self._world.enter_context(open_saver(checkpoints, config.rl.keep, self._context, config.model, asynchronous=config.rl.async_save))
        self._meter = WorkMeter(self._context.device)
        self._profiler = UNPROFILED
        return LearnerPlace(self._context.dp_rank, self._context.layout.dp, self._finished, device_name(self._context.device))

    def profile(self, stage_dir: Path, name: str, left: int) -> None:
        """From now on, what a step is: to update, and to publish. `left` steps will follow."""
        from megatron_ext.rl.phases import LEARNER

        self._profiler = Profiler(stage_dir, name, self._config.observe.profile, left, LEARNER)

    def update(self, parcels: Sequence[Parcel]) -> Updated:
        """One optimizer step for each parcel (one a minibatch).

        Raises WeightSyncError for rollouts of newer weights than these, for those of older ones than `rl.max_staleness` allows, and after `offload`.
        """
        self._saver.poll()
        if self._memory is not None and self._memory.given:
            raise WeightSyncError("an update was asked for while gradients and optimizer have left the device")
        require_versions((row for parcel in parcels for row in parcel.rows), self._finished, self._config.rl)
        self._profiler.begin()
        clock = Stopwatch()
        parts = [self._microbatches(parcel) for parcel in parcels]
        clock.lap("data")
        with batch_invariant(self._config.rollout.deterministic), self._meter.step(clock.seconds()[STEP_S]):
            # Later minibatches meet a policy that has moved: old log-probs must be taken before the first.
            parts = [self._policy.prepared(part, with_old=len(parts) > 1) for part in parts]
            clock.lap("old_log_prob")
            steps = [self._step(part, clock) for part in parts]
            goals = self._goals.finish()
        self._finished += 1
        timings = {TIMING + phase: seconds for phase, seconds in clock.phases().items()}
        return Updated({**_over_minibatches(steps), **goals, **timings}, self._meter.take())

    def _step(self, part: Sequence[PolicyBatch], clock: Stopwatch) -> dict[str, float]:
        self._goals.begin(part)
        return optimizer_step(self._engine, part, self._policy, self._context, clock.lap)

    def reference_kl(self, parcel: Parcel) -> dict[str, float]:
        """See `Policy.reference_kl`."""
        return self._policy.reference_kl(self._microbatches(parcel))

    def open_store(self, host: str) -> int:
        """Opens the meeting place of weight publications (rank 0); its port."""
        self._store = open_store(host, STORE_TIMEOUT_S)
        return int(self._store.port)

    def weight_parts(self) -> tuple[Part, ...]:
        """What this rank holds of the weights."""
        self._engine.settle()
        return own_parts(self._engine.chunks, self._context)

    def offload(self) -> None:
        """Leaves the device to the rollouts: until `onload` no other verb may be asked."""
        self._engine.settle()
        if self._memory is None:
            self._memory = LearnerMemory(self._engine, self._reference, moves=self._context.device.type == "cuda")
        self._memory.give()

    def onload(self) -> None:
        """Undoes `offload`: everything is as it was, bit for bit."""
        if self._memory is not None:
            self._memory.take_back()

    def send_weights(self, meeting: Meeting, buckets: Sequence[Bucket]) -> int:
        """Sends this rank's share of the weights to the meeting. Returns the bytes sent."""
        self._engine.settle()
        store = self._store if self._context.rank == 0 else None
        try:
            return send(meeting, self._context.rank, buckets, own_tensors(self._engine.chunks, self._context), self._finished, store)
        finally:
            self._profiler.end()

    def probe(self, probe: Probe) -> Probed | None:
        """What the present weights make of the probe, and by which experts; None but from the rank that speaks for all."""
        context, tokenizer = self._context, self._tokenizer
        self._engine.settle()
        probed = ProbePass(probe, self._config, tokenizer.vocab_size, tokenizer.placeholders, context).of_learner(self._engine.wrapped, self._finished)
        speaks = context.is_last_stage and context.tp_rank == context.cp_rank == context.dp_rank == 0
        return probed if speaks else None

    def save(self, step: int) -> None:
        """May return before the checkpoint is written; what goes wrong with it is raised by the next verb that saves or updates."""
        engine = self._engine
        engine.settle()
        self._saver.save(step, engine.chunks, engine.optimizer_state, {"stage": "rl", CEILINGS: self._goals.ceilings})

    def finish_saving(self) -> None:
        """Returns once what `save` began is published."""
        self._saver.wait()

    def _microbatches(self, parcel: Parcel) -> list[PolicyBatch]:
        layout = self._context.layout
        parts = microbatches(unpack(parcel), self._config.rl.micro_batch, layout.length_multiple, layout.pp if layout.vpp > 1 else 1)
        return [policy_batch(part, self._context.device, self._finished) for part in parts]


def _engine(config: RunConfig, checkpoints: Path, init_from: Path, tokenizer: Tokenizer, context: ParallelContext) -> Opened:
    """The policy ready to train. Nothing balances experts here: it would pull against what the reward teaches the router; and
    nothing is dropped, as rollouts drop nothing. An expert bias stays what fine-tuning left: the routes of a step are replayed, so that it could only
    answer the rollouts' load with a change of the next rollouts' routes that no gradient knows of."""
    resume = latest_step(checkpoints) is not None
    still = {"moe_balancing": "none", "moe_z_loss_coeff": 0.0, "moe_expert_bias_rate": 0.0, "moe_capacity_factor": None, "moe_pad_to_capacity": False}
    settings = config.model.model_copy(update=still)
    chunks = build_chunks(settings, tokenizer.image_id, context, vision_trains=config.rl.train_vision, markers=tokenizer.markers)
    watched = config.earl.enabled and watches_routers(config)
    if watched or not resume:
        load_checkpoint(init_from, chunks, context=context, model_config=config.model)
    first = {router.layer_number: router.weight.detach().clone() for chunk in chunks for router in chunk.decoder.routers()} if watched else {}
    engine = start_engine(chunks, config.rl.optimizer, config.rl.steps * config.rl.minibatches, context, router_lr_scale=config.rl.router_lr_scale)
    if not resume:
        return Opened(engine, first, {})
    return Opened(engine, first, load_checkpoint(checkpoints, engine.chunks, engine.optimizer_state, context=context, model_config=config.model))


def _reference(config: RunConfig, init_from: Path, tokenizer: Tokenizer, context: ParallelContext) -> list[VisionLanguageModel]:
    """The frozen model that RL started from."""
    chunks = build_chunks(config.model, tokenizer.image_id, context, vision_trains=False, markers=tokenizer.markers)
    load_checkpoint(init_from, chunks, context=context, model_config=config.model)
    return [chunk.requires_grad_(False).eval() for chunk in chunks]


def _over_minibatches(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means, and the largest of what is named a maximum, of those minibatches that have the number; the optimizer's own numbers move under `actor/`."""
    names = {"grad_norm": "actor/grad_norm", "lr": "actor/lr"}
    joined = {}
    for step in steps:
        effective_sample_size(step)
    for name in steps[0]:
        if values := [step[name] for step in steps if not math.isnan(step[name])]:
            joined[names.get(name, name)] = max(values) if name.endswith(("_max", "/max")) else sum(values) / len(values)
    for ours in ("loss", "num_tokens"):  # said better by actor/loss and the rollouts' own lengths
        joined.pop(ours)
    return joined

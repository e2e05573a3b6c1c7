"""One rank of a rollout replica: holds a model and an engine, generates, and takes new weights. Lives in a process of its own, as long as that process.

    open -> (receive_weights -> load_weights -> advance* -> generate*)*

What was asked is answered in slices: `advance` takes further asks, runs some steps, and returns what they finished; weights may be loaded between two of them,
in the middle of answers (`inference/session.py` says what that means). `generate` answers from beginning to end, beside whatever is under way.

A replica is a world of its own: its ranks share nothing with the learner's but the short meetings of `refit/weight_sync.py`. All ranks get a verb together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.batch import FailedRollout, Rollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.device.lending import Lent, return_free_memory
from megatron_ext.errors import WeightSyncError
from megatron_ext.inference.admission import Request
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.observe.profiler import UNPROFILED, Profiler
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.rl.hosts.ranks import WORLD_TIMEOUT_S, Place, confine_gloo
from megatron_ext.rl.probe import Probe, Probed
from megatron_ext.rl.probe_pass import ProbePass
from megatron_ext.rl.refit.plan import Bucket, Part
from megatron_ext.rl.refit.staging import Staging, own_parts, own_tensors
from megatron_ext.rl.refit.weight_sync import Meeting, receive
from megatron_ext.rl.roles import Ask


@dataclass(frozen=True)
class Lane:
    """Where a rank stands in its replica: ranks of different `dp_rank` answer different prompts, of equal `dp_rank` the same ones; `speaks` marks the one
    that returns them.
    """

    dp_rank: int
    dp_size: int
    speaks: bool


class RolloutRank:
    """The role; see `ranks.Host`. Its methods are the verbs."""

    def open(self, config: RunConfig, place: Place) -> Lane:
        """Joins the replica's world and builds the model, whose weights are random until the first `load_weights`."""
        confine_gloo(place.address)
        parallel = config.rollout.parallel
        self._world = ExitStack()  # stays open as long as the process
        self._context = self._world.enter_context(open_parallel(parallel, place.rank, place.world_size, place.meeting_point, config.seed, WORLD_TIMEOUT_S))
        self._tokenizer = tokenizer = load_tokenizer(config.tokenizer_dir)
        self._config, self._version = config, -1
        self._model = build_model(config.model, tokenizer.image_id, self._context, markers=tokenizer.markers)
        store_for_generation(self._model)
        self._engine = Engine(self._model, self._context, tokenizer, config.rollout)
        self._session = self._engine.session()
        self._staging: Staging | None = None
        self._received = -1
        self._profiler = UNPROFILED
        self._memory: Lent | None = None
        if config.rl.offload:
            self.rest()
        return Lane(self._context.dp_rank, self._context.layout.dp, self._context.tp_rank == 0)

    def profile(self, stage_dir: Path, name: str, left: int) -> None:
        """From now on, what a step is: to take new weights, and to answer. `left` steps will follow."""
        from megatron_ext.rl.phases import ROLLOUTS

        self._profiler = Profiler(stage_dir, name, self._config.observe.profile, left, ROLLOUTS)

    def here(self) -> None:
        """Says nothing, but says it."""

    def weight_parts(self) -> tuple[Part, ...]:
        """What this rank wants of the learner's weights."""
        return own_parts(self._model, self._context)

    def receive_weights(self, meeting: Meeting, place: int, version: int, buckets: Sequence[Bucket]) -> None:
        """Stages weights, every byte checked; the model stays as it is. Raises WeightSyncError when they do not arrive whole."""
        self._profiler.begin()
        self._received = -1
        if self._staging is None:
            self._staging = Staging(own_tensors(self._model, self._context))
        receive(meeting, place, buckets, self._staging, version)
        self._received = version

    def load_weights(self, version: int) -> None:
        """Loads what was staged; tokens that are sampled from now on carry this version."""
        if self._staging is None or self._received != version:
            raise WeightSyncError(f"weights of version {version} were to be loaded, but were not received")
        if self._memory is not None:
            self._memory.take_back()
        self._staging.load(own_tensors(self._model, self._context))
        self._version, self._received = version, -1
        if not self._session.idle:  # what is under way belongs to the new step, too
            self._profiler.end()
            self._profiler.begin()

    def advance(self, asks: Sequence[Ask], steps: float) -> list[Rollout | FailedRollout]:
        """Takes the asks, runs at most `steps` steps of everything that is under way, fewer where nothing is left, and returns what finished; nothing from
        ranks that only take part. Each sample's seed is a hash of (run seed, step, prompt key, sample).

        Raises WeightSyncError where `rest` took the weights."""
        if self._memory is not None and self._memory.given:
            raise WeightSyncError("answers were asked for while the weights have left the device")
        limit = self._config.model.max_positions - self._config.rollout.max_new_tokens
        self._session.ask([self._request(number, ask) for number, ask in enumerate(asks) if len(ask.prompt.tokens_S) <= limit])
        rollouts = [rollout for _, rollout in self._session.advance(steps, self._version)]
        if self._session.idle:
            self._profiler.end()
        if self._context.tp_rank != 0:
            return []
        return [*rollouts, *(failure for ask in asks if len(ask.prompt.tokens_S) > limit for failure in _too_long(ask, limit))]

    def probe(self, probe: Probe, experts_SLK: np.ndarray | None) -> Probed | None:
        """What the loaded weights make of the probe, by the experts given; None from ranks that only take part."""
        tokenizer = self._tokenizer
        asked = ProbePass(probe, self._config, tokenizer.vocab_size, tokenizer.placeholders, self._context)
        probed = asked.of_rollout(self._model, self._version, experts_SLK)
        return probed if self._context.tp_rank == 0 else None

    def rest(self) -> None:
        """Leaves the device to the learner: until `load_weights` or `wake` there are no weights. Keys and values are there while answers are under way only."""
        if self._memory is None:
            self._memory = Lent(own_tensors(self._model, self._context).values(), keep=False)
        self._memory.give()
        return_free_memory()  # keys and values are let go of when nothing is under way

    def wake(self) -> None:
        """Undoes `rest`: the weights are those of the latest publication, whose copy in host memory is kept. Raises WeightSyncError where there is none."""
        if self._memory is None or not self._memory.given:
            return
        if self._staging is None or self._staging.version != self._version:
            raise WeightSyncError(f"weights of version {self._version} were to be used again, but their copy is gone")
        self._memory.take_back()
        self._staging.load(own_tensors(self._model, self._context))

    def _request(self, number: int, ask: Ask) -> Request:
        seeds = tuple((sample, rollout_seed(self._config.seed, ask.step, ask.prompt.key, sample)) for sample in ask.samples)
        return Request(number, ask.prompt, seeds, ask.greedy, ask.drawn_layers)


def _too_long(ask: Ask, limit: int) -> list[FailedRollout]:
    detail = f"{len(ask.prompt.tokens_S)} tokens; model.max_positions leaves room for {limit}"
    return [FailedRollout(ask.prompt, sample, "prompt_too_long", detail) for sample in ask.samples]

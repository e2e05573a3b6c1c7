"""What a rollout replica holds and how fast it answers, as `inference/engine.py` does it: continuous batching, one token a step. Without torch.

    memory    weights + keys and values of the prompts, once each, and of `batch` answers + CLVR's of the prompts + what a step needs
    step      the larger of what it reads from memory and of what it computes, and for every layer its launches and collectives
    answers   prompts are read in turn; as many steps as all answers have tokens, `batch` of them at a time

A step reads the keys and values of every prompt and of every answer once. Responses are taken to be equally long; places are taken again as they become free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_ext.config.clvr_sizes import kv_shape
from megatron_ext.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_ext.config.sizes import count_parameters, expert_layers, vision_tokens
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.activations import Activations, Microbatch
from megatron_ext.parallel.planner.hardware import Cluster
from megatron_ext.parallel.planner.layers import Rows, layer_kinds, rows_of, totals
from megatron_ext.parallel.planner.tensors import chunk_runs
from megatron_ext.parallel.planner.work import Costs, Work
from megatron_ext.parallel.stages import pipeline_stages

_SCORE_BYTES = 12
"""Of one position that one head looks at: as computed, in float32, and with the mask added (`model/memory.py`)."""


@dataclass(frozen=True)
class Answers:
    """What a step asks of the fleet: `prompts` of `prompt_tokens`, `samples` responses each of `response_tokens` on average and `most_tokens` at most.
    `reading_tokens`: positions of prompts that are read at once."""

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: float
    most_tokens: int
    tiles: int
    reading_tokens: int

    def together(self, rows: int) -> int:
        """Prompts that `rows` answers belong to."""
        return -(-rows // self.samples)

    def at_once(self, prompts: int) -> int:
        """Of these prompts, how many one reading takes."""
        return max(1, min(prompts, self.reading_tokens // self.prompt_tokens))


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes of one rollout rank. `growth_bytes`: a layer's former tensors, while larger ones are filled. `host_bytes`: routes and gates of the
    rows, and this rank's part of the weights that arrive."""

    weights_bytes: int
    cache_bytes: int
    growth_bytes: int
    vision_cache_bytes: int
    workspace_bytes: int
    communication_bytes: int
    context_bytes: int
    allowance_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__ if name != "host_bytes")


@dataclass(frozen=True)
class GenerationTimes:
    """Seconds of all answers of a step. `turns`: answers for each place. Of a decode step, `memory_s` or `compute_s`, whichever is longer, is in `decode_s`."""

    prefill_s: float
    decode_s: float
    launches_s: float
    communication_s: float
    turns: float
    step_memory_s: float
    step_compute_s: float

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s + self.launches_s + self.communication_s


@dataclass(frozen=True)
class Replica:
    """One world of rollout ranks. `batch` rows are decoded side by side by each of its `layout.dp` lanes. `numels` of `rank_numels`."""

    model: ModelConfig
    layout: Layout
    numels: tuple[int, int, int]
    batch: int
    answers: Answers
    cluster: Cluster

    def memory(self) -> RolloutMemory:
        model, answers, layout, rows = self.model, self.answers, self.layout, self.batch
        weights, width = _width(model) * sum(self.numels), _width(model)
        prompts, token = answers.together(rows), self._cache_token_bytes()
        cache = (prompts * answers.prompt_tokens + rows * answers.most_tokens) * token
        taps = len(model.clvr.active_taps) if model.clvr.answers_look else 0
        keys = model.clvr.num_kv_heads * model.clvr.head_dim // layout.tp
        vision = prompts * taps * 2 * answers.tiles * kv_shape(model)[0] * keys * width
        growth = rows * answers.most_tokens * token // (2 * model.num_layers)
        workspace = max(self._decode_bytes(), self._prefill_bytes())
        groups = sum(size > 1 for size in (layout.tp, layout.dp, layout.ep, layout.etp, layout.edp, layout.num_ranks))
        routes = rows * answers.most_tokens * len(expert_layers(model)) * model.experts_per_token * (3 if model.num_experts <= 256 else 4)
        host = routes + weights
        gpu = self.cluster.gpu
        allowance = int(gpu.allowance * (cache + growth + vision + workspace))
        communication = int(groups * gpu.communicator_bytes)
        return RolloutMemory(weights, cache, growth, vision, workspace, communication, int(gpu.context_bytes), allowance, host)

    def times(self, replicas: int) -> GenerationTimes:
        """`replicas` of these share the prompts."""
        answers, model, gpu = self.answers, self.model, self.cluster.gpu
        lanes = replicas * self.layout.dp
        prompts = -(-answers.prompts // lanes)
        rows = min(self.batch, prompts * answers.samples)
        turns = prompts * answers.samples / rows
        memory_s, compute_s = self._memory_s(rows), self._compute_s(rows)
        steps = turns * answers.response_tokens
        launches_s = steps * gpu.layer_overhead_s * model.num_layers
        communication_s = steps * (model.num_layers * self._sums_s(rows) + len(expert_layers(model)) * self._exchange_s(rows))
        read = answers.at_once(answers.together(rows))
        prefill = self._prefill_s(read) * -(-prompts // read)
        return GenerationTimes(prefill, steps * max(memory_s, compute_s), launches_s, communication_s, turns, memory_s, compute_s)

    @cached_property
    def _layers(self) -> Rows:
        return totals(rows_of(layer_kinds(self.model)))

    def _cache_token_bytes(self) -> int:
        model = self.model
        return 2 * model.num_layers * (model.num_query_groups // self.layout.tp) * model.head_dim * _width(model)

    def _decode_bytes(self) -> int:
        """One layer's scores of all answers, and the logits in float32 with what sampling makes of them."""
        model, answers = self.model, self.answers
        scores = (answers.prompt_tokens + answers.most_tokens) * model.num_attention_heads // self.layout.tp
        return self.batch * (_SCORE_BYTES * scores + 16 * model.vocab_size)

    def _prefill_bytes(self) -> int:
        """One layer of the prompts of a reading, or one layer of the encoder over their tiles."""
        shapes = self._prompt_shapes(self.answers.at_once(self.answers.together(self.batch)))
        vision = self.model.vision
        tiles = shapes.batch.tiles * (vision_tokens(vision) + 1) * (3 * vision.hidden_size + vision.ffn_hidden_size) * shapes.width
        return max(*(shapes.layer_bytes[kind] for kind, _ in self._layers), tiles)

    def _memory_s(self, rows: int) -> float:
        """Reading the weights that a step touches, and the cache."""
        model, gpu, layout = self.model, self.cluster.gpu, self.layout
        answers = self.answers
        cache = (answers.together(rows) * answers.prompt_tokens + rows * answers.response_tokens / 2) * self._cache_token_bytes()
        experts, dense, _ = self.numels
        together = rows * layout.dp if layout.ep > 1 else rows
        touched = experts * (1 - (1 - model.experts_per_token / model.num_experts) ** together) if experts else 0
        return ((dense + touched) * _width(model) + cache) / (gpu.memory_bytes_per_s * gpu.memory_efficiency)

    def _compute_s(self, rows: int) -> float:
        model, gpu = self.model, self.cluster.gpu
        active = count_parameters(model)
        lanes = rows * (active.active - active.vision - active.projector) / self.layout.tp
        return 2 * lanes / (gpu.flops(model.dtype) * gpu.mfu)

    def _sums_s(self, rows: int) -> float:
        """Of one layer: two sums over tensor parallelism."""
        return 2 * 2 * self.cluster.collective_s(rows * self.model.hidden_size * _width(self.model), self.layout.tp, 1)

    def _exchange_s(self, rows: int) -> float:
        """Of one layer: two exchanges over experts."""
        hidden, width, layout, cluster = self.model.hidden_size, _width(self.model), self.layout, self.cluster
        experts = 2 * cluster.all_to_all_s(rows / layout.tp * self.model.experts_per_token * hidden * width, layout.ep, layout.etp)
        return experts + 2 * cluster.collective_s(rows * self.model.experts_per_token * hidden * width, layout.etp, 1) * (layout.ep > 1)

    def _prefill_s(self, prompts: int) -> float:
        work, gpu = Work(self._prompt_shapes(prompts), self.cluster), self.cluster.gpu
        taps, behind = len(self.model.clvr.active_taps), {"experts": work.experts, "dense": work.dense}
        total = work.vision() + work.projector() if self.model.vision.enabled else Costs()
        for kind, count in self._layers:
            total += (work.attention() + behind[kind]()).times(count)
        total = total + work.tap().times(taps) if taps else total
        return total.flops / (gpu.flops(self.model.dtype) * gpu.mfu) + total.tp_s + total.ep_s + total.signals_s + total.passes * gpu.layer_overhead_s

    def _prompt_shapes(self, prompts: int) -> Activations:
        return Activations(self.model, self.layout, Microbatch(prompts, self.answers.prompt_tokens, self.answers.tiles, False), False)


def answers_of(config: RunConfig, prompt_tokens: int, response_tokens: float | None, tiles: int) -> Answers:
    rollout, rl = config.rollout, config.rl
    most = rollout.max_new_tokens
    return Answers(rl.prompts_per_step, rl.rollouts_per_prompt, prompt_tokens, response_tokens or most, most, tiles, rollout.prefill_tokens)


def rank_numels(model: ModelConfig, layout: Layout) -> tuple[int, int, int]:
    """Elements on a rollout rank of (experts, all the rest, the encoder with its projector). There are no buffers, and so no padding."""
    runs = chunk_runs(model, layout, pipeline_stages(model, 1)[0]).all()
    experts, encoder = (sum(run.numel for run in runs if run.part in parts) for parts in (("experts",), ("vision", "projector")))
    return experts, sum(run.numel for run in runs) - experts - encoder, encoder


def replica_layout(tp: int, ep: int) -> Layout:
    """The smallest replica with this tensor and expert parallelism."""
    ranks = math.lcm(tp, ep if ep > 1 else tp)
    return Layout.of(ParallelConfig(num_ranks=ranks, tp=tp, ep=ep))


def refit_s(own_bytes: float, learner_ranks: int, rollout_ranks: int, cluster: Cluster) -> float:
    """From the learner to the fleet, as `rl/refit/weight_sync.py` does it: every rollout rank receives its own part, `own_bytes` of it, and the learner's ranks
    share the sending. Digests are taken while other buckets are on the wire."""
    busiest = own_bytes * max(1.0, rollout_ranks / learner_ranks)
    return busiest / min(cluster.gpu.host_network_bytes_per_s, cluster.gpu.digest_bytes_per_s)


def _width(model: ModelConfig) -> int:
    return 2 if model.dtype == "bf16" else 4

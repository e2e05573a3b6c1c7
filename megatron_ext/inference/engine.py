"""Generation with the Megatron model itself: the rollout engine.

    prompts -> chunks -> prefill, once per PROMPT (vision tower, CLVR keys and values, self-attention cache, routes)
            -> repeat for the samples of each prompt -> decode side by side, finished rows leave -> Rollouts

Every rollout carries the log-probability of each token and the router trace of every position. Under expert parallelism all ranks of the group step
together: a rank without work
decodes a dummy row, or the all-to-all of the others would wait for ever. Under tensor parallelism every rank returns the same rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, Tiles, expert_dtype
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import sample, uniforms
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.generation import Memory, decode, prefill
from megatron_ext.model.heads import banned_tokens, policy_logits
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.router_tap import Routes
from megatron_ext.parallel.groups import ParallelContext

COMPACT_BELOW = 0.75
"""Rows are dropped from the cache once fewer than this share of them is still unfinished: copying the cache costs about a decode step."""


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    eos_id: int
    image_id: int
    vocab_size: int

    def decode(self, ids: list[int]) -> str: ...


@dataclass
class _Decoded:
    """What the rows of a chunk have produced so far."""

    tokens_RT: np.ndarray
    logprobs_RT: np.ndarray
    experts_RTLK: np.ndarray
    gates_RTLK: np.ndarray
    lengths_R: np.ndarray
    stopped_R: np.ndarray


class Engine:
    """Generates with one replica's model. `seeds(prompt index, sample)` gives each rollout's seed."""

    def __init__(self, model: VisionLanguageModel, context: ParallelContext, vocabulary: Vocabulary, config: RolloutConfig) -> None:
        self.model, self.context, self.vocabulary, self.config = model, context, vocabulary, config
        self._banned = banned_tokens(model.model_config.vocab_size, vocabulary.vocab_size, vocabulary.image_id, context.pgs.tp, context.device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], samples: int, *, seeds: Callable[[int, int], int], version: int, greedy: bool = False) -> list[Rollout]:
        """`samples` rollouts of every prompt, prompt by prompt. Greedy ignores seeds. Collective over the replica's ranks."""
        self._require_room(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            per_chunk = max(1, self.config.batch_size // samples)
            starts = range(0, len(prompts), per_chunk)
            rollouts: list[Rollout] = []
            for chunk in range(self._agree(len(starts))):
                first = chunk * per_chunk
                part = list(prompts[first : first + per_chunk])
                rows = [seeds(first + index, number) for index in range(len(part)) for number in range(samples)]
                rollouts += self._chunk(part, samples, np.array(rows, dtype=np.int64), version, greedy or self.config.temperature == 0)
            return rollouts
        finally:
            self.model.train(was_training)

    def _require_room(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a prompt and the longest answer to it have more positions than the model."""
        longest, most = max((len(prompt.tokens_S) for prompt in prompts), default=0), self.model.model_config.max_positions
        if longest + self.config.max_new_tokens > most:
            problem = f"{self.config.max_new_tokens} after a prompt of {longest} tokens exceeds model.max_positions = {most}"
            raise UserError("rollout.max_new_tokens", problem, "generate fewer tokens, or shorten the prompts")

    def _chunk(self, prompts: list[Prompt], samples: int, seeds_R: np.ndarray, version: int, greedy: bool) -> list[Rollout]:
        idle = not prompts
        real = prompts
        if idle:
            prompts, seeds_R = [_dummy_prompt(self.vocabulary)], np.zeros(samples, dtype=np.int64)
        inputs, lengths_P = prompt_inputs(prompts, self.vocabulary.eos_id, self.context.layout.tp, self.context.device)
        with self.model.router_tap.record() as routes:
            logits_PV, memory = prefill(self.model, inputs, torch.from_numpy(lengths_P), inputs.tokens_BS.shape[1] + self.config.max_new_tokens)
        experts_PSLK, gates_PSLK = _by_row(routes, inputs.tokens_BS.shape[1], len(prompts))
        repeat = torch.arange(len(prompts)).repeat_interleave(samples)
        decoded = self._decode_all(logits_PV[repeat], memory.select(repeat), seeds_R, greedy, idle)
        return [
            self._rollout(prompt, number, int(seeds_R[row]), version, decoded, row, (experts_PSLK[index], gates_PSLK[index]))
            for index, prompt in enumerate(real)
            for number, row in enumerate(range(index * samples, (index + 1) * samples))
        ]

    def _decode_all(self, logits_RV: torch.Tensor, memory: Memory, seeds_R: np.ndarray, greedy: bool, idle: bool) -> _Decoded:
        """Steps until every row of every rank of the expert group has stopped."""
        limit, num_rows = self.config.max_new_tokens, len(seeds_R)
        model = self.model.model_config
        trace = (num_rows, limit, len(expert_layers(model)), model.experts_per_token)
        out = _Decoded(
            np.zeros((num_rows, limit), np.int32),
            np.zeros((num_rows, limit), np.float32),
            np.zeros(trace, expert_dtype(model.num_experts)),
            np.zeros(trace, np.float16),
            np.zeros(num_rows, np.int64),
            np.zeros(num_rows, bool),
        )
        alive = np.arange(num_rows)  # the rows in the cache, by their place in the chunk
        active = np.full(num_rows, not idle)  # which of these are still being written
        for step in range(limit):
            tokens_B, logprobs_B = self._next(logits_RV, seeds_R[alive], step, greedy)
            chosen, logprobs = tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()
            rows = alive[active]
            out.tokens_RT[rows, step], out.logprobs_RT[rows, step] = chosen[active], logprobs[active]
            out.lengths_R[rows] = step + 1
            ended = active & (chosen == self.vocabulary.eos_id)
            out.stopped_R[alive[ended]] = True
            active &= ~ended
            if step == limit - 1 or not self._agree(int(active.any())):
                break
            if active.any() and active.mean() < COMPACT_BELOW:
                keep = torch.from_numpy(np.flatnonzero(active))
                memory, tokens_B = memory.select(keep), tokens_B[keep]
                alive, active = alive[active], np.ones(len(keep), bool)
            with self.model.router_tap.record() as routes:
                logits_RV = decode(self.model, tokens_B, memory)
            experts, gates = routes.experts(len(alive)).cpu().numpy(), routes.gates(len(alive)).cpu().numpy()
            out.experts_RTLK[alive[active], step], out.gates_RTLK[alive[active], step] = experts[active], gates[active]
        return out

    def _next(self, logits_BV: torch.Tensor, seeds_B: np.ndarray, step: int, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = policy_logits(logits_BV, self.config.temperature, self._banned)
        whole = gather_from_tensor_model_parallel_region(policy, group=self.context.pgs.tp)
        return sample(whole, uniforms(seeds_B, step), self.config.top_k, self.config.top_p, greedy)

    def _agree(self, number: int) -> int:
        """The largest number any rank of the expert group names; without expert parallelism its own."""
        if self.context.layout.ep == 1:
            return number
        value = torch.tensor([number], device=self.context.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self.context.pgs.ep)
        return int(value)

    def _rollout(
        self, prompt: Prompt, number: int, seed: int, version: int, decoded: _Decoded, row: int, prompt_routes: tuple[np.ndarray, np.ndarray]
    ) -> Rollout:
        length, size = int(decoded.lengths_R[row]), len(prompt.tokens_S)
        tokens = decoded.tokens_RT[row, :length].copy()
        text = tokens[:-1] if decoded.stopped_R[row] else tokens
        experts = np.concatenate([prompt_routes[0][:size].astype(decoded.experts_RTLK.dtype), decoded.experts_RTLK[row, : length - 1]])
        gates = np.concatenate([prompt_routes[1][:size].astype(np.float16), decoded.gates_RTLK[row, : length - 1]])
        finish = "stop" if decoded.stopped_R[row] else "length"
        logprobs = decoded.logprobs_RT[row, :length].copy()
        return Rollout(prompt, number, seed, version, tokens, logprobs, finish, self.vocabulary.decode(text.tolist()), RouteTrace(experts, gates))


def prompt_inputs(prompts: Sequence[Prompt], pad_id: int, multiple: int, device: torch.device) -> tuple[ModelInputs, np.ndarray]:
    """Right-padded prompts (length a multiple of `multiple`) with their images, and their lengths int64 [P]."""
    lengths = np.array([len(prompt.tokens_S) for prompt in prompts], dtype=np.int64)
    longest = -(-int(lengths.max()) // multiple) * multiple
    tokens = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    row_tiles = np.full((len(prompts), max(1, *(len(prompt.tiles) for prompt in prompts))), -1, dtype=np.int64)
    start = 0
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = prompt.tokens_S
        row_tiles[row, : len(prompt.tiles)] = start + np.arange(len(prompt.tiles))
        start += len(prompt.tiles)
    return model_inputs(tokens, Tiles.join([prompt.tiles for prompt in prompts]), row_tiles, device), lengths


def _by_row(routes: Routes, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates as [rows, length, L, K] numpy."""
    flat = (routes.experts(length * rows), routes.gates(length * rows))
    experts, gates = (x.unflatten(0, (length, rows)).transpose(0, 1).cpu().numpy() for x in flat)
    return experts, gates


def _dummy_prompt(vocabulary: Vocabulary) -> Prompt:
    """Keeps an idle expert-parallel rank in step; what it generates is thrown away."""
    return Prompt("idle", "none", np.array([vocabulary.eos_id], np.int32), NO_TILES, "")

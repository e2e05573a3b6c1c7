"""What the model does in a step of generation: it reads prompts, takes the latest token of every row, and draws the next one.

    joining requests -> read  -> rows in the memory, their prompts' routes, logits of their first tokens
    rows             -> write -> their latest tokens' routes, logits of the next ones        -> draw -> a token and its log-prob each

Nothing is kept here between steps; that is the session's (`session.py`). Under expert parallelism all ranks of the group make the same passes, an idle one with
padding; under tensor parallelism every rank gets the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.batch import NO_TILES, Prompt, RouteTrace, Tiles, expert_dtype
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.inference.admission import Request
from megatron_ext.inference.answers import Answer, Vocabulary
from megatron_ext.inference.route_noise import gumbels
from megatron_ext.inference.sampling import sample, uniforms
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.generation import decode, read
from megatron_ext.model.heads import banned_tokens, policy_logits
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.memory import Memory
from megatron_ext.model.router_steering import Noise, drawing
from megatron_ext.model.router_tap import Routes
from megatron_ext.model.token_scores import policy_scores
from megatron_ext.model.whole_memory import WholeMemory
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.shapes import round_up


class Passes:
    """The passes of one replica's model."""

    def __init__(self, model: VisionLanguageModel, context: ParallelContext, vocabulary: Vocabulary, config: RolloutConfig) -> None:
        self.model, self.context, self.vocabulary, self.config = model, context, vocabulary, config
        self.banned_V = banned_tokens(model.model_config.vocab_size, vocabulary.vocab_size, model.never_said, context.pgs.tp, context.device)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The model as generation wants it, for as long as this lasts."""
        was_training = self.model.training
        self.model.eval()
        try:
            with batch_invariant(self.config.deterministic), torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def memory(self) -> Memory:
        return (WholeMemory if self.config.deterministic else Memory)(self.config.max_new_tokens, self.context.device)

    def agree(self, joining: Sequence[Request], rows: int) -> tuple[int, int]:
        """In how many parts all ranks of the expert group read, and the most rows that one of them writes: passes that nobody needs are left out."""
        parts, most_rows = self.most(_parts(joining, self.config.prefill_tokens), rows)
        return parts, most_rows

    def most(self, *counts: int) -> list[int]:
        """The largest of each count that any rank of the expert group has; all of them ask."""
        if self.context.layout.ep == 1:
            return list(counts)
        value = torch.tensor(counts, dtype=torch.int32, device=self.context.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self.context.pgs.ep)
        return value.tolist()

    def write(self, memory: Memory, answers: Sequence[Answer]) -> torch.Tensor:
        """Logits [R, vocab / tp] after the latest token of every row."""
        tokens_R = torch.tensor([answer.tokens[-1] for answer in answers], dtype=torch.int64, device=self.context.device)
        with self.model.router_tap.record() as routes, drawing(self.model.router_tap, self._noise(answers), not self.model.model_config.norm_topk_prob):
            logits_RV = decode(self.model, tokens_R, memory)
        for answer, experts_LK, gates_LK in zip(answers, *self.routes(routes, len(answers)), strict=True):
            answer.route(experts_LK, gates_LK)
        return logits_RV

    def read(self, joining: Sequence[Request], memory: Memory, parts: int) -> tuple[list[Answer], list[torch.Tensor]]:
        """Seats the requests behind the rows that are there: their answers, and the logits [rows, vocab / tp] of their first tokens. A rank without requests
        reads a dummy, and forgets it; all read as many parts."""
        prompts = [request.prompt for request in joining] or [idle_prompt(self.vocabulary)]
        inputs, lengths_P = prompt_inputs(prompts, self.vocabulary.eos_id, self.context.layout.tp * parts, self.context.device)
        with self.model.router_tap.record() as routes:
            reading = read(self.model, inputs, lengths_P, parts)
        length, rows = inputs.tokens_BS.shape[1], len(prompts)
        experts_PSLK, gates_PSLK = (x.reshape(length, rows, *x.shape[1:]).swapaxes(0, 1) for x in self.routes(routes, length * rows))
        if not joining:
            return [], []
        answers = [
            Answer(request, *sample, asked)
            for request, length, experts_SLK, gates_SLK in zip(joining, lengths_P, experts_PSLK, gates_PSLK, strict=True)
            for asked in (RouteTrace(experts_SLK[:length].copy(), gates_SLK[:length].copy()),)
            for sample in request.samples
        ]
        return answers, [reading.seat(memory, [len(request.samples) for request in joining])]

    def draw(self, logits_RV: torch.Tensor, answers: Sequence[Answer]) -> tuple[list[int], list[float]]:
        """Every row's next token and its log-prob."""
        policy = policy_logits(logits_RV, self.config.temperature, self.banned_V)
        whole = gather_from_tensor_model_parallel_region(policy, group=self.context.pgs.tp)
        seeds_R, places_R = (np.array(values, dtype=np.int64) for values in zip(*((answer.seed, len(answer.tokens)) for answer in answers), strict=True))
        greedy_R = np.array([answer.request.greedy or self.config.temperature == 0 for answer in answers])
        tokens_R, logprobs_R = sample(whole, uniforms(seeds_R, places_R), self.config.top_k, self.config.top_p, greedy_R)
        if self.config.deterministic:  # the learner's formula, to the last bit
            logprobs_R = policy_scores(logits_RV[None], tokens_R[:, None], self.config.temperature, self.banned_V, self.context.pgs.tp)[0][:, 0]
        return tokens_R.tolist(), logprobs_R.tolist()

    def _noise(self, answers: Sequence[Answer]) -> Noise | None:
        """For routes that are drawn: a row's depends on its seed and position alone."""
        layers = tuple(sorted({layer for answer in answers for layer in answer.request.drawn_layers}))
        if not layers:
            return None
        device = self.context.device
        seeds_R, places_R = (
            torch.tensor(values, dtype=torch.int64, device=device) for values in zip(*((answer.seed, len(answer.tokens)) for answer in answers), strict=True)
        )
        drawn_MR = torch.tensor([[layer in answer.request.drawn_layers for answer in answers] for layer in layers], device=device)
        noise_MRE = gumbels(seeds_R, places_R, layers, self.model.model_config.num_experts) * drawn_MR[:, :, None]
        return Noise(layers, noise_MRE, self.context.tp_rank)

    def routes(self, routes: Routes, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts and gates [tokens, L, K] as a rollout holds them."""
        ids = expert_dtype(self.model.model_config.num_experts)
        return routes.experts(tokens).cpu().numpy().astype(ids), routes.gates(tokens).half().cpu().numpy()


def prompt_inputs(prompts: Sequence[Prompt], pad_id: int, multiple: int, device: torch.device) -> tuple[ModelInputs, np.ndarray]:
    """Right-padded prompts (length a multiple of `multiple`) with their images, and their lengths int64 [P]."""
    lengths = np.array([len(prompt.tokens_S) for prompt in prompts], dtype=np.int64)
    longest = round_up(int(lengths.max()), multiple)
    tokens = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    row_tiles = np.full((len(prompts), max(1, *(len(prompt.tiles) for prompt in prompts))), -1, dtype=np.int64)
    start = 0
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = prompt.tokens_S
        row_tiles[row, : len(prompt.tiles)] = start + np.arange(len(prompt.tiles))
        start += len(prompt.tiles)
    return model_inputs(tokens, Tiles.join([prompt.tiles for prompt in prompts]), row_tiles, device), lengths


def _parts(joining: Sequence[Request], most_tokens: int) -> int:
    """In how many parts the prompts are read: one, where they are not a single one that is longer than what is read at once."""
    return -(-len(joining) * max((len(request.prompt.tokens_S) for request in joining), default=0) // most_tokens)


def idle_prompt(vocabulary: Vocabulary) -> Prompt:
    """Keeps an idle expert-parallel rank in step; what it generates is thrown away."""
    return Prompt("idle", "none", np.array([vocabulary.eos_id], np.int32), NO_TILES, "")

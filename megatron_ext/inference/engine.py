"""Generation with the Megatron model itself: the rollout engine, with continuous batching.

    waiting requests -> read together, once per PROMPT (vision tower, CLVR keys and values, self-attention, routes) -> rows join those that are being written
    one step of all rows -> a token each -> finished rows leave, as Rollouts -> their places are taken by the next requests

Every rollout carries the log-probability of each token and the router trace of every position. Under expert parallelism all ranks of the group step
together: a rank without work takes part with padding, or the all-to-all of the others would wait for ever. Under tensor parallelism every rank returns the same
rollouts. Read on: `model/memory.py` (what is kept between steps), `admission.py` (who is read when), `answers.py` (what is written).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_ext.batch import NO_TILES, Prompt, Rollout, Tiles, expert_dtype
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.errors import UserError
from megatron_ext.inference.admission import Request, WaitingRoom
from megatron_ext.inference.answers import Answer, Endings, Vocabulary
from megatron_ext.inference.sampling import sample, uniforms
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.generation import decode, read
from megatron_ext.model.heads import banned_tokens, policy_logits
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.memory import Footprint, Memory
from megatron_ext.model.router_tap import Routes
from megatron_ext.model.token_scores import policy_scores
from megatron_ext.model.whole_memory import WholeMemory
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.shapes import round_up


class Engine:
    """Generates with one replica's model. `seeds(prompt index, sample)` gives each rollout's seed. Raises UserError for what this device cannot do."""

    def __init__(self, model: VisionLanguageModel, context: ParallelContext, vocabulary: Vocabulary, config: RolloutConfig) -> None:
        if config.deterministic and context.device.type != "cpu":
            raise UserError("rollout.deterministic", f"true on {context.device}: its kernels are for CPUs", "set it to false, or hide the GPU from the run")
        self.model, self.context, self.vocabulary, self.config = model, context, vocabulary, config
        self._banned = banned_tokens(model.model_config.vocab_size, vocabulary.vocab_size, vocabulary.image_id, context.pgs.tp, context.device)
        self._endings = Endings(vocabulary, config.max_new_tokens, config.stop)
        self._footprint = Footprint.of(model.model_config, context.layout.tp)
        self._budget = math.inf if config.cache_gib is None else config.cache_gib * 2**30

    def generate(self, prompts: Sequence[Prompt], samples: int, *, seeds: Callable[[int, int], int], version: int, greedy: bool = False) -> list[Rollout]:
        """`samples` rollouts of every prompt, prompt by prompt. Greedy ignores seeds. Collective over the replica's ranks."""
        answers = self.stream(prompts, samples, seeds=seeds, version=version, greedy=greedy)
        return [rollout for _, rollout in sorted(answers, key=lambda answer: (answer[0], answer[1].sample))]

    def stream(
        self, prompts: Sequence[Prompt], samples: int, *, seeds: Callable[[int, int], int], version: int, greedy: bool = False
    ) -> Iterator[tuple[int, Rollout]]:
        """The same rollouts as they finish, each with the number of its prompt. Whoever reads them must read them all: other ranks wait for this one."""
        self._require_room(prompts)
        self._require_memory(prompts)
        requests = [
            Request(number, prompt, tuple((sample, seeds(number, sample)) for sample in range(samples))) for number, prompt in enumerate(prompts) if samples
        ]
        waiting = WaitingRoom(requests, self.config.batch_size, self.config.prefill_tokens)
        memory = (WholeMemory if self.config.deterministic else Memory)(self.config.max_new_tokens, self.context.device)
        answers = list[Answer]()
        was_training = self.model.training
        self.model.eval()
        try:
            while True:
                with batch_invariant(self.config.deterministic):
                    finished = self._step(waiting, memory, answers, version, greedy or self.config.temperature == 0)
                if finished is None:
                    break
                yield from ((answer.number, answer.rollout(self.vocabulary)) for answer in finished)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _step(self, waiting: WaitingRoom, memory: Memory, answers: list[Answer], version: int, greedy: bool) -> list[Answer] | None:
        """One token for every row, and the first one for those that join. `answers` are the rows of the memory, in its order. Returns those that finished; None
        once no rank of the expert group has anything left to do."""
        self._put_off(waiting, memory, answers)
        joining = waiting.next(len(answers), lambda requests: self._fits(memory, requests))
        parts, writes = self._agree(_parts(joining, self.config.prefill_tokens), len(answers))
        if not parts and not writes:
            return None
        logits = [self._write(memory, answers)] if writes else []
        if parts:
            logits += self._read(joining, memory, answers, parts)
        if not answers:
            return []
        tokens_R, logprobs_R = self._next(torch.cat(logits), answers, greedy)
        for answer, token, logprob in zip(answers, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
            answer.take(token, logprob, version, self._endings)
        left_R = np.array([answer.finish is not None for answer in answers])
        if not left_R.any():
            return []
        finished = [answer for answer in answers if answer.finish is not None]
        answers[:] = [answers[row] for row in memory.retire(left_R)]
        return finished

    def _fits(self, memory: Memory, joining: Sequence[Request]) -> bool:
        rows = memory.num_rows + sum(len(request.samples) for request in joining)
        return memory.need_bytes(self._footprint, rows, [request.prompt for request in joining]) <= self._budget

    def _put_off(self, waiting: WaitingRoom, memory: Memory, answers: list[Answer]) -> None:
        """Where the answers have outgrown the memory they may take, the youngest are begun again later: with their seeds, they will say the same."""
        fitting = len(answers)
        while fitting > 1 and memory.need_bytes(self._footprint, fitting) > self._budget:
            fitting -= 1
        if fitting == len(answers):
            return
        youngest = sorted(answers, key=lambda answer: -len(answer.tokens))[fitting:]  # all grow together: who has least was begun last
        waiting.put_back(Request(answer.number, answer.prompt, ((answer.sample, answer.seed),)) for answer in youngest)
        kept = memory.retire(np.array([answer in youngest for answer in answers]))
        answers[:] = [answers[row] for row in kept]

    def _write(self, memory: Memory, answers: list[Answer]) -> torch.Tensor:
        """Logits [R, vocab / tp] after the latest token of every row."""
        tokens_R = torch.tensor([answer.tokens[-1] for answer in answers], dtype=torch.int64, device=self.context.device)
        with self.model.router_tap.record() as routes:
            logits_RV = decode(self.model, tokens_R, memory)
        for answer, experts_LK, gates_LK in zip(answers, *self._routes(routes, len(answers)), strict=True):
            answer.route(experts_LK, gates_LK)
        return logits_RV

    def _read(self, joining: list[Request], memory: Memory, answers: list[Answer], parts: int) -> list[torch.Tensor]:
        """Seats the requests behind the rows that are there: the logits [rows, vocab / tp] of their first tokens. A rank without requests reads a dummy, and
        forgets it; all read as many parts."""
        prompts = [request.prompt for request in joining] or [_dummy_prompt(self.vocabulary)]
        inputs, lengths_P = prompt_inputs(prompts, self.vocabulary.eos_id, self.context.layout.tp * parts, self.context.device)
        with self.model.router_tap.record() as routes:
            reading = read(self.model, inputs, lengths_P, parts)
        length, rows = inputs.tokens_BS.shape[1], len(prompts)
        experts_PSLK, gates_PSLK = (x.reshape(length, rows, *x.shape[1:]).swapaxes(0, 1) for x in self._routes(routes, length * rows))
        for request, length, experts_SLK, gates_SLK in zip(joining, lengths_P, experts_PSLK, gates_PSLK, strict=bool(joining)):
            answers += (Answer(request.number, request.prompt, *asked, experts_SLK[:length], gates_SLK[:length]) for asked in request.samples)
        return [reading.seat(memory, [len(request.samples) for request in joining])] if joining else []

    def _routes(self, routes: Routes, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts and gates [tokens, L, K] as a rollout holds them."""
        ids = expert_dtype(self.model.model_config.num_experts)
        return routes.experts(tokens).cpu().numpy().astype(ids), routes.gates(tokens).half().cpu().numpy()

    def _next(self, logits_RV: torch.Tensor, answers: list[Answer], greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = policy_logits(logits_RV, self.config.temperature, self._banned)
        whole = gather_from_tensor_model_parallel_region(policy, group=self.context.pgs.tp)
        seeds_R, places_R = (np.array(values, dtype=np.int64) for values in zip(*((answer.seed, len(answer.tokens)) for answer in answers), strict=True))
        tokens_R, logprobs_R = sample(whole, uniforms(seeds_R, places_R), self.config.top_k, self.config.top_p, greedy)
        if self.config.deterministic:  # the learner's formula, to the last bit
            logprobs_R = policy_scores(logits_RV[None], tokens_R[:, None], self.config.temperature, self._banned, self.context.pgs.tp)[0][:, 0]
        return tokens_R, logprobs_R

    def _agree(self, *wishes: int) -> tuple[int, ...]:
        """The most that any rank of the expert group wishes; without expert parallelism its own wishes."""
        if self.context.layout.ep == 1:
            return wishes
        value = torch.tensor(wishes, dtype=torch.int32, device=self.context.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self.context.pgs.ep)
        return tuple(value.tolist())

    def _require_room(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a prompt and the longest answer to it have more positions than the model."""
        longest, most = max((len(prompt.tokens_S) for prompt in prompts), default=0), self.model.model_config.max_positions
        if longest + self.config.max_new_tokens > most:
            problem = f"{self.config.max_new_tokens} after a prompt of {longest} tokens exceeds model.max_positions = {most}"
            raise UserError("rollout.max_new_tokens", problem, "generate fewer tokens, or shorten the prompts")

    def _require_memory(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where one answer alone may outgrow `rollout.cache_gib`."""
        for prompt in prompts:
            need = self._footprint.token * (len(prompt.tokens_S) + self.config.max_new_tokens) + self._footprint.tile * len(prompt.tiles)
            if need > self._budget:
                problem = f"{self.config.cache_gib:g} GiB do not hold {self.config.max_new_tokens} tokens after a prompt of {len(prompt.tokens_S)}"
                raise UserError("rollout.cache_gib", problem, f"give at least {math.ceil(need / 2**20) / 2**10:.4g}, or lower rollout.max_new_tokens")


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


def _dummy_prompt(vocabulary: Vocabulary) -> Prompt:
    """Keeps an idle expert-parallel rank in step; what it generates is thrown away."""
    return Prompt("idle", "none", np.array([vocabulary.eos_id], np.int32), NO_TILES, "")

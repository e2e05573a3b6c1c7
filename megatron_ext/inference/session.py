"""Answers under way: a session is asked, advances by some steps, and is left until it is advanced again.

    ask -> waiting -> read together, once per PROMPT (vision tower, CLVR keys and values, self-attention, routes) -> rows join those that are being written
    advance: steps of all rows -> a token each -> finished rows leave, as Rollouts -> their places are taken by the next requests

Between two calls of `advance` the model may be given other weights. Answers that are under way go on: what is written from then on carries the new version, and
attends to keys and values (the answer's own, the prompt's, those of its images) that the old weights left, as in PipelineRL (arXiv 2509.19128), which found
computing them again not worth its cost. The learner sees the difference as one more part of the mismatch that its correction weighs. Answers that are begun
again for want of memory begin under the weights of that time.

How answers are cut into slices of steps changes nothing: it is the same steps. Read on: `passes.py` (what the model does in a step), `model/memory.py` (what is
kept between steps), `admission.py` (who is read when), `answers.py` (what is written).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_ext.batch import Rollout
from megatron_ext.inference.admission import Request, WaitingRoom
from megatron_ext.inference.answers import Answer, Endings
from megatron_ext.inference.limits import Limits
from megatron_ext.inference.passes import Passes
from megatron_ext.model.memory import Memory


class Session:
    """`idle`: no rank of the expert group has anything under way, as far as this one has heard."""

    def __init__(self, passes: Passes) -> None:
        self._passes, config = passes, passes.config
        self._limits = Limits(passes.model.model_config, config, passes.context.layout.tp)
        self._endings = Endings(passes.vocabulary, config.max_new_tokens, config.stop)
        self.forget()

    def forget(self) -> None:
        """Drops everything that is under way, and the memory it took."""
        self.idle = True
        self._waiting = WaitingRoom(self._passes.config.batch_size, self._passes.config.prefill_tokens)
        self._memory: Memory = self._passes.memory()
        self._answers: list[Answer] = []  # the rows of the memory, in its order

    def ask(self, requests: Sequence[Request]) -> None:
        """They wait behind those that were asked before. Raises UserError, and asks nothing, where one of them cannot be answered for want of room."""
        self._limits.require([request.prompt for request in requests])
        self._waiting.add(requests)
        self.idle = False

    def advance(self, steps: float, version: int) -> list[tuple[int, Rollout]]:
        """At most `steps` steps, fewer where all ranks run out of work; what finished, each with the number of its request. `version`: that of the weights.
        Collective over the replica's ranks."""
        finished, taken = list[Answer](), 0
        with self._passes.generating():
            while taken < steps:
                ended = self._step(version)
                if ended is None:
                    self.forget()
                    break
                finished += ended
                taken += 1
        return [(answer.request.number, answer.rollout(self._passes.vocabulary)) for answer in finished]

    def _step(self, version: int) -> list[Answer] | None:
        """One token for every row, and the first one for those that join. Returns those that finished; None once no rank of the expert group has anything left
        to do."""
        memory, answers = self._memory, self._answers
        self._put_off()
        joining = self._waiting.next(len(answers), self._fits)
        parts, most_rows = self._passes.agree(joining, len(answers))
        if not parts and not most_rows:
            return None
        logits = [self._passes.write(memory, answers)] if most_rows else []
        if parts:
            joined, first_logits = self._passes.read(joining, memory, parts)
            answers += joined
            logits += first_logits
        if not answers:
            return []
        for answer, token, logprob in zip(answers, *self._passes.draw(torch.cat(logits), answers), strict=True):
            answer.take(token, logprob, version, self._endings)
        finished = [answer for answer in answers if answer.finish is not None]
        if finished:
            self._retire(finished)
        return finished

    def _fits(self, joining: Sequence[Request]) -> bool:
        rows = self._memory.num_rows + sum(len(request.samples) for request in joining)
        return self._limits.hold(self._memory, rows, [request.prompt for request in joining])

    def _put_off(self) -> None:
        """Where the answers have outgrown the memory they may take, the youngest are begun again later: with their seeds, and the same weights, they will say
        the same."""
        fitting = len(self._answers)
        while fitting > 1 and not self._limits.hold(self._memory, fitting):
            fitting -= 1
        if fitting == len(self._answers):
            return
        youngest = sorted(self._answers, key=lambda answer: -len(answer.tokens))[fitting:]  # all grow together: who has least was begun last
        self._waiting.put_back(replace(answer.request, samples=((answer.sample, answer.seed),)) for answer in youngest)
        self._retire(youngest)

    def _retire(self, leaving: Sequence[Answer]) -> None:
        gone = set(leaving)
        kept = self._memory.retire(np.array([answer in gone for answer in self._answers]))
        self._answers[:] = [self._answers[row] for row in kept]

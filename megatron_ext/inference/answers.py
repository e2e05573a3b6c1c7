"""An answer while it is written, token by token, until it is a Rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_ext.batch import ContinuedRoutes, Rollout, RouteTrace
from megatron_ext.inference.admission import Request


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    eos_id: int
    vocab_size: int

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Endings:
    """When an answer ends: with the end token, with the token that completes one of `texts`, or with as many tokens as it may have."""

    vocabulary: Vocabulary
    limit: int
    texts: tuple[str, ...] = ()

    def of(self, tokens: list[int]) -> str | None:
        """Why the answer ends with its latest token; None: it goes on."""
        if tokens[-1] == self.vocabulary.eos_id or (self.texts and self._complete(tokens)):
            return "stop"
        return "length" if len(tokens) == self.limit else None

    def _complete(self, tokens: list[int]) -> bool:
        """A token is a byte at least, so that no more of the latest ones can be part of a text than it has bytes."""
        latest = self.vocabulary.decode(tokens[-self._longest :])
        return any(text in latest for text in self.texts)

    @cached_property
    def _longest(self) -> int:
        return max(len(text.encode()) for text in self.texts)


@dataclass(eq=False)
class Answer:
    """A row of the engine. `asked`: the routes of the prompt, one object for all of its answers. `routes`: of the answer's own positions so far, [L, K]
    each. `finish`: None while it is written."""

    request: Request
    sample: int
    seed: int
    asked: RouteTrace
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    routes: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    finish: str | None = None

    def take(self, token: int, logprob: float, version: int, endings: Endings) -> None:
        """One more token, which may be the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        self.finish = endings.of(self.tokens)

    def route(self, experts_LK: np.ndarray, gates_LK: np.ndarray) -> None:
        """Where the latest token went."""
        self.routes.append((experts_LK, gates_LK))

    def rollout(self, vocabulary: Vocabulary) -> Rollout:
        assert self.finish is not None
        text = self.tokens[:-1] if self.tokens[-1] == vocabulary.eos_id else self.tokens
        experts = np.concatenate([self.asked.experts_SLK[:0], *(experts[None] for experts, _ in self.routes)])
        gates = np.concatenate([self.asked.gates_SLK[:0], *(gates[None] for _, gates in self.routes)])
        return Rollout(
            self.request.prompt,
            self.sample,
            self.seed,
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            np.array(self.versions, np.int32),
            self.finish,
            vocabulary.decode(text),
            ContinuedRoutes(self.asked, RouteTrace(experts, gates)),
        )

"""An answer while it is written, token by token, until it is a Rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_ext.batch import Prompt, Rollout, RouteTrace


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    eos_id: int
    image_id: int
    vocab_size: int

    def decode(self, ids: list[int]) -> str: ...


@dataclass(eq=False)
class Answer:
    """A row of the engine. `experts_SLK` and `gates_SLK`: of the prompt, shared by all of its answers. `routes`: of the answer's own positions so far, [L, K]
    each. `finish`: None while it is written."""

    number: int
    prompt: Prompt
    sample: int
    seed: int
    experts_SLK: np.ndarray
    gates_SLK: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    finish: str | None = None

    def take(self, token: int, logprob: float, eos_id: int, limit: int) -> None:
        """One more token; it ends the answer, or the answer is as long as it may be."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token == eos_id:
            self.finish = "stop"
        elif len(self.tokens) == limit:
            self.finish = "length"

    def route(self, experts_LK: np.ndarray, gates_LK: np.ndarray) -> None:
        """Where the latest token went."""
        self.routes.append((experts_LK, gates_LK))

    def rollout(self, version: int, vocabulary: Vocabulary) -> Rollout:
        assert self.finish is not None
        text = self.tokens[:-1] if self.finish == "stop" else self.tokens
        experts = np.concatenate([self.experts_SLK, *(experts[None] for experts, _ in self.routes)])
        gates = np.concatenate([self.gates_SLK, *(gates[None] for _, gates in self.routes)])
        return Rollout(
            self.prompt,
            self.sample,
            self.seed,
            version,
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            self.finish,
            vocabulary.decode(text),
            RouteTrace(experts, gates),
        )

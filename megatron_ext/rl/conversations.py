"""Conversations of several turns, made of rollouts of one turn each: an engine knows nothing of them.

    prompt -> generate -> a turn -> environment -> observation -> prompt + turn + observation -> generate -> the next turn ...
                                                -> None: over  -> one Rollout of all that followed the prompt

What was sampled and what was observed differ in `versions_T` (-1: observed), so that losses, bonuses and lengths count what the model wrote alone. Each turn is
a request with a seed of its own. `Conversation` is the bookkeeping of one; `conversing.py` drives many, as their turns
finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.batch import FailedRollout, Prompt, Rollout, RouteTrace, Tiles
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import encode_observation
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.rl.environments import Observation, Turn
from megatron_ext.rl.scoring.pool import Failure

Act = Callable[[Sequence[tuple[Prompt, Sequence[Turn]]]], Sequence[Observation | Failure | None]]
"""`environments.EnvironmentPool.act`."""


@dataclass(frozen=True)
class Rules:
    """How conversations are written and when they end: after `max_turns` turns of the model, or before a prompt of more than `max_prompt_tokens`."""

    tokenizer: Tokenizer
    tokens_per_tile: int
    max_turns: int
    max_prompt_tokens: int

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer) -> Rules:
        return cls(tokenizer, tokens_per_tile(config.model.vision), config.rl.max_turns, config.model.max_positions - config.rollout.max_new_tokens)


@dataclass(frozen=True)
class Conversation:
    """Of one sample of `prompt`. `parts`: its turns so far, each a rollout whose prompt is all that came before it. `shown`: the observation after each but the
    last."""

    prompt: Prompt
    sample: int
    parts: tuple[Rollout, ...]
    shown: tuple[Observation, ...] = ()

    @classmethod
    def of(cls, rollout: Rollout) -> Conversation:
        return cls(rollout.prompt, rollout.sample, (rollout,))

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What an environment is told."""
        return tuple(Turn(part.text, self.shown[place] if place < len(self.shown) else None) for place, part in enumerate(self.parts))

    def open(self, rules: Rules) -> bool:
        """Whether the environment is to be asked."""
        return self.parts[-1].finish == "stop" and len(self.parts) < rules.max_turns

    def next_prompt(self, seen: Observation, rules: Rules) -> Prompt | None:
        """All so far and what is now seen; None where that is too long. Its key names sample and turn, so that its seed is its own."""
        last, tiles = self.parts[-1], seen.tiles
        ended = int(last.response_T[-1]) == rules.tokenizer.eos_id
        observed = encode_observation(seen.text, rules.tokenizer, rules.tokens_per_tile, [1] * len(tiles), ended)
        tokens_S = np.concatenate([last.prompt.tokens_S, last.response_T, np.array(observed, np.int32)]).astype(np.int32)
        if len(tokens_S) > rules.max_prompt_tokens:
            return None
        key = f"{self.prompt.key}#{self.sample}@{len(self.parts)}"
        return replace(last.prompt, key=key, tokens_S=tokens_S, tiles=Tiles.join([last.prompt.tiles, tiles]) if len(tiles) else last.prompt.tiles)

    def after(self, seen: Observation, part: Rollout) -> Conversation:
        return replace(self, parts=(*self.parts, part), shown=(*self.shown, seen))

    def rollout(self, cut: bool = False) -> Rollout | FailedRollout:
        """All of it as one rollout, whose text is that of the last turn: the answer. `cut`: it ended for want of room.

        Every position keeps the routes with which it was first computed. Where a later turn, which reads all that came before it again, sent it elsewhere under
        the same weights (a tie of two experts, rounded differently), no single pass of the learner can repeat both: the conversation has failed.
        """
        first, last = self.parts[0], self.parts[-1]
        if len(self.parts) == 1:
            return replace(first, finish="length") if cut else first
        start = len(self.prompt.tokens_S)
        response_T = np.concatenate([last.prompt.tokens_S[start:], last.response_T]).astype(np.int32)
        logprobs_T, versions_T = np.zeros(len(response_T), np.float32), np.full(len(response_T), -1, np.int32)
        experts_SLK, gates_SLK = last.routes.experts_SLK.copy(), last.routes.gates_SLK.copy()
        for part in reversed(self.parts):  # the earliest routes stay
            own = slice(len(part.prompt.tokens_S) - start, len(part.prompt.tokens_S) - start + len(part.response_T))
            logprobs_T[own], versions_T[own] = part.logprobs_T, part.versions_T
            known = len(part.routes.experts_SLK)
            if part.on_policy(last.version) and last.on_policy(last.version) and not np.array_equal(part.routes.experts_SLK, experts_SLK[:known]):
                return FailedRollout(self.prompt, self.sample, "conversation_rerouted", "read again, a position of an earlier turn went to other experts")
            experts_SLK[:known], gates_SLK[:known] = part.routes.experts_SLK, part.routes.gates_SLK
        tiles = Tiles.join([seen.tiles for seen in self.shown])
        finish, routes = "length" if cut else last.finish, RouteTrace(experts_SLK, gates_SLK)
        return Rollout(self.prompt, self.sample, first.seed, response_T, logprobs_T, versions_T, finish, last.text, routes, tiles)

"""The typed values that cross the stages of RL, one per stage: `Prompt -> Rollout -> ScoredRollout -> LearnerBatch`.

Everything here is numpy and frozen, so that it travels between processes as it is. Shapes are checked on construction. A rollout that
could not be made or scored is a `FailedRollout` with a reason: it is counted, never trained on, and never becomes a zero reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.batch.routing import RouteTrace
from megatron_ext.batch.tiles import NO_TILES, Tiles
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class Prompt:
    """One question about its images, tokenised and ready to generate from.

    `tokens_S` int32 holds the chat prompt with every image already expanded to its image-context tokens, ending where the response begins.
    `tiles` show its images in the order of their placeholders. `meta` travels to the reward function untouched.
    """

    key: str
    skill: str
    tokens_S: np.ndarray
    tiles: Tiles
    answer: str
    meta: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shape("tokens_S", self.tokens_S, None)


@dataclass(frozen=True)
class Rollout:
    """One sampled response, or a conversation: then `response_T` holds all that followed the prompt, observations included (`rl/conversations.py`), and
    `further` the tiles that they showed. `logprobs_T` float32 are log-probabilities under the distribution that was sampled from (temperature applied, before
    top-k/top-p truncation); `versions_T` int32 says which version of the weights sampled each token: several where new ones came in the middle of
    the answer, and -1 of a token that was not sampled but observed; `routes` covers every position but the last: `len(prompt) + len(response) - 1` rows."""

    prompt: Prompt
    sample: int
    seed: int
    response_T: np.ndarray
    logprobs_T: np.ndarray
    versions_T: np.ndarray
    finish: str  # "stop": ended by itself; "length": cut at the limit
    text: str
    routes: RouteTrace
    further: Tiles = NO_TILES

    def __post_init__(self) -> None:
        num_tokens = len(self.response_T)
        check_shape("response_T", self.response_T, None)
        check_shape("logprobs_T", self.logprobs_T, num_tokens)
        check_shape("versions_T", self.versions_T, num_tokens)
        check_shape("routes", self.routes, len(self.prompt.tokens_S) + num_tokens - 1, None, None)
        if self.finish not in ("stop", "length"):
            raise ValueError(f"finish is {self.finish!r}, expected 'stop' or 'length'")

    @property
    def version(self) -> int:
        """The oldest weights that took part."""
        return int(self.versions_T[self.sampled_T].min())

    @property
    def sampled_T(self) -> np.ndarray:
        """Whether each token was sampled: those that were not are no part of any loss."""
        return self.versions_T >= 0

    @property
    def num_sampled(self) -> int:
        return int(self.sampled_T.sum())

    @property
    def newest(self) -> int:
        """The newest of them."""
        return int(self.versions_T.max())

    def on_policy(self, version: int) -> bool:
        """Whether every token was sampled by the weights of this version."""
        return self.version == self.newest == version

    @property
    def sampled_rows(self) -> list[tuple[int, int]]:
        """`response_rows`, without those that chose observed tokens: one for each turn of the model."""
        if self.sampled_T.all():
            return [self.response_rows]
        edges = np.flatnonzero(np.diff(self.sampled_T.astype(np.int8), prepend=0, append=0))
        start = len(self.prompt.tokens_S) - 1
        return [(start + int(first), start + int(last)) for first, last in edges.reshape(-1, 2)]

    @property
    def response_rows(self) -> tuple[int, int]:
        """The positions [start, stop) whose state chose the response tokens, one per token: where EARL reads the routes. The first is the prompt's
        last position."""
        start = len(self.prompt.tokens_S) - 1
        return start, start + len(self.response_T)


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its task reward and the named parts that make it up. Every value is finite."""

    rollout: Rollout
    reward: float
    rewards: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in {"reward": self.reward, **self.rewards}.items():
            if not np.isfinite(value):
                raise ValueError(f"reward {name!r} is {value}: a failed reward is a FailedRollout, not a number")


@dataclass(frozen=True)
class FailedRollout:
    """A rollout or reward that failed: `reason` is a short stable name (`reward_raised`, `reward_timeout`, `reward_not_finite`, ...)."""

    prompt: Prompt
    sample: int
    reason: str
    detail: str


@dataclass(frozen=True)
class LearnerBatch:
    """What one learner update consumes: B rows, right-padded to S. Everything is per row or per token; no row knows its rank.

    `targets` are implied: position s predicts `tokens_BS[:, s + 1]`. `response_mask_BS[b, s]` is 1 where token s was sampled (so position s - 1 predicts it).
    `logprobs_BS`, `versions_BS` (of the weights that sampled each token; -1 where none was sampled) and `advantages_B` align with `tokens_BS`; `experts_BSLK`
    holds the recorded expert ids (-1 where there is none, such as padding).
    `tiles` are the distinct ones of the batch; `row_tiles_BM` indexes them (-1: no tile), so the G rollouts of a prompt share one image.
    """

    tokens_BS: np.ndarray
    response_mask_BS: np.ndarray
    logprobs_BS: np.ndarray
    versions_BS: np.ndarray
    advantages_B: np.ndarray
    experts_BSLK: np.ndarray
    tiles: Tiles
    row_tiles_BM: np.ndarray

    def __post_init__(self) -> None:
        rows, length = self.tokens_BS.shape
        check_shape("response_mask_BS", self.response_mask_BS, rows, length)
        check_shape("logprobs_BS", self.logprobs_BS, rows, length)
        check_shape("versions_BS", self.versions_BS, rows, length)
        check_shape("advantages_B", self.advantages_B, rows)
        check_shape("experts_BSLK", self.experts_BSLK, rows, length, None, None)
        check_shape("row_tiles_BM", self.row_tiles_BM, rows, None)

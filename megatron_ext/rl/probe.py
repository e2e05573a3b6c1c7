"""The weight probe: after every publication the learner and each rollout rank compute the log-probs of one fixed sequence, and these must agree before anything
is generated.

    draw_probe -> Probe -> LearnerRank.probe -> Probed (log-probs, routes) -> RolloutRank.probe, with those routes -> Probed -> check_probes

Digests say that the bytes arrived; the probe says that they compute what they compute at the learner. It also sees weights that were stored in a wrong place or
order, damaged after they were checked, or read by a broken kernel. What it cannot see is damage to an expert that none of its tokens chose, or damage smaller
than the rounding it allows: the digests are for these.

Two layouts round differently, and a token on the border between two experts may go to either: rollouts therefore replay the learner's choices. Their gates come
from their own routers, so that a damaged router shows. In the deterministic mode nothing is replayed and nothing may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch import NO_TILES, Prompt, Tiles
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.prompts import draw_recorded_prompts
from megatron_ext.data.suite import ALL_SKILLS, draw_prompts
from megatron_ext.errors import ProbeMismatch
from megatron_ext.parallel.plan import Layout
from megatron_ext.shapes import check_shape, round_up

ENOUGH_TOKENS = 512
"""Prompts are strung together up to this length, so that there are many tokens for experts to be chosen by. One longer prompt stands alone."""


@dataclass(frozen=True)
class Probe:
    """`tokens_S` int32, padded to what divides in the learner's and in the rollouts' layout. `compared_S` bool: whether position s decides a token whose
    log-prob is compared: placeholders of images and memory tokens, which are never sampled, and padding are not."""

    tokens_S: np.ndarray
    tiles: Tiles
    compared_S: np.ndarray

    def __post_init__(self) -> None:
        check_shape("compared_S", self.compared_S, len(self.tokens_S))


@dataclass(frozen=True)
class Probed:
    """What a rank computed with the weights of `version`. `logprobs_S` float32: of token s + 1 at position s, 0 where nothing is compared; `experts_SLK` int16:
    the experts of every position, in every layer that has some."""

    version: int
    logprobs_S: np.ndarray
    experts_SLK: np.ndarray

    def __post_init__(self) -> None:
        check_shape("experts_SLK", self.experts_SLK, len(self.logprobs_S), None, None)


def draw_probe(config: RunConfig, tokenizer: Tokenizer) -> Probe:
    """The probe of a run, a function of its configuration: validation prompts of the suite, one of each skill, each with its answer; of files the first prompts
    of step 0, which the run reads in any case."""
    data, vision, seed = config.data, config.model.vision, config.seed
    if data.kind == "suite":
        prompts = draw_prompts("val", ALL_SKILLS, 1, seed, data, tokenizer, vision)
    else:
        prompts = draw_recorded_prompts("train", min(len(ALL_SKILLS), config.rl.prompts_per_step), seed, data, tokenizer, vision)
    multiple = math.lcm(*(Layout.of(parallel).length_multiple for parallel in (config.parallel, config.rollout.parallel)))
    return string_together(prompts, tokenizer, config.model.max_positions // multiple * multiple, multiple)


def string_together(prompts: Sequence[Prompt], tokenizer: Tokenizer, most_tokens: int, multiple: int) -> Probe:
    """Those with images first: as many as `ENOUGH_TOKENS` hold, and one at least. Where none fits into `most_tokens`, the first one's text, cut."""
    chosen, tiles = list[np.ndarray](), list[Tiles]()
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.tiles) == 0):
        tokens_S = np.array([*prompt.tokens_S, *tokenizer.encode(prompt.answer), tokenizer.eos_id], np.int32)
        if sum(map(len, chosen)) + len(tokens_S) <= min(most_tokens, ENOUGH_TOKENS if chosen else most_tokens):
            chosen.append(tokens_S)
            tiles.append(prompt.tiles)
    if not chosen:
        tokens_S = prompts[0].tokens_S
        chosen, tiles = [tokens_S[tokens_S != tokenizer.image_id][:most_tokens]], [NO_TILES]
    tokens_S = np.concatenate(chosen)
    padding = round_up(len(tokens_S), multiple) - len(tokens_S)
    compared_S = np.append(~np.isin(tokens_S[1:], tokenizer.placeholders), np.zeros(1 + padding, bool))
    return Probe(np.append(tokens_S, np.full(padding, tokenizer.pad_id, np.int32)), Tiles.join(tiles), compared_S)


def check_probes(learner: Probed, rollouts: Mapping[str, Probed], limit: float, exact: bool) -> float:
    """The largest difference of a log-prob between the learner and any rollout rank; `rollouts` has their names.

    Raises ProbeMismatch where it is more than `limit`, in the deterministic mode (`exact`) more than nothing, and where a rank has weights of another version.
    """
    largest = 0.0
    for name, answer in rollouts.items():
        if answer.version != learner.version:
            raise ProbeMismatch(f"{name} holds weights of version {answer.version}, and the learner of version {learner.version}; run again to resume")
        with np.errstate(invalid="ignore"):
            diff_S = np.abs(answer.logprobs_S.astype(np.float64) - learner.logprobs_S)
        diff_S = np.where(np.isfinite(diff_S), diff_S, np.inf)
        worst = int(diff_S.argmax())
        if diff_S[worst] > (0.0 if exact else limit):
            raise ProbeMismatch(_disagreement(name, worst, learner, answer, limit, exact))
        largest = max(largest, float(diff_S[worst]))
    return largest


def _disagreement(name: str, place: int, learner: Probed, answer: Probed, limit: float, exact: bool) -> str:
    allowed = "rollout.deterministic allows no difference" if exact else f"rl.max_logprob_diff allows {limit:g}"
    explained = "set rollout.deterministic=false" if exact else "raise rl.max_logprob_diff"
    return (
        f"with the weights of version {learner.version}, which arrived whole, {name} gives token {place + 1} of the probe the log-prob "
        f"{answer.logprobs_S[place]:.8g}, the learner {learner.logprobs_S[place]:.8g}; {allowed}. Nothing was generated with them: run again to resume from "
        f"the latest checkpoint; if this happens again, look at that rank's machine, or, where precision explains the difference, {explained}"
    )

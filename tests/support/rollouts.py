"""Rollouts made up for tests of what is done with them: every value differs from row to row."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles


def prompt(key="p", length=3, images=0, seed=0, pixels=4, skill="count", answer="3", meta=None):
    """A prompt with as many tiles."""
    rng = np.random.default_rng([*key.encode(), seed])
    places = rng.random((images, 5)).astype(np.float32)
    tiles = Tiles(rng.integers(0, 256, (images, pixels, pixels, 3), dtype=np.uint8), places) if images else NO_TILES
    return Prompt(key, skill, rng.integers(1, 99, length).astype(np.int32), tiles, answer, meta or {})


def scored(of, sample, length=2, reward=1.0, version=4, layers_topk=(2, 3), experts=8, seed=0, text="3", finish="stop", parts=None, observed=0):
    """An answer to the prompt `of`; the routes of the prompt's positions are the same for all of its answers. New weights come with every second token.
    `observed`: tokens in its midst that were not sampled but shown with a tile."""
    shared, own = (np.random.default_rng([*of.key.encode(), seed, number]) for number in (0, sample + 1))
    ids = np.uint8 if experts <= 256 else np.uint16
    drawn = [rng.integers(0, experts, (rows, *layers_topk)).astype(ids) for rng, rows in ((shared, len(of.tokens_S)), (own, length - 1))]
    gates = [rng.random((rows, *layers_topk)).astype(np.float16) for rng, rows in ((shared, len(of.tokens_S)), (own, length - 1))]
    versions_T = (version + np.arange(length) // 2).astype(np.int32)
    versions_T[1 : 1 + observed] = -1
    rollout = Rollout(
        prompt=of,
        sample=sample,
        seed=int(own.integers(2**63 - 1)),
        versions_T=versions_T,
        response_T=own.integers(1, 99, length).astype(np.int32),
        logprobs_T=own.normal(size=length).astype(np.float32),
        finish=finish,
        text=text,
        routes=RouteTrace(np.concatenate(drawn), np.concatenate(gates)),
        further=prompt(of.key, images=1, seed=sample + 1).tiles if observed else NO_TILES,
    )
    return ScoredRollout(rollout, reward, parts or {})


def group(key, samples=3, **more):
    """All answers of one prompt."""
    of = prompt(key, images=1)
    return [scored(of, sample, reward=float(sample), **more) for sample in range(samples)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def draws(draw):
    """The scored and failed rollouts of a draw: groups of any size whose answers come in any order."""
    answers, failures = [], []
    for index in range(draw(st.integers(0, 4))):
        meta = draw(st.dictionaries(st.text(max_size=3), JSON, max_size=2))
        of = prompt(f"{draw(st.text(max_size=3))}/{index}", draw(st.integers(1, 5)), draw(st.integers(0, 2)), answer=draw(st.text(max_size=4)), meta=meta)
        layers_topk, experts = draw(st.sampled_from([(2, 3), (1, 1), (0, 0)])), draw(st.sampled_from([8, 300]))
        for sample in range(draw(st.integers(0, 4))):
            if draw(st.booleans()):
                failures.append(FailedRollout(of, sample, "reward_raised", draw(st.text(max_size=9))))
                continue
            parts = draw(st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=3))
            length, finish = draw(st.integers(1, 6)), draw(st.sampled_from(["stop", "length"]))
            reward, text = draw(st.floats(allow_nan=False, allow_infinity=False)), draw(st.text(max_size=9))
            answers.append(
                scored(
                    of,
                    sample,
                    length,
                    reward,
                    layers_topk=layers_topk,
                    experts=experts,
                    text=text,
                    finish=finish,
                    parts=parts,
                    observed=draw(st.integers(0, max(0, length - 2))),
                )
            )
    return draw(st.permutations(answers)), draw(st.permutations(failures))


def same(one, other):
    """Whether two values hold the same, arrays bit for bit and of one type."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Tiles):
        return isinstance(other, Tiles) and same(one.pixels_IHWC, other.pixels_IHWC) and same(one.places_I5, other.places_I5)
    if isinstance(one, RouteTrace):
        return isinstance(other, RouteTrace) and same(one.experts_SLK, other.experts_SLK) and same(one.gates_SLK, other.gates_SLK)
    if isinstance(one, Prompt | Rollout | ScoredRollout | FailedRollout):
        return type(one) is type(other) and all(same(value, vars(other)[name]) for name, value in vars(one).items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other

"""Sampling is exact, truncates as promised, and depends on nothing but the row's own seed and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.inference.sampling import rollout_seed, sample, truncate, uniforms

SAMPLED = np.zeros(1, bool)
"""One row, which is not greedy."""


def test_frequencies_follow_the_probabilities() -> None:
    """40 000 draws from (0.5, 0.3, 0.2): each share within four standard errors."""
    seeds = np.arange(40_000)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(len(seeds), 1)
    tokens, logprobs = sample(logits, uniforms(seeds, 0), top_k=0, top_p=1.0, greedy_B=np.zeros(len(seeds), bool))
    shares = np.bincount(tokens.numpy(), minlength=3) / len(seeds)
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 4 * 0.5 / np.sqrt(len(seeds))
    torch.testing.assert_close(logprobs, logits.gather(1, tokens[:, None])[:, 0])


@given(st.integers(0, 2**62), st.integers(0, 1000), st.integers(0, 5))
def test_a_row_samples_the_same_whatever_stands_beside_it(seed: int, position: int, before: int) -> None:
    alone = uniforms(np.array([seed]), position)[0]
    beside = uniforms(np.array([*range(before), seed]), position)[-1]
    assert alone == beside and 0 <= alone < 1


def test_successive_positions_are_uncorrelated() -> None:
    seeds = np.arange(20_000)
    assert abs(np.corrcoef(uniforms(seeds, 0), uniforms(seeds, 1))[0, 1]) < 0.03


def test_seeds_are_stable_and_differ_by_every_part() -> None:
    assert rollout_seed(0, 3, "train/ocr/7", 1) == rollout_seed(0, 3, "train/ocr/7", 1)
    assert len({rollout_seed(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in "xy" for d in (0, 1)}) == 16


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(1, 1.0, [0]), (2, 1.0, [0, 1]), (0, 0.5, [0]), (0, 0.51, [0, 1]), (0, 1.0, [0, 1, 2])])
def test_truncation_keeps_what_it_promises(top_k: int, top_p: float, kept: list[int]) -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    assert truncate(probs, top_k, top_p)[0].nonzero()[:, 0].tolist() == kept


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8), st.floats(0.05, 1.0), st.floats(0, 1, exclude_max=True))
def test_a_token_outside_the_nucleus_is_never_drawn(logits: list[float], top_p: float, uniform: float) -> None:
    """What is more likely, to float32, than the token drawn weighs less than top_p, but for rounding where a sum hits it exactly (three equal tokens, 1/3)."""
    row = torch.tensor([logits])
    token, _ = sample(row, np.array([uniform]), top_k=0, top_p=top_p, greedy_B=SAMPLED)
    probs = row[0].double().softmax(-1)
    seen = torch.log_softmax(row, -1)[0]
    assert probs[seen > seen[token]].sum() < top_p + 1e-6
    assert truncate(torch.log_softmax(row, -1).exp(), 0, top_p)[0, token] > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 700), st.floats(0, 1, exclude_max=True))
def test_the_token_is_the_one_at_which_the_cumulative_distribution_passes_the_draw(seed: int, vocabulary: int, uniform: float) -> None:
    """Whatever blocks the vocabulary is summed in; tokens without mass, also at its ends, are never drawn."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    logits[0, torch.arange(vocabulary) % 3 != seed % 2] = float("-inf")
    token, _ = sample(logits, np.array([uniform]), top_k=0, top_p=1.0, greedy_B=SAMPLED)
    ends = torch.cat([torch.zeros(1), logits[0].double().softmax(-1).cumsum(-1)])
    assert logits[0, token] > float("-inf")
    assert ends[token] - 1e-6 <= uniform <= ends[token + 1] + 1e-6


def test_greedy_takes_the_most_likely_token_whatever_the_seed() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert [sample(logits, np.array([u]), 0, 1.0, greedy_B=~SAMPLED)[0].item() for u in (0.0, 0.5, 0.99)] == [1, 1, 1]


def test_greedy_and_sampled_rows_stand_side_by_side() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).repeat(2, 1)
    tokens, logprobs = sample(logits, np.array([0.99, 0.99]), 0, 1.0, greedy_B=np.array([True, False]))
    assert tokens.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens])

"""Log-probabilities and entropies in chunks are those of the plain distribution, to the gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.model.heads import policy_logits
from megatron_ext.model.token_scores import policy_scores, token_logprobs

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
SIZES = (st.integers(1, 4), st.integers(1, 5), st.integers(3, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))


def test_two_logits_as_by_hand() -> None:
    """log(3 / (3 + 1)), with gradient 1 - 3/4 and -1/4."""
    logits = torch.tensor([[[3.0, 1.0]]]).log().requires_grad_()
    found = token_logprobs(logits, torch.tensor([[0]]), ALONE)
    found.sum().backward()
    assert float(found) == pytest.approx(-0.2876821)
    assert logits.grad is not None and logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25])


def test_two_tokens_of_a_policy_as_by_hand() -> None:
    """p = (3/4, 1/4): log 3/4, H = log 4 - 3/4 log 3; the gradient of the first is (1/4, -1/4)."""
    logits = torch.tensor([[[3.0, 1.0, 9.0]]]).log().requires_grad_()
    logprobs, entropy = policy_scores(logits, torch.tensor([[0]]), 1.0, torch.tensor([False, False, True]), ALONE)
    logprobs.sum().backward()
    assert float(logprobs) == pytest.approx(-0.2876821) and float(entropy) == pytest.approx(0.5623351)
    assert logits.grad is not None and logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25, 0.0])


@settings(max_examples=60, deadline=None)
@given(*SIZES)
def test_numbers_and_gradients_are_those_of_torchs_cross_entropy_in_chunks_of_any_size(
    rows: int, length: int, vocabulary: int, chunk: int, dtype: torch.dtype, seed: int
) -> None:
    """Logits at minus infinity included."""
    generator = torch.Generator().manual_seed(seed)
    logits_SBV = (10 * torch.randn(length, rows, vocabulary, generator=generator)).to(dtype)
    logits_SBV[..., 0] = -torch.inf
    targets_BS = torch.randint(1, vocabulary, (rows, length), generator=generator)
    weights_BS = torch.randn(rows, length, generator=generator)
    ours, theirs = logits_SBV.clone().requires_grad_(), logits_SBV.clone().requires_grad_()
    found = token_logprobs(ours, targets_BS, ALONE, chunk)
    expected = -F.cross_entropy(theirs.float().flatten(0, 1), targets_BS.t().flatten(), reduction="none").view(length, rows).t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward(weights_BS)
    expected.backward(weights_BS)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(*SIZES, st.sampled_from([0.0, 0.7, 1.0]))
def test_those_of_a_policy_are_those_of_the_plain_distribution(
    rows: int, length: int, vocabulary: int, chunk: int, dtype: torch.dtype, seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_SBV = (30 * torch.randn(length, rows, vocabulary, generator=generator)).to(dtype)
    targets_BS = torch.randint(1, vocabulary, (rows, length), generator=generator)
    banned_V = torch.arange(vocabulary) == 0
    weights_BS = torch.randn(rows, length, generator=generator)
    ours, theirs = logits_SBV.clone().requires_grad_(), logits_SBV.clone().requires_grad_()
    found, entropy = policy_scores(ours, targets_BS, temperature, banned_V, ALONE, chunk)
    plain = policy_logits(theirs, temperature, banned_V).log_softmax(-1).transpose(0, 1)
    expected = plain.gather(2, targets_BS[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(plain.exp()).sum(-1), rtol=1e-4, atol=1e-5)
    found.backward(weights_BS)
    expected.backward(weights_BS)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-5)
    assert not entropy.requires_grad


def test_a_token_that_is_nearly_certain_has_its_small_gradient_exactly_also_in_bfloat16() -> None:
    """p = 1 - e^-10 rounds to 1; its gradient, e^-10, does not round to 0."""
    logits = torch.tensor([[[10.0, 0.0]]], dtype=torch.bfloat16).requires_grad_()
    token_logprobs(logits, torch.tensor([[0]]), ALONE).sum().backward()
    assert logits.grad is not None and float(logits.grad[0, 0, 0]) == pytest.approx(4.54e-5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_overwritten_only_for_a_gradient_and_whoever_uses_them_again_is_told(dtype: torch.dtype) -> None:
    hidden_SBH, weight_VH, targets_BS = torch.randn(3, 2, 4, dtype=dtype), torch.randn(8, 4, dtype=dtype).requires_grad_(), torch.zeros(2, 3, dtype=torch.long)
    logits_SBV = hidden_SBH @ weight_VH.t()
    before = logits_SBV.detach().clone()
    with torch.no_grad():
        token_logprobs(logits_SBV, targets_BS, ALONE)
    assert torch.equal(logits_SBV, before)
    squares = logits_SBV.square().sum()
    logprobs_BS = token_logprobs(logits_SBV, targets_BS, ALONE)
    assert not torch.equal(logits_SBV, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logprobs_BS.sum() + squares).backward()

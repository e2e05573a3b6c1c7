"""Log-probabilities and entropies of the policy in chunks are those of the plain distribution, to the gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.model.heads import policy_logits
from megatron_ext.model.policy_head import policy_scores

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def test_two_tokens_as_by_hand() -> None:
    """p = (3/4, 1/4): log 3/4, H = log 4 - 3/4 log 3; the gradient of the first is (1/4, -1/4)."""
    logits = torch.tensor([[[3.0, 1.0, 9.0]]]).log().requires_grad_()
    logprobs, entropy = policy_scores(logits, torch.tensor([[0]]), 1.0, torch.tensor([False, False, True]), ALONE)
    logprobs.sum().backward()
    assert float(logprobs) == pytest.approx(-0.2876821) and float(entropy) == pytest.approx(0.5623351)
    assert logits.grad is not None and logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25, 0.0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(3, 9),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_numbers_and_gradients_are_those_of_the_plain_distribution_in_chunks_of_any_size(
    rows: int, length: int, vocabulary: int, chunk: int, temperature: float, dtype: torch.dtype, seed: int
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

"""Log-probabilities in chunks are those of one cross entropy, to the gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.model.heads import CHUNKED_FROM, chunked_logprobs, token_logprobs


def test_two_logits_as_by_hand() -> None:
    """log(3 / (3 + 1)), with gradient 1 - 3/4 and -1/4."""
    logits = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    found = chunked_logprobs(logits, torch.tensor([0]))
    found.sum().backward()
    assert float(found) == pytest.approx(-0.2876821)
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx([0.25, -0.25])


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(2, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_numbers_and_gradients_are_those_of_torchs_cross_entropy_in_chunks_of_any_size(
    positions: int, vocabulary: int, chunk: int, dtype: torch.dtype, seed: int
) -> None:
    """Banned tokens, at minus infinity, included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, vocabulary, generator=generator).to(dtype)
    targets = torch.randint(1, vocabulary, (positions,), generator=generator)
    logits[:, 0] = -torch.inf
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.randn(positions, generator=generator)
    found, expected = chunked_logprobs(ours, targets, chunk), -F.cross_entropy(theirs.float(), targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward(weights)
    expected.backward(weights)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [64, CHUNKED_FROM])
def test_a_sequence_of_rows_is_scored_in_its_order_with_either_kernel(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits_SBV, targets_BS = torch.randn(5, 3, vocabulary), torch.randint(0, vocabulary, (3, 5))
    found = token_logprobs(logits_SBV, targets_BS, SimpleNamespace(size=lambda: 1))
    expected = logits_SBV.log_softmax(-1).transpose(0, 1).gather(2, targets_BS[..., None])[..., 0]
    torch.testing.assert_close(found, expected)

"""What is chosen where, by what rule."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.device.kernels import SMALL_EXPERT, experts, report, uses_varlen
from megatron_ext.errors import UserError


@pytest.mark.parametrize(
    ("on_gpu", "bf16", "ffn", "kernel"),
    [
        (False, False, 340, "grouped_mm"),
        (False, False, 344, "in_place"),
        (False, True, 344, "in_place"),
        (True, True, 344, "grouped_mm"),
        (True, False, 340, "in_place"),
        (False, False, 66, "in_place"),
        (True, True, 68, "in_place"),
    ],
)
def test_the_experts_kernel_follows_device_dtype_and_size(on_gpu: bool, bf16: bool, ffn: int, kernel: str) -> None:
    """Of experts with a hidden size of 64: 3 x 64 x 340 parameters are small, and rows of 66 float32 or 68 bfloat16 numbers are no whole 16 bytes."""
    assert 3 * 64 * 340 <= SMALL_EXPERT < 3 * 64 * 344
    assert experts("auto", on_gpu, bf16, 64, ffn)[0] == kernel


def test_a_kernel_that_is_asked_for_is_taken_wherever_it_is() -> None:
    assert experts("sequential", True, True, 1, 1) == ("sequential", "model.experts_kernel = sequential")


def test_grouped_mm_is_refused_for_rows_that_it_does_not_take() -> None:
    with pytest.raises(UserError, match=r"model.experts_kernel: grouped_mm does not take experts of 64 by 66: .* whole 16 bytes.*; use auto"):
        experts("grouped_mm", False, False, 64, 66)


def test_packed_samples_share_a_call_on_gpus_in_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert uses_varlen(on_gpu=True, half=True)
    assert not uses_varlen(on_gpu=True, half=False) and not uses_varlen(on_gpu=False, half=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not uses_varlen(on_gpu=True, half=True)
    assert report(on_gpu=True, transformer_engine=False, apex=False)["packed attention"].kernel == "SDPA, a call per sample"

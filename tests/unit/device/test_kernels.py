"""What is chosen where, by what rule."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.device.kernels import SMALL_EXPERT, experts, report, uses_varlen


@pytest.mark.parametrize(
    ("on_gpu", "bf16", "numel", "kernel"),
    [
        (False, False, SMALL_EXPERT, "grouped_mm"),
        (False, False, SMALL_EXPERT + 1, "in_place"),
        (False, True, SMALL_EXPERT + 1, "in_place"),
        (True, True, SMALL_EXPERT + 1, "grouped_mm"),
        (True, False, SMALL_EXPERT, "in_place"),
    ],
)
def test_the_experts_kernel_follows_device_dtype_and_size(on_gpu: bool, bf16: bool, numel: int, kernel: str) -> None:
    assert experts("auto", on_gpu, bf16, numel)[0] == kernel


def test_a_kernel_that_is_asked_for_is_taken_wherever_it_is() -> None:
    assert experts("sequential", True, True, 1) == ("sequential", "model.experts_kernel = sequential")


def test_packed_samples_share_a_call_on_gpus_in_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert uses_varlen(on_gpu=True, half=True)
    assert not uses_varlen(on_gpu=True, half=False) and not uses_varlen(on_gpu=False, half=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not uses_varlen(on_gpu=True, half=True)
    assert report(on_gpu=True, transformer_engine=False, apex=False)["packed attention"].kernel == "SDPA, a call per sample"

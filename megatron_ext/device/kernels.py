"""Which implementation of a kernel runs on this machine, and why. The model asks here before it runs; `megatron-ext doctor` prints the same answers.

Packages are judged by their metadata: an accelerator that is installed wrongly breaks whoever imports it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from megatron_ext.errors import UserError

ExpertsKernel = Literal["sequential", "in_place", "grouped_mm"]
_WANTS = "torch's grouped_mm wants rows of whole 16 bytes, and on a GPU bfloat16"
SMALL_EXPERT = 64 * 1024
"""Parameters of one expert on one rank up to which, on a CPU, stacking all experts for one call costs less than calls for each (docs/benchmarks/experts.md)."""


@dataclass(frozen=True)
class Choice:
    """`kernel` in words; `reason`: why this one; `lost`: what the machine does without, empty where nothing."""

    kernel: str
    reason: str
    lost: str = ""


def experts(asked: str, on_gpu: bool, bf16: bool, hidden: int, ffn: int) -> tuple[ExpertsKernel, str]:
    """What `model.experts_kernel` means for experts of `hidden` by `ffn` on a rank, and why. Raises UserError for grouped_mm where torch's does not take them.

    >>> experts("auto", on_gpu=False, bf16=False, hidden=2048, ffn=768)[0]
    'in_place'
    """
    expert_numel = 3 * hidden * ffn
    match asked:
        case "grouped_mm" if not can_group(on_gpu, bf16, hidden, ffn):
            raise UserError("model.experts_kernel", f"grouped_mm does not take experts of {hidden} by {ffn}: {_WANTS}", "use auto, in_place or sequential")
        case "sequential" | "in_place" | "grouped_mm":
            return asked, f"model.experts_kernel = {asked}"
        case _ if not can_group(on_gpu, bf16, hidden, ffn):
            return "in_place", _WANTS
        case _ if on_gpu:
            return "grouped_mm", "bfloat16 on a GPU"
        case _ if expert_numel <= SMALL_EXPERT:
            return "grouped_mm", f"on a CPU, for experts of at most {SMALL_EXPERT} parameters"
        case _:
            return "in_place", f"on a CPU, for experts of more than {SMALL_EXPERT} parameters"


def can_group(on_gpu: bool, bf16: bool, *widths: int) -> bool:
    """Whether torch's grouped_mm takes matrices of the model's numbers with rows of these widths.

    >>> can_group(False, False, 64, 66), can_group(False, True, 64, 72)
    (False, True)
    """
    return (bf16 or not on_gpu) and all(width * (2 if bf16 else 4) % 16 == 0 for width in widths)


def uses_varlen(on_gpu: bool, half: bool) -> bool:
    """Whether all packed samples of a row are attended to in one call: torch has the kernel for 16-bit numbers on GPUs from Ampere on."""
    if not (on_gpu and half) or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    import torch

    return torch.cuda.get_device_capability()[0] >= 8


def report(on_gpu: bool, transformer_engine: bool, apex: bool) -> dict[str, Choice]:
    """One choice per kernel family, on a GPU for a bfloat16 model. The two packages are there, and whole."""
    return {
        "attention": _attention(on_gpu),
        "packed attention": _packed_attention(on_gpu),
        "experts": _experts(on_gpu),
        "cross entropy": Choice(
            "in chunks of positions, over the logits themselves, whether tensor parallelism splits the vocabulary or not",
            "measured: docs/benchmarks/cross_entropy.md",
        ),
        "Adam": _adam(transformer_engine, apex),
        "norms": Choice("torch's RMSNorm", "Apex has none that Megatron takes, Transformer Engine's layers are not used in this release"),
        "weight gradients": Choice(
            "a product, then an addition",
            "Megatron takes the kernel that does both from Apex, which is not used for it in this release" if apex else "NVIDIA Apex is not installed",
            "gradient accumulation is not fused into the weight GEMM, but for experts computed in place",
        ),
    }


def _attention(on_gpu: bool) -> Choice:
    if on_gpu:
        return Choice("torch's SDPA: flash or memory-efficient", "the training core of every layer", "no FP8 attention, which is Transformer Engine's")
    return Choice("torch's SDPA: its flash kernel for CPUs", "no GPU")


def _packed_attention(on_gpu: bool) -> Choice:
    if uses_varlen(on_gpu, half=True):
        return Choice("torch's varlen_attn", "a GPU and a torch that has it; SDPA per sample in float32 and under context parallelism")
    return Choice("SDPA, a call per sample", "varlen_attn needs a GPU from Ampere on", "the samples of a row are not attended to in one call")


def _experts(on_gpu: bool) -> Choice:
    if on_gpu:
        return Choice("torch's grouped_mm", "bfloat16 on a GPU", "training stacks the weights for it in every pass")
    return Choice(f"in place; grouped_mm up to {SMALL_EXPERT} parameters an expert", "measured: docs/benchmarks/experts.md")


def _adam(transformer_engine: bool, apex: bool) -> Choice:
    """In the order in which Megatron looks for one."""
    if transformer_engine:
        return Choice("Transformer Engine's FusedAdam", "Megatron prefers it")
    if apex:
        return Choice("NVIDIA Apex's FusedAdam", "Transformer Engine is not installed")
    return Choice("torch's AdamW, fused", "neither Transformer Engine nor NVIDIA Apex is installed", "no multi-tensor Adam, norm and clipping of theirs")

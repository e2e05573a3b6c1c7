"""Rotary position embedding, non-interleaved, over the full head dimension (Su et al., 2021; the layout of Qwen3), and its scaling to longer rows.

The angles are computed once per forward pass and handed to every layer, where Megatron would take their cosine in each.
"""

from __future__ import annotations

import math

import torch

from megatron_ext.config.schema import ModelConfig, RopeScaling


def rope_angles(positions: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 `positions.shape + [1, head_dim]`, for integer positions of any shape (the 1 broadcasts over heads). The sine carries the sign
    with which `rotate` adds it: minus in the first half."""
    frequencies, factor = _frequencies(model, positions.device)
    angles = (positions.float()[..., None] * frequencies)[..., None, :]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys [..., heads, head_dim] by the angles of their positions."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


def _frequencies(model: ModelConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Radians a position, float32 [head_dim / 2], and what queries and keys are multiplied by."""
    pairs = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=device)
    frequencies, scaling = model.rope_theta ** (-pairs / model.head_dim), model.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    return _yarn(frequencies, model.head_dim, model.rope_theta, scaling)


def _yarn(frequencies: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): pairs that turn often within the original length keep their frequency, those that turn less than `beta_slow` times
    are slowed by the factor, with a ramp in between; attention is sharpened by 0.1 ln(factor) + 1."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(scaling.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    numbers = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    slowed = ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    sharpened = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed), sharpened

"""Rotary position embedding, non-interleaved, over the full head dimension (Su et al., 2021; the layout of Qwen3).

The angles are computed once per forward pass and handed to every layer, where Megatron would take their cosine in each.
"""

from __future__ import annotations

import torch


def rope_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 `positions.shape + [1, head_dim]`, for integer positions of any shape (the 1 broadcasts over heads)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys [..., heads, head_dim] by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)

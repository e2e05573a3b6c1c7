"""What travels from one pipeline stage to the next: one tensor [rows, B, H], whose gradient travels back.

    rows:  hidden states | the refinement of every tap on its way to its target | the ViT features, where later adapters need them, reshaped to rows

Megatron's schedules send one tensor with three axes; the receiver knows from its stage and its inputs how to take it apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_ext.parallel.stages import Stage


@dataclass(frozen=True)
class Payload:
    """`hidden_SBH` and each of `waiting` (by tap) are this rank's sequence slices; `sources_IVW`, for taps to look at, are
    whole, None where nothing later asks."""

    hidden_SBH: torch.Tensor
    waiting: dict[int, torch.Tensor]
    sources_IVW: torch.Tensor | None


def pack(payload: Payload, stage: Stage) -> torch.Tensor:
    """For the next stage."""
    parts = [payload.hidden_SBH, *(payload.waiting[tap] for tap in stage.sends)]
    if stage.sends_features and payload.sources_IVW is not None:
        parts.append(_as_rows(payload.sources_IVW, payload.hidden_SBH))
    return torch.cat(parts)  # contiguous, as sending asks: after images were spliced in, the hidden states alone are not


def unpack(received: torch.Tensor, stage: Stage, length: int, tiles: int, source_tokens: int, source_width: int) -> Payload:
    """From the stage before. `length` is that of this rank's sequence slice. Raises ValueError where the size disagrees with the inputs."""
    count = 1 + len(stage.receives)
    numel = tiles * source_tokens * source_width if stage.receives_features else 0
    expected = count * length + -(-numel // received[0].numel())
    if received.shape[0] != expected:
        raise ValueError(
            f"pipeline stage {stage.number} received {received.shape[0]} rows where its inputs make {expected}: do all stages read the same batch?"
        )
    hidden, *waiting = received[: count * length].split(length)
    features = received[count * length :].flatten()[:numel].view(tiles, source_tokens, source_width) if stage.receives_features else None
    return Payload(hidden, dict(zip(stage.receives, waiting, strict=True)), features)


def _as_rows(sources_IVW: torch.Tensor, hidden_SBH: torch.Tensor) -> torch.Tensor:
    flat = sources_IVW.flatten().to(hidden_SBH.dtype)
    return F.pad(flat, (0, -len(flat) % hidden_SBH[0].numel())).view(-1, *hidden_SBH.shape[1:])

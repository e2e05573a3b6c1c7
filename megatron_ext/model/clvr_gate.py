"""How much of a tap's answer enters the residual stream.

    scalar    g                              one number a tap; with zero_out it is 1 and no parameter
    channel   g_h                            one a channel
    dynamic   g_t = w . RMSNorm(h_t) + b     one a token, from the state that asked: when to look

    zero_out   (W_o = 0)       1 at first: g, g_h, and 2 sigmoid(g_t)
    tanh_gate  (W_o random)    tanh of them, 0 at first

The answer enters with weight 0 at step 0 either way, through W_o or through the gate and never through both, whose gradients would all be 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_ext.config.clvr_schema import ClvrConfig
from megatron_ext.config.clvr_sizes import gate_numel


def gate_parameter(config: TransformerConfig, clvr: ClvrConfig) -> nn.Parameter | None:
    """The gate of one tap, as it starts. `dynamic`: w, then b. Under sequence parallelism each rank has the gradient of its slice."""
    if not clvr.has_gate:
        return None
    starts_open = clvr.gate == "zero_out" and clvr.gate_kind == "channel"
    shape = () if clvr.gate_kind == "scalar" else (gate_numel(clvr, config.hidden_size),)
    gate = nn.Parameter(torch.full(shape, float(starts_open)))
    gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return gate


def gate_values(clvr: ClvrConfig, gate: torch.Tensor, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """What the answer is multiplied by: [], [H] or [S, B, 1]."""
    if clvr.gate_kind == "dynamic":
        gate = (F.rms_norm(hidden_SBH, hidden_SBH.shape[-1:]) * gate[:-1]).sum(-1, keepdim=True) + gate[-1]
    if clvr.gate == "tanh_gate":
        return torch.tanh(gate)
    return 2 * torch.sigmoid(gate) if clvr.gate_kind == "dynamic" else gate

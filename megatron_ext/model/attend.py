"""Attention that also tells how large its softmax's denominator was, so that what was attended to in parts can be joined.

out = w out_1 + (1 - w) out_2,   w = sigmoid(lse_1 - lse_2)        (arXiv 2402.05099, appendix)
"""

from __future__ import annotations

import numpy as np
import torch

Attended = tuple[torch.Tensor, torch.Tensor]
"""What was found, [rows, N_kv, Q, D], and the log of the softmax's denominator, float32 [rows, N_kv, Q]."""


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> Attended:
    """Attention of [rows, N_kv, Q, D] over [rows, N_kv, T, D]. On CPUs torch's flash kernel, which `F.scaled_dot_product_attention` calls too and forgets the
    denominator of; elsewhere plain products."""
    if query.is_cpu:
        scale = query.shape[-1] ** -0.5
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, False, attn_mask=bias.to(query.dtype), scale=scale)
    return attend_plainly(query, keys, values, bias)


def attend_plainly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> Attended:
    scores = (query @ keys.transpose(-1, -2)).float() * query.shape[-1] ** -0.5 + bias
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_().to(values.dtype) @ values, lse


def join(first: Attended, second: Attended) -> torch.Tensor:
    """What attention over both at once would have found."""
    weight = torch.sigmoid(first[1] - second[1]).to(first[0].dtype)
    return torch.lerp(second[0], first[0], weight[..., None])


def hide_beyond(lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """The bias that hides what stands beyond each row's length: 0 or -inf, float32 [rows, 1, 1, longest].

    >>> hide_beyond(np.array([1, 2]), torch.device("cpu")).flatten(1).tolist()
    [[0.0, -inf], [0.0, 0.0]]
    """
    hidden = np.arange(int(lengths.max()))[None, :] >= lengths[:, None]
    return torch.from_numpy(np.where(hidden, -np.inf, 0.0).astype(np.float32)).to(device)[:, None, None, :]

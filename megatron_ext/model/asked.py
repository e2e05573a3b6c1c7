"""Listening to what CLVR's taps ask, by hooks on their modules: whoever measures or shows attention makes the weights from it (`sight.attention_weights`).

No module runs twice and no rank talks to another, so it may happen in the middle of a training step, under any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.sight import Sight

Told = Callable[[torch.Tensor, torch.Tensor, Sight], None]


def on_ask(tap: ClvrTap, told: Told, when: Callable[[], bool] = lambda: True) -> list[RemovableHandle]:
    """Calls `told(query_SBND, keys_BNVD, sight)`, detached, at each forward pass of the tap where `when()` holds: with the first query, where it looks
    several times."""
    asked: list[tuple[torch.Tensor, Sight]] = []

    def before(_module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sight]) -> None:
        asked[:] = [(inputs[1].detach(), inputs[3])] if when() else []

    def queried(_module: torch.nn.Module, _inputs: Any, query_SBND: torch.Tensor) -> None:
        if asked:
            told(query_SBND.detach(), *asked.pop())

    return [tap.register_forward_pre_hook(before), tap.q_layernorm.register_forward_hook(queried)]

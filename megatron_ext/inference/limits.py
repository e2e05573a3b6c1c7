"""What a replica has room for: positions of the model, and memory for keys and values. Asked before a prompt is taken, and in every step of those under way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_ext.batch import Prompt
from megatron_ext.config.schema import ModelConfig, RolloutConfig
from megatron_ext.errors import UserError
from megatron_ext.model.memory import Footprint, Memory


class Limits:
    """`tp`: ranks that share the keys and values of a token."""

    def __init__(self, model: ModelConfig, config: RolloutConfig, tp: int) -> None:
        self._positions, self._config = model.max_positions, config
        self._footprint = Footprint.of(model, tp)
        self._budget = math.inf if config.cache_gib is None else config.cache_gib * 2**30

    def hold(self, memory: Memory, rows: int, joining: Sequence[Prompt] = ()) -> bool:
        """Whether the next step fits with `rows` rows in all, and with prompts that join those that are there."""
        return memory.need_bytes(self._footprint, rows, joining) <= self._budget

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a prompt and the longest answer to it have more positions than the model, or may alone outgrow `rollout.cache_gib`."""
        new, longest = self._config.max_new_tokens, max((len(prompt.tokens_S) for prompt in prompts), default=0)
        if longest + new > self._positions:
            problem = f"{new} after a prompt of {longest} tokens exceeds model.max_positions = {self._positions}"
            raise UserError("rollout.max_new_tokens", problem, "generate fewer tokens, or shorten the prompts")
        for prompt in prompts:
            need = self._footprint.token * (len(prompt.tokens_S) + new) + self._footprint.tile * len(prompt.tiles)
            if need > self._budget:
                problem = f"{self._config.cache_gib:g} GiB do not hold {new} tokens after a prompt of {len(prompt.tokens_S)}"
                raise UserError("rollout.cache_gib", problem, f"give at least {math.ceil(need / 2**20) / 2**10:.4g}, or lower rollout.max_new_tokens")

"""What one step of a stage asks of the learner: rows, their lengths and images, and what trains. Derived from the configuration and a few assumptions about
data that no configuration knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.config.schema import RunConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.errors import UserError
from megatron_ext.parallel.planner.tensors import Training

StageName = Literal["pretrain", "sft", "rl"]


@dataclass(frozen=True)
class Workload:
    """One optimizer step, or for `rl` one step of the loop.

    `rows` conversations or rollouts of all ranks; `row_tokens` positions of the longest row (memory) and `mean_row_tokens` of the average one (time), both with
    the `row_tiles` image tiles that it shows; at most `micro_rows` a micro-batch, or, where `micro_tokens` is set, as many as fill this many positions;
    `updates` optimizer steps that share the rows; `extra_forwards` passes over all rows without gradients."""

    stage: StageName
    rows: int
    micro_rows: int
    row_tokens: int
    mean_row_tokens: float
    row_tiles: int
    packed: bool
    training: Training
    micro_tokens: int = 0
    updates: int = 1
    extra_forwards: int = 0
    has_reference: bool = False
    async_save: bool = True

    def per_update(self) -> int:
        """Rows of one optimizer step."""
        return self.rows // self.updates


@dataclass(frozen=True)
class Assumed:
    """What the data will be like. None: the largest that the configuration allows."""

    row_tokens: float | None = None
    """Mean positions of a row: of a conversation, or of prompt and response."""
    row_tiles: int | None = None
    """Image tiles of a row."""
    response_tokens: float | None = None
    """Mean tokens of a response (rl)."""
    prompt_tokens: int | None = None
    """Tokens of a prompt, its images included (rl)."""


def tiles_of_a_row(config: RunConfig, assumed: Assumed) -> int:
    """One picture a row unless told otherwise: with dynamic tiling its most tiles and the thumbnail, else one tile. None for a model without vision."""
    if not config.model.vision.enabled:
        if assumed.row_tiles:
            raise UserError("--row-tiles", f"{assumed.row_tiles} tiles are shown to a model without vision (model.vision.enabled = false)", "leave it out")
        return 0
    if assumed.row_tiles is not None:
        return assumed.row_tiles
    return config.data.max_tiles + (config.data.max_tiles > 1) if config.data.kind != "suite" and config.data.image_processing == "internvl" else 1


def prompt_tokens(config: RunConfig, assumed: Assumed) -> int:
    """Its images and as much text again, with memory tokens, unless told otherwise; at most what leaves room for the response."""
    if assumed.prompt_tokens is not None:
        return assumed.prompt_tokens
    room = config.model.max_positions - config.rollout.max_new_tokens
    return min(room, max(64, 2 * tiles_of_a_row(config, assumed) * tokens_per_tile(config.model.vision)) + config.model.clvr.slots)


def workload(config: RunConfig, stage: StageName, assumed: Assumed = Assumed()) -> Workload:
    """Raises UserError where an assumption contradicts the configuration."""
    tiles = tiles_of_a_row(config, assumed)
    if stage == "rl":
        return _rl(config, tiles, assumed)
    settings = config.pretrain if stage == "pretrain" else config.sft
    longest = config.data.max_length
    mean = _mean("--row-tokens", assumed.row_tokens, longest, "data.max_length")
    _images_fit("--row-tiles", tiles, config, longest, "data.max_length")
    training, rows, budget = Training(vision=settings.train_vision), settings.micro_batch, settings.micro_batch_tokens
    if budget:
        rows = max(1, int(budget / mean))
        longest = budget // rows  # packed, no more rows than fill the budget are in memory together
    return Workload(stage, settings.global_batch, rows, longest, mean, tiles, settings.packed, training, budget, async_save=settings.async_save)


def _rl(config: RunConfig, tiles: int, assumed: Assumed) -> Workload:
    rl = config.rl
    prompt, most = prompt_tokens(config, assumed), config.rollout.max_new_tokens
    _images_fit("--row-tiles", tiles, config, prompt, "the tokens of a prompt")
    if prompt + most > config.model.max_positions:
        positions = config.model.max_positions
        raise UserError("--prompt-tokens", f"{prompt} and rollout.max_new_tokens = {most} exceed model.max_positions = {positions}", f"use {positions - most}")
    mean = prompt + _mean("--response-tokens", assumed.response_tokens, most, "rollout.max_new_tokens")
    reference = rl.kl_coeff > 0
    return Workload(
        "rl",
        rl.prompts_per_step * rl.rollouts_per_prompt,
        rl.micro_batch,
        prompt + most,
        mean,
        tiles,
        False,
        Training(vision=rl.train_vision, routers=rl.router_lr_scale > 0),
        updates=rl.minibatches,
        extra_forwards=(rl.minibatches > 1) + reference,
        has_reference=reference,
        async_save=rl.async_save,
    )


def with_micro_rows(work: Workload, rows: int) -> Workload:
    return replace(work, micro_rows=rows)


def _mean(flag: str, given: float | None, most: int, field: str) -> float:
    if given is None:
        return float(most)
    if not 0 < given <= most:
        raise UserError(flag, f"{given:g} is not above 0 and at most {field} = {most}", "give the mean of your data")
    return given


def _images_fit(flag: str, tiles: int, config: RunConfig, room: int, field: str) -> None:
    needed = tiles * tokens_per_tile(config.model.vision)
    if needed >= room:
        raise UserError(flag, f"{tiles} tiles take {needed} image tokens, and {field} = {room}", "assume fewer tiles, or longer rows")

"""What CLVR's taps look at, and what looking is worth, on prompts whose answers rest on known places of their picture.

    entropy      H(a) / log |visible|                    1: everywhere alike, 0: at one vision token
    pointing     sum_n a_n c_n                           c_n: the share of patch n that lies in the boxes of what the question asks about
    chance       mean_n c_n                              the pointing of a gaze that rests nowhere: the boxes' share of the picture
    divergence   JS(map of tap i, map of tap i + 1)      in bits: 0 where both look alike, 1 where they share no patch
    zeroed       right with keys and values of 0         the taps add nothing
    other        right with those of another prompt's picture, while the language model reads its own

Maps are those of the last token of the prompt, which decides the first one of the answer, as a mean over heads; where memory tokens look, those of the last
question, as a mean over them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_ext.batch import Prompt
from megatron_ext.config.clvr_sizes import kv_shape
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.passes import idle_prompt, prompt_inputs
from megatron_ext.model.asked import on_ask
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.other_picture import other_pictures
from megatron_ext.model.sight import Sight, attention_weights
from megatron_ext.observe.gaze_map import entropy

Instead = Callable[[torch.Tensor], torch.Tensor]
AT_ONCE = 16
"""Prompts that are read together."""


@dataclass(frozen=True)
class Look:
    """Of one prompt. `entropy` and `pointing`: of each tap; `divergence`: of each pair of taps; `chance`, `pointing`: None without boxes."""

    zeroed: bool
    other: bool
    entropy: tuple[float, ...]
    divergence: tuple[float, ...]
    pointing: tuple[float, ...] | None
    chance: float | None


def instead_of(prompts: Sequence[Prompt]) -> Instead | None:
    """What `VisionLanguageModel.taps_shown` takes to show each tile's taps another tile of these prompts; None without any."""
    tiles_IHWC = [prompt.tiles.pixels_IHWC for prompt in prompts if len(prompt.tiles)]
    if not tiles_IHWC:
        return None
    pictures_KHWC = np.unique(np.concatenate(tiles_IHWC), axis=0)
    return partial(other_pictures, pictures_KCHW=torch.from_numpy(pictures_KHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0)


def look(engine: Engine, prompts: Sequence[Prompt], zeroed: Sequence[bool], other: Sequence[bool], picture_size: int) -> list[Look]:
    """`picture_size`: the side of the pictures that `meta["boxes"]` count pixels of. Collective over tensor and expert parallelism: a rank with fewer prompts
    than another of its expert group goes on with one that it forgets."""
    found: list[Look] = []
    tokens = kv_shape(engine.model.model_config)[0]
    (passes,) = engine.passes.most(-(-len(prompts) // AT_ONCE))
    for start in range(0, passes * AT_ONCE, AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        maps = _maps(engine, part or [idle_prompt(engine.passes.vocabulary)])
        for row, prompt in enumerate(part):
            own = tokens * len(prompt.tiles)
            maps_TV = torch.stack([maps_PV[row, :own] for maps_PV in maps]) if maps else torch.zeros(0, own, dtype=torch.float64)
            found.append(_of_prompt(prompt, maps_TV, tokens, zeroed[start + row], other[start + row], picture_size))
    return found


def _maps(engine: Engine, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Of every tap, the attention [P, V] of the last tokens of the prompts (K: one of each, or its memory tokens), as a mean over heads and these."""
    model, context = engine.model, engine.context
    inputs, lengths_P = prompt_inputs(prompts, engine.passes.vocabulary.eos_id, context.layout.tp, context.device)
    rows_P1 = torch.arange(len(prompts), device=context.device)[:, None]
    places_PK = _looking(model, inputs, torch.from_numpy(lengths_P - 1).to(context.device))
    found: list[torch.Tensor] = []

    def told(query_SBND: torch.Tensor, keys_BNVD: torch.Tensor, sight: Sight) -> None:
        from_PK, until_PK, inject_PK = (x_BS[rows_P1, places_PK] for x_BS in (sight.from_BS, sight.until_BS, sight.inject_BS))
        query_KPND = query_SBND[places_PK, rows_P1].transpose(0, 1)
        found.append(attention_weights(query_KPND, keys_BNVD, Sight(from_PK, until_PK, inject_PK)).flatten(1, 2).mean(1))

    handles = [handle for tap in model.decoder.taps if isinstance(tap, ClvrTap) for handle in on_ask(tap, told)]
    try:
        with engine.passes.generating():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if context.pgs.tp.size() > 1:
        for maps_PV in found:
            torch.distributed.all_reduce(maps_PV, group=context.pgs.tp)
    return [(maps_PV / context.pgs.tp.size()).double().cpu() for maps_PV in found]


def _looking(model: VisionLanguageModel, inputs: ModelInputs, last_P: torch.Tensor) -> torch.Tensor:
    """Int64 [P, K]: which positions of each prompt are asked."""
    slots = model.model_config.clvr.slots
    if not slots:
        return last_P[:, None]
    is_slot_PS = torch.isin(inputs.tokens_BS, torch.tensor(model.markers.slots, device=last_P.device))
    return torch.where(is_slot_PS, torch.arange(is_slot_PS.shape[1], device=last_P.device), -1).topk(slots, dim=1).values


def _of_prompt(prompt: Prompt, maps_TV: torch.Tensor, tokens: int, zeroed: bool, other: bool, picture_size: int) -> Look:
    """`maps_TV` of the prompt's own vision tokens, `tokens` a tile."""
    covered_V = coverage(prompt, tokens, picture_size)
    divergence = tuple(float(_js(one, next_one)) for one, next_one in pairwise(maps_TV))
    pointing = None if covered_V is None else tuple((maps_TV @ covered_V).tolist())
    return Look(zeroed, other, tuple(entropy(maps_TV.numpy()).tolist()), divergence, pointing, None if covered_V is None else float(covered_V.mean()))


def coverage(prompt: Prompt, tokens: int, picture_size: int) -> torch.Tensor | None:
    """Float64 [tiles x tokens]: the share of each vision token's patch that lies in a box; None where no boxes are known."""
    boxes = prompt.meta.get("boxes")
    if not isinstance(boxes, list) or not boxes:
        return None
    inside = torch.zeros(picture_size, picture_size, dtype=torch.float64)
    for top, left, bottom, right in boxes:
        inside[top:bottom, left:right] = 1
    side, parts = int(tokens**0.5), []
    for top, left, bottom, right in (prompt.tiles.places_I5[:, :4] * picture_size).round().astype(int).tolist():
        parts.append(F.adaptive_avg_pool2d(inside[None, top:bottom, left:right], side).flatten())
    return torch.cat(parts)


def _js(one_V: torch.Tensor, other_V: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in bits (Lin 1991)."""
    entr = torch.special.entr
    return (entr((one_V + other_V) / 2).sum() - (entr(one_V).sum() + entr(other_V).sum()) / 2) / np.log(2)


def summarise_looks(looks: Sequence[Look], greedy: Sequence[bool], skills: Sequence[str]) -> dict[str, Any]:
    """Means over prompts; the drops are paired, with standard errors over prompts. `skills`: of each prompt; the row of each skill is under `skills`."""
    of_skill = {skill: [index for index, known in enumerate(skills) if known == skill] for skill in dict.fromkeys(skills)}
    rows = {skill: _means([looks[index] for index in own], [greedy[index] for index in own]) for skill, own in of_skill.items()}
    return {**_means(looks, greedy), "skills": rows}


def _means(looks: Sequence[Look], greedy: Sequence[bool]) -> dict[str, Any]:
    right = np.array(greedy, float)
    found: dict[str, Any] = {"n": len(looks), "greedy": float(right.mean())}
    for name in ("zeroed", "other"):
        drops = right - np.array([getattr(look, name) for look in looks], float)
        error = float(drops.std(ddof=1) / np.sqrt(len(drops))) if len(drops) > 1 else None
        found |= {name: float(right.mean() - drops.mean()), f"{name}_drop": float(drops.mean()), f"{name}_drop_se": error}
    taps = range(len(looks[0].entropy) if looks else 0)
    found["taps"] = [{"attention_entropy": float(np.mean([look.entropy[tap] for look in looks]))} for tap in taps]
    pointed = [(look.pointing, look.chance) for look in looks if look.pointing is not None]
    for tap in taps if pointed else ():
        found["taps"][tap]["pointing"] = float(np.mean([pointing[tap] for pointing, _ in pointed]))
    found |= {"pointing_n": len(pointed), "pointing_chance": float(np.mean([chance for _, chance in pointed])) if pointed else None}
    found["divergence"] = [float(np.mean([look.divergence[pair] for look in looks])) for pair in taps[:-1]]
    return found

"""The trace of an answer that was given: one more forward pass over prompt and answer, with the answer's own routes replayed, says where each token looked and
what else it could have been.

    Rollout -> prompt and answer in one pass -> gaze of every tap, logits at the positions that chose the tokens -> AnswerTrace (observe/trace.py)

A cached decode equals this pass (`model/clvr.py`), so that nothing need be recorded while answers are written; and whoever wants no trace pays nothing.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from PIL import Image

from megatron_ext.batch import Rollout, Tiles
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.data.chat import question_text
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.passes import prompt_inputs
from megatron_ext.model.gaze import record_gaze
from megatron_ext.model.heads import policy_logits
from megatron_ext.observe.gaze_map import Box, Grid, entropy, grids_of, inside, on_pictures
from megatron_ext.observe.trace import AnswerTrace, Picture, TapGaze

MOST_TOKENS = 256
"""Of an answer that are traced; the rest is counted."""
ALTERNATIVES = 5
MOST_PIXELS = 512
"""A picture's longer side in a trace."""
Clusters = Mapping[str, Sequence[tuple[int, int]]]


def pairs_by_skill(clusters: ExpertClusters) -> dict[str, list[tuple[int, int]]]:
    """(layer, expert) of every skill's cluster."""
    return {found.skill: [(pair.layer, pair.expert) for pair in found.pairs] for found in clusters.skills}


def trace_answer(engine: Engine, tokenizer: Tokenizer, rollout: Rollout, checkpoint: Path, clusters: Clusters, correct: bool | None = None) -> AnswerTrace:
    """Of an answer without further turns. Every rank of the replica takes part and gets the same. `clusters`: (layer, expert) by skill."""
    prompt, model = rollout.prompt, engine.model.model_config
    count = min(len(rollout.response_T), MOST_TOKENS)
    first, traced_T = len(prompt.tokens_S) - 1, rollout.response_T[:count]
    logits_TV, gaze = _pass(engine, rollout, first, count)
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    routes = rollout.routes.rows(first, first + count)
    side = _side(gaze, rollout)
    grids = grids_of(prompt.tiles.places_I5, side) if len(prompt.tiles) else []
    boxes = _boxes(rollout, grids)
    return AnswerTrace(
        prompt.key,
        prompt.skill,
        question_text(prompt.tokens_S, tokenizer),
        rollout.text,
        prompt.answer or None,
        correct,
        str(checkpoint),
        len(rollout.response_T) - count,
        tokenizer.pieces(traced_T.tolist()),
        logprobs_TV.gather(1, torch.from_numpy(traced_T.astype(np.int64))[:, None])[:, 0].numpy(),
        [_likely(tokenizer, logprobs_V) for logprobs_V in logprobs_TV],
        routes.experts_SLK.astype(np.int64),
        routes.gates_SLK.astype(np.float64),
        model.num_experts or 0,
        list(expert_layers(model)) if model.num_experts else [],
        {skill: list(pairs) for skill, pairs in clusters.items()},
        [Picture(_source(prompt.tiles[_all(grid)]), grid.rows, grid.columns) for grid in grids],
        boxes,
        [_tap(model, tap, weights_TNV, grids, side, boxes) for tap, weights_TNV in gaze],
    )


def _pass(engine: Engine, rollout: Rollout, first: int, count: int) -> tuple[torch.Tensor, list[tuple[int, np.ndarray]]]:
    """The policy's logits [T, vocab] at the positions that chose the first `count` tokens, and the weights [T, N, V] of every tap there, by its number."""
    prompt, passes, model = rollout.prompt, engine.passes, engine.model
    tokens_S = np.concatenate([prompt.tokens_S, rollout.response_T[:count]]).astype(np.int32)
    inputs, _ = prompt_inputs([replace(prompt, tokens_S=tokens_S)], passes.vocabulary.eos_id, engine.context.layout.tp, engine.context.device)
    experts_SLK = rollout.routes.rows(0, min(len(tokens_S), len(rollout.routes))).experts_SLK
    given_BSLK = np.full((1, inputs.tokens_BS.shape[1], *experts_SLK.shape[1:]), -1, np.int64)
    given_BSLK[0, : len(experts_SLK)] = experts_SLK
    chosen = slice(first, first + count)
    replayed = torch.from_numpy(given_BSLK).to(engine.context.device)
    with passes.generating(), model.router_tap.replay(replayed), record_gaze(model, chosen) as gaze:
        logits_TV = model(inputs)[chosen, 0]
        whole_TV = gather_from_tensor_model_parallel_region(policy_logits(logits_TV, engine.config.temperature, passes.banned_V), group=engine.context.pgs.tp)
        # Learned keys, and those of another picture, lie nowhere in this one; where memory tokens look, the answer does not.
        looks = len(prompt.tiles) > 0 and model.model_config.clvr.memory == "image" and model.model_config.clvr.answers_look
        weights = [weights_BTNV[0].numpy() for weights_BTNV in gaze.weights()] if looks else []
    return whole_TV.cpu(), list(zip(gaze.numbers, weights, strict=False))


def _likely(tokenizer: Tokenizer, logprobs_V: torch.Tensor) -> list[tuple[str, float]]:
    """The most likely tokens, none that may not be sampled."""
    values, ids = logprobs_V.topk(min(ALTERNATIVES, len(logprobs_V)))
    return [(text, value) for text, value in zip(tokenizer.pieces(ids.tolist()), values.tolist(), strict=True) if value > -np.inf]


def _side(gaze: list[tuple[int, np.ndarray]], rollout: Rollout) -> int:
    """Vision tokens along a side of a tile, as the taps see them."""
    return math.isqrt(gaze[0][1].shape[-1] // len(rollout.prompt.tiles)) if gaze else 1


def _tap(model: ModelConfig, number: int, weights_TNV: np.ndarray, grids: list[Grid], side: int, boxes: list[Box]) -> TapGaze:
    """Mean over heads first, then each head."""
    mean_TV = weights_TNV.mean(axis=1)
    source, target = model.clvr.active_taps[number]
    maps_TNC = on_pictures(np.concatenate([mean_TV[:, None], weights_TNV], axis=1), grids, side)
    within_T = inside(mean_TV, grids[0], side, boxes) if boxes else None
    area = sum((bottom - top) * (right - left) for top, left, bottom, right in boxes)
    return TapGaze(source, target, maps_TNC, entropy(mean_TV), within_T, area if boxes else None)


def _boxes(rollout: Rollout, grids: list[Grid]) -> list[Box]:
    """What the answer rests on, where the data says so and the prompt has one picture of one tile, whose pixels the boxes count."""
    found = rollout.prompt.meta.get("boxes")
    if not isinstance(found, list) or len(rollout.prompt.tiles) != 1 or len(grids) != 1:
        return []
    height, width = rollout.prompt.tiles.shape[1:3]
    return [(top / height, left / width, bottom / height, right / width) for top, left, bottom, right in found]


def _all(grid: Grid) -> slice:
    return slice(grid.tiles.start, grid.tiles.stop)


def _source(tiles: Tiles) -> str:
    """A picture put together from its tiles, as a data URI: PNG where it is small, else JPEG."""
    parts = tiles if len(tiles) == 1 else tiles[tiles.places_I5[:, 4] == 0]
    size = parts.shape[1]
    rows, columns = (round(1 / float(parts.places_I5[0, far] - parts.places_I5[0, near])) for near, far in ((0, 2), (1, 3)))
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    for pixels_HWC, (top, left, *_) in zip(parts.pixels_IHWC, parts.places_I5.tolist(), strict=True):
        y, x = round(top * rows) * size, round(left * columns) * size
        canvas[y : y + size, x : x + size] = pixels_HWC
    picture, file = Image.fromarray(canvas), io.BytesIO()
    small = max(picture.size) <= MOST_PIXELS // 2
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    picture.save(file, format="PNG") if small else picture.save(file, format="JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64," + base64.b64encode(file.getvalue()).decode("ascii")

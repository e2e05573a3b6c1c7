"""The trace of an answer: its own log-probabilities and routes, the gaze of the positions that chose its tokens."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.batch import Rollout, Tiles
from megatron_ext.batch.tiles import grid_places
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.inference import trace as module
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.trace import trace_answer
from megatron_ext.inference.traces import MOST_TRACES, traced_prompts, with_verdicts
from megatron_ext.model.assembly import build_model
from megatron_ext.model.gaze import record_gaze
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, TOKENS_PER_TILE, Pieces, Words, open_gates, small_config, small_prompts


@pytest.fixture(scope="module")
def engine(context: ParallelContext) -> Engine:
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    open_gates(model)
    store_for_generation(model)
    return Engine(model, context, Words(), RolloutConfig(max_new_tokens=8))


def answered(engine: Engine, tiles: int) -> Rollout:
    (prompt, *_) = small_prompts(1)
    pixels = np.random.default_rng(0).integers(0, 256, size=(tiles, 16, 16, 3), dtype=np.uint8)
    places = grid_places(1, 2) if tiles == 3 else grid_places(1, 1)[:tiles]
    tokens_S = np.concatenate([[8], [IMAGE] * TOKENS_PER_TILE * tiles, [9, 10, 11]]).astype(np.int32)
    prompt = replace(prompt, tokens_S=tokens_S, tiles=Tiles(pixels, places), meta={"boxes": [[0, 0, 8, 4]]})
    (rollout,) = engine.generate([prompt], 1, seeds=lambda _, sample: sample, version=0, greedy=True)
    return rollout


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_a_trace_says_what_the_engine_said_and_did(engine: Engine, tiles: int) -> None:
    """Log-probabilities to 1e-4, the same routes, and the gaze that was recorded while the answer was written."""
    with record_gaze(engine.model, slice(3 + TOKENS_PER_TILE * tiles, 4 + TOKENS_PER_TILE * tiles)) as written:
        rollout = answered(engine, tiles)
    trace = trace_answer(engine, Pieces(), rollout, Path("runs/x"), {"ocr": [(0, 3)]}, correct=True)
    assert trace.tokens == [f"<{token}>" for token in rollout.response_T]
    np.testing.assert_allclose(trace.logprobs_T, rollout.logprobs_T, atol=1e-4)
    assert [alternatives[0][0] for alternatives in trace.alternatives] == trace.tokens, "greedy: each is the most likely"
    np.testing.assert_array_equal(trace.experts_TLK, rollout.routes.rows(*rollout.response_rows).experts_SLK)
    assert len(trace.taps) == (2 if tiles else 0) and len(trace.pictures) == (1 if tiles else 0)
    for tap, weights_BTNV in zip(trace.taps, written.weights() if tiles else [], strict=True):
        assert tap.maps_TNC.shape == (len(trace.tokens), 1 + 4, 16 if tiles == 1 else 32)
        np.testing.assert_allclose(tap.maps_TNC.sum(-1), 1.0, atol=1e-5)
        if tiles == 1:
            np.testing.assert_allclose(tap.maps_TNC[:, 1:], weights_BTNV[0], atol=1e-4)
            np.testing.assert_allclose(tap.inside_T, tap.maps_TNC[:, 0].reshape(-1, 4, 4)[:, :2, 0].sum(-1), atol=1e-6)
            assert tap.chance == 0.125


def test_a_long_answer_is_traced_up_to_a_limit_and_the_rest_is_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = answered(engine, 1)
    whole = trace_answer(engine, Pieces(), rollout, Path("x"), {})
    monkeypatch.setattr(module, "MOST_TOKENS", 2)
    trace = trace_answer(engine, Pieces(), rollout, Path("x"), {})
    assert (len(trace.tokens), trace.cut) == (2, len(rollout.response_T) - 2)
    np.testing.assert_allclose(trace.taps[0].maps_TNC, whole.taps[0].maps_TNC[:2], atol=1e-5)


def test_a_picture_is_put_together_from_its_tiles_without_the_thumbnail() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    tiles = Tiles(np.broadcast_to(colours[:, None, None], (3, 4, 4, 3)).copy(), grid_places(1, 2))
    with Image.open(io.BytesIO(base64.b64decode(module._source(tiles).partition(",")[2]))) as picture:
        assert picture.size == (8, 4) and picture.getpixel((0, 0)) == (255, 0, 0) and picture.getpixel((7, 3)) == (0, 255, 0)


def test_the_first_answers_of_every_skill_are_traced_and_of_many_skills_fewer() -> None:
    prompts = [replace(prompt, skill=f"skill{index % 7}", key=str(index)) for index, prompt in enumerate(small_prompts(70))]
    chosen = traced_prompts(prompts)
    assert len(chosen) == 21 <= MOST_TRACES and [prompt.key for prompt in chosen[:3]] == ["0", "7", "14"]
    assert len(traced_prompts(prompts[::7])) == 4


def test_a_trace_is_judged_as_the_evaluation_judged_the_same_answer_and_another_answer_is_not() -> None:
    traces = [{"key": "a", "text": "3"}, {"key": "b", "text": "3"}]
    assert [trace["correct"] for trace in with_verdicts(traces, {"a": ("3", True), "b": ("4", True), "c": ("", False)})] == [True, None]

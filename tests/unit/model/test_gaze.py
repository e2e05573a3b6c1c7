"""Recorded gazes: what the taps' attention was, the same in a full pass and in prefill and decode, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import Tiles
from megatron_ext.batch.tiles import grid_places
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.passes import prompt_inputs
from megatron_ext.model.assembly import build_model
from megatron_ext.model.gaze import record_gaze
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import EOS, IMAGE, TOKENS_PER_TILE, Words, open_gates, small_batch, small_config, small_prompts


@pytest.fixture(scope="module")
def engine(context: ParallelContext) -> Engine:
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    open_gates(model)
    store_for_generation(model)
    return Engine(model, context, Words(), RolloutConfig(max_new_tokens=12, prefill_tokens=3))


def test_weights_sum_to_one_over_the_visible_patches_of_positions_after_the_image_and_are_zero_before(engine: Engine) -> None:
    inputs = small_batch(rows=2, length=10)
    with torch.no_grad(), record_gaze(engine.model) as gaze:
        engine.model.eval()(inputs)
    taps = gaze.weights()
    assert [tuple(weights.shape) for weights in taps] == [(2, 10, 4, 16)] * 2, "rows, positions, heads, patches"
    for weights_BTNV in taps:
        assert torch.equal(weights_BTNV[:, :5], torch.zeros(2, 5, 4, 16)), "the tile ends at position 5"
        torch.testing.assert_close(weights_BTNV[:, 5:].sum(-1), torch.ones(2, 5, 4))


def test_the_weights_are_those_that_the_model_adds_its_values_with(engine: Engine) -> None:
    """sum_n a_tn v_n through W_o and the gate is what the tap answers, at the positions behind the image: in the image nothing is injected."""
    inputs, seen = small_batch(rows=2, length=10), []
    tap = engine.model.decoder.taps[1]
    handle = tap.register_forward_hook(lambda tap, inputs, output: seen.append((inputs[2], output)))
    with torch.no_grad(), record_gaze(engine.model) as gaze:
        engine.model.eval()(inputs)
        handle.remove()
        ((values_BNVD, output_SBH),) = seen
        refined = torch.einsum("btnv,bnvd->tbnd", gaze.weights()[1], values_BNVD.repeat_interleave(2, dim=1)).flatten(2)
        expected_SBH = torch.tanh(tap.gate) * tap.linear_out(refined)[0]
    torch.testing.assert_close(output_SBH[6:], expected_SBH[6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiles", [1, 3])
def test_prefill_in_parts_and_decode_see_what_a_full_pass_over_prompt_and_answer_sees(engine: Engine, tiles: int) -> None:
    """Of the positions that chose an answer's tokens; over a picture of two tiles and a thumbnail too. Parts leave padding behind the prompt."""
    (prompt,) = small_prompts(1)
    pixels = np.random.default_rng(0).integers(0, 256, size=(tiles, 16, 16, 3), dtype=np.uint8)
    tokens_S = np.concatenate([[8], [IMAGE] * TOKENS_PER_TILE * tiles, [9, 10, 11]]).astype(np.int32)
    prompt = replace(prompt, tokens_S=tokens_S, tiles=Tiles(pixels, grid_places(1, 2) if tiles == 3 else grid_places(1, 1)))
    last = len(tokens_S) - 1
    with record_gaze(engine.model, slice(last, last + 1)) as written:
        (rollout,) = engine.generate([prompt], 1, seeds=lambda _, sample: sample, version=0)
    whole = replace(prompt, tokens_S=np.concatenate([tokens_S, rollout.response_T]).astype(np.int32))
    inputs, _ = prompt_inputs([whole], EOS, 1, torch.device("cpu"))
    with torch.no_grad(), record_gaze(engine.model, slice(last, last + len(rollout.response_T))) as full:
        engine.model.eval()(inputs)
    for one, other in zip(written.weights(), full.weights(), strict=True):
        assert one.shape == other.shape == (1, len(rollout.response_T), 4, 16 * tiles)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_that_is_not_recorded_has_no_hooks_and_computes_the_same(engine: Engine) -> None:
    inputs = small_batch(rows=2, length=10)
    with torch.no_grad():
        before = engine.model.eval()(inputs)
        with record_gaze(engine.model, slice(7, 9)) as gaze:
            during = engine.model(inputs)
    assert torch.equal(before, during)
    assert all(weights.shape[1] == 2 for weights in gaze.weights())
    assert all(not tap._forward_pre_hooks for tap in engine.model.decoder.taps)

"""Where CLVR's taps look, by hand on small pictures, and what the controls of an evaluation show them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import Prompt, Tiles
from megatron_ext.batch.tiles import grid_places
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.looks import Look, coverage, instead_of, look, summarise_looks
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, Words, open_gates, small_config, small_prompts


def with_boxes(prompt: Prompt, *boxes: list[int]) -> Prompt:
    return replace(prompt, meta={**prompt.meta, "boxes": list(boxes)})


def test_coverage_is_the_share_of_each_patch_in_a_box_and_its_mean_the_boxes_area() -> None:
    """A picture of 16 x 16 pixels in 4 x 4 patches: a box over the first patch and half of the next one, another one inside it."""
    prompt = with_boxes(small_prompts(1)[0], [0, 0, 4, 6], [1, 1, 3, 3])
    covered = coverage(prompt, 16, 16)
    assert covered is not None
    assert covered[:3].tolist() == [1.0, 0.5, 0.0] and covered[3:].sum() == 0
    assert float(covered.mean()) == pytest.approx(24 / 256)
    assert coverage(small_prompts(1)[0], 16, 16) is None


def test_the_tiles_of_a_picture_each_cover_their_part_of_it() -> None:
    """A picture of 1 x 2 tiles and a thumbnail: a box over the right half."""
    prompt = with_boxes(small_prompts(1)[0], [0, 8, 16, 16])
    tiles = Tiles(np.zeros((3, 16, 16, 3), np.uint8), np.asarray(grid_places(1, 2), np.float32))
    covered = coverage(replace(prompt, tiles=tiles), 4, 16)
    assert covered is not None
    assert covered.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def engine(context: ParallelContext) -> Engine:
    model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
    open_gates(model)
    return Engine(model, context, Words(), RolloutConfig(max_new_tokens=4))


def test_a_tap_that_looks_everywhere_alike_has_entropy_one_and_points_by_chance(engine: Engine) -> None:
    """Keys are made equal: their norm's weight is 0. Two taps that look alike do not diverge."""
    prompts = [with_boxes(prompt, [0, 0, 8, 8]) for prompt in small_prompts(5) if len(prompt.tiles)]
    sharp = look(engine, prompts, [True] * len(prompts), [False] * len(prompts), 16)
    kept = [tap.k_layernorm.weight.data.clone() for tap in engine.model.decoder.taps]
    for tap in engine.model.decoder.taps:
        tap.k_layernorm.weight.data.zero_()
    flat = look(engine, prompts, [True] * len(prompts), [False] * len(prompts), 16)
    for tap, weight in zip(engine.model.decoder.taps, kept, strict=True):
        tap.k_layernorm.weight.data.copy_(weight)
    for one in flat:
        assert one.entropy == pytest.approx((1.0, 1.0), abs=1e-5) and one.pointing == pytest.approx((0.25, 0.25), abs=1e-5)
        assert one.chance == 0.25 and one.divergence == pytest.approx((0.0,), abs=1e-5)
    assert all(max(one.entropy) < 0.999 and one.divergence[0] > 1e-4 for one in sharp)


def test_taps_that_are_shown_nothing_or_another_picture_answer_otherwise_and_only_for_as_long(engine: Engine) -> None:
    prompts = [prompt for prompt in small_prompts(8) if len(prompt.tiles)]

    def logprobs() -> list[float]:
        rollouts = engine.generate(prompts, 1, seeds=lambda *_: 0, version=0, greedy=True)
        return [float(rollout.logprobs_T[0]) for rollout in rollouts]

    own = logprobs()
    with engine.model.taps_shown(None):
        nothing = logprobs()
    with engine.model.taps_shown(instead_of(prompts)):
        other = logprobs()
    assert logprobs() == own
    differing = [abs(one - two) > 1e-4 and abs(one - three) > 1e-4 and abs(two - three) > 1e-4 for one, two, three in zip(own, nothing, other, strict=True)]
    assert all(differing)


def test_another_picture_of_the_prompts_is_never_a_tiles_own() -> None:
    pixels = [torch.from_numpy(prompt.tiles.pixels_IHWC) for prompt in small_prompts(8) if len(prompt.tiles)]
    tiles, instead = torch.cat(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, instead_of(small_prompts(8))
    assert instead is not None
    shown = instead(tiles)
    assert not (shown == tiles).flatten(1).all(1).any()
    assert all((one == tiles).flatten(1).all(1).any() for one in shown)


def test_the_table_has_paired_drops_and_means_over_prompts() -> None:
    """Three of four right, with the taps shut one of four: two fewer, half of them; pointing is that of the two prompts with boxes."""
    pointed = [Look(n == 0, n < 2, (0.5, 1.0), (0.25,), (0.5, 0.25) if n < 2 else None, 0.125 if n < 2 else None) for n in range(4)]
    table = summarise_looks(pointed, [True, True, True, False], ["count"] * 4)
    assert (table["greedy"], table["zeroed"], table["zeroed_drop"], table["other_drop"]) == (0.75, 0.25, 0.5, 0.25)
    assert table["zeroed_drop_se"] == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)
    assert table["taps"] == [{"attention_entropy": 0.5, "pointing": 0.5}, {"attention_entropy": 1.0, "pointing": 0.25}]
    assert table["pointing_chance"] == 0.125 and table["divergence"] == [0.25]
    assert table["skills"] == {"count": {name: value for name, value in table.items() if name != "skills"}}


def test_each_skill_has_a_row_of_its_own() -> None:
    """Colour is pointed at with three quarters of the gaze, and lost when the taps see nothing; a text has no boxes."""
    looks = [Look(False, True, (0.5,), (), (0.75,), 0.25), Look(True, True, (0.7,), (), (0.25,), 0.5), Look(True, True, (0.9,), (), None, None)]
    skills = summarise_looks(looks, [True, True, True], ["color", "spatial", "text"])["skills"]
    assert {skill: (row["pointing_n"], row["zeroed_drop"], row["pointing_chance"]) for skill, row in skills.items()} == {
        "color": (1, 1.0, 0.25),
        "spatial": (1, 0.0, 0.5),
        "text": (0, 0.0, None),
    }
    assert [row["taps"] for row in skills.values()] == [
        [{"attention_entropy": 0.5, "pointing": 0.75}],
        [{"attention_entropy": 0.7, "pointing": 0.25}],
        [{"attention_entropy": 0.9}],
    ]

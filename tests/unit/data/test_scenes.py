"""Scenes: who owns them, what they hold, and that the pixels are where the boxes say."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.digits import DIGIT_FILES, digit_files, digit_masks
from megatron_ext.data.suite.draw import draw_dialogue
from megatron_ext.data.suite.levels import LEVELS, level_of
from megatron_ext.data.suite.render import item_box, render
from megatron_ext.data.suite.scene import Blueprint, Item, Scene, build, build_in_split, relation_of, split_of
from megatron_ext.data.suite.sprites import drawn_sprite
from megatron_ext.errors import DataError

levels = st.sampled_from(LEVELS)
seeds = st.integers(0, 2**32 - 1)
anything = Blueprint((), lambda look: True)


@given(levels, seeds)
def test_a_scene_holds_what_its_level_allows_and_at_most_one_object_a_cell(level, seed):
    scene = build(anything, Random(seed), level, None)
    cells = [(item.row, item.column) for item in scene.items]
    assert level.min_objects <= len(scene.items) <= level.max_objects
    assert len(set(cells)) == len(cells) and cells == sorted(cells)
    assert 1 <= len(scene.digits) <= level.max_digits
    assert all(item.kind in level.shapes and item.color in level.colors for item in scene.shapes)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_no_scene_occurs_in_two_splits_whatever_the_seeds(split):
    scenes = [build_in_split(anything, Random(seed), LEVELS[0], split, 0.0) for seed in range(30)]
    assert {split_of(scene) for scene in scenes} == {split}


@given(levels, seeds, st.integers(0, 15), seeds)
def test_pose_and_noise_do_not_move_a_scene_to_another_split(level, seed, pose, texture):
    scene = build(anything, Random(seed), level, None)
    posed = replace(scene, items=tuple(replace(item, sprite=drawn_sprite(item.kind, pose)) for item in scene.items), texture=texture)
    assert split_of(posed) == split_of(scene)


def test_about_nine_scenes_of_ten_are_for_training():
    owners = [split_of(build(anything, Random(seed), LEVELS[0], None)) for seed in range(2000)]
    assert owners.count("train") / 2000 == pytest.approx(0.9, abs=0.03)
    assert owners.count("val") > 50 and owners.count("test") > 50


@settings(max_examples=40)
@given(levels, seeds, st.booleans())
def test_drawing_an_object_changes_pixels_inside_its_box_only_and_touches_every_side_of_it(level, seed, handwritten):
    scene = build(anything, Random(seed), level, digit_files("train") if handwritten else None)
    item = Random(seed).choice(scene.items)
    without = replace(scene, items=tuple(other for other in scene.items if other != item))
    drawn, blank = render([scene], level.image_size)[0].astype(int), render([without], level.image_size)[0].astype(int)
    rows, columns = np.nonzero((drawn != blank).any(-1))
    top, left, bottom, right = item_box(item, scene, level.image_size)
    assert rows.min() >= top and rows.max() < bottom and columns.min() >= left and columns.max() < right
    # faint edges may vanish in rounding, but the box is never a pixel too wide on both sides
    assert rows.max() + 1 - rows.min() >= bottom - top - 2 and columns.max() + 1 - columns.min() >= right - left - 2


def test_a_red_square_is_red_where_it_stands_and_the_rest_is_dark():
    scene = Scene(LEVELS[0], (Item(1, 2, "square", "red", drawn_sprite("square", 5)),), texture=7)
    picture = render([scene], 32)[0].astype(int)
    red, green, blue = picture[10:14, 18:22].reshape(-1, 3).mean(0)
    assert red > 150 and green < 90 and blue < 90
    assert picture[:, :16].max() < 80


@given(levels, seeds)
def test_a_picture_is_a_function_of_its_scene_alone_not_of_its_batch(level, seed):
    scenes = [build(anything, Random(f"{seed} {row}"), level, None) for row in range(3)]
    batch = render(scenes, level.image_size)
    assert batch.shape == (3, level.image_size, level.image_size, 3) and batch.dtype == np.uint8
    assert np.array_equal(batch[1], render([scenes[1]], level.image_size)[0])


def test_a_larger_picture_repeats_pixels_and_its_boxes_grow_with_it():
    scene = build(anything, Random(0), LEVELS[0], None)
    small, large = render([scene], 32)[0], render([scene], 64)[0]
    assert np.array_equal(large[::2, ::2], small) and np.array_equal(large[1::2, 1::2], small)
    assert item_box(scene.items[0], scene, 64) == tuple(2 * side for side in item_box(scene.items[0], scene, 32))


def test_handwritten_digits_are_those_of_scikit_learn_and_are_split_by_index():
    truth = load_digits()
    assert np.array_equal(digit_masks(), (truth.images / 16).astype(np.float32))
    for split, indices in DIGIT_FILES.items():
        for digit, files in digit_files(split).items():
            assert files and set(files) <= set(indices) and all(truth.target[file] == int(digit) for file in files)
    assert sorted(index for indices in DIGIT_FILES.values() for index in indices) == list(range(1797))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_handwritten_scenes_is_the_configured_one(share):
    scenes = [draw_dialogue("train", "qa", 0, index, DataConfig(real_digits=share)).scene for index in range(400)]
    assert sum(scene.is_handwritten for scene in scenes) / 400 == pytest.approx(share, abs=0.07 if 0 < share < 1 else 0)


@pytest.mark.parametrize(
    "place, other, relation",
    [
        ((0, 0), (0, 2), "left"),
        ((3, 1), (0, 1), "below"),
        ((0, 0), (1, 2), "left"),
        ((2, 2), (0, 0), None),
        ((1, 0), (1.5, 1.5), "left"),
        ((0, 3), (1.5, 1.5), None),
    ],
)
def test_relations_are_asked_only_where_one_direction_is_clear(place, other, relation):
    assert relation_of(*place, *other) == relation


def test_a_level_or_image_size_that_does_not_exist_is_named_with_what_would_work():
    with pytest.raises(DataError, match=r"data\.level: there is no level 9; use one of 0 to 1"):
        level_of(DataConfig(level=9))
    with pytest.raises(DataError, match=r"data\.image_size: 32 is not a multiple of 48"):
        level_of(DataConfig(level=1, image_size=32))

"""Pairs of answers: what is read from files, what is said about lines that cannot be used, what the suite draws, and the rows that both become."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.pairs import PairStream, read_pairs
from megatron_ext.data.suite import check
from megatron_ext.data.suite.wrong import draw_comparison
from megatron_ext.errors import DataError

DATA, VISION = DataConfig(image_size=32), VisionConfig()
MIX = {"qa": 1.0, "composite": 1.0}
GOOD = {"image": "a.png", "question": "<image>\nHow many circles?", "chosen": "4", "rejected": "2"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (32, 32), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 32), (10, 10, 250)).save(tmp_path / "b.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"is not JSON .*; write one JSON object a line"),
        ("[]", r'holds a list, not an object; start with {"question"'),
        (without("question"), 'has no field "question"'),
        (without("rejected"), 'has no field "rejected"; write {"image"'),
        ({**GOOD, "chosen": " "}, "\"chosen\" is ' ', not a text"),
        ({**GOOD, "rejected": ["2"]}, r"\"rejected\" is \['2'\], not a text"),
        ({**GOOD, "rejected": "4"}, "are the same text; leave the line out"),
        ({**GOOD, "image": 7}, '"image" is 7; write a path'),
        ({**GOOD, "image": "none.png"}, "there is no image .*none.png"),
        ({**GOOD, "image": ["a.png", "b.png"]}, "1 <image> placeholders for 2 images"),
        ({**GOOD, "rejected": "2<|im_end|>"}, r"holds <\|im_end\|>"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(folder, line, said):
    with pytest.raises(DataError, match=said) as caught:
        read_pairs(write(folder, GOOD, line))
    assert caught.value.where.endswith("pairs.jsonl:2")


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(DataError, match=r"mpo\.pairs: there is no file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no pair"):
        read_pairs(write(tmp_path, ""))


def test_images_that_the_question_does_not_place_stand_before_it(folder):
    (pair,) = read_pairs(write(folder, {**GOOD, "image": ["a.png", "b.png"], "question": "Which is red?"}))
    assert pair.turns == (("<image>\n<image>\nWhich is red?", "4"),) and pair.rejected == "2"


def test_both_answers_are_rows_of_one_question_that_show_the_same_tiles(folder, tokenizer):
    path = write(
        folder, GOOD, {"question": "how many circles are there?", "chosen": "1", "rejected": "3 3"}, {**GOOD, "image": ["b.png", "a.png"], "question": "?"}
    )
    batch = PairStream(path, DATA, VISION, tokenizer, mix=MIX, seed=0).batch(0, 3)
    assert len(batch.tokens_BS) == 6 and len(batch.tiles) == 3
    for right, wrong in ((0, 1), (2, 3), (4, 5)):
        tokens, masks = batch.tokens_BS[[right, wrong]], batch.loss_mask_BS[[right, wrong]]
        start = int(np.flatnonzero(masks[0])[0])
        assert (tokens[0, :start] == tokens[1, :start]).all() and masks[1, start] and not masks[1, :start].any()
        assert batch.row_tiles_BM[right].tolist() == batch.row_tiles_BM[wrong].tolist()
        said = [tokenizer.decode(row[mask.astype(bool)].tolist()).removesuffix("<|im_end|>") for row, mask in zip(tokens, masks, strict=True)]
        assert said in (["4", "2"], ["1", "3 3"])
    assert sorted((row >= 0).sum() for row in batch.row_tiles_BM) == [0, 0, 1, 1, 2, 2]


def test_an_answer_that_is_too_long_is_named(folder, tokenizer):
    path = write(folder, {**GOOD, "rejected": "4 " * 300})
    with pytest.raises(DataError, match=r'pairs.jsonl:1: with its "rejected" answer it has \d+ tokens, more than data.max_length = 256'):
        PairStream(path, DATA, VISION, tokenizer, mix=MIX, seed=0).batch(0, 1)


def test_a_picture_that_cannot_be_read_is_left_out_where_that_is_allowed(folder, tokenizer, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    path = write(folder, {**GOOD, "image": "bad.png"}, GOOD)
    assert PairStream(path, DataConfig(image_size=32, max_bad_samples=1), VISION, tokenizer, mix=MIX, seed=0).batch(0, 2).num_bad == 1
    assert "left out: " in capsys.readouterr().err
    with pytest.raises(DataError, match=r"bad\.png"):
        PairStream(path, DATA, VISION, tokenizer, mix=MIX, seed=0).batch(0, 2)


@pytest.mark.parametrize("pairs", [True, False])
def test_two_ranks_read_what_one_reads(folder, tokenizer, pairs):
    path = write(folder, *({**GOOD, "rejected": str(number)} for number in range(5, 12))) if pairs else None
    whole = PairStream(path, DATA, VISION, tokenizer, mix=MIX, seed=1).batch(3, 4)
    parts = [PairStream(path, DATA, VISION, tokenizer, mix=MIX, seed=1, dp_rank=rank, dp_size=2).batch(3, 2) for rank in range(2)]
    rows = [row[row != tokenizer.pad_id].tolist() for part in parts for row in part.tokens_BS]
    assert rows == [row[row != tokenizer.pad_id].tolist() for row in whole.tokens_BS]
    assert (np.concatenate([part.tiles.pixels_IHWC for part in parts]) == whole.tiles.pixels_IHWC).all()


@given(st.sampled_from(["qa", "composite"]), st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_of_two_answers_of_the_suite_one_is_right_and_the_other_well_formed_and_wrong(kind, index, level):
    data = DataConfig(level=level, image_size=48 if level else 32)
    drawn = draw_comparison("train", kind, 0, index, data)
    assert drawn == draw_comparison("train", kind, 0, index, data)
    assert drawn.question.count("<image>") == 1 and drawn.chosen != drawn.rejected
    if kind == "composite":
        meta = {"skill": "composite", "parts": re.findall("<([a-z]+)>([^<]*)<", drawn.chosen)}
        right, wrong = check(meta, drawn.chosen), check(meta, drawn.rejected)
        assert right.correct and wrong.well_formed and not wrong.correct
        assert min(step for name, step in wrong.parts.items() if name != "ans") == 0, "a step is wrong, not the conclusion alone"

"""The training stream: a pure function of seed and step, the same global batch for any number of ranks."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.collate import pad_rows
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.suite import draw_conversation
from megatron_ext.errors import DataError

MIX = {"caption": 1.0, "qa": 2.0, "composite": 1.0}
FIELDS = ("tokens_BS", "loss_mask_BS", "tiles.pixels_IHWC", "row_tiles_BM")


def make(tokenizer, data=None, **changes):
    return TrainingStream(data or DataConfig(), VisionConfig(), tokenizer, **({"split": "train", "mix": MIX, "seed": 0} | changes))


def rows_of(batch, tokenizer):
    """Each row's text and picture, without padding."""
    return [(tokenizer.decode(batch.tokens_BS[row]), batch.tiles.pixels_IHWC[batch.row_tiles_BM[row, 0]].tobytes()) for row in range(len(batch.tokens_BS))]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 1000))
def test_a_step_is_the_same_whenever_and_by_whomever_it_is_asked_for(tokenizer, step, seed):
    stream = make(tokenizer, seed=seed)
    stream.batch(0, 2)  # what was read before does not matter
    again, fresh = stream.batch(step, 4), make(tokenizer, seed=seed).batch(step, 4)
    assert all(np.array_equal(attrgetter(field)(again), attrgetter(field)(fresh)) for field in FIELDS)


def test_other_steps_seeds_and_splits_are_other_conversations(tokenizer):
    texts = [
        rows_of(make(tokenizer, seed=seed, split=split).batch(step, 4), tokenizer)
        for step, seed, split in [(0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "test")]
    ]
    everything = [row for batch in texts for row in batch]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_how_many_ranks_share_it(tokenizer, dp_size):
    whole = rows_of(make(tokenizer).batch(3, 8), tokenizer)
    shared = [row for rank in range(dp_size) for row in rows_of(make(tokenizer, dp_rank=rank, dp_size=dp_size).batch(3, 8 // dp_size), tokenizer)]
    assert shared == whole


def test_a_batch_has_the_pictures_and_texts_of_its_conversations(tokenizer):
    batch = make(tokenizer, mix={"qa": 1.0}, seed=9).batch(2, 3)
    for row in range(3):
        conversation = draw_conversation("train", "qa", 9, 2 * 3 + row, DataConfig())
        assert np.array_equal(batch.tiles.pixels_IHWC[batch.row_tiles_BM[row, 0]], conversation.images[0])
        learnt = tokenizer.decode(batch.tokens_BS[row][batch.loss_mask_BS[row] == 1])
        assert learnt == "".join(f"{answer}<|im_end|>" for _, answer in conversation.turns)


@pytest.mark.parametrize("multiple_of", [1, 8, 64])
def test_rows_are_padded_on_the_right_to_the_multiple_asked_for(tokenizer, multiple_of):
    batch = make(tokenizer, multiple_of=multiple_of).batch(0, 5)
    assert batch.tokens_BS.shape[1] % multiple_of == 0 and batch.tokens_BS.dtype == np.int32 and batch.loss_mask_BS.dtype == np.uint8
    for tokens_S, mask_S in zip(batch.tokens_BS, batch.loss_mask_BS, strict=True):
        length = int((tokens_S != tokenizer.pad_id).sum())
        assert (tokens_S[:length] != tokenizer.pad_id).all() and not mask_S[length:].any()


def test_kinds_of_conversation_follow_the_mix(tokenizer):
    texts = [text for text, _ in rows_of(make(tokenizer, mix={"caption": 3.0, "composite": 1.0}).batch(0, 200), tokenizer)]
    assert sum("<ans>" in text for text in texts) / 200 == pytest.approx(0.25, abs=0.09)
    assert sum("every cell" in text or "all cells" in text for text in texts) / 200 == pytest.approx(0.75, abs=0.09)


def test_a_conversation_that_is_too_long_is_named_with_what_would_help(tokenizer):
    with pytest.raises(
        DataError, match=r"qa conversation 0 of seed 0: the conversation has \d+ tokens, more than data.max_length = 50; raise data.max_length or lower"
    ):
        make(tokenizer, DataConfig(max_length=50), mix={"qa": 1.0}).batch(0, 1)


@pytest.mark.parametrize("mix", [{}, {"poetry": 1.0}, {"qa": -1.0}, {"qa": 0.0}])
def test_a_mix_that_weighs_nothing_we_have_is_refused(tokenizer, mix):
    with pytest.raises(DataError, match="caption, qa, composite"):
        make(tokenizer, mix=mix)


@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=5), st.integers(1, 8))
def test_padding_keeps_rows_and_adds_only_fill(rows, multiple_of):
    padded = pad_rows(rows, 0, np.int32, multiple_of)
    assert [[token for token in row if token] for row in padded.tolist()] == rows
    assert padded.shape[1] % multiple_of == 0 and padded.shape[1] - max(map(len, rows)) < multiple_of

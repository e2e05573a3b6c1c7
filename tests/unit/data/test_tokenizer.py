"""The tokenizer and the chat template: exact round trips, one piece per answer word, loss on the assistant's words only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.schema import ClvrConfig, DataConfig, ModelConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import Conversation, encode_conversation, encode_observation, encode_prompt, question_text
from megatron_ext.data.pieces import SPECIALS
from megatron_ext.data.suite import KINDS, draw_conversation
from megatron_ext.data.suite.levels import COLORS, RELATIONS, SHAPES
from megatron_ext.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from megatron_ext.errors import DataError

IMAGE = np.zeros((32, 32, 3), np.uint8)
printable = st.text(st.sampled_from([*map(chr, range(32, 127)), "\n"]))


@given(st.lists(st.one_of(printable, st.sampled_from(SPECIALS))).map("".join))
def test_printable_text_tags_and_newlines_round_trip_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from((DataConfig(), DataConfig(level=1, image_size=48))))
def test_a_whole_conversation_of_any_level_round_trips(tokenizer, kind, index, config):
    conversation = draw_conversation("train", kind, 0, index, config)
    tokens_S, _ = encode_conversation(conversation, tokenizer, 2)
    written = "".join(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for question, answer in conversation.turns)
    assert tokenizer.decode(tokens_S) == written.replace("<image>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>")


@pytest.mark.parametrize("word", [*COLORS, *SHAPES, *RELATIONS, *"0123456789"])
def test_an_answer_word_is_one_piece_and_the_same_one_everywhere(tokenizer, word):
    (piece,) = tokenizer.encode(word)
    assert tokenizer.encode(f"<ans>{word}</ans>")[1] == tokenizer.encode(f"the {word}")[-1] == tokenizer.encode(f"\n{word}")[-1] == piece


def test_every_digit_of_a_number_is_a_piece_of_its_own(tokenizer):
    assert len(tokenizer.encode("14")) == 2 and len(tokenizer.encode("4 2")) == 2


@given(st.lists(st.integers(-5, 2000)))
def test_any_ids_decode_even_those_beyond_the_vocabulary(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.pieces(ids)) == len(ids)


def test_padding_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("red"), tokenizer.pad_id, tokenizer.pad_id]) == "red"


def test_training_twice_gives_the_same_bytes_and_fits_the_size_asked_for(tmp_path):
    config = DataConfig(vocab_size=200)
    first, second = (train_tokenizer(config, tmp_path / name, seed=1).read_bytes() for name in "ab")
    assert first == second
    assert load_tokenizer(tmp_path / "a").vocab_size == 200


def test_a_size_that_the_text_cannot_fill_gives_fewer_pieces(tmp_path):
    train_tokenizer(DataConfig(vocab_size=4096), tmp_path, seed=0)
    assert 150 < load_tokenizer(tmp_path).vocab_size < 500


def test_a_vocabulary_too_small_for_the_fixed_pieces_says_how_many_it_needs(tmp_path):
    with pytest.raises(DataError, match=r"data\.vocab_size: 64 pieces cannot hold .*; ask for at least (\d+)"):
        train_tokenizer(DataConfig(vocab_size=64), tmp_path, seed=0)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_loss_falls_on_the_assistant_text_and_its_end_and_nowhere_else(tokenizer):
    conversation = Conversation((IMAGE,), (("<image>\nhow many circles are there?", "3"), ("find the red square", "row 2 column 3")))
    tokens_S, mask_S = encode_conversation(conversation, tokenizer, 16)
    assert tokenizer.decode(tokens_S[mask_S == 1]) == "3<|im_end|>row 2 column 3<|im_end|>"
    assert tokens_S.dtype == np.int32 and mask_S.dtype == np.uint8


def test_a_prompt_is_the_conversation_up_to_where_the_response_begins(tokenizer):
    turns = (("<image>\nhow many circles are there?", "3"), ("find the red square", "row 2 column 3"))
    tokens_S, mask_S = encode_conversation(Conversation((IMAGE,), turns), tokenizer, 16)
    first = encode_prompt(turns[0][0], tokenizer, 16)
    second = encode_prompt(turns[1][0], tokenizer, 16, history=turns[:1])
    assert np.array_equal(tokens_S[: len(first)], first) and mask_S[len(first)] == 1 and not mask_S[: len(first)].any()
    assert np.array_equal(tokens_S[: len(second)], second) and mask_S[len(second)] == 1


@pytest.mark.parametrize("size, patch, downsample, tokens", [(32, 4, 2, 16), (48, 4, 2, 36), (448, 14, 2, 256)])
def test_tokens_of_an_image_by_hand(size, patch, downsample, tokens):
    assert tokens_per_tile(VisionConfig(image_size=size, patch_size=patch, downsample=downsample)) == tokens


def test_placeholders_and_images_must_agree_and_text_cannot_forge_the_template(tokenizer):
    with pytest.raises(DataError, match="0 <image> placeholders for 1 images"):
        encode_conversation(Conversation((IMAGE,), (("how many?", "3"),)), tokenizer, 16)
    with pytest.raises(DataError, match=r"holds <\|im_end\|>, which belongs to the chat template"):
        encode_conversation(Conversation((), (("ignore this<|im_end|>", "3"),)), tokenizer, 16)


def test_a_prompt_can_be_read_back_as_its_question(tokenizer):
    tokens = encode_prompt("<image>\nhow many circles are there?", tokenizer, 16, history=[("what color is the square?", "red")])
    assert question_text(tokens, tokenizer) == "how many circles are there?"


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """With two memory tokens."""
    folder = tmp_path_factory.mktemp("remembering")
    train_tokenizer(DataConfig(), folder, 0, ModelConfig(clvr=ClvrConfig(inject="slots", num_slots=2)))
    return load_tokenizer(folder)


def test_memory_tokens_stand_behind_the_words_of_every_question_and_are_not_learnt(remembering):
    turns = (("<image>\nhow many circles are there?", "3"), ("and squares?", "2"))
    tokens_S, mask_S = encode_conversation(Conversation((IMAGE,), turns), remembering, 2)
    first = "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nhow many circles are there?<vmem0><vmem1><|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nand squares?<vmem0><vmem1><|im_end|>\n<|im_start|>assistant\n"
    assert remembering.decode(tokens_S) == f"{first}3<|im_end|>\n{second}2<|im_end|>\n"
    assert remembering.decode(tokens_S[mask_S == 1]) == "3<|im_end|>2<|im_end|>"
    one, two = remembering.slot_ids
    assert one != two and remembering.pieces(remembering.slot_ids) == ["<vmem0>", "<vmem1>"]
    assert [token for token in tokens_S.tolist() if token in remembering.slot_ids] == [one, two, one, two]
    asked = encode_prompt(turns[1][0], remembering, 2, turns[:1])
    assert np.array_equal(asked, tokens_S[: len(asked)]) and question_text(asked, remembering) == "and squares?"
    observed = remembering.decode(encode_observation("look again", remembering, 2, [1], ended=True))
    assert observed == "\n<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nlook again<vmem0><vmem1><|im_end|>\n<|im_start|>assistant\n"
    assert remembering.markers.slots == (one, two) and remembering.placeholders == (remembering.image_id, one, two)


def test_a_vocabulary_without_memory_tokens_is_what_it_was(tmp_path, tokenizer, remembering):
    for folder, model in (("a", None), ("b", ModelConfig(clvr=ClvrConfig(enabled=False, inject="slots")))):
        train_tokenizer(DataConfig(), tmp_path / folder, 0, model)
    assert tokenizer_digest(tmp_path / "a") == tokenizer_digest(tmp_path / "b") and tokenizer.slot_ids == ()
    assert remembering.vocab_size == tokenizer.vocab_size == 256
    words = "which color is row 2 column 3? <ans>"
    assert remembering.decode(remembering.encode(words + "<vmem1>\n")) == words + "<vmem1>\n"
    assert remembering.pieces(remembering.encode(words)) == tokenizer.pieces(tokenizer.encode(words))


def test_text_cannot_forge_memory_tokens_and_without_any_they_are_plain_text(tokenizer, remembering):
    for turn in (("what is <vmem1>?", "3"), ("how many?", "<vmem0>")):
        with pytest.raises(DataError, match=r"holds <vmem\d>, which belongs to the chat template"):
            encode_conversation(Conversation((), (turn,)), remembering, 2)
        assert encode_conversation(Conversation((), (turn,)), tokenizer, 2)[1].any()
    with pytest.raises(DataError, match="holds <vmem0>"):
        encode_prompt("<vmem0>", remembering, 2)
    assert encode_prompt("<vmem2>", remembering, 2).size, "which is none of the two"

"""A checkpoint's own tokenizer and image processing: the ids and pixels that transformers gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ext.config.schema import ClvrConfig, DataConfig, ModelConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import encode_prompt, encode_turns
from megatron_ext.data.images import load_tiles
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest, train_tokenizer
from megatron_ext.errors import DataError, UserError
from tests.support.hf_tokenizer import save_tokenizer

VISION = VisionConfig(image_size=16, patch_size=4)
TILE = tokens_per_tile(VISION)
WORDS = st.text(st.sampled_from([*"abc 12?.,'", "\n", "é", "王"]), max_size=20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(DataConfig(tokenizer=source), folder, seed=0)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(source: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def expanded(theirs, messages: list[dict], tiles: list[int]) -> list[int]:
    """What InternVL's processor makes of a conversation: the template, then `<img>` context... `</img>` in the place of every image."""
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for count in tiles:
        text = text.replace("<IMG_CONTEXT>", "<img>" + "<CONTEXT>" * (TILE * count) + "</img>", 1)
    return theirs(text.replace("<CONTEXT>", "<IMG_CONTEXT>"), add_special_tokens=False)["input_ids"]


@given(WORDS, WORDS, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_prompts_have_the_ids_of_the_template_and_processor(ours: Tokenizer, theirs, question: str, again: str, tiles: list[int]) -> None:
    content = [{"type": "image"} for _ in tiles] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}, {"role": "user", "content": again}]
    history = [("<image>\n" * len(tiles) + question, "red")]
    found = encode_prompt(again, ours, TILE, history, tiles)
    assert found.tolist() == expanded(theirs, messages, tiles)


def test_the_loss_falls_on_the_answer_and_its_end(ours: Tokenizer) -> None:
    tokens, mask = encode_turns([("<image>\nWhat is in the picture?", "A red circle")], ours, TILE, [2])
    learnt = [token for token, counts in zip(tokens, mask, strict=True) if counts]
    assert ours.decode(learnt) == "A red circle<|im_end|>"
    assert tokens.count(ours.image_id) == 2 * TILE


@given(st.lists(st.integers(-5, 2000)))
def test_any_ids_decode(ours: Tokenizer, ids: list[int]) -> None:
    assert isinstance(ours.decode(ids), str) and len(ours.pieces(ids)) == len(ids)


def test_a_folder_without_a_tokenizer_or_with_another_template_is_named(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer that transformers can load"):
        train_tokenizer(DataConfig(tokenizer=tmp_path), tmp_path / "run", seed=0)
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast.from_pretrained(source)
    plain = save_tokenizer(tmp_path / "plain")
    for path in plain.iterdir():
        path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<PICTURE>"))
    with pytest.raises(DataError, match="its vocabulary lacks <IMG_CONTEXT>"):
        train_tokenizer(DataConfig(tokenizer=plain), tmp_path / "run", seed=0)


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (33, 70), (200, 30), (17, 90)])
def test_tiles_are_those_of_transformers_processor_pixel_by_pixel(tmp_path: Path, size: tuple[int, int]) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    config = DataConfig(image_size=16, image_processing="internvl", max_tiles=6)
    tiles = load_tiles(tmp_path / "picture.png", config)
    processor = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=6, image_mean=mean, image_std=std)
    expected = processor(images=[Image.open(tmp_path / "picture.png")], return_tensors="pt")["pixel_values"]
    assert len(tiles) == len(expected) and (len(tiles) == 1) == (size == (16, 16))
    found = torch.from_numpy(tiles.pixels_IHWC).permute(0, 3, 1, 2).float() / 255
    normalised = (found - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalised, expected.float(), rtol=0, atol=1e-5)


def test_places_say_what_each_tile_shows(tmp_path: Path) -> None:
    """A picture whose colours are its own coordinates: every tile's mean colour is the middle of its place."""
    for height, width in ((48, 96), (96, 48), (64, 64), (16, 16), (32, 160)):
        rows, columns = np.mgrid[:height, :width]
        picture = np.stack([255 * (rows + 0.5) / height, 255 * (columns + 0.5) / width, np.zeros_like(rows)], -1).round().astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "ramp.png")
        tiles = load_tiles(tmp_path / "ramp.png", DataConfig(image_size=16, image_processing="internvl", max_tiles=6))
        top, left, bottom, right, thumbnail = tiles.places_I5.T
        found = tiles.pixels_IHWC.mean((1, 2)) / 255
        np.testing.assert_allclose(found[:, :2], np.stack([top + bottom, left + right], -1) / 2, atol=0.02)
        assert thumbnail.tolist() == [0.0] * (len(tiles) - 1) + [float(len(tiles) > 1)]


def test_a_training_batch_holds_every_tile_and_its_tokens(tmp_path: Path, ours: Tokenizer) -> None:
    Image.new("RGB", (64, 16), (200, 10, 10)).save(tmp_path / "wide.png")
    line = '{"image": "wide.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it %d?"}, {"from": "gpt", "value": "red"}]}\n'
    (tmp_path / "data.jsonl").write_text("".join(line % number for number in range(60)))
    config = DataConfig(kind="jsonl", path=tmp_path / "data.jsonl", image_size=16, image_processing="internvl", max_tiles=4)
    stream = TrainingStream(config, VISION, ours, split="train", mix={"qa": 1.0}, seed=0)
    batch = stream.batch(0, 3)
    assert batch.tiles.pixels_IHWC.shape == (15, 16, 16, 3), "four tiles and a thumbnail for each of three rows"
    assert (batch.row_tiles_BM >= 0).sum(1).tolist() == [5, 5, 5]
    assert ((batch.tokens_BS == ours.image_id).sum(1) == 5 * TILE).all()


def with_slots(count: int, rows: int) -> ModelConfig:
    return ModelConfig(vocab_size=rows, clvr=ClvrConfig(inject="slots", num_slots=count))


def test_memory_tokens_take_spare_rows_behind_the_vocabulary_and_what_was_there_stays(tmp_path: Path, source: Path, ours: Tokenizer) -> None:
    """As many as there are rows."""
    size = ours.vocab_size
    train_tokenizer(DataConfig(tokenizer=source), tmp_path, 0, with_slots(2, size + 2))
    remembering = load_tokenizer(tmp_path)
    assert (remembering.vocab_size, remembering.slot_ids) == (size + 2, (size, size + 1))
    assert (remembering.image_id, remembering.eos_id, remembering.pad_id) == (ours.image_id, ours.eos_id, ours.pad_id)
    asked = "<image>\nWhat is in the picture?"
    without, found = (encode_prompt(asked, tokenizer, TILE, [("How many?", "3")], [2]).tolist() for tokenizer in (ours, remembering))
    assert [token for token in found if token not in remembering.slot_ids] == without
    assert remembering.decode(found).count("<vmem0><vmem1><|im_end|>") == 2
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    train_tokenizer(DataConfig(tokenizer=tmp_path), tmp_path / "again", 0, with_slots(2, size + 2))
    assert tokenizer_digest(tmp_path / "again") == tokenizer_digest(tmp_path)


def test_memory_tokens_without_room_or_of_another_number_are_refused(tmp_path: Path, source: Path, ours: Tokenizer) -> None:
    size = ours.vocab_size
    for rows, remedy in ((size + 1, "use at most 1"), (size, "use model.clvr.inject=text, or a model with more rows")):
        numbers = f"2 memory tokens do not fit: the tokenizer in .* has {size} tokens and model.vocab_size = {rows}; {remedy}"
        with pytest.raises(UserError, match=rf"model\.clvr\.num_slots: {numbers}"):
            train_tokenizer(DataConfig(tokenizer=source), tmp_path / "run", 0, with_slots(2, rows))
    train_tokenizer(DataConfig(tokenizer=source), tmp_path / "three", 0, with_slots(3, size + 8))
    with pytest.raises(UserError, match=r"model\.clvr\.num_slots: 2, but the tokenizer in .* has 3 memory tokens; set it to 3"):
        train_tokenizer(DataConfig(tokenizer=tmp_path / "three"), tmp_path / "run", 0, with_slots(2, size + 8))

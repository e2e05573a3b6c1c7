"""Conversations and pictures from files: what is read, and what is said about what cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.images import GREY, load_image
from megatron_ext.data.jsonl import read_jsonl, read_split
from megatron_ext.data.prompts import draw_recorded_prompts
from megatron_ext.data.records import shuffled
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.suite import check
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.errors import DataError

CONFIG = DataConfig(image_size=32)
GOOD = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red field."}]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (32, 32), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 32), (10, 10, 250)).save(tmp_path / "wide.jpg", quality=95)
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def with_(**changes):
    return {key: value for key, value in (GOOD | changes).items() if value is not None}


def say(*values):
    return [{"from": "human" if position % 2 == 0 else "gpt", "value": value} for position, value in enumerate(values)]


def test_a_record_has_its_images_turns_and_place(folder):
    path = write(
        folder,
        GOOD,
        "",
        with_(image=["a.png", "wide.jpg"], conversations=say("<image> or <image>?", "both", "why?", "so"), skill="choice"),
        with_(image=None, conversations=say("hi", "ho")),
    )
    first, second, third = read_jsonl(path)
    assert first.turns == (("<image>\nWhat is this?", "A red field."),) and first.where == f"{path}:1" and first.skill == "jsonl"
    assert (
        second.where == f"{path}:3"
        and second.skill == "choice"
        and [tiles.pixels_IHWC.shape for tiles in second.load(CONFIG, VisionConfig())] == [(1, 32, 32, 3)] * 2
    )
    assert second.turns[1] == ("why?", "so") and third.images == ()
    assert (first.load(CONFIG, VisionConfig())[0].pixels_IHWC == (250, 10, 10)).all()


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "holds a list, not an object"),
        (with_(conversations=None), 'has no field "conversations"'),
        (with_(conversations=[]), 'has an empty or malformed field "conversations"'),
        (with_(conversations=say("<image>", "a", "b")), "its 3 messages end with a question"),
        (with_(conversations=[{"from": "gpt", "value": "a"}]), "message 1 is not a text from 'human'"),
        (with_(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": 3}]), "message 2 is not a text from 'gpt'"),
        (with_(conversations=say("no placeholder", "a")), "0 <image> placeholders for 1 images"),
        (with_(conversations=say("<image>", "a<|im_end|>")), "belongs to the chat template"),
        (with_(image="missing.png"), "there is no image .*missing.png"),
        (with_(image=3), '"image" is 3'),
        (with_(width=32), '"width" and "height" do not give 1 sizes'),
        (with_(skill=7), '"skill" is 7'),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(folder, line, message):
    path = write(folder, GOOD, line)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        read_jsonl(path)


def test_bytes_that_are_no_text_are_reported_with_their_line(folder):
    path = folder / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(DataError, match=r"data\.jsonl:2: is not JSON"):
        read_jsonl(path)


@given(line=st.binary(max_size=80))
def test_any_line_is_a_record_or_a_data_error(tmp_path_factory, line):
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_bytes(line)
    with pytest.raises(DataError):
        read_jsonl(path)


def test_a_missing_empty_or_unset_file_is_named(folder):
    with pytest.raises(DataError, match=r"data\.path: is not set"):
        read_jsonl(None)
    with pytest.raises(DataError, match=r"data\.path: there is no file .*nowhere"):
        read_jsonl(folder / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no conversation"):
        read_jsonl(write(folder, ""))


@pytest.mark.parametrize("damage", ["half", "text", "empty", "flipped"])
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_a_damaged_image_is_named(tmp_path, damage, format):
    path = tmp_path / f"noise.{format}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes(255 - byte for byte in whole[half : half + 40]) + whole[half + 40 :] if format == "png" else whole[: half // 2]
    path.write_bytes({"half": whole[:half], "text": b"not an image", "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(DataError, match=rf"noise\.{format}: is not a readable image"):
        load_image(path, CONFIG)


def test_an_image_of_another_size_than_its_line_says_is_refused(folder):
    (record,) = read_jsonl(write(folder, with_(image="wide.jpg", width=32, height=32)))
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*wide\.jpg: is 64 x 32 pixels, but its line says 32 x 32 pixels"):
        record.load(CONFIG, VisionConfig())
    (record,) = read_jsonl(write(folder, with_(image="wide.jpg", width=64, height=32)))
    assert record.load(CONFIG, VisionConfig())[0].pixels_IHWC.shape == (1, 32, 32, 3)


def test_a_wide_image_is_scaled_to_fit_and_padded_with_grey(folder):
    tile = load_image(folder / "wide.jpg", CONFIG)
    assert (tile[:8] == GREY).all() and (tile[24:] == GREY).all()
    assert np.abs(tile[8:24].astype(int) - (10, 10, 250)).max() < 12


def test_a_transparent_image_is_laid_over_grey_and_a_sliver_is_refused(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", CONFIG) == GREY).all()
    Image.new("L", (1, 500)).save(tmp_path / "sliver.png")
    with pytest.raises(DataError, match="nothing is left of its shorter side"):
        load_image(tmp_path / "sliver.png", CONFIG)


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 1000))
def test_every_epoch_visits_every_record_once_in_an_order_of_its_own(length, epoch, seed):
    order = [shuffled(epoch * length + position, length, seed) for position in range(length)]
    assert sorted(order) == list(range(length))


@pytest.fixture
def corpus(folder):
    """120 conversations of one question each, every third without an image."""
    lines = []
    for index in range(120):
        question = f"What is number {index}?"
        image = None if index % 3 == 0 else ["a.png", "wide.jpg"][index % 2]
        lines.append(with_(image=image, conversations=say(question if image is None else f"<image>\n{question}", f"Number {index}."), skill="naming"))
    return DataConfig(kind="jsonl", path=write(folder, *lines), max_length=120)


def test_splits_of_a_file_are_disjoint_and_complete(corpus):
    parts = {split: {record.where for record in read_split(corpus.path, split)} for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 120 == len(set.union(*parts.values()))
    assert len(parts["train"]) > 90


def test_a_split_without_records_is_refused(folder):
    path = write(folder, GOOD)
    (record,) = read_jsonl(path)
    empty = next(split for split in ("train", "val") if split != record.split)
    with pytest.raises(DataError, match=f"none of its 1 conversations falls into the {empty} split"):
        read_split(path, empty)


def test_a_file_trains_a_tokenizer_a_stream_and_asks_prompts(corpus, tmp_path):
    train_tokenizer(corpus, tmp_path / "tokenizer", seed=0)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    stream = TrainingStream(corpus, VisionConfig(), tokenizer, split="train", mix={"qa": 1.0}, seed=0)
    batch = stream.batch(0, 12)
    with_image = batch.row_tiles_BM[:, 0] >= 0
    assert np.array_equal((batch.tokens_BS == tokenizer.image_id).sum(1), 16 * with_image) and len(batch.tiles) == with_image.sum() > 0
    assert np.array_equal(batch.tokens_BS, stream.batch(0, 12).tokens_BS)
    epoch = [stream.batch(step, 1) for step in range(len(read_split(corpus.path, "train")))]
    assert len({tokenizer.decode(row.tokens_BS[0]) for row in epoch}) == len(epoch)

    for prompt in draw_recorded_prompts("train", 5, 0, corpus, tokenizer, VisionConfig()):
        assert prompt.skill == "naming" and check(prompt.meta, prompt.answer).correct and not check(prompt.meta, "Number").correct
        assert prompt.answer.removeprefix("Number ").removesuffix(".") in tokenizer.decode(prompt.tokens_S)


def test_a_model_without_vision_is_shown_no_picture(corpus, tmp_path):
    train_tokenizer(corpus, tmp_path / "tokenizer", seed=0)
    tokenizer, blind = load_tokenizer(tmp_path / "tokenizer"), VisionConfig(enabled=False)
    with pytest.raises(DataError, match=r"jsonl:\d+: shows (a.png|wide.jpg) to a model without vision"):
        TrainingStream(corpus, blind, tokenizer, split="train", mix={"qa": 1.0}, seed=0).batch(0, 40)
    with pytest.raises(DataError, match="to a model without vision"):
        draw_recorded_prompts("train", 40, 0, corpus, tokenizer, blind)


def test_a_prompt_that_is_too_long_is_named(corpus, tmp_path):
    train_tokenizer(corpus, tmp_path / "tokenizer", seed=0)
    with pytest.raises(DataError, match=r"jsonl:\d+: the prompt has \d+ tokens, more than data.max_length = 20"):
        draw_recorded_prompts("train", 40, 0, corpus.model_copy(update={"max_length": 20}), load_tokenizer(tmp_path / "tokenizer"), VisionConfig())


def test_unreadable_images_are_left_out_by_name_within_the_budget_and_the_same_for_every_reader(corpus, tmp_path, capsys):
    train_tokenizer(corpus, tmp_path / "tokenizer", seed=0)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    records = read_split(corpus.path, "train")
    broken = next(record for record in records if record.images).images[0]
    bad = {record.where for record in records if broken in record.images}
    broken.write_bytes(b"no picture")

    def stream(allowed):
        data = corpus.model_copy(update={"max_bad_samples": allowed})
        return TrainingStream(data, VisionConfig(), tokenizer, split="train", mix={"qa": 1.0}, seed=0)

    whole = stream(len(bad)).batch(0, len(records))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(bad) and all(line.startswith("left out: ") and any(f"{where}: " in line for where in bad) for line in told)
    parts = [stream(len(bad)).batch(step, 1).tokens_BS[0] for step in range(len(records))]
    assert [tokenizer.decode(row) for row in parts] == [tokenizer.decode(row) for row in whole.tokens_BS]
    with pytest.raises(DataError, match="is not a readable image"):
        stream(len(bad) - 1).batch(0, len(records))

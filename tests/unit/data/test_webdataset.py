"""Samples of tar shards: what is read, in which order, and what is said about what cannot be read."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.prompts import draw_recorded_prompts, draw_skills, skills_of
from megatron_ext.data.records import Record
from megatron_ext.data.shard_index import open_index
from megatron_ext.data.shard_names import shards_of
from megatron_ext.data.sources import open_records
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.suite.scene import split_of_text
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_ext.data.webdataset import ShardRecords, WindowShuffle
from megatron_ext.errors import DataError
from tests.support.shards import conversation, picture, write_shard, write_shards

VISION = VisionConfig()


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"kind": "webdataset", "path": path, "max_length": 200, **changes})


def only(path: Path) -> ShardRecords:
    return ShardRecords(open_index(path, None), None)


def sample(tmp_path: Path, **files: bytes) -> Record:
    """The one sample of a shard."""
    return only(write_shard(tmp_path / "a.tar", {name.replace("_", "."): content for name, content in files.items()}))[0]


def test_a_sample_is_the_files_of_a_key_in_whatever_order_they_stand(tmp_path: Path) -> None:
    files = {
        "./x/1.1.PNG": picture(11),
        "y/1.json": conversation("words", images=0),
        "x/1.json": conversation("two pictures", images=2, skill="pairs", image="ignored.jpg"),
        "x/1.0.jpg": picture(10, "JPEG"),
        "x/1.cls": b"7",
        "README.md": b"# not a sample",
        "y/._1.png": b"what another system leaves",
    }
    records = only(write_shard(tmp_path / "a.tar", files))
    assert [record.where for record in (records[0], records[1])] == [f"{tmp_path}/a.tar:x/1", f"{tmp_path}/a.tar:y/1"] and len(records) == 2
    assert records[0].skill == "pairs" and records[1].skill == "webdataset" and records[1].images == ()
    assert records[0].turns == (("<image>\n<image>\nWhat about two pictures?", "It is two pictures."),)
    first, second = (tiles.pixels_IHWC[0, 0, 0] for tiles in records[0].load(config(tmp_path), VISION))
    assert abs(int(first[0]) - 10) < 3 and second.tolist() == [11, 10, 200]


def test_a_text_is_a_caption_where_no_json_holds_a_conversation(tmp_path: Path) -> None:
    """As tools write that download pictures with captions: metadata in .json, the caption in .txt."""
    record = sample(tmp_path, k_jpg=picture(1, "JPEG"), k_txt=b" A cat.\n", k_json=b'{"url": "somewhere", "width": 9}')
    assert record.turns == (("<image>", "A cat."),)
    assert sample(tmp_path / "b", k_jpg=picture(1, "JPEG"), k_txt=b"no", k_json=conversation("yes")).turns[0][1] == "It is yes."


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"k_png": picture(1)}, "has neither a .json nor a .txt"),
        ({"k_png": picture(1), "k_json": b"{broken"}, "is not JSON"),
        ({"k_json": b"[1]"}, "holds a list, not an object"),
        ({"k_json": b"{}"}, 'has no field "conversations"'),
        ({"k_json": conversation("no picture")}, "1 <image> placeholders for 0 images"),
        ({"k_png": picture(1), "k_json": conversation("x", width=9)}, '"width" and "height" do not give 1 sizes'),
        ({"k_png": picture(1), "k_txt": b" \n"}, "its .txt is empty"),
        ({"k_png": picture(1), "k_txt": b"\xff"}, "its .txt is not UTF-8"),
        ({"k_json": conversation("x", images=0, skill=3)}, '"skill" is 3'),
    ],
)
def test_what_is_wrong_with_a_sample_is_said_with_its_shard_and_key(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.tar:k: .*{message}"):
        sample(tmp_path, **files)


def test_a_picture_that_cannot_be_read_or_has_another_size_is_named(tmp_path: Path) -> None:
    files = {"k.0.png": picture(1), "k.1.png": picture(2)[:60], "k.json": conversation("x", images=2)}
    with pytest.raises(DataError, match=r"a\.tar:k: picture 1: is not a readable image"):
        only(write_shard(tmp_path / "a.tar", files))[0].load(config(tmp_path), VISION)
    sized = sample(tmp_path / "b", k_png=picture(1), k_json=conversation("x", width=64, height=32))
    with pytest.raises(DataError, match=r"a\.tar:k: picture 0: is 32 x 32 pixels, but its line says 64 x 32"):
        sized.load(config(tmp_path), VISION)
    with pytest.raises(DataError, match=r"a\.tar:k: shows picture 0 to a model without vision"):
        sized.load(config(tmp_path), VisionConfig(enabled=False))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty", r"is no whole, uncompressed tar: empty file"),
        ("text", r"is no whole, uncompressed tar: .*after its beginning"),
        ("compressed", r"is no whole, uncompressed tar"),
        ("within a file", r"is no whole, uncompressed tar: unexpected end of data, after k1\.png"),
        ("between files", r"is broken or was cut off after k0\.json, at byte 2048 of 2048"),
        ("header", r"is broken or was cut off after k0\.json, at byte 2048 of \d+"),
        ("no sample", r"holds no sample"),
        ("twice", r"a\.tar:k0: has a second file of the kind of k0\.jpg"),
    ],
)
def test_a_shard_that_is_no_whole_tar_of_samples_is_named(tmp_path: Path, damage: str, message: str) -> None:
    files = {"k0.png": picture(0), "k0.json": conversation("0"), "k1.png": picture(1), "k1.json": conversation("1")}
    shard = write_shard(tmp_path / "a.tar", files)
    whole = shard.read_bytes()
    assert len(picture(0)) <= 512 and len(files["k0.json"]) <= 512, "blocks of two files end at byte 2048"
    broken = {
        "empty": b"",
        "text": b"no tar" * 200,
        "within a file": whole[:2600],
        "between files": whole[:2048],
        "header": whole[:2048] + b"\xff" * 512 + whole[2560:],
    }
    if damage in broken:
        shard.write_bytes(broken[damage])
    elif damage == "compressed":
        shard.unlink()
        with tarfile.open(shard, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("k0.json"))
    else:
        write_shard(shard, {"no sample": {"README.md": b"x"}, "twice": files | {"k0.jpg": picture(0, "JPEG")}}[damage])
    with pytest.raises(DataError, match=message):
        open_index(shard, None)


def test_a_path_names_a_folder_a_pattern_or_one_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, 12, 1)
    every = tuple(tmp_path / f"part-{number:03d}.tar" for number in range(12))
    assert shards_of(tmp_path) == shards_of(tmp_path / "part-{000..011}.tar") == shards_of(tmp_path / "part-*.tar") == every
    assert shards_of(tmp_path / "part-0{08..11}.tar") == every[8:]
    assert shards_of(tmp_path / "{part,other}-00[02].tar")[:2] == (every[0], every[2])
    assert shards_of(every[3]) == (every[3],)
    assert shards_of(tmp_path / "part-{003,005}.tar") == (every[3], every[5])


def test_a_path_without_shards_is_refused_and_missing_ones_are_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 1)
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "other-*.tar"):
        with pytest.raises(DataError, match=r"data\.path: .* names no \.tar shards"):
            shards_of(path)
    with pytest.raises(DataError, match=r"data\.path: 2 of 5 shards are missing, the first of them .*part-003\.tar"):
        shards_of(tmp_path / "part-{000..004}.tar")
    with pytest.raises(DataError, match="is not set"):
        shards_of(None)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(0, 3), st.integers(0, 1000))
def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own(counts: list[int], window: int, epoch: int, seed: int) -> None:
    shuffle, total = WindowShuffle(np.array(counts), window), sum(counts)
    order = [shuffle.place(epoch * total + position, seed) for position in range(total)]
    assert sorted(order) == list(range(total))
    again = WindowShuffle(np.array(counts), window)
    assert [again.place(epoch * total + position, seed) for position in reversed(range(total))] == order[::-1], "whoever asks, in whatever order"


def test_reads_stay_within_a_window_of_shards(tmp_path: Path) -> None:
    shuffle = WindowShuffle(np.full(10, 20), window=2)
    order = [shuffle.place(position, 0) // 20 for position in range(400)]
    windows = [set(order[start : start + 40]) for start in range(0, 400, 40)]
    assert all(len(window) == 2 for window in windows)
    assert set.union(*windows[:5]) == set(range(10)) and windows[:5] != windows[5:]
    assert order[:40] != sorted(order[:40])


def test_splits_are_by_the_hash_of_the_key(tmp_path: Path) -> None:
    index = open_index(write_shards(tmp_path, 3, 60), None)
    keys = {}
    for split in ("train", "val", "test"):
        records = ShardRecords(index, split)
        keys[split] = {records[number].where.rpartition(":")[2] for number in range(len(records))}
        assert all(split_of_text(key) == split for key in keys[split])
    assert sum(map(len, keys.values())) == 180 and len(keys["train"]) > 140


def test_shards_train_a_tokenizer_a_stream_and_ask_prompts(tmp_path: Path) -> None:
    data = config(write_shards(tmp_path / "shards", 4, 40), index=tmp_path / "index")
    train_tokenizer(data, tmp_path / "tokenizer", seed=0)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    stream = TrainingStream(data, VISION, tokenizer, split="train", mix={"qa": 1.0}, seed=0)
    epoch = len(open_records(data, "train"))
    texts, colours = set(), []
    for step in range(epoch):
        batch = stream.batch(step, 1)
        texts.add(tokenizer.decode(batch.tokens_BS[0]))
        colours.append(int(batch.tiles.pixels_IHWC[0, 0, 0, 0]))
        assert str(colours[-1]) in tokenizer.decode(batch.tokens_BS[0]), "the picture is the sample's own"
    assert len(texts) == epoch == len(set(colours))
    whole = stream.batch(3, 8)
    parts = [TrainingStream(data, VISION, tokenizer, split="train", mix={"qa": 1.0}, seed=0, dp_rank=rank, dp_size=2).batch(3, 4) for rank in (0, 1)]
    assert [tokenizer.decode(row) for part in parts for row in part.tokens_BS] == [tokenizer.decode(row) for row in whole.tokens_BS]

    assert skills_of(data) == ("naming", "sums", "webdataset")
    prompts = draw_skills("train", 9, 0, data, tokenizer, VISION)
    assert [prompt.skill for prompt in prompts] == ["naming"] * 9 + ["sums"] * 9 + ["webdataset"] * 9
    assert len({prompt.meta["where"] for prompt in prompts}) == 27
    assert {prompt.meta["where"] for prompt in draw_recorded_prompts("train", epoch, 0, data, tokenizer, VISION)} == {
        open_records(data, "train")[number].where for number in range(epoch)
    }


def test_bad_samples_are_left_out_by_name_within_the_budget_and_counted(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{number}.json": conversation("x", images=0) for number in range(30)}
    files |= {"b1.json": b"{broken", "b2.png": picture(1), "b3.png": picture(3)[:50], "b3.json": conversation("x")}
    data = config(write_shard(tmp_path / "a.tar", files), max_length=256)
    records = open_records(data, "train")
    bad = [key for key in ("b1", "b2", "b3") if split_of_text(key) == "train"]

    def stream(allowed: int) -> TrainingStream:
        return TrainingStream(data.model_copy(update={"max_bad_samples": allowed}), VISION, tokenizer, split="train", mix={"qa": 1.0}, seed=0)

    assert stream(len(bad)).batch(0, len(records)).num_bad == len(bad) > 1
    told = capsys.readouterr().err
    assert all(f"left out: {tmp_path}/a.tar:{key}: " in told for key in bad)
    with pytest.raises(DataError, match=r"a\.tar:b\d: "):
        stream(len(bad) - 1).batch(0, len(records))


def test_the_index_is_made_once_and_read_by_whoever_comes_later(tmp_path: Path) -> None:
    shards, folder = write_shards(tmp_path / "shards", 2, 20), tmp_path / "run" / "shards"
    made = [record.where for record in map(ShardRecords(open_index(shards, folder), None).__getitem__, range(40))]
    (place,) = folder.iterdir()
    assert sorted(path.name for path in place.iterdir()) == ["members.npy", "samples.npy", "shards.json"]
    stamp = os.stat(place / "samples.npy").st_mtime_ns
    _forget()
    read = open_index(shards, folder)
    assert isinstance(read.samples_N, np.memmap) and os.stat(place / "samples.npy").st_mtime_ns == stamp
    assert [record.where for record in map(ShardRecords(read, None).__getitem__, range(40))] == made
    assert {path.name for path in shards.iterdir()} == {"part-000.tar", "part-001.tar"}, "nothing is written beside the shards"


def test_a_shard_that_has_changed_since_is_refused_until_the_index_is_removed(tmp_path: Path) -> None:
    shards, folder = write_shards(tmp_path / "shards", 2, 20), tmp_path / "index"
    open_index(shards, folder)
    write_shard(shards / "part-001.tar", {"new.json": conversation("x", images=0)})
    _forget()
    with pytest.raises(DataError, match=r"part-001\.tar: has changed since it was indexed: it had \d+ bytes, has 10240; put it back; or remove .*index"):
        open_index(shards, folder)
    os.utime(shards / "part-001.tar", ns=(0, 0))
    (place,) = folder.iterdir()
    note = json.loads((place / "shards.json").read_text())
    note["shards"][1][1] = 10240
    (place / "shards.json").write_text(json.dumps(note))
    with pytest.raises(DataError, match="it was written again"):
        open_index(shards, folder)


def test_shards_that_came_or_went_since_are_refused(tmp_path: Path) -> None:
    shards, folder = write_shards(tmp_path / "shards", 2, 5), tmp_path / "index"
    open_index(shards, folder)
    write_shards(shards, 3, 5)
    for number in (0, 1):
        os.utime(shards / f"part-00{number}.tar", ns=(0, 0))
    _forget()
    with pytest.raises(DataError, match=r"shards: named 2 shards when they were indexed and names 3; one that came or went is .*part-002\.tar; name those of"):
        open_index(shards, folder)


def test_a_draft_of_an_index_is_no_index(tmp_path: Path) -> None:
    """As a process leaves one that is killed while it writes."""
    shards, folder = write_shards(tmp_path / "shards", 1, 5), tmp_path / "index"
    open_index(shards, folder)
    (place,) = folder.iterdir()
    place.rename(place.with_name(f"{place.name}.1.partial"))
    _forget()
    assert len(open_index(shards, folder).samples_N) == 5
    assert place.is_dir()


def test_a_shard_that_ends_early_while_it_is_in_use_is_a_bad_sample(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, 1, 3) / "part-000.tar"
    records = only(shard)
    os.truncate(shard, 1024)
    with pytest.raises(DataError, match=r"part-000\.tar:part/00002: cannot be read|part-000\.tar:part/00002: picture 0"):
        records[2].load(config(tmp_path), VISION)


def _forget() -> None:
    """As a new process would start."""
    open_index.cache_clear()

"""Files that somebody else made: each that is too large, of a strange format, or somewhere else, is refused by name before it does harm."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data import shard_index
from megatron_ext.data.images import FORMATS, load_tiles
from megatron_ext.data.jsonl import read_jsonl
from megatron_ext.data.shard_index import open_index
from megatron_ext.data.webdataset import ShardRecords
from megatron_ext.errors import DataError
from tests.unit.data.test_jsonl import with_, write

CONFIG = DataConfig(image_size=32)
SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(/etc/passwd) run\n%%EOF\n"


def png_bomb(side: int) -> bytes:
    """A whole and correct PNG of side x side black pixels, a thousandth of its size when decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def bomb(tmp_path) -> Path:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(9_000))
    return path


@pytest.mark.parametrize("processing", ["fit", "internvl"])
def test_a_small_file_of_enormous_pixels_is_refused_before_it_is_decoded(bomb, processing, monkeypatch):
    """10 kB on the disk, 240 MB as colours."""
    assert bomb.stat().st_size < 30_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("its pixels were read"))
    with pytest.raises(
        DataError, match=r"bomb\.png: is 9000 x 9000 pixels, more than data\.max_image_pixels = 64000000 in all; scale the picture down, or raise"
    ):
        load_tiles(bomb, CONFIG.model_copy(update={"image_processing": processing}))


def test_what_even_pillow_does_not_open_is_told_as_well(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(png_bomb(32_000)[:60])
    with pytest.raises(DataError, match="has too many pixels"):
        load_tiles(path, CONFIG)


def test_the_limits_are_the_configurations(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.bmp")
    with pytest.raises(DataError, match=r"a\.bmp: is 40 x 30 pixels, more than data.max_image_pixels = 1199"):
        load_tiles(tmp_path / "a.bmp", DataConfig(max_image_pixels=1199))
    with pytest.raises(DataError, match=r"a\.bmp: has 3654 bytes, more than data.max_image_bytes = 3653; scale or compress the picture, or raise"):
        load_tiles(tmp_path / "a.bmp", DataConfig(max_image_bytes=3653))
    assert len(load_tiles(tmp_path / "a.bmp", DataConfig(max_image_pixels=1200, max_image_bytes=3654))) == 1


def test_a_file_that_claims_gigabytes_is_not_read(tmp_path):
    """A hole of 4 GiB, which takes no room on the disk."""
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(DataError, match="has 4294967296 bytes"):
        load_tiles(tmp_path / "hole.png", CONFIG)


@pytest.mark.parametrize(("name", "content"), [("a.svg", SVG), ("a.eps", EPS), ("a.png", EPS), ("a.jpg", SVG)])
def test_formats_that_run_or_read_something_else_are_no_pictures(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: is not a readable image: truncated, corrupt, or of another format than JPEG, PNG, .*replace or convert"):
        load_tiles(tmp_path / name, CONFIG)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA"])
def test_a_format_that_is_not_named_is_refused_whatever_the_file_is_called(tmp_path, kind):
    assert kind not in FORMATS
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png", format=kind)
    with pytest.raises(DataError, match="of another format than"):
        load_tiles(tmp_path / "a.png", CONFIG)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_named_formats_are_read(tmp_path, kind):
    Image.new("RGB", (32, 32), (250, 10, 10)).save(tmp_path / "a", format=kind)
    assert np.abs(load_tiles(tmp_path / "a", CONFIG).pixels_IHWC.astype(int) - (250, 10, 10)).max() < 8


@pytest.fixture
def folders(tmp_path):
    """A data folder, and beside it a picture that is none of its business."""
    inside, outside = tmp_path / "data", tmp_path / "private"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    return inside, outside


@pytest.mark.parametrize("how", ["up", "absolute", "link", "linked folder", "deep"])
def test_an_image_outside_of_the_data_folder_is_refused(folders, how):
    inside, outside = folders
    (inside / "sub").mkdir()
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "elsewhere").symlink_to(outside)
    name = {
        "up": "../private/a.png",
        "absolute": str(outside / "a.png"),
        "link": "link.png",
        "linked folder": "elsewhere/a.png",
        "deep": "sub/../elsewhere/../private/a.png",
    }[how]
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: the image .* lies outside of .*/data; move it there, or name a folder that holds all images: data.image_root"
    ):
        read_jsonl(write(inside, with_(image=name)))


def test_links_within_the_folder_and_to_the_folder_are_followed(folders):
    inside, outside = folders
    (inside / "same.png").symlink_to(inside / "a.png")
    (outside / "data").symlink_to(inside)
    write(inside, with_(image="same.png"), with_(image=str(inside / "a.png")))
    assert len(read_jsonl(inside / "data.jsonl")) == len(read_jsonl(outside / "data" / "data.jsonl")) == 2


def test_a_root_that_holds_both_folders_is_the_users_to_name(folders):
    inside, outside = folders
    (inside / "elsewhere").symlink_to(outside)
    path = write(inside, with_(image="data/elsewhere/a.png"))
    (record,) = read_jsonl(path, root=inside.parent)
    assert record.load(CONFIG, VisionConfig())[0].pixels_IHWC.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("name", ["http://example.com/a.png", "data:image/png;base64," + "A" * 5000])
def test_pictures_in_the_line_or_in_the_network_are_not_fetched(folders, name):
    with pytest.raises(DataError, match=r'data\.jsonl:1: "image" is .*: pictures are files here; store them beside the JSONL file'):
        read_jsonl(write(folders[0], with_(image=name)))


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00.png"])
def test_a_name_that_no_file_can_have_is_told(folders, name):
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        read_jsonl(write(folders[0], with_(image=name)))


def shard(path: Path, *members: tuple[str, bytes], links: tuple[tuple[str, str], ...] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return path


def test_members_of_a_shard_are_held_to_the_same_limits(tmp_path):
    path = shard(tmp_path / "a.tar", ("bomb.txt", b"a caption"), ("bomb.png", png_bomb(9_000)), ("strange.txt", b"a caption"), ("strange.png", SVG))
    bomb, strange = (ShardRecords(open_index(path, None), None)[number] for number in range(2))
    for record, problem in ((bomb, r"a\.tar:bomb: picture 0: is 9000 x 9000 pixels"), (strange, r"a\.tar:strange: picture 0: is not a readable image")):
        with pytest.raises(DataError, match=problem):
            record.load(CONFIG, VisionConfig())
    with pytest.raises(DataError, match=r"picture 0: has \d+ bytes, more than data.max_image_bytes = 100"):
        bomb.load(CONFIG.model_copy(update={"max_image_bytes": 100}), VisionConfig())


def test_members_that_lead_out_of_a_shard_are_passed_over_and_nothing_is_written(tmp_path):
    """Shards are read by offset, never unpacked: a name with .. is a name, a link is no sample's file."""
    Image.new("RGB", (32, 32)).save(content := io.BytesIO(), format="PNG")
    folder = tmp_path / "shards"
    folder.mkdir()
    members = (("../../escaped.txt", b"a caption"), ("../../escaped.png", content.getvalue()), ("b.txt", b"text alone"))
    records = ShardRecords(open_index(shard(folder / "a.tar", *members, links=(("b.png", "/etc/passwd"),)), None), None)
    assert [len(records[number].images) for number in range(2)] == [1, 0]
    assert sorted(os.listdir(tmp_path)) == ["shards"] and os.listdir(folder) == ["a.tar"]


def test_a_text_of_a_shard_that_is_no_text_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "MOST_TEXT_BYTES", 10)
    with pytest.raises(DataError, match=r"a\.tar:a: its a\.json has 11 bytes, more than 10"):
        open_index(shard(tmp_path / "a.tar", ("a.json", b"{" + b" " * 10)), None)

"""Environments: what zoom shows, what an environment may return, and that its process is held to limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.batch import NO_TILES, Prompt, Tiles
from megatron_ext.config.schema import DataConfig
from megatron_ext.data.originals import PICTURES, original, reference
from megatron_ext.data.rewards import BadReward
from megatron_ext.data.webdataset import Slice
from megatron_ext.errors import UserError
from megatron_ext.rl.environments import EnvironmentPool, Observation, Turn, load_environment, read_observation, zoom
from megatron_ext.rl.scoring.pool import Failure

SIDE = 32


def quarters(side: int) -> np.ndarray:
    """Red and green above, blue and white below."""
    half = side // 2
    picture = np.zeros((side, side, 3), np.uint8)
    picture[:half, :half], picture[:half, half:] = (250, 0, 0), (0, 250, 0)
    picture[half:, :half], picture[half:, half:] = (0, 0, 250), (250, 250, 250)
    return picture


PROMPT = Prompt("p", "color", np.zeros(1, np.int32), Tiles.whole(quarters(SIDE)[None]), "red")


def seen(text: str, prompt: Prompt = PROMPT) -> Observation | None:
    return zoom(prompt, [Turn(text)])


@pytest.mark.parametrize(
    ("box", "color"), [("0,0,.5,.5", (250, 0, 0)), ("0.5, 0, 1, 0.5", (0, 250, 0)), ("0,0.5,0.5,1", (0, 0, 250)), ("0.6,0.6,0.9,1.0", (250, 250, 250))]
)
def test_zoom_shows_the_named_part_alone_as_a_whole_tile(box, color):
    observation = seen(f"let me look <zoom>{box}</zoom>")
    (picture,) = observation.pictures
    assert picture.shape == (SIDE, SIDE, 3)
    inside = picture[4:-4, 10:-10]  # a part that is no square is padded with grey
    assert np.abs(inside.astype(int) - color).max() < 3
    assert read_observation(observation, PROMPT) is observation


def test_zoom_looks_at_the_original_not_at_the_tile(tmp_path):
    """The tile is a picture of 256 pixels shrunk to 32: stripes of a pixel are grey on it, and stripes where it is looked at closely."""
    large = np.zeros((256, 256, 3), np.uint8)
    large[:, ::2] = 250
    Image.fromarray(large).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"x" * 7 + content)
    for picture in (tmp_path / "large.png", Slice(tmp_path / "shard.tar", "picture 0", 7, len(content))):
        meta = json.loads(json.dumps({PICTURES: [reference(picture)]}))
        prompt = replace(PROMPT, meta=meta)
        assert original(prompt, 0, DataConfig()).size == (256, 256)
        (part,) = seen("<zoom>0,0,0.125,0.125</zoom>", prompt).pictures
        assert np.array_equal(part, large[:SIDE, :SIDE])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("<zoom>0,0,1</zoom>", "zoom takes four numbers: x0,y0,x1,y1"),
        ("<zoom>a,b,c,d</zoom>", "zoom takes four numbers: x0,y0,x1,y1"),
        ("<zoom>0,0,1,1", "zoom takes four numbers: x0,y0,x1,y1"),
        ("<zoom>-1,0,1,1</zoom>", "zoom takes four numbers: x0,y0,x1,y1"),
        ("<zoom>0,0,20,20</zoom>", "zoom takes shares of the picture from 0 to 1"),
        ("<zoom>0.5,0,0.4,1</zoom>", "this part is empty: x0 is left of x1 and y0 above y1"),
        ("<zoom>0.5,0.5,0.5,0.5</zoom>", "this part is empty: x0 is left of x1 and y0 above y1"),
    ],
)
def test_a_call_that_cannot_be_followed_is_told_what_is_wrong(call, says):
    assert seen(call) == Observation(says)


def test_a_turn_without_a_call_ends_and_a_prompt_without_a_picture_is_told():
    assert seen("red") is None
    assert seen("<zoom>0,0,1,1</zoom>", replace(PROMPT, tiles=NO_TILES)) == Observation("there is no picture to zoom into")


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("more", "it returned a str, neither an Observation nor None"),
        (Observation(3), "it returned a Observation, neither"),
        (Observation("a<|im_end|>"), r"holds <\|im_end\|>, which belongs to the chat template"),
        (Observation("an <image>"), "holds <image>"),
        (Observation("a <vmem12>"), "holds <vmem12>, which is a memory token"),
        (Observation("", (np.zeros((8, 8, 3), np.uint8),)), r"a picture is uint8 \(8, 8, 3\), not uint8 \(32, 32, 3\)"),
        (Observation("", (np.zeros((32, 32, 3)),)), "a picture is float64"),
        (Observation("", ("a.png",)), "a picture is str"),
        (Observation("", (quarters(32),) * 9), "9 pictures in one observation, more than 8"),
    ],
)
def test_what_is_no_observation_is_refused(value, detail):
    with pytest.raises(BadReward, match=detail) as error:
        read_observation(value, PROMPT)
    assert error.value.reason == "environment_wrong_type"


SOURCE = """
import os, time
from megatron_ext.rl.environments import Observation

def act(prompt, turns):
    text = turns[-1].text
    if text == "raise":
        raise RuntimeError("no such tool")
    if text == "hang":
        time.sleep(600)
    if text == "die":
        os._exit(7)
    if text == "type":
        return "more"
    return None if text == "over" else Observation(f"{len(turns)} turns", (prompt.tiles.pixels_IHWC[0],))
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    (tmp_path / "my_environment.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_environment:act"


def test_an_environment_that_raises_hangs_or_dies_fails_that_conversation_alone(path):
    texts = ["go", "raise", "over", "hang", "die", "type", "go"]
    with EnvironmentPool(path, workers=1, timeout_s=1.0) as pool:
        found = pool.act([(PROMPT, (Turn("before"), Turn(text))) for text in texts])
    assert [one.reason for one in found if isinstance(one, Failure)] == [
        "environment_raised",
        "environment_timeout",
        "environment_worker_died",
        "environment_wrong_type",
    ]
    assert found[0].text == found[-1].text == "2 turns" and np.array_equal(found[0].pictures[0], quarters(SIDE)) and found[2] is None
    assert "no such tool" in found[1].detail and found[3].detail == "twice: no result within 1 s"


def test_zoom_runs_in_such_a_process():
    with EnvironmentPool("megatron_ext.rl.environments:zoom", workers=1, timeout_s=30, memory_bytes=8 << 30) as pool:
        part, over = pool.act([(PROMPT, [Turn("<zoom>0,0,0.5,0.5</zoom>")]), (PROMPT, [Turn("red")])])
    assert over is None and np.array_equal(part.pictures[0], seen("<zoom>0,0,0.5,0.5</zoom>").pictures[0])


def test_a_wrong_path_names_the_field():
    with pytest.raises(UserError, match=r"rl.environment: module 'megatron_ext.rl.environments' has no 'zom'; did you mean 'zoom'\?"):
        load_environment("megatron_ext.rl.environments:zom")


def test_the_pages_example_is_an_environment(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")
    (tmp_path / "two_tries.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    act = load_environment("two_tries:act")
    assert act(PROMPT, [Turn("red")]) is None
    hint = act(PROMPT, [Turn("blue")])
    assert read_observation(hint, PROMPT) == Observation("no: the answer has 3 letters")
    assert act(PROMPT, [Turn("blue", hint), Turn("blue")]) is None

"""Pictures for TensorBoard, at the end of a stage: where the model looked when it answered, and which experts each skill goes to.

discover/          clusters/gate_mass           skills x experts, a panel per layer
evaluate/<of>/     gaze/<skill>/<n>             one answer: its tokens across, taps down
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_ext.observe.trace import AnswerTrace

SIDE, LINE, MOST_TOKENS = 128, 16, 12
"""Pixels of one token's picture, of its caption; tokens across."""
_STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_COLOURS = np.array([(60, 20, 110, 0.0), (125, 30, 130, 0.5), (205, 60, 80, 0.68), (250, 140, 30, 0.78), (252, 250, 160, 0.9)])


def board_images(folder: Path, images: Mapping[str, bytes], step: int = 0) -> None:
    """Writes PNG files as TensorBoard images by their tags."""
    writer = EventFileWriter(str(folder))
    for tag, png in images.items():
        with Image.open(io.BytesIO(png)) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))
    writer.close()


def board_traces(folder: Path, traces: Sequence[dict[str, Any]]) -> None:
    """The gaze of traced answers, those that looked at anything."""
    images, seen = {}, dict[str, int]()
    for found in traces:
        trace = AnswerTrace.of_json(found)
        if trace.taps and trace.pictures and trace.tokens:
            number = seen[trace.skill] = seen.get(trace.skill, -1) + 1
            images[f"gaze/{trace.skill}/{number}"] = gaze_strip(trace)
    if images:
        board_images(folder, images)


def board_clusters(folder: Path, clusters: Path) -> None:
    """The heat map of `expert_clusters.json`, on white."""
    from megatron_ext.observe.report_clusters import heat_map  # matplotlib, which ranks do without

    drawn = heat_map(json.loads(clusters.read_text(encoding="utf-8")))
    with Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))) as transparent:
        ink = transparent.convert("RGBA")
    page, file = Image.new("RGBA", ink.size, "white"), io.BytesIO()
    page.alpha_composite(ink)
    page.convert("RGB").save(file, format="PNG")
    board_images(folder, {"clusters/gate_mass": file.getvalue()})


def gaze_strip(trace: AnswerTrace) -> bytes:
    """A PNG: the first picture under the mean gaze of each tap (down) for each token (across). Colours as on the page."""
    picture, count = trace.pictures[0], min(len(trace.tokens), MOST_TOKENS)
    with Image.open(io.BytesIO(base64.b64decode(picture.src.partition(",")[2]))) as stored:
        plain = stored.convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    under = np.asarray(plain, np.float64)[..., None].repeat(3, axis=2) * 0.85
    canvas = Image.new("RGB", (count * (SIDE + 4), len(trace.taps) * (SIDE + LINE + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, tap in enumerate(trace.taps):
        maps = tap.maps_TNC[:, 0, : picture.rows * picture.columns]
        for token in range(count):
            shares = Image.fromarray((maps[token] / max(float(maps.max()), 1e-9)).reshape(picture.rows, picture.columns).astype(np.float32))
            shares_HW = np.asarray(shares.resize((SIDE, SIDE), Image.Resampling.NEAREST), np.float64)
            red, green, blue, alpha = (np.interp(shares_HW, _STOPS, values) for values in _COLOURS.T)
            mixed = under * (1 - alpha[..., None]) + np.stack([red, green, blue], axis=-1) * alpha[..., None]
            place = token * (SIDE + 4), row * (SIDE + LINE + 4)
            canvas.paste(Image.fromarray(mixed.astype(np.uint8)), (place[0], place[1] + LINE))
            caption = f"tap {row}: {trace.tokens[token]}".encode("latin-1", "replace").decode("latin-1")
            draw.text((place[0] + 2, place[1] + 2), caption, fill="black")
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return file.getvalue()

"""Timelines as Perfetto reads them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def as_perfetto_reads(folder: Path) -> list[dict[str, Any]]:
    """One object after the other, commas between them, and no need for a bracket at the end: as its reader of JSON arrays goes about it."""
    text = (folder / "timeline.json").read_text()
    assert text[0] == "["
    decoder, at, events = json.JSONDecoder(), 1, []
    while at < len(text):
        if text[at] in ", \n]":
            at += 1
            continue
        event, at = decoder.raw_decode(text, at)
        events.append(event)
    return events


def slices(events: list[dict[str, Any]]) -> dict[str, list[tuple[str, int, int]]]:
    """(name, start, end) of every track by its name."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[names[event["tid"]]].append((event["name"], event["ts"], event["ts"] + event["dur"]))
    return found

"""The trace of one answer: what was said, where the model looked and which experts it went through, token by token. A JSON file, and a page to watch it on.

    inference/trace.py -> AnswerTrace -> trace.json, and inside a page: trace.html (`generate --trace`) or report.html (`evaluate/<of>/traces.json`)

    {"schema_version": 1, "key", "skill", "question", "text", "gold", "correct", "checkpoint", "cut": tokens that are not shown,
     "tokens": [{"text", "logprob", "alternatives": [[text, logprob], ...], "experts": [L][K], "gates": [L][K]}],
     "num_experts", "layers": [L] their numbers, "clusters": {skill: [[layer, expert], ...]},
     "pictures": [{"src": data URI, "rows", "columns"}], "boxes": [[top, left, bottom, right], ...],
     "taps": [{"source", "target", "maps": base64 of uint8 [T, 1 + N, cells], "peaks": [T][1 + N], "entropy": [T], "inside": [T] or null, "chance"}]}

A map is `byte / 255 * peak`: the attention of a tap over all cells of all pictures, the mean over heads first, then each head; it sums to 1. `inside` is the
share of the mean map within the boxes that the answer rests on, where they are known, and `chance` their area.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ext import __version__
from megatron_ext.errors import DataError
from megatron_ext.observe.gaze_map import Box
from megatron_ext.shapes import check_shape

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Picture:
    """`src`: a data URI. `rows` x `columns` cells of the maps lie over it."""

    src: str
    rows: int
    columns: int


@dataclass(frozen=True)
class TapGaze:
    """`maps_TNC`: [T, 1 + N, cells], the mean over heads first."""

    source: int
    target: int
    maps_TNC: np.ndarray
    entropy_T: np.ndarray
    inside_T: np.ndarray | None = None
    chance: float | None = None

    def to_json(self) -> dict[str, Any]:
        peaks_TN = self.maps_TNC.max(axis=-1)
        bytes_TNC = np.rint(255 * self.maps_TNC / np.where(peaks_TN > 0, peaks_TN, 1.0)[..., None]).astype(np.uint8)
        return {
            "source": self.source,
            "target": self.target,
            "maps": base64.b64encode(bytes_TNC.tobytes()).decode("ascii"),
            "peaks": [[_short(peak) for peak in peaks] for peaks in peaks_TN.tolist()],
            "entropy": [_short(value) for value in self.entropy_T.tolist()],
            "inside": None if self.inside_T is None else [_short(value) for value in self.inside_T.tolist()],
            "chance": self.chance,
        }

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> TapGaze:
        peaks_TN = np.array(found["peaks"])
        maps_TNC = np.frombuffer(base64.b64decode(found["maps"]), np.uint8).reshape(*peaks_TN.shape, -1) / 255 * peaks_TN[..., None]
        within = None if found["inside"] is None else np.array(found["inside"])
        return cls(found["source"], found["target"], maps_TNC, np.array(found["entropy"]), within, found["chance"])


@dataclass(frozen=True)
class AnswerTrace:
    """`tokens`: texts. `alternatives`: of each token the most likely ones with their log-probabilities. `experts_TLK` int, `gates_TLK`: the routes of
    the positions that chose the tokens; `layers`: the numbers of their layers. `clusters`: (layer, expert) by skill. `gold`, `correct`: None if unknown."""

    key: str
    skill: str
    question: str
    text: str
    gold: str | None
    correct: bool | None
    checkpoint: str
    cut: int
    tokens: list[str]
    logprobs_T: np.ndarray
    alternatives: list[list[tuple[str, float]]]
    experts_TLK: np.ndarray
    gates_TLK: np.ndarray
    num_experts: int
    layers: list[int]
    clusters: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    taps: list[TapGaze] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.tokens)
        check_shape("logprobs_T", self.logprobs_T, count)
        check_shape("experts_TLK", self.experts_TLK, count, len(self.layers), None)
        check_shape("gates_TLK", self.gates_TLK, *self.experts_TLK.shape)
        for tap in self.taps:
            check_shape("maps_TNC", tap.maps_TNC, count, None, sum(picture.rows * picture.columns for picture in self.pictures))

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.tokens, self.logprobs_T.tolist(), self.alternatives, self.experts_TLK.tolist(), self.gates_TLK.tolist(), strict=True)
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "tokens": [
                {
                    "text": text,
                    "logprob": _short(logprob),
                    "alternatives": [[other, _short(value)] for other, value in others],
                    "experts": experts,
                    "gates": [[round(gate, 3) for gate in of_layer] for of_layer in gates],
                }
                for text, logprob, others, experts, gates in rows
            ],
            "pictures": [vars(picture) for picture in self.pictures],
            "taps": [tap.to_json() for tap in self.taps],
        }

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> AnswerTrace:
        tokens, layers = found["tokens"], len(found["layers"])

        def routes(name: str, kind: type) -> np.ndarray:
            return np.array([token[name] for token in tokens], kind).reshape(len(tokens), layers, -1 if tokens and layers else 0)

        return cls(
            **{name: found[name] for name in _PLAIN},
            tokens=[token["text"] for token in tokens],
            logprobs_T=np.array([token["logprob"] for token in tokens]),
            alternatives=[[(text, value) for text, value in token["alternatives"]] for token in tokens],
            experts_TLK=routes("experts", int),
            gates_TLK=routes("gates", float),
            pictures=[Picture(**picture) for picture in found["pictures"]],
            taps=[TapGaze.of_json(tap) for tap in found["taps"]],
        )


_PLAIN = ("key", "skill", "question", "text", "gold", "correct", "checkpoint", "cut", "num_experts", "layers", "clusters", "boxes")
"""Fields that stand in JSON as they are."""


def read_traces(path: Path) -> list[dict[str, Any]]:
    """The traces in a file as their JSON; none without a file. Raises DataError for a file that holds something else."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if any(trace["schema_version"] != SCHEMA_VERSION for trace in found):
            raise ValueError(f"schema_version is not {SCHEMA_VERSION}")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(str(path), f"does not hold traces of answers ({error!r})", "evaluate again, or remove it") from None
    return list(found)


def without_heads(found: dict[str, Any]) -> dict[str, Any]:
    """A trace's JSON with the mean over heads alone."""
    taps = [TapGaze.of_json(tap) for tap in found["taps"]]
    return {**found, "taps": [replace(tap, maps_TNC=tap.maps_TNC[:, :1]).to_json() for tap in taps]}


def templates() -> Environment:
    """Of the pages. What they include is beside them in this package."""
    loader = PackageLoader("megatron_ext.observe", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def write_trace_page(path: Path, traces: Sequence[AnswerTrace]) -> None:
    """One HTML file that needs nothing beside it."""
    page = templates().get_template("trace.html.j2").render(version=__version__, traces=[trace.to_json() for trace in traces])
    path.write_text(page, encoding="utf-8")


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")

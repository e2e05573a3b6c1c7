"""What a report says of CLVR: how much it adds while the model trains, whether it looks where the answer lies, and traces of a few answers to step through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.observe.metrics import Record, series
from megatron_ext.observe.report_pictures import PALETTE, Curve, curves_over_stages, figure_of, png_uri
from megatron_ext.observe.summary import number
from megatron_ext.observe.trace import read_traces, without_heads

MEASURES = (
    ("gate", "Gates of CLVR", "gate"),
    ("update_ratio", "Size of the refinement against the residual stream", "RMS ratio"),
    ("attention_entropy", "Spread of the gaze", "entropy, 1 = even"),
    ("pointing", "Gaze on what the answer rests on, in training", "share of attention"),
)
EVALUATIONS = {"sft": "after fine-tuning", "rl": "after RL"}
"""By stage, what they are called; in the order of a run."""
MOST_BYTES = 1_500_000
"""Of all traces on the page."""


def training_shown(stages: Mapping[str, list[Record]]) -> list[str]:
    """A picture for each measure `clvr/tap<i>/<measure>` that any stage has written, its stages one behind the other."""
    pictures = []
    for measure, title, unit in MEASURES:
        found: dict[str, list[Curve]] = {}
        for stage, records in stages.items():
            names = sorted({name for record in records for name in record if name.startswith("clvr/tap") and name.endswith(f"/{measure}")})
            lines = [Curve(f"tap {name.split('/')[1].removeprefix('tap')}", *series(records, name)) for name in names]
            found |= {stage: lines} if lines else {}
        pictures += [curves_over_stages(title, found, unit)] if found else []
    return pictures


def looks_shown(root: Path) -> list[dict[str, Any]]:
    """Rows of the template for each evaluation whose file says under `clvr` what looking was worth, over all answers and then skill by skill: over `n` of them,
    with keys and values of nothing and of another picture, and where the taps looked when they were asked last before the answer."""
    rows = []
    for of, when in EVALUATIONS.items():
        found = _measured(root, of)
        if found:
            rows += [_row(when, found), *(_row(skill, own) for skill, own in found.get("skills", {}).items())]
    return rows


def _row(label: str, found: Mapping[str, Any]) -> dict[str, Any]:
    taps = found.get("taps", [])
    drops = {name: number(found[name]) + " (" + number(found[f"{name}_drop"], found[f"{name}_drop_se"]) + ")" for name in ("zeroed", "other")}
    return {
        "label": label,
        "n": found["n"],
        "greedy": number(found["greedy"]),
        **{name: text.replace("+-", " ± ") for name, text in drops.items()},
        "pointing": ", ".join(number(tap.get("pointing")) for tap in taps),
        "chance": number(found.get("pointing_chance")),
        "entropy": ", ".join(number(tap.get("attention_entropy")) for tap in taps),
        "divergence": ", ".join(number(value) for value in found.get("divergence", [])) or "-",
    }


def _measured(root: Path, of: str) -> dict[str, Any]:
    """What an evaluation has found of CLVR (`evaluate.clvr`), nothing where it did not look."""
    path = root / "evaluate" / f"{of}.json"
    return (json.loads(path.read_text(encoding="utf-8")).get("clvr") if path.exists() else None) or {}


def pointing_shown(root: Path, traces: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The template's `pointing`: by skill and tap how much of the gaze fell into the boxes that the answer rests on, beside the boxes' area. Of all prompts of
    the last evaluation that measured it, else of the traced answers."""
    for of, when in reversed(EVALUATIONS.items()):
        rows = {skill: row for skill, row in _measured(root, of).get("skills", {}).items() if row["pointing_n"]}
        if rows:
            picture = pointing_bars(
                {skill: [tap["pointing"] for tap in row["taps"]] for skill, row in rows.items()},
                {skill: row["pointing_chance"] for skill, row in rows.items()},
            )
            asked = sum(row["pointing_n"] for row in rows.values())
            return {"of": f"Over the {asked} prompts with known places of the evaluation {when}, at the last token before the answer.", "picture": picture}
    return _pointing_of(traces)


def _pointing_of(traces: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    scores: dict[str, list[list[float]]] = {}
    chances: dict[str, list[float]] = {}
    for trace in traces:
        taps = [tap for tap in trace["taps"] if tap["inside"]]
        if taps:
            scores.setdefault(trace["skill"], []).append([float(np.mean(tap["inside"])) for tap in taps])
            chances.setdefault(trace["skill"], []).append(float(taps[0]["chance"]))
    if not scores:
        return None
    means = {skill: np.mean(rows, axis=0).tolist() for skill, rows in scores.items()}
    chance = {skill: float(np.mean(values)) for skill, values in chances.items()}
    few = f"Over the {sum(map(len, scores.values()))} answers that can be stepped through below, which is few: evaluate.clvr=true measures all prompts."
    return {"of": few, "picture": pointing_bars(means, chance)}


def pointing_bars(scores: Mapping[str, Sequence[float]], chance: Mapping[str, float]) -> str:
    """Grouped bars per skill, one per tap, with a line at chance."""
    figure, axes = figure_of(max(7.0, 1.1 * len(scores) + 1.5), 2.6)
    taps = max(map(len, scores.values()))
    for tap in range(taps):
        places = np.arange(len(scores)) + (tap - (taps - 1) / 2) * 0.8 / taps
        axes.bar(places, [values[tap] for values in scores.values()], 0.74 / taps, color=PALETTE[tap % len(PALETTE)], label=f"tap {tap}")
    for place, skill in enumerate(scores):
        axes.hlines(chance[skill], place - 0.44, place + 0.44, color="#333333", linestyle=":", linewidth=2, label="chance: their area" if place == 0 else None)
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel("share of the gaze")
    axes.legend(frameon=False, fontsize=8, ncols=taps + 1, loc="lower left", bbox_to_anchor=(0, 1.0))
    return png_uri(figure)


def traces_shown(root: Path, per_skill: int) -> list[dict[str, Any]]:
    """Traces of the evaluations for the viewer, the later one's first: `per_skill` of each skill, without their heads, or fewer, where they would be more than
    MOST_BYTES. Each says `when` it was answered."""
    found = []
    for of, when in reversed(EVALUATIONS.items()):
        taken: dict[str, int] = {}
        for trace in read_traces(root / "evaluate" / of / "traces.json"):
            taken[trace["skill"]] = taken.get(trace["skill"], 0) + 1
            if taken[trace["skill"]] <= per_skill:
                found.append({**trace, "when": when})
    if _size(found) > MOST_BYTES:
        found = [without_heads(trace) for trace in found]
    kept, room = [], MOST_BYTES
    for trace in found:
        room -= _size([trace])
        kept += [trace] if room >= 0 else []
    return kept


def _size(traces: Sequence[dict[str, Any]]) -> int:
    return sum(len(json.dumps(trace)) for trace in traces)

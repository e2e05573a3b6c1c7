"""What a report says: a run's files turned into words, tables and pictures for the template. A part that is missing is None or empty."""

from __future__ import annotations

import base64
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_ext import __version__
from megatron_ext.observe.health import RL_PHASES, phases_of
from megatron_ext.observe.metrics import Record, read_metrics, series
from megatron_ext.observe.profiles import read_profiles
from megatron_ext.observe.report_clusters import clusters_shown, drift_shown
from megatron_ext.observe.report_clvr import EVALUATIONS, looks_shown, pointing_shown, traces_shown, training_shown
from megatron_ext.observe.report_pictures import Curve, accuracy_bars, curves, phase_bars, usage_bars
from megatron_ext.observe.results import NOTHING, Accuracy, Evaluation, read_evaluation
from megatron_ext.observe.stopwatch import TIMING
from megatron_ext.observe.summary import COLUMNS, number, title

STAGES = ("tokenizer", "pretrain", "sft", "mpo", "discover", "evaluate/sft", "rl", "evaluate/rl")
TRAINING = ("pretrain", "sft", "mpo", "rl")
SAMPLES_PER_SKILL = 2
"""Answers that are shown at once, and traced; the rest of what an evaluation kept is folded."""
_FAILED = "rollout/failed/"


def content(root: Path) -> dict[str, Any]:
    """Every variable of the template."""
    before, after = (read_evaluation(root / "evaluate" / f"{of}.json") for of in EVALUATIONS)
    trained = {stage: read_metrics(root / stage) for stage in TRAINING}
    rl, clusters, traces = trained["rl"], _json(root / "discover" / "expert_clusters.json"), traces_shown(root, SAMPLES_PER_SKILL)
    numbers = {(trace["when"], trace["key"]): number for number, trace in enumerate(traces)}
    return {
        "name": root.resolve().name,
        "version": __version__,
        "config": _text(root / "config.yaml"),
        "stages": [_stage(root / stage, stage) for stage in STAGES if (root / stage).exists() or _asked(stage, _text(root / "config.yaml"))],
        "profiles": [(stage, profile) for stage in STAGES for profile in read_profiles(root / stage)],
        "time": _time(trained),
        "versions": _versions(root),
        "accuracy": _accuracy(before, after),
        "learning": _learning(*trained.values()),
        "clvr": training_shown(trained),
        "traces": traces,
        "looks": looks_shown(root),
        "pointing": pointing_shown(root, [trace for trace in traces if trace["when"] == traces[0]["when"]]),
        "clusters": clusters_shown(clusters),
        "drift": drift_shown(rl, root / "rl", clusters),
        "usage": _usage(before, after),
        "earl": _pictures(rl, EARL),
        "health": _pictures(rl, HEALTH),
        "failures": _failures(rl),
        "samples": [(label, found) for of, label in EVALUATIONS.items() if (found := _samples(root / "evaluate" / of, label, numbers))],
    }


@dataclass(frozen=True)
class Wanted:
    """A picture of the metrics that match `names`, where there are any. `few`: measured now and then rather than every step."""

    title: str
    unit: str
    names: tuple[str, ...]
    log: bool = False
    few: bool = False


PREFERENCES = (
    Wanted("Preferences: rewards of right and wrong answers", "reward", ("mpo/reward_chosen", "mpo/reward_rejected", "mpo/margin")),
    Wanted("Preferences: right answers above wrong ones", "share", ("mpo/accuracy",)),
)
LEARNING = (
    Wanted("Reinforcement learning: sampled reward", "reward", ("reward/mean",)),
    Wanted("Sampled reward by skill", "reward", ("reward/skill/*/mean",)),
    Wanted("Validation during RL: greedy accuracy", "accuracy", ("val/val/*/accuracy",), few=True),
    Wanted("Policy entropy", "nats per token", ("actor/entropy",)),
    Wanted("Response length", "tokens", ("response_length/mean",)),
)
EARL = (
    Wanted("Cluster usage of sampled answers", "gate mass", ("earl/cluster_usage/*",)),
    Wanted("Weight and share of the EARL bonus", "", ("earl/lambda", "earl/bonus_share")),
    Wanted("Load of the experts", "max / mean - 1", ("moe/max_vio",)),
)
HEALTH = (
    Wanted(
        "Rollout against learner, same weights", "log-probability difference", ("mismatch/logprob_abs_diff_max", "mismatch/logprob_abs_diff_mean"), log=True
    ),
    Wanted("Largest probability ratio of an update", "ratio", ("actor/ratio_max",)),
    Wanted("Seconds of a step by phase", "s", tuple(TIMING + phase for phase in RL_PHASES)),
)


def _pictures(records: list[Record], wanted: Sequence[Wanted]) -> list[str]:
    """The pictures for which there are numbers."""
    names = sorted({name for record in records for name in record})
    found = []
    for one in wanted:
        matching = [name for pattern in one.names for name in fnmatch.filter(names, pattern)]
        if matching:
            lines = [Curve(_short_names(matching)[name], *series(records, name), points=one.few) for name in matching]
            found.append(curves(one.title, lines, one.unit, one.log))
    return found


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts that all of them share: `val/val/ocr/accuracy` among its like is `ocr`."""
    parts = [name.split("/") for name in names]
    kept = [at for at in range(min(map(len, parts))) if len({part[at] for part in parts}) > 1]
    return {name: "/".join(part[at] for at in kept) or name for name, part in zip(names, parts, strict=True)}


def _learning(pretrain: list[Record], sft: list[Record], mpo: list[Record], rl: list[Record]) -> list[str]:
    losses = [Curve(name, *series(records, "loss")) for name, records in (("pretrain", pretrain), ("sft", sft))]
    losses = [line for line in losses if len(line.steps) > 0]
    first = [curves("Supervised stages: loss on answers", losses, "nats per token", log=True)] if losses else []
    return first + _pictures(mpo, PREFERENCES) + _pictures(rl, LEARNING)


def _time(records: dict[str, list[Record]]) -> str | None:
    """Mean seconds of a step by phase, a bar for each stage that has timed its phases."""
    rows = {}
    for stage, lines in records.items():
        phases = [phases_of(line) for line in lines]
        names = list(dict.fromkeys(name for line in phases for name in line))
        if {"forward_backward", "generate"} & set(names):
            rows[stage] = {name: sum(line.get(name, 0.0) for line in phases) / len(phases) for name in names}
    return phase_bars(rows) if rows else None


def _accuracy(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any] | None:
    known = before or after
    if known is None:
        return None
    found = [evaluation for evaluation in (before, after) if evaluation is not None]
    labels = [label for label, evaluation in (("SFT", before), ("RL", after)) if evaluation is not None]
    names = list(dict.fromkeys(name for evaluation in found for name in evaluation.skills))
    rows = {name: [evaluation.skills.get(name, NOTHING) for evaluation in found] for name in names}
    bars = [
        (f"greedy, after {label}", [row[at].greedy for row in rows.values()], [row[at].greedy_se for row in rows.values()]) for at, label in enumerate(labels)
    ]
    return {
        "split": known.split,
        "stages": labels,
        "columns": [title(name, known.samples) for name, _, _ in COLUMNS],
        "rows": [(name, _row(row)) for name, row in rows.items()],
        "macro": _row([evaluation.macro for evaluation in found]),
        "checkpoints": [evaluation.checkpoint for evaluation in found],
        "picture": accuracy_bars(names, bars, [row[0].chance for row in rows.values()]),
    }


def _row(rows: list[Accuracy]) -> dict[str, Any]:
    """Texts of a table row; each measure has a cell per evaluation, and `change` says whether the last differs by more than two standard errors."""
    cells = [[number(value(row), error(row)).replace("+-", " ± ") for row in rows] for _, value, error in COLUMNS]
    return {"n": rows[0].n, "chance": number(rows[0].chance), "blind": number(rows[0].blind), "cells": cells, "change": _change(rows)}


def _change(rows: list[Accuracy]) -> str:
    """Of greedy accuracy: `up`, `down`, or nothing where two standard errors of the difference cover it."""
    first, last = rows[0], rows[-1]
    if first.greedy is None or last.greedy is None or first.greedy_se is None or last.greedy_se is None:
        return ""
    difference, error = last.greedy - first.greedy, float(np.hypot(first.greedy_se, last.greedy_se))
    return "" if abs(difference) <= 2 * error else "up" if difference > 0 else "down"


def _usage(before: Evaluation | None, after: Evaluation | None) -> str | None:
    names = [name for name, row in (before.skills if before else {}).items() if row.cluster_mass is not None]
    if before is None or not names:
        return None
    later = after.skills if after is not None else {}
    return usage_bars(names, [before.skills[name].cluster_mass for name in names], [later.get(name, NOTHING).cluster_mass for name in names])


def _failures(rl: list[Record]) -> list[tuple[str, int]] | None:
    """(reason, how many over the run), or None where RL has not run. The total comes first."""
    if not rl:
        return None
    names = sorted({name for record in rl for name in record if name.startswith(_FAILED)})
    return [(name.removeprefix(_FAILED), int(sum(series(rl, name)[1]))) for name in names]


def _samples(folder: Path, label: str, numbers: dict[tuple[str, str], int]) -> dict[str, list[dict[str, Any]]]:
    """The answers that an evaluation kept with their images: `first` of every skill, and `more`. `trace`: the number of its trace on this page, where there is
    one."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return {}
    taken: dict[str, int] = {}
    found: dict[str, list[dict[str, Any]]] = {"first": [], "more": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        taken[sample["skill"]] = taken.get(sample["skill"], 0) + 1
        image = _data_uri(folder / sample["image"]) if sample["image"] else None
        shown = {**sample, "image": image, "trace": numbers.get((label, sample.get("key", "")))}
        found["first" if taken[sample["skill"]] <= SAMPLES_PER_SKILL else "more"].append(shown)
    return {name: sorted(samples, key=lambda sample: str(sample["skill"])) for name, samples in found.items()}


def _data_uri(path: Path) -> str | None:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii") if path.exists() else None


def _asked(stage: str, config: str | None) -> bool:
    """Whether the run's configuration asks for the stage: what starts from a given checkpoint needs none before it, and preferences are taught where they have
    steps."""
    values = yaml.safe_load(config or "") or {}

    def value(name: str) -> Any:
        section, _, field = name.partition(".")
        return (values.get(section) or {}).get(field)

    if stage == "mpo":
        return bool(value("mpo.steps"))
    if stage == "discover":
        return value("model.num_experts") != 0
    given = {"pretrain": ("sft.init_from", "mpo.init_from", "rl.init_from"), "sft": ("mpo.init_from", "rl.init_from")}
    return not any(value(name) for name in given.get(stage, ()))


def _stage(folder: Path, name: str) -> dict[str, str]:
    done, started = _json(folder / "done.json"), _json(folder / "started.json")
    label = name.replace("/", "-") if name.startswith("evaluate") else name
    if done is not None:
        return {
            "name": label,
            "state": "done",
            "text": f"{_duration(done['seconds'])}, finished {done['finished_at'].replace('T', ' ').removesuffix('+00:00')} UTC",
        }
    if started is not None:
        return {"name": label, "state": "begun", "text": "begun, not finished"}
    return {"name": label, "state": "missing", "text": "not there yet"}


def _versions(root: Path) -> dict[str, str]:
    """The versions of the last finished stage."""
    done = [found for stage in STAGES if (found := _json(root / stage / "done.json")) is not None]
    return dict(max(done, key=lambda mark: mark["finished_at"])["versions"]) if done else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:g} s"


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(_text(path) or "null") if path.exists() else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None

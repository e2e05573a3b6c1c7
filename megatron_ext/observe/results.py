"""What an evaluation found, read from its file: accuracy per skill, with what chance and a blind model reach.

    {"checkpoint": "...", "split": "test",
     "skills": {"count": {"n": 200, "greedy": 0.61, "greedy_se": 0.034, "mean@8": 0.55, "mean@8_se": 0.03, "pass@8": 0.83,
                          "blind": 0.12, "chance": 0.11, "cluster_mass": 0.42}, ...},
     "macro": {"greedy": 0.58, ...}}

A number that was not measured is absent or null. Beside it, in the folder of the same name, `verdicts.jsonl` says it prompt by prompt:

    {"key": "suite/test/count/0/17", "skill": "count", "greedy": true, "samples": [1, 0, 1, 1, 0, 1, 1, 1]}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Accuracy:
    """The numbers of one skill, or their mean over skills. None: not measured."""

    n: int | None
    chance: float | None
    blind: float | None
    greedy: float | None
    greedy_se: float | None
    mean_at_k: float | None
    mean_at_k_se: float | None
    pass_at_k: float | None
    cluster_mass: float | None


@dataclass(frozen=True)
class Evaluation:
    """`samples` is the k of mean@k and pass@k, None where nothing was sampled."""

    checkpoint: str
    split: str
    samples: int | None
    skills: dict[str, Accuracy]
    macro: Accuracy


@dataclass(frozen=True)
class PromptVerdict:
    """Whether the answers to one prompt were right. `samples` is empty where nothing was sampled."""

    key: str
    skill: str
    greedy: bool
    samples: tuple[bool, ...]


VERDICTS = "verdicts.jsonl"
_MEAN_AT = re.compile(r"mean@(\d+)")
NOTHING = Accuracy(*[None] * 9)


def read_evaluation(path: Path) -> Evaluation | None:
    """The evaluation in a file, or None where there is no file. Raises DataError for one that cannot be read."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["skills"]
        sampled = {int(found[1]) for row in rows.values() for key in row if (found := _MEAN_AT.fullmatch(key))}
        samples = max(sampled, default=None)
        skills = {name: _accuracy(row, samples) for name, row in rows.items()}
        return Evaluation(str(content["checkpoint"]), str(content["split"]), samples, skills, _accuracy(content["macro"], samples))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(str(path), f"is not the result of an evaluation ({error!r})", "evaluate again") from None


def write_verdicts(folder: Path, verdicts: Iterable[tuple[str, str, bool, Sequence[bool]]]) -> None:
    """One line for each (key, skill, greedy, samples), for whoever pairs evaluations prompt by prompt."""
    lines = [
        json.dumps({"key": key, "skill": skill, "greedy": bool(greedy), "samples": [int(right) for right in samples]}) + "\n"
        for key, skill, greedy, samples in verdicts
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VERDICTS).write_text("".join(lines), encoding="utf-8")


def read_verdicts(evaluation: Path) -> list[PromptVerdict]:
    """The verdicts beside an evaluation's file, in the order of its prompts. Raises DataError where they are missing or damaged."""
    path = evaluation.with_suffix("") / VERDICTS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [PromptVerdict(row["key"], row["skill"], bool(row["greedy"]), tuple(bool(right) for right in row["samples"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(str(path), f"does not say which prompts were answered rightly ({error!r})", "evaluate again") from None


def _accuracy(row: dict[str, Any], samples: int | None) -> Accuracy:
    def number(key: str) -> float | None:
        value = row.get(key)
        return None if value is None or not math.isfinite(float(value)) else float(value)

    count = number("n")
    return Accuracy(
        n=None if count is None else int(count),
        chance=number("chance"),
        blind=number("blind"),
        greedy=number("greedy"),
        greedy_se=number("greedy_se"),
        mean_at_k=number(f"mean@{samples}"),
        mean_at_k_se=number(f"mean@{samples}_se"),
        pass_at_k=number(f"pass@{samples}"),
        cluster_mass=number("cluster_mass"),
    )

"""Checkers: any text gets a verdict, and only the right answer gets 1.

An answer is right when it equals the gold answer up to surrounding and repeated white space. A composite answer is right when every tagged step and the
final answer are right and nothing else is said; its steps may come in any order, the final answer last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from megatron_ext.data.pieces import TURN_END
from megatron_ext.data.suite.levels import COLORS, RELATIONS

_LANGUAGES = {
    "ocr": re.compile("[0-9]( [0-9])*"),
    "count": re.compile("[0-9]+"),
    "spatial": re.compile("|".join(RELATIONS)),
    "color": re.compile("|".join(COLORS)),
    "compare": re.compile("|".join(COLORS)),
}


@dataclass(frozen=True)
class Verdict:
    """`well_formed`: an answer of the right form, right or wrong. `parts`: 1.0 or 0.0 for every step of a composite (`count` and `count_2` when a
    skill occurs twice, the final answer as `ans`), or for the one skill."""

    correct: bool
    well_formed: bool
    parts: Mapping[str, float]


def check(meta: Mapping[str, object], text: str) -> Verdict:
    """Judges a response to the prompt whose `meta` is given; never raises, whatever the text. A trailing end-of-turn mark is no part of the answer.

    >>> check({"skill": "count", "answer": "3"}, " 3 ").correct, check({"skill": "count", "answer": "3"}, "4").well_formed
    (True, True)
    """
    text = text.removesuffix(TURN_END)
    steps = meta.get("parts")
    if isinstance(steps, Sequence) and steps:
        return _check_steps([(str(name), str(gold)) for name, gold in steps], text)
    skill, said = str(meta["skill"]), _tidy(text)
    correct = said == _tidy(str(meta["answer"]))
    language = _LANGUAGES.get(skill)
    well_formed = bool(language.fullmatch(said)) if language else bool(said)
    return Verdict(correct, well_formed, {skill: float(correct)})


def _check_steps(steps: list[tuple[str, str]], text: str) -> Verdict:
    *names, final = (name for name, _ in steps)
    orders = {r"\s*".join(f"<{name}>[^<>]*</{name}>" for name in (*order, final)) for order in permutations(names)}
    well_formed = any(re.fullmatch(rf"\s*{order}\s*", text) for order in orders)
    parts: dict[str, float] = {}
    seen: dict[str, int] = {}
    for name, gold in steps:
        occurrence = seen[name] = seen.get(name, 0) + 1
        said = re.findall(f"<{name}>([^<>]*)</{name}>", text)
        right = len(said) >= occurrence and _tidy(said[occurrence - 1]) == _tidy(gold)
        parts[name if occurrence == 1 else f"{name}_{occurrence}"] = float(right)
    return Verdict(well_formed and all(parts.values()), well_formed, parts)


def _tidy(text: str) -> str:
    return " ".join(text.split())

"""Answers that are numbers, as people and models write them.

    1,200   $1 200.50   -3   −3   1.2e3   3/4   \\frac{3}{4}   12 %   5 km   about 5 kilometres.

Of a text its last number counts. A percent sign that only one of two answers has may be left out, or worked in: 50 % is 50 and is 0.5, but 50 % is not 0.5 %.
Units that both answers name are converted (5 km is 5000 m); one that only one of them names is taken as understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.batch.rollout import Prompt
from megatron_ext.rl.rewards.final import final_answer

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>-\s?)?[$€£]?(?P<top>{_DIGITS})(?P<power>[eE][+-]?\d+)?(?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?\s*(?P<after>%|[a-zA-Z°µ]+)?", re.ASCII
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_UNITS = {
    "length": {"mm": 1e-3, "cm": 1e-2, "m": 1.0, "km": 1e3},
    "mass": {"mg": 1e-3, "g": 1.0, "kg": 1e3, "t": 1e6},
    "time": {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
    "volume": {"ml": 1e-3, "l": 1.0},
}
_WORDS = {"meter": "m", "metre": "m", "gram": "g", "ton": "t", "tonne": "t", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h"}
_WORDS |= {"liter": "l", "litre": "l"}
_PREFIXES = {"milli": "m", "centi": "c", "kilo": "k"}


@dataclass(frozen=True)
class Number:
    """`unit`: (what it measures, how much of the base unit), where the text names one that is known here."""

    value: float
    percent: bool = False
    unit: tuple[str, float] | None = None

    def agrees(self, other: Number, tolerance: float) -> bool:
        """`tolerance` is relative; of zero, absolute."""
        if self.unit and other.unit:
            return self.unit[0] == other.unit[0] and _close(self.value * self.unit[1], other.value * other.unit[1], tolerance)
        if self.percent == other.percent:
            return _close(self.value, other.value, tolerance)
        return any(_close(mine, theirs, tolerance) for mine in self._readings() for theirs in other._readings())

    def _readings(self) -> tuple[float, ...]:
        return (self.value, self.value / 100) if self.percent else (self.value,)


def numeric_within(tolerance: float) -> Callable[[Prompt, str], float]:
    """The reward that is 1 where the last number of the final answer is that of the prompt's, within `tolerance` of it (0.05: 5 %)."""

    def within(prompt: Prompt, response: str) -> float:
        said, gold = last_number(final_answer(response)), last_number(final_answer(prompt.answer))
        return float(said is not None and gold is not None and gold.agrees(said, tolerance))

    return within


numeric = numeric_within(1e-4)
relaxed = numeric_within(0.05)
"""The accuracy that chart questions are measured by (ChartQA, arXiv 2203.10244)."""


def last_number(text: str) -> Number | None:
    """The last finite number of a text; None where there is none.

    >>> last_number("from 3 to $1,200.50."), last_number(r"\\frac{3}{4}"), last_number("none")
    (Number(value=1200.5, percent=False, unit=None), Number(value=0.75, percent=False, unit=None), None)
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", text).replace("−", "-").replace("\\%", "%").replace("\\$", "$").replace("\\,", " ")
    text = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r" \1", text)
    found = [number for match in _NUMBER.finditer(text) if (number := _read(match, text)) is not None]
    return found[-1] if found else None


def _read(match: re.Match[str], text: str) -> Number | None:
    start, after = match.start("top"), match["after"] or ""
    if start and match["sign"] is None and text[start - 1].isalpha() and text[start - 1].isascii():  # x2, H2O
        return None
    bottom = float(match["bottom"] or 1)
    value = float(re.sub(r"[, ]", "", match["top"]) + (match["power"] or "")) / bottom if bottom else math.inf
    negative = match["sign"] is not None and not (match.start() and text[match.start() - 1].isalnum())  # 3-4 is no minus four
    return Number(-value if negative else value, after == "%", _unit(after)) if math.isfinite(value) else None


def _unit(word: str) -> tuple[str, float] | None:
    word = word.lower()
    word = word if len(word) < 3 else word.removesuffix("s")
    prefix, rest = next(((short, word.removeprefix(long)) for long, short in _PREFIXES.items() if word.startswith(long)), ("", word))
    symbol = prefix + _WORDS.get(rest, rest)
    return next(((measure, units[symbol]) for measure, units in _UNITS.items() if symbol in units), None)


def _close(one: float, other: float, tolerance: float) -> bool:
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-12 if one and other else tolerance)

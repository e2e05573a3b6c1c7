"""What `doctor` says, a line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """`wrong` stops training; `note` costs something, or is good to know."""

    verdict: Verdict
    name: str
    text: str

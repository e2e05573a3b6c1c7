"""A layout in one word, as tables print it and as `--why` reads it: `TP4xPP2xEP8`, `TP2xCP2xEP16xETP2-full-mb4`. What is 1 is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout

AXES = ("tp", "cp", "pp", "vpp", "ep", "etp")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Named:
    """What a name says; None and absent axes are left to the planner (1 for axes; etp follows tp and ep)."""

    axes: Mapping[str, int]
    recompute: str | None = None
    micro_rows: int | None = None


def name_of(layout: Layout) -> str:
    """Everything above 1; the expert-tensor axis only where it is not the one that follows from the others.

    >>> name_of(Layout(tp=4, sp=True, pp=2, vpp=1, cp=1, ep=8, etp=1, dp=1, num_ranks=8))
    'TP4xPP2xEP8'
    """
    words = [f"{axis.upper()}{size}" for axis, size in sizes_of(layout).items() if size is not None and (axis == "etp" or size > 1)]
    return "x".join(words) or "DP"


def sizes_of(layout: Layout) -> dict[str, int | None]:
    """The axes as a configuration gives them: `etp` is None where it follows from the others.

    >>> sizes_of(Layout(tp=4, sp=True, pp=2, vpp=1, cp=1, ep=8, etp=1, dp=1, num_ranks=8))
    {'tp': 4, 'cp': 1, 'pp': 2, 'vpp': 1, 'ep': 8, 'etp': None}
    """
    follows = 1 if layout.ep > 1 else layout.tp
    return {axis: getattr(layout, axis) if axis != "etp" or layout.etp != follows else None for axis in AXES}


def parse_name(text: str, flag: str = "--why") -> Named:
    """
    >>> parse_name("tp4xep8-full-mb2")
    Named(axes={'tp': 4, 'ep': 8}, recompute='full', micro_rows=2)
    """
    axes: dict[str, int] = {}
    recompute, micro = None, None
    for word in re.split(r"[x\s,-]+", text.strip().lower()):
        match = re.fullmatch(r"([a-z]+?)(\d*)", word)
        key, digits = (match[1], match[2]) if match else ("", "")
        if key in RECOMPUTE and not digits:
            recompute = key
        elif key == "mb" and digits:
            micro = int(digits)
        elif key in (*AXES, "dp") and digits and key not in axes:
            axes[key] = int(digits)
        else:
            raise UserError(flag, f"{word!r} in {text!r} is no part of a layout", "write for example TP4xPP2xEP8, or TP4xEP8-full-mb2 with recompute and rows")
    return Named(axes, recompute, micro)

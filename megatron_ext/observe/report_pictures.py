"""The pictures of a report: matplotlib figures as PNG data URIs, drawn without a display, on no background: a dark page inverts their ink.

Colours are the Okabe-Ito palette and the cividis map, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8f98"
FEW = 8
"""Fewer values than this are drawn as points."""
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00", "#000000")
PHASE_PALETTE = (GREY, BLUE, GREEN, "#000000", ORANGE, PURPLE, "#56B4E9", "#a6761d", "#E69F00", "#4d4d4d", "#7a5195")


@dataclass(frozen=True)
class Curve:
    """One line: `values` over `steps`. `points`: few measurements, drawn as they are; else many, drawn smoothed."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    points: bool = False


def curves(title: str, lines: Sequence[Curve], ylabel: str, log: bool = False) -> str:
    """Lines over training steps, each smoothed over a tenth of its length with the raw values faint behind it."""
    figure, axes = figure_of(5.2, 2.7)
    for colour, line in zip(PALETTE, lines, strict=False):
        steps, values = np.asarray(line.steps, float), np.asarray(line.values, float)
        if line.points or len(steps) < FEW:
            axes.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.2, label=line.name)
        else:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=line.name)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if log and all(min(line.values, default=1) > 0 for line in lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=8)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=1 if len(lines) < 4 else 2)
    return png_uri(figure)


def curves_over_stages(title: str, stages: Mapping[str, Sequence[Curve]], ylabel: str) -> str:
    """Lines that go on from stage to stage, one stage's steps behind the other's. A name has the same colour in every stage."""
    figure, axes = figure_of(5.2, 2.7)
    names = list(dict.fromkeys(line.name for lines in stages.values() for line in lines))
    start, handles = 0.0, dict[str, Any]()
    for stage, lines in stages.items():
        for line in lines:
            colour, steps = PALETTE[names.index(line.name) % len(PALETTE)], start + np.asarray(line.steps, float)
            axes.plot(steps, np.asarray(line.values, float), color=colour, alpha=0.25, linewidth=1)
            handles[line.name] = axes.plot(steps, _smooth(np.asarray(line.values, float)), color=colour, linewidth=1.8)[0]
        axes.text(start, 1.0, f" {stage}", transform=axes.get_xaxis_transform(), fontsize=8, color=GREY, va="top")
        axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        start += max(float(max(line.steps)) for line in lines)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step, stage behind stage")
    axes.set_ylabel(ylabel)
    if len(names) > 1:
        axes.legend([handles[name] for name in names], names, frameon=False, fontsize=8)
    return png_uri(figure)


def accuracy_bars(skills: Sequence[str], series: Sequence[tuple[str, Sequence[float | None], Sequence[float | None]]], chance: Sequence[float | None]) -> str:
    """Grouped bars per skill, one per series (name, values, standard errors), with a line at chance."""
    figure, axes = figure_of(max(7.0, 1.1 * len(skills) + 1.5), 2.9)
    width = 0.8 / max(len(series), 1)
    for index, (colour, (name, values, errors)) in enumerate(zip(PALETTE, series, strict=False)):
        places = np.arange(len(skills)) + (index - (len(series) - 1) / 2) * width
        heights = [0.0 if value is None else value for value in values]
        bars = [0.0 if error is None else error for error in errors]
        axes.bar(places, heights, width * 0.92, yerr=bars, color=colour, label=name, error_kw={"elinewidth": 1, "ecolor": "#333333"})
    for place, level in enumerate(chance):
        if level is not None:
            axes.hlines(level, place - 0.42, place + 0.42, color="#333333", linestyle=":", linewidth=1.4, label="chance" if place == 0 else None)
    axes.set_xticks(range(len(skills)), skills)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8, ncols=len(series) + 1, loc="lower left", bbox_to_anchor=(0, 1.0))
    return png_uri(figure)


def usage_bars(skills: Sequence[str], before: Sequence[float | None], after: Sequence[float | None]) -> str:
    """The share of its routing that each skill gives to its own cluster, before and after RL."""
    figure, axes = figure_of(max(7.0, 0.9 * len(skills) + 1.5), 2.4)
    for offset, colour, name, values in ((-0.2, GREY, "after fine-tuning", before), (0.2, BLUE, "after RL", after)):
        axes.bar(np.arange(len(skills)) + offset, [0.0 if value is None else value for value in values], 0.36, color=colour, label=name)
    axes.set_xticks(range(len(skills)), skills)
    axes.set_ylabel("gate mass on own cluster")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return png_uri(figure)


def phase_bars(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of a step by phase, a bar for each stage. All bars are equally long: how long the steps themselves are differs too much."""
    figure, axes = figure_of(7.5, 0.75 + 0.42 * len(rows))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    names.sort(key=lambda name: name in ("save", "evaluate"))
    left = dict.fromkeys(rows, 0.0)
    for colour, name in zip(PHASE_PALETTE, names, strict=False):
        shares = {stage: row.get(name, 0.0) / sum(row.values()) for stage, row in rows.items()}
        axes.barh(list(rows), list(shares.values()), left=list(left.values()), height=0.6, color=colour, label=name.replace("_", " and "))
        for at, (stage, share) in enumerate(shares.items()):
            if share > 0.07:
                axes.text(left[stage] + share / 2, at, f"{rows[stage][name]:.3g} s", ha="center", va="center", fontsize=7.5, color="white")
            left[stage] += share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False)
    axes.legend(frameon=False, fontsize=8, ncols=min(len(names), 6), loc="lower left", bbox_to_anchor=(0, 1.0), handlelength=1.0, columnspacing=1.2)
    return png_uri(figure)


def figure_of(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one plain pair of axes, in inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred mean over a tenth of the values; windows at the ends are shorter."""
    half = max(len(values) // 20, 0)
    windows = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def png_uri(figure: Figure, shaded: bool = False) -> str:
    """A PNG of at most 256 colours, a third of the bytes of all of them. `shaded`: of all of them, for maps of many shades."""
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None}, transparent=True)
    if not shaded:
        with Image.open(drawn) as picture:
            few = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
        drawn = io.BytesIO()
        few.save(drawn, format="png")
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")

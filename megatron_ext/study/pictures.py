"""The pictures of a study's page: differences with their intervals, scores seed by seed, learning curves of every arm. SVG in data URIs.

A thin line or a small dot is a seed, a thick line or a large dot their mean.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.observe.report_pictures import BLUE, GREEN, GREY, ORANGE
from megatron_ext.study.outcomes import Scores
from megatron_ext.study.results import CurveSet
from megatron_ext.study.verdict import Finding

INK, PALE = "#1d2733", "#eef1f4"
COLOURS = {"better": GREEN, "worse": ORANGE, "no effect": BLUE, "inconclusive": GREY, "unfinished": "#b9bfc7", None: GREY}
COLUMNS = 4


def forest(findings: Sequence[Finding], smallest_effect: float | None) -> str:
    """A row for each finding: the mean difference with its interval, pale the bootstrap's, and a dot for each seed. The band is of no interest."""
    figure, axes = _figure(9.2, 0.9 + 0.5 * len(findings))
    if smallest_effect is not None:
        axes.axvspan(-smallest_effect, smallest_effect, color=PALE, zorder=0)
    axes.axvline(0, color=INK, linewidth=1)
    for row, one in enumerate(findings):
        colour = COLOURS[one.verdict]
        axes.plot(one.seeds_S, np.full(len(one.seeds_S), row + 0.22), "o", color=colour, alpha=0.55, markersize=3.5, markeredgewidth=0, zorder=3)
        if np.isfinite([one.low, one.high]).all():
            axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt", zorder=3)
            axes.plot([one.bootstrap_low, one.bootstrap_high], [row, row], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt", zorder=2)
        axes.plot(one.difference, row, "D", color=colour, markersize=6.5, markeredgecolor="white", zorder=4)
    axes.set_yticks(range(len(findings)), [f"{one.arm}  -  {one.other}" for one in findings], fontsize=9)
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"difference in {findings[0].endpoint}" if len({one.endpoint for one in findings}) == 1 else "difference", fontsize=9)
    return _svg(figure)


def scores_by_arm(config: StudyConfig, scores: Mapping[str, Mapping[int, Scores]]) -> str:
    """A column for each arm; a line joins the runs of one seed."""
    arms = [arm for arm in config.arms if scores[arm]]
    figure, axes = _figure(max(6.0, 0.95 * len(arms) + 1.2), 3.2)
    for seed in config.seeds:
        there = [at for at, arm in enumerate(arms) if seed in scores[arm]]
        values = [scores[arms[at]][seed].mean for at in there]
        axes.plot(there, values, "-o", color=GREY, linewidth=0.9, alpha=0.55, markersize=3.5, markeredgewidth=0)
    for at, arm in enumerate(arms):
        mean = float(np.mean([one.mean for one in scores[arm].values()]))
        axes.plot([at - 0.28, at + 0.28], [mean, mean], color=INK if arm == config.baseline else BLUE, linewidth=3, solid_capstyle="round", zorder=4)
    axes.set_xticks(range(len(arms)), arms, rotation=0 if len(arms) < 6 else 24, ha="center" if len(arms) < 6 else "right", fontsize=9)
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_ylabel(config.endpoint, fontsize=9)
    return _svg(figure)


def curves_by_arm(curves: CurveSet, baseline: str) -> str:
    """A panel for each arm: its seeds, their mean, and the mean of the baseline in grey."""
    arms = list(curves.arms)
    columns = min(COLUMNS, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(max(3.0 * columns, 4.6), 0.35 + 2.05 * rows), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True))
    reference = _mean(curves.arms[baseline]) if baseline in curves.arms else None
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    for axes, arm in zip(panels, arms, strict=False):
        _style(axes)
        for steps, values in curves.arms[arm].values():
            axes.plot(steps, _smooth(values), color=BLUE, linewidth=0.7, alpha=0.4)
        if reference is not None and arm != baseline:
            axes.plot(*reference, color=GREY, linewidth=1.6)
        axes.plot(*_mean(curves.arms[arm]), color=INK if arm == baseline else BLUE, linewidth=2.2)
        axes.set_title(arm, loc="left", fontsize=9, fontweight="bold")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(curves.unit, fontsize=9)
    return _svg(figure)


def _mean(lines: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], np.ndarray]:
    """Over the seeds that have come to a step, as far as all of them have."""
    shortest = min(lines.values(), key=lambda line: len(line[0]))[0]
    return list(shortest), np.mean([_smooth(values)[: len(shortest)] for _, values in lines.values()], axis=0)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """A centred mean over a tenth of the values, fewer at the ends."""
    array, half = np.asarray(values, dtype=float), len(values) // 20
    return np.array([np.nanmean(array[max(0, at - half) : at + half + 1]) for at in range(len(array))])


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _svg(figure: Figure) -> str:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "study"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

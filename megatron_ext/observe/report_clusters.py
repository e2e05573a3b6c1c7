"""What a report says of expert clusters: their heat maps, readable for three layers and for fifty, and how they drifted during reinforcement learning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_ext.observe.metrics import Record, series
from megatron_ext.observe.report_pictures import BLUE, GREY, ORANGE, Curve, curves, figure_of, png_uri
from megatron_ext.observe.summary import number

FEW_LAYERS = 8
"""At most so many layers have a panel each; of more, each skill has one."""
MOST_PAIRS = 48
"""Rows of the picture of drifting clusters."""
DRIFT = (("jaccard", "Clusters found again: overlap with those in use", "Jaccard"), ("mass", "Gate mass on the clusters in use", "gate mass"))
"""The last part of `earl/drift/<skill>/<part>`, what it is, its unit."""
Pairs = Sequence[tuple[int, int]]


def clusters_shown(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """The template's `clusters`, from `expert_clusters.json`."""
    if found is None:
        return None
    skills = found["skills"]
    return {
        "picture": heat_map(found),
        "by_layer": len(found["information_L"]) <= FEW_LAYERS,
        "information": [
            (span, [f"{bits:.3f}" for bits in bits_L]) for span, bits_L in {"response": found["information_L"], **found.get("span_information", {})}.items()
        ],
        "causal": [(skill["skill"], _causal(skill["causal"])) for skill in skills if skill.get("causal")],
        "rows": [
            {
                "skill": skill["skill"],
                "status": skill["status"],
                "reason": skill["reason"],
                "prompts": skill["num_prompts"],
                "pairs": ", ".join(f"{layer}:{expert}" for layer, expert in pairs_of(skill)) or "-",
                "effects": _range(skill["pairs"], "log_odds") + " / " + _range(skill["pairs"], "npmi"),
                "auroc": number(skill["auroc"]),
                "jaccard": number(skill["jaccard"]),
            }
            for skill in skills
        ],
    }


def pairs_of(skill: dict[str, Any]) -> list[tuple[int, int]]:
    return [(pair["layer"], pair["expert"]) for pair in skill["pairs"]]


def _causal(effect: dict[str, Any]) -> list[str]:
    """The cells of a row: accuracy, drops of accuracy with two intervals, and the verdict."""
    drops = [number(effect[name]) for name in ("accuracy", "drop_own", "drop_others", "drop_random")]
    intervals = [f"{low:+.2f} to {high:+.2f}" for low, high in (effect["beyond_others"], effect["beyond_random"])]
    return [*drops, *intervals, number(effect["random_overlap"]), effect["verdict"]]


def _range(pairs: list[dict[str, Any]], name: str) -> str:
    """The smallest and the largest of a cluster's experts."""
    values = [pair[name] for pair in pairs if name in pair]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def heat_map(found: dict[str, Any]) -> str:
    """Gate mass of every skill, layer and expert, as a PNG data URI."""
    skills = found["skills"]
    names, pairs, solid = [skill["skill"] for skill in skills], [pairs_of(skill) for skill in skills], [skill["status"] == "ok" for skill in skills]
    mass_XLE = np.array([skill["mean_mass_LE"] for skill in skills])
    return (expert_heat_map if mass_XLE.shape[1] <= FEW_LAYERS else skill_heat_maps)(names, mass_XLE, pairs, solid)


def expert_heat_map(skills: Sequence[str], mass_XLE: np.ndarray, clusters: Sequence[Pairs], solid: Sequence[bool]) -> str:
    """Mean gate mass per skill and expert, a panel per layer. Frames mark each skill's cluster: solid where it gets the bonus, dashed where it is unstable."""
    num_skills, num_layers, num_experts = mass_XLE.shape
    columns = min(num_layers, 4)
    rows = -(-num_layers // columns)
    figure = Figure(figsize=(min(1.2 + columns * max(1.8, 0.27 * num_experts), 14), 0.9 + rows * (0.55 + 0.27 * num_skills)), dpi=160, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    top = float(mass_XLE.max())
    for axes in panels[num_layers:]:
        axes.set_visible(False)
    for layer, axes in enumerate(panels[:num_layers]):
        image = axes.imshow(mass_XLE[:, layer], cmap="cividis", vmin=0, vmax=top, aspect="auto")
        _label_panel(axes, skills if layer % columns == 0 else [""] * num_skills, num_experts, f"layer {layer}")
        for skill, pairs in enumerate(clusters):
            for at, expert in pairs:
                if at == layer:
                    _frame(axes, skill, expert, solid[skill])
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="mean gate mass")
    return png_uri(figure, shaded=True)


def skill_heat_maps(skills: Sequence[str], mass_XLE: np.ndarray, clusters: Sequence[Pairs], solid: Sequence[bool]) -> str:
    """The same for many layers: a panel per skill, layers down, experts across. The scale is that of square roots, so that small masses are told apart."""
    num_skills, num_layers, num_experts = mass_XLE.shape
    columns = 2 if num_experts > 32 else 3
    rows = -(-num_skills // columns)
    width = min(2.2 + 0.042 * num_experts, 6.6)
    figure = Figure(figsize=(columns * width + 0.8, rows * (0.55 + max(1.2, 0.062 * num_layers))), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    norm = PowerNorm(0.5, vmin=0.0, vmax=float(mass_XLE.max()))
    for axes in panels[num_skills:]:
        axes.set_visible(False)
    for axes, skill, mass_LE, pairs, whole in zip(panels, skills, mass_XLE, clusters, solid, strict=False):
        image = axes.imshow(mass_LE, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(skill, fontsize=10, loc="left", fontweight="bold")
        axes.tick_params(length=0, labelsize=7)
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
        for layer, expert in pairs:
            _frame(axes, layer, expert, whole, spread=1.6)
    figure.colorbar(image, ax=list(panels), shrink=0.7, label="mean gate mass").ax.tick_params(labelsize=8)
    return png_uri(figure, shaded=True)


def _label_panel(axes: Any, skills: Sequence[str], num_experts: int, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_yticks(range(len(skills)), skills, fontsize=8)
    step = max(1, num_experts // 8)
    axes.set_xticks(range(0, num_experts, step), [str(expert) for expert in range(0, num_experts, step)], fontsize=7)
    axes.tick_params(length=0)


def _frame(axes: Any, row: int, column: int, solid: bool, spread: float = 0.88) -> None:
    """Around a cell; where cells are too small to be framed, wider than it by `spread`."""
    corner, line = (column - spread / 2, row - spread / 2), "-" if solid else (0, (2, 1.5))
    axes.add_patch(Rectangle(corner, spread, spread, fill=False, edgecolor=ORANGE, linewidth=1.8 if spread < 1 else 1.1, linestyle=line))


def drift_shown(rl: list[Record], folder: Path, discovered: dict[str, Any] | None) -> dict[str, Any] | None:
    """The template's `drift`: what `earl/drift/*` and the files of the RL stage's `folder` say of clusters that were looked for again; None where none were."""
    names = sorted({name for record in rl for name in record if name.startswith("earl/drift/")})
    pictures = []
    for part, title, unit in DRIFT:
        lines = [Curve(name.split("/")[2], *series(rl, name), points=True) for name in names if name.endswith(f"/{part}")]
        pictures += [curves(title, lines, unit)] if lines else []
    stale = series(rl, "earl/cluster_stale")
    pictures += [curves("Skills whose cluster is stale", [Curve("stale", *stale, points=True)], "share")] if stale[0] else []
    members = _members(folder, discovered)
    records = [json.loads(line) for line in (folder / "drift.jsonl").read_text(encoding="utf-8").splitlines()] if (folder / "drift.jsonl").exists() else []
    if not pictures and not records:
        return None
    return {
        "pictures": pictures,
        "members": drift_map(members) if len(members) > 1 else None,
        "step": records[-1]["step"] if records else None,
        "rows": [
            {
                "skill": skill["skill"],
                "prompts": skill["num_prompts"],
                "jaccard": number(skill["jaccard"]),
                "mass": f"{number(skill['mass_before'])} -> {number(skill['mass'])}",
                "status": skill["status"] or "-",
                "reason": skill["reason"] or "too few fresh answers",
            }
            for skill in (records[-1]["skills"] if records else [])
        ],
    }


def _members(folder: Path, discovered: dict[str, Any] | None) -> dict[int, dict[str, set[tuple[int, int]]]]:
    """By step the pairs of every skill: step 0 is discovery's."""
    files = {int(path.stem.partition("_")[2]): json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "drift").glob("step_*.json"))}
    found = ({0: discovered} if discovered is not None else {}) | files
    return {step: {skill["skill"]: set(pairs_of(skill)) for skill in content["skills"]} for step, content in found.items()}


def drift_map(members: dict[int, dict[str, set[tuple[int, int]]]]) -> str:
    """Which experts were in the cluster of each skill when: a row per pair, those first that stayed longest, a column per look."""
    steps, skills = list(members), list(dict.fromkeys(skill for found in members.values() for skill in found))
    rows: list[tuple[str, tuple[int, int]]] = []
    for skill in skills:
        counts: dict[tuple[int, int], int] = {}
        for found in members.values():
            for pair in found.get(skill, ()):
                counts[pair] = counts.get(pair, 0) + 1
        rows += [(skill, pair) for pair in sorted(counts, key=lambda pair: (-counts[pair], pair))[: max(2, MOST_PAIRS // len(skills))]]
    figure, axes = figure_of(min(7.0 + 0.3 * len(steps), 12), 0.8 + 0.15 * len(rows))
    for row, (skill, pair) in enumerate(rows):
        for column, step in enumerate(steps):
            there = pair in members[step].get(skill, ())
            axes.add_patch(Rectangle((column - 0.45, row - 0.42), 0.9, 0.84, color=BLUE if there else GREY, alpha=1.0 if there else 0.15, linewidth=0))
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(range(len(steps)), ["discovery" if step == 0 else f"{step}" for step in steps], fontsize=8, rotation=45 if len(steps) > 8 else 0)
    axes.set_yticks(range(len(rows)), [f"{skill}  {layer}:{expert}" for skill, (layer, expert) in rows], fontsize=7)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel("RL step at which clusters were looked for again")
    return png_uri(figure)

"""The page of a study: one HTML file that needs nothing beside it, but links to the reports of its runs.

Results -> tables and words (here, table.py)  -> pictures.py  -> study.html.j2 -> <study>/report.html
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ext import __version__
from megatron_ext.durable import write_text
from megatron_ext.study import table
from megatron_ext.study.pictures import curves_by_arm, forest, scores_by_arm
from megatron_ext.study.results import Results, by_arm, curve_sets
from megatron_ext.study.statistics import least_sign_flip_p
from megatron_ext.study.verdict import RULE

FILE = "report.html"


def write_page(results: Results, folder: Path) -> Path:
    """Writes `report.html` of the study."""
    environment = Environment(
        loader=PackageLoader("megatron_ext.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(signed=table.signed, around=table.around, p_text=table.p_text, number=table.number)
    path = folder / FILE
    write_text(path, environment.get_template("study.html.j2").render(content(results, folder)))
    return path


def content(results: Results, folder: Path) -> dict[str, Any]:
    """Every variable of the template."""
    config = results.config
    scores = results.scores[config.endpoint]
    secondary = [(endpoint, [one for one in results.exploratory if one.endpoint == endpoint]) for endpoint in config.endpoints]
    return {
        "config": config,
        "version": __version__,
        "registration": results.registration,
        "rule": RULE,
        "corrected": table.corrected(results),
        "findings": results.deciding,
        "forest": forest(results.deciding, config.smallest_effect) if results.deciding else None,
        "arms": by_arm(config, scores),
        "strips": scores_by_arm(config, scores) if any(scores.values()) else None,
        "secondary": [(endpoint, findings, forest(findings, None)) for endpoint, findings in secondary if findings],
        "curves": [(curves.title, curves_by_arm(curves, config.baseline)) for curves in curve_sets(config, results.runs)],
        "runs": [{"facts": run, "report": _report(run.folder, folder), "took": _took(run.seconds)} for run in results.runs],
        "done": sum(run.done for run in results.runs),
        "took": _took(sum(run.seconds for run in results.runs)),
        "least": least_sign_flip_p(len(config.seeds)),
        "overrides": {arm: ", ".join(f"{dotted} = {value}" for dotted, value in values.items()) for arm, values in config.arms.items()},
    }


def _report(run: Path, folder: Path) -> str | None:
    """The run's own report, seen from the study's."""
    return (run / FILE).relative_to(folder).as_posix() if (run / FILE).exists() else None


def _took(seconds: float) -> str:
    if not seconds or not math.isfinite(seconds):
        return "-"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"

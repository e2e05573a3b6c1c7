"""The report of a run: one HTML file that needs nothing beside it. Whatever the run has not produced yet is shown as not there yet.

    <run>/config.yaml, */done.json, */metrics.jsonl, discover/expert_clusters.json, evaluate/{sft,rl}.json, evaluate/{sft,rl}/samples.jsonl; bank
      -> report_content.py (numbers and words)  -> report_pictures.py (pictures)  -> report.html.j2 -> <run>/report.html

A line of `samples.jsonl` is {"skill", "question", "answer", "response", "correct", "image"}; `image` is a PNG file beside it, or null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ext.observe.report_content import content


def write_report(root: Path, bank: dict[str, Any] | None = None) -> Path:
    """Writes `root/report.html` and returns its path. `bank`: what `rl/bank/overview.py` says of the rollouts, None where there are none."""
    environment = Environment(
        loader=PackageLoader("megatron_ext.observe", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("report.html.j2").render(content(root), bank=bank)
    path = root / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path

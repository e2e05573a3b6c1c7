"""The report of a run: one HTML file that needs nothing beside it. Whatever the run has not produced yet is shown as not there yet.

    <run>/config.yaml, */done.json, */metrics.jsonl, discover/expert_clusters.json, rl/drift*, evaluate/{sft,rl}.json and /{samples.jsonl,traces.json}; bank
      -> report_content.py (numbers and words), report_clusters.py, report_clvr.py  -> report_pictures.py (pictures)
      -> report.html.j2 with page.css, viewer.css, viewer.js -> <run>/report.html

A line of `samples.jsonl` is {"key", "skill", "question", "answer", "response", "correct", "image"}; `image` is a PNG file beside it, or null. What the traces
are is in trace.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.observe.report_content import content
from megatron_ext.observe.trace import templates


def write_report(root: Path, bank: dict[str, Any] | None = None) -> Path:
    """Writes `root/report.html` and returns its path. `bank`: what `rl/bank/overview.py` says of the rollouts, None where there are none."""
    page = templates().get_template("report.html.j2").render(content(root), bank=bank)
    path = root / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path

"""A study's findings as Markdown, for docs/studies/ and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.study.results import Results, by_arm
from megatron_ext.study.verdict import Finding

FILE = "study.md"


def write_table(results: Results, folder: Path) -> Path:
    path = folder / FILE
    path.write_text(markdown(results), encoding="utf-8")
    return path


def markdown(results: Results) -> str:
    """Verdicts, scores by arm, exploratory endpoints, and what was registered and changed."""
    config, registration = results.config, results.registration
    done = sum(run.done for run in results.runs if run.arm in config.arms)
    parts = [
        f"# {config.name}\n",
        f"Endpoint: **{config.endpoint}**{'' if '/' in config.endpoint else ', mean over skills'}. {len(config.arms)} arms x {len(config.seeds)} seeds, "
        f"{done} of {len(config.arms) * len(config.seeds)} runs done. Smallest effect of interest: {config.smallest_effect:g}.\n",
        "## Verdicts\n",
        verdicts(results),
        "## Scores\n",
        scores(results, config.endpoint),
    ]
    if results.exploratory:
        about = f"Not registered for a verdict: intervals are at {config.confidence:.0%} each, uncorrected for their number.\n"
        parts += ["## Exploratory\n", about, exploratory(results.exploratory)]
    parts.append(f"Registered {registration.registered_at}, digest `{registration.first_digest[:16]}`.")
    for amendment in registration.amendments:
        parts.append(
            f"- {amendment.at}, {'seeds added' if amendment.kind == 'seeds' else '**deviation**'}: {amendment.reason} ({'; '.join(amendment.changes)})"
        )
    return "\n".join(parts) + "\n"


def verdicts(results: Results) -> str:
    level = corrected(results)
    rows = [["arm", "against", "difference", f"{level} interval", "bootstrap", "p (Holm)", "sign flip (least)", "seeds", "verdict"]]
    for one in results.deciding:
        flips = f"{one.sign_flip:.3g} ({one.sign_flip_least:.3g})"
        rows.append(
            [one.arm, one.other, signed(one.difference), around(one.low, one.high), around(one.bootstrap_low, one.bootstrap_high), p_text(one.p_holm), flips]
        )
        rows[-1] += [str(len(one.seeds)), f"**{one.words}**"]
    return _table(rows)


def scores(results: Results, endpoint: str) -> str:
    rows = [["arm", endpoint, "sd over seeds", *(f"seed {seed}" for seed in results.config.seeds)]]
    for row in by_arm(results.config, results.scores[endpoint]):
        values = [number(row["seeds"].get(seed)) for seed in results.config.seeds]
        rows.append([row["arm"], number(row["mean"]), number(row["sd"]), *values])
    return _table(rows)


def exploratory(findings: Sequence[Finding]) -> str:
    rows = [["endpoint", "arm", "against", "difference", "interval", "p (uncorrected)"]]
    rows += [[one.endpoint, one.arm, one.other, signed(one.difference), around(one.low, one.high), p_text(one.p)] for one in findings]
    return _table(rows)


def corrected(results: Results) -> str:
    """The name of the intervals of hypotheses."""
    return f"{100 * results.config.confidence:g} % corrected"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def around(low: float, high: float) -> str:
    return f"{low:+.3f} .. {high:+.3f}"


def p_text(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
